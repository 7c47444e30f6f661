"""The center losses and the centers' update as people write them in plain PyTorch, for `check` and `profile`.

They share no code with dlkernels and run in the dtype that they are given. `ignore_index=None` leaves the masks out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _kept(labels: Tensor, ignore_index: int | None) -> tuple[Tensor, Tensor | None]:
    """Labels that can be indexed with, and the rows that count."""
    if ignore_index is None:
        return labels, None
    kept = (labels >= 0) & (labels != ignore_index)
    return torch.where(kept, labels, 0), kept


def _attention(attention: Tensor, logits: bool) -> Tensor:
    return torch.sigmoid(attention) if logits else attention


def _reduce(loss: Tensor, kept: Tensor | None, reduction: str) -> Tensor:
    loss = loss if kept is None else torch.where(kept, loss, 0.0)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / (loss.shape[0] if kept is None else kept.sum())


def center_loss(
    features: Tensor, labels: Tensor, centers: Tensor, reduction: str = "mean", ignore_index: int | None = None
) -> Tensor:
    """The center of each row gathered, and half the squared distance."""
    y, kept = _kept(labels, ignore_index)
    return _reduce(0.5 * (features - centers[y]).square().sum(1), kept, reduction)


def sparse_center_loss(
    features: Tensor,
    labels: Tensor,
    centers: Tensor,
    attention: Tensor,
    reduction: str = "mean",
    ignore_index: int | None = None,
    attention_logits: bool = False,
) -> Tensor:
    """The squares weighed by the attention before they are summed."""
    y, kept = _kept(labels, ignore_index)
    squares = _attention(attention, attention_logits) * (features - centers[y]).square()
    return _reduce(0.5 * squares.sum(1), kept, reduction)


def _pairs(centers: Tensor) -> Tensor:
    """cos + 1 over the ordered pairs, from the K x K matrix of cosines."""
    n = F.normalize(centers)
    cosines = n @ n.T
    return (cosines + 1).sum() - (cosines.diagonal() + 1).sum()


def island_loss(
    features: Tensor,
    labels: Tensor,
    centers: Tensor,
    island_weight: float = 10.0,
    reduction: str = "mean",
    ignore_index: int | None = None,
) -> Tensor:
    """Center loss and the pairs; unreduced, every row that counts carries them."""
    pairs = island_weight * _pairs(centers)
    if reduction == "none" and ignore_index is not None:
        pairs = pairs * _kept(labels, ignore_index)[1]
    return center_loss(features, labels, centers, reduction, ignore_index) + pairs


@torch.no_grad()
def update_centers_(
    centers: Tensor,
    features: Tensor,
    labels: Tensor,
    alpha: float = 0.5,
    attention: Tensor | None = None,
    island_weight: float = 0.0,
    ignore_index: int | None = None,
    ema: bool = False,
    attention_logits: bool = False,
) -> Tensor:
    """Sums and counts scattered over all classes; the island's term by automatic differentiation."""
    k = centers.shape[0]
    y, kept = _kept(labels, ignore_index)
    pulls = centers[y] - features
    if attention is not None:
        pulls = _attention(attention, attention_logits) * pulls
    if kept is not None:
        y, pulls = y[kept], pulls[kept]
    sums = torch.zeros_like(centers).index_add_(0, y, pulls.to(centers.dtype))
    counts = torch.bincount(y, minlength=k)[:, None]
    step = sums / (counts.clamp(min=1) if ema else 1 + counts)
    if island_weight > 0:
        with torch.enable_grad():
            c = centers.detach().requires_grad_(True)
            (push,) = torch.autograd.grad(_pairs(c), c)
        step = step + island_weight / (2 * (k - 1)) * push
    return centers.sub_(alpha * step)
