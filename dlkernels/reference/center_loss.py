"""Center, sparse center and island loss, and the centers' update rules, in the symbols of the papers.

Wen et al., "A Discriminative Feature Learning Approach for Deep Face Recognition", eq. 2 to 4; Farzaneh and Qi, "Facial
Expression Recognition in the Wild via Deep Attentive Center Loss", eq. 5 and 6; Cai et al., "Island Loss for Learning
Discriminative Features in Facial Expression Recognition", eq. 3 to 6.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._activation import compute


def counted(labels: Tensor, ignore_index: int) -> Tensor:
    """The rows that count: (N,) bool. Negative labels and ignore_index are left out."""
    return (labels >= 0) & (labels != ignore_index)


def _differences(
    features: Tensor, labels: Tensor, centers: Tensor, attention: Tensor | None, logits: bool, ignore_index: int
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """x - c_y and A (N, D), 0 in the rows that are left out; the rows that count; their classes."""
    ok = counted(labels, ignore_index)
    y = torch.where(ok, labels, 0).long()
    # Not index_select, whose second derivative torch 2.11 does not trace with symbolic sizes.
    own = compute(centers)[y] if centers.shape[0] else compute(centers).new_zeros(features.shape)
    d = torch.where(ok[:, None], compute(features) - own, 0.0)
    a = None
    if attention is not None:
        a = torch.where(ok[:, None], compute(attention), 0.0)
        a = torch.sigmoid(a) if logits else a
    return d, a, ok, y


def center_loss(
    features: Tensor, labels: Tensor, centers: Tensor, attention: Tensor | None, logits: bool, ignore_index: int
) -> Tensor:
    """L_i = 1/2 sum_d A_id (x_id - c_yd)^2 of every row (N,); A = 1 where there is no attention."""
    d, a, _, _ = _differences(features, labels, centers, attention, logits, ignore_index)
    squares = d.square() if a is None else a * d.square()
    return 0.5 * squares.sum(1)


def divisor(labels: Tensor, ignore_index: int, dtype: torch.dtype) -> Tensor:
    """How many rows count, at least 1: the mean over no row is 0."""
    return counted(labels, ignore_index).sum().clamp(min=1).to(dtype)


def class_sums(
    features: Tensor, labels: Tensor, centers: Tensor, attention: Tensor | None, logits: bool, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """sum A_i (x_i - c_j) over the rows of class j (K, D), and their number (K,), both in float32 (float64)."""
    d, a, ok, y = _differences(features, labels, centers, attention, logits, ignore_index)
    d = d if a is None else a * d
    sums = torch.zeros_like(centers, dtype=d.dtype).index_add(0, y, d)
    return sums, torch.zeros_like(centers[:, 0], dtype=d.dtype).index_add(0, y, ok.to(d.dtype))


def updated_centers(
    centers: Tensor, sums: Tensor, counts: Tensor, alpha: float, ema: bool, island_weight: float
) -> Tensor:
    """c_j + alpha sums_j / (1 + n_j), or with `ema` sums_j / n_j; minus alpha times the island term. In float32."""
    c = compute(centers)
    step = sums / (counts.clamp(min=1) if ema else 1 + counts)[:, None]
    if island_weight and c.shape[0] > 1:
        # The paper's term, 1 / (K - 1) sum_k d cos(c_j, c_k) / d c_j, for all classes, present or not.
        step = step - island_weight / (c.shape[0] - 1) * island_direction(c)
    return c + alpha * step


def normalised(c: Tensor) -> tuple[Tensor, Tensor]:
    """n_j = c_j / ||c_j|| and 1 / ||c_j||; both 0 for a center of norm 0."""
    squares = c.square().sum(1, keepdim=True)
    some = squares > 0
    inverse = torch.where(some, torch.where(some, squares, 1.0).rsqrt(), 0.0)
    return c * inverse, inverse


def island_pairs(centers: Tensor) -> Tensor:
    """sum over ordered pairs j != k of cos(c_j, c_k) + 1, in closed form: ||S||^2 - K' + K (K - 1), S = sum_j n_j."""
    n, inverse = normalised(compute(centers))
    k, some = centers.shape[0], (inverse > 0).sum()
    cosines = n.sum(0).square().sum() - some if k > 1 else 0.0 * n.sum()
    return cosines + k * (k - 1)


def island_direction(centers: Tensor) -> Tensor:
    """(S - (n_j . S) n_j) / ||c_j|| (K, D): half the gradient of island_pairs; 0 for a center of norm 0."""
    n, inverse = normalised(centers)
    s = n.sum(0)
    return inverse * (s - (n @ s)[:, None] * n)
