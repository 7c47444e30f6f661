"""The Gaussian class-conditional simplex loss as a module."""

from __future__ import annotations

from torch import Tensor, nn

from .. import _checks
from ..ops.gccs_loss import check_options, gccs_loss


class GCCSLoss(nn.Module):
    """`dlkernels.gccs_loss` as a module.

    Args:
        target_mean, target_std, covariance, kurtosis_weight, reduction, ignore_index, eps, higher_order: as in the
            function, whose docstring says which of them are not verified against the paper.

    Shape:
        features: (N, D), D the number of classes; labels: integers (N,).
    """

    def __init__(
        self,
        *,
        target_mean: float = 40.0,
        target_std: float = 1.0,
        covariance: str = "diagonal",
        kurtosis_weight: float = 0.0,
        reduction: str = "sum",
        ignore_index: int = -100,
        eps: float = 1e-5,
        higher_order: bool = True,
    ) -> None:
        super().__init__()
        _checks.reduction_code(reduction)
        _, self.target_mean, self.target_std, self.eps, self.kurtosis_weight, self.ignore_index = check_options(
            target_mean, target_std, covariance, kurtosis_weight, ignore_index, eps
        )
        self.covariance = covariance
        self.reduction = reduction
        self.higher_order = higher_order

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        return gccs_loss(
            features, labels, target_mean=self.target_mean, target_std=self.target_std, covariance=self.covariance,
            kurtosis_weight=self.kurtosis_weight, reduction=self.reduction, ignore_index=self.ignore_index,
            eps=self.eps, higher_order=self.higher_order,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return (
            f"target_mean={self.target_mean}, target_std={self.target_std}, covariance={self.covariance!r}, "
            f"kurtosis_weight={self.kurtosis_weight}, reduction={self.reduction!r}"
        )
