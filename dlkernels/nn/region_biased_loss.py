"""Region attention and its loss as modules."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import _checks
from ..ops.region_biased_loss import NORMALIZE, check_mask, region_biased_loss


class RegionBiasedLoss(nn.Module):
    """`dlkernels.region_biased_loss` as a module.

    Args:
        origin_index, margin, normalize, reduction, higher_order: as in the function. The authors' published code is
            `RegionBiasedLoss(origin_index=-1, margin=0.1, normalize="softmax")` of weights before their softmax.

    Shape:
        attention: (N, R). forward also takes `mask`, booleans (N, R), which changes from batch to batch.
    """

    def __init__(
        self,
        origin_index: int = 0,
        margin: float = 0.02,
        normalize: str | None = None,
        reduction: str = "mean",
        *,
        higher_order: bool = True,
    ) -> None:
        super().__init__()
        self.origin_index = _checks.integer("origin_index", origin_index)
        self.margin = _checks.finite("margin", margin)
        _checks.one_of("normalize", normalize, NORMALIZE)
        _checks.reduction_code(reduction)
        self.normalize = normalize
        self.reduction = reduction
        self.higher_order = higher_order

    def forward(self, attention: Tensor, mask: Tensor | None = None) -> Tensor:
        return region_biased_loss(
            attention, origin_index=self.origin_index, margin=self.margin, normalize=self.normalize, mask=mask,
            reduction=self.reduction, higher_order=self.higher_order,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return (
            f"origin_index={self.origin_index}, margin={self.margin}, normalize={self.normalize!r}, "
            f"reduction={self.reduction!r}"
        )


class RegionAttention(nn.Module):
    r"""Self-attention and relation-attention pooling of the features of a face and of its crops.

        mu_i = sigmoid(q0 . F_i),   F_m = sum_i mu_i F_i / sum_i mu_i
        nu_i = sigmoid(q1 . [F_i : F_m]),   pooled = sum_i mu_i nu_i [F_i : F_m] / sum_i mu_i nu_i

    Args:
        dim: D, the size of a region's feature.
        bias: add a number to both scores before their sigmoid, as the authors' code does.
        normalize: None, as in the paper, or "softmax": mu and nu pass through a softmax over the regions before they
            weigh anything, and mu before it is returned, as in the authors' code.
        device, dtype: of the parameters.

    Shape:
        features: (N, R, D); mask: None or booleans (N, R), True where a region takes part.
        forward returns (pooled, weights): pooled (N, 2 D), and weights mu (N, R), 0 where a region takes no part, for
        `RegionBiasedLoss`, whose own `normalize` stays None. A row in which nothing takes part is pooled to 0.

    Reference:
        Wang et al., "Region Attention Networks for Pose and Occlusion Robust Facial Expression Recognition", IEEE TIP
        2020.
    """

    def __init__(
        self,
        dim: int,
        *,
        bias: bool = True,
        normalize: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if _checks.integer("dim", dim) < 1:
            raise ValueError(f"`dim` must be a number of features >= 1, got {dim}")
        _checks.one_of("normalize", normalize, NORMALIZE)
        self.dim = dim
        self.normalize = normalize
        self.self_attention = nn.Linear(dim, 1, bias, device, dtype)
        self.relation_attention = nn.Linear(2 * dim, 1, bias, device, dtype)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._check(features, mask)
        if mask is not None:
            features = torch.where(mask.unsqueeze(-1), features, 0.0)
        mu = self._weights(self.self_attention, features, mask)
        mean = _average(mu, features).unsqueeze(1).expand(features.shape)
        both = torch.cat([features, mean.to(features.dtype)], -1)
        nu = self._weights(self.relation_attention, both, mask)
        return _average(mu * nu, both), mu

    def _weights(self, score: nn.Linear, features: Tensor, mask: Tensor | None) -> Tensor:
        """(N, R) weights in the dtype of the features; 0 where a region takes no part."""
        weights = torch.sigmoid(score(features).squeeze(-1).to(features.dtype))
        if self.normalize == "softmax":
            if mask is not None:  # a row in which nothing takes part must not become NaN
                weights = torch.where(mask | ~mask.any(1, keepdim=True), weights, float("-inf"))
            weights = torch.softmax(weights, 1)
        return weights if mask is None else torch.where(mask, weights, 0.0)

    def _check(self, features: Tensor, mask: Tensor | None) -> None:
        _checks.floating("features", features)
        if features.dim() != 3 or features.shape[2] != self.dim:
            raise ValueError(
                f"`features` must have shape (N, R, D) with D = {self.dim}, got {_checks.shape_of(features)}"
            )
        if mask is not None:
            check_mask(mask, features, "features")

    def extra_repr(self) -> str:
        bias = self.self_attention.bias is not None
        return f"dim={self.dim}, bias={bias}, normalize={self.normalize!r}"


def _average(weights: Tensor, features: Tensor) -> Tensor:
    """sum_i w_i F_i / sum_i w_i of (N, R) and (N, R, D); 0, with finite gradients, where the weights sum to 0."""
    total = weights.sum(1, keepdim=True)
    summed = torch.bmm(weights.unsqueeze(1), features).squeeze(1)
    return summed / torch.where(total == 0, 1.0, total)
