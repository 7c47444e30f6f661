"""Center loss, sparse (attentive) center loss, island loss, and the centers' update."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import _backend, _checks
from .._library import has_tangent, is_compiling, transforms_active, wants_grad
from ..reference import center_loss as reference
from ._center_checks import attention_of, check_arguments, check_labels, is_sharded, prepared
from ._center_loss import CenterLoss, IslandPairs
from ._center_updates import update_anywhere_
from ._reduced import MEAN, NONE, SUM

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def center_loss(
    features: Tensor,
    labels: Tensor,
    centers: Tensor,
    *,
    reduction: str = "mean",
    ignore_index: int = -100,
    higher_order: bool = True,
) -> Tensor:
    r"""Center loss: half the squared distance of each feature to the center of its class.

        L_i = 1/2 ||x_i - c_{y_i}||^2

    Args:
        features: x (N, D), float32, float16, bfloat16 or float64, any strides.
        labels: y (N,), integers in [0, K). Negative ones and ignore_index leave their row out.
        centers: c (K, D), the dtype of features, or float32 beside half-precision features.
        reduction: "mean" over the rows that count (the authors' code), "sum" (the paper), or "none".
        ignore_index: labels of this value leave their row out: loss 0, gradient 0.
        higher_order: keep the inputs beside stored gradients, so that second derivatives work. False saves that memory.

    Returns:
        float32 (float64 for float64 features): (N,) for "none", otherwise a scalar. 0 where no row counts.

    Raises:
        TypeError: features, centers or labels of an unsupported dtype.
        ValueError: shapes, devices, an unknown reduction.
        IndexError: a label of K or more (CPU). On CUDA nothing is read out of bounds and the loss is NaN.

    Note:
        Differentiable in features and centers (the exact gradient). For the paper's update of the centers, which is not
        a gradient step, see `update_centers_` and `dlkernels.nn.CenterLoss`. Nothing of size N x K is made.
        The values of the widespread pytorch-center-loss, sum_i ||x_i - c_{y_i}||^2 / N, are 2 * center_loss(...).
        Works under torch.compile(fullgraph=True), export, torch.func and AMP; bitwise equal between runs and thread
        counts.

        Centers sharded by class: a DTensor of placements (Shard(0),) on a 1-D mesh, beside this rank's own rows as
        plain tensors. The result is the unsharded one for these rows; the gradient in the centers is that of the sum of
        the ranks' losses. Every rank must call, also with an empty batch; no rank makes anything of size K x D. A label
        out of range on one rank raises on all, CUDA too.

    Reference:
        Wen et al., "A Discriminative Feature Learning Approach for Deep Face Recognition", ECCV 2016, eq. 2.
    """
    if is_sharded(centers):
        return _sharded(features, labels, centers, None, False, reduction, ignore_index, higher_order)
    fast = None if is_compiling() else _backend.fast(features)
    if fast is not None:
        loss = fast.center_loss(features, labels, centers, None, False, reduction, ignore_index, higher_order, None)
        if loss is not None:
            return loss
    return _center_loss(features, labels, centers, None, False, reduction, ignore_index, higher_order)


def sparse_center_loss(
    features: Tensor,
    labels: Tensor,
    centers: Tensor,
    attention: Tensor,
    *,
    reduction: str = "mean",
    ignore_index: int = -100,
    attention_logits: bool = False,
    higher_order: bool = True,
) -> Tensor:
    r"""Sparse center loss (deep attentive center loss): squared distances weighed per feature by an attention.

        L_i = 1/2 sum_d A_id (x_id - c_{y_i d})^2

    Args:
        features: x (N, D).
        labels: y (N,), integers in [0, K). Negative ones and ignore_index leave their row out.
        centers: c (K, D), the dtype of features, or float32 beside half-precision features.
        attention: A (N, D) in [0, 1]; the dtype of features, or float32 beside half-precision features. With
            `attention_logits` its logits: (N, D), A = sigmoid(a), or (N, D, 2), A = sigmoid(a[..., 1] - a[..., 0]), the
            softmax over two values of the authors' attention head.
        reduction: "mean" over the rows that count, "sum", or "none".
        ignore_index: labels of this value leave their row out: loss 0, gradient 0.
        attention_logits: take `attention` as logits; the sigmoid is part of the kernel.
        higher_order: keep the inputs beside stored gradients, so that second derivatives work. False saves that memory.

    Returns:
        As `center_loss`.

    Raises:
        TypeError, ValueError, IndexError: as `center_loss`; `attention` outside of [0, 1] (on CUDA a NaN loss).

    Note:
        Differentiable in features, centers and attention. The gradient in the attention is never negative: this loss
        alone drives it to 0, so it needs a classification loss beside it. Otherwise as `center_loss`.

    Reference:
        Farzaneh and Qi, "Facial Expression Recognition in the Wild via Deep Attentive Center Loss", WACV 2021, eq. 5.
    """
    if is_sharded(centers):
        return _sharded(features, labels, centers, attention, attention_logits, reduction, ignore_index, higher_order)
    fast = None if is_compiling() else _backend.fast(features)
    if fast is not None:
        loss = fast.center_loss(
            features, labels, centers, attention, attention_logits, reduction, ignore_index, higher_order, None
        )
        if loss is not None:
            return loss
    attention = attention_of(features, attention, attention_logits)
    return _center_loss(
        features, labels, centers, attention, attention_logits, reduction, ignore_index, higher_order
    )  # fmt: skip


class IslandParts(NamedTuple):
    """The island loss and what it is made of: loss = center + island_weight * pairs."""

    loss: Tensor
    center: Tensor
    pairs: Tensor


def island_loss(
    features: Tensor,
    labels: Tensor,
    centers: Tensor,
    island_weight: float = 10.0,
    *,
    reduction: str = "mean",
    ignore_index: int = -100,
    return_parts: bool = False,
    higher_order: bool = True,
) -> Tensor | IslandParts:
    r"""Island loss: center loss, and centers pushed apart.

        L = L_C + island_weight sum_{j} sum_{k != j} (cos(c_j, c_k) + 1)

    The pairs, ordered ones, are summed in closed form, O(K D): ||S||^2 - K' + K (K - 1), where S is the sum of the
    normalised centers and K' how many have a norm above 0.

    Args:
        features: x (N, D).
        labels: y (N,), integers in [0, K). Negative ones and ignore_index leave their row out.
        centers: c (K, D), the dtype of features, or float32 beside half-precision features.
        island_weight: lambda_1 of the paper, >= 0.
        reduction: of the center part: "mean", "sum", or "none", where every row that counts carries the pairs.
        ignore_index: labels of this value leave their row out.
        return_parts: return a named tuple `(loss, center, pairs)`.
        higher_order: as in `center_loss`.

    Returns:
        As `center_loss`, or the named tuple. K = 1 has no pairs; a center of norm 0 has cosine 0 with all others and no
        gradient from them. With no row that counts the pairs remain.

    Raises:
        TypeError, ValueError, IndexError: as `center_loss`; island_weight < 0.

    Note:
        Differentiable in features and centers (the exact gradient, twice (K - 1) times the term in the paper's update:
        see `update_centers_`). Some published code counts each pair once, or has a constant K more.

    Reference:
        Cai et al., "Island Loss for Learning Discriminative Features in Facial Expression Recognition", FG 2018, eq. 3.
    """
    weight = _checks.non_negative("island_weight", island_weight)
    center = center_loss(
        features, labels, centers, reduction=reduction, ignore_index=ignore_index, higher_order=higher_order
    )
    parts = with_pairs(center, island_pairs(centers), weight, labels, reduction, ignore_index)
    return parts if return_parts else parts.loss


@torch.no_grad()
def update_centers_(
    centers: Tensor,
    features: Tensor,
    labels: Tensor,
    alpha: float = 0.5,
    *,
    attention: Tensor | None = None,
    island_weight: float = 0.0,
    ignore_index: int = -100,
    process_group: ProcessGroup | None = None,
    ema: bool = False,
    attention_logits: bool = False,
) -> Tensor:
    r"""Move the centers towards the features of their classes, in place: the update rule of the papers.

        c_j <- c_j - alpha ( sum_{y_i = j} A_i (c_j - x_i) / (1 + n_j)  +  island_weight I_j )

        I_j = 1 / (K - 1) sum_{k != j} d cos(c_j, c_k) / d c_j

    Args:
        centers: c (K, D), changed in place; the dtype of features, or float32 beside half-precision features. Or a
            DTensor of shards by class, as in `center_loss`: the rows of all ranks of its mesh count.
        features: x (N, D).
        labels: y (N,), integers in [0, K). Negative ones and ignore_index leave their row out.
        alpha: the centers' learning rate, in [0, 1].
        attention: A (N, D) in [0, 1], as in `sparse_center_loss`; None is 1. A row counts in n_j whatever its A.
        island_weight: lambda_1 of the island loss; its term moves all classes, present in the batch or not.
        ignore_index: labels of this value leave their row out.
        process_group: the ranks that hold replicas of the centers: their rows all count, summed before the division,
            so that replicas stay equal to the bit. Every rank must call, also with an empty batch.
        ema: divide by n_j in place of 1 + n_j: c_j <- (1 - alpha) c_j + alpha mean_j.
        attention_logits: take `attention` as logits, as in `sparse_center_loss`.

    Returns:
        centers, the same tensor. Classes that are absent from the batch keep their center (but for the island term).

    Raises:
        TypeError, ValueError, IndexError: as `sparse_center_loss`; alpha outside of [0, 1]; centers that are not dense.
            Nothing is changed before all checks have passed. On several ranks a label out of range raises on each
            (replicas on CUDA may leave the row out); another error raises before the rank has sent anything, and the
            others wait for it until their collective times out.

    Note:
        Deterministic: rows are grouped by class with a stable sort and summed in a fixed order, also when all share one
        class. Memory O(N D + K), on P ranks O(P N D). Not differentiable; a graph that has saved the centers notices.
        DLKERNELS_ATOMICS=1 in the environment lets Triton add with atomics in place of the sort, here and in the
        centers' gradient, where K <= N: sums then differ in their last bits from run to run. CUDA C++ always sorts.

    Reference:
        Wen et al. 2016, eq. 4; Cai et al. 2018, eq. 6; Farzaneh and Qi 2021, eq. 6.
    """
    alpha = _checks.in_unit_interval("alpha", alpha)
    weight = _checks.non_negative("island_weight", island_weight)
    check_arguments(features, labels, centers, ignore_index)
    if not centers.is_contiguous():
        raise ValueError(f"`centers` must be contiguous to be changed in place, got strides {centers.stride()}")
    a = None if attention is None else attention_of(features, attention, attention_logits)
    update_anywhere_(
        centers, features, labels, a, attention_logits, alpha, ema, weight, ignore_index, process_group
    )  # fmt: skip
    return centers


# Shared with the modules ----------------------------------------------------------------------------------------------


def with_pairs(
    center: Tensor, pairs: Tensor, weight: float, labels: Tensor, reduction: str, ignore_index: int
) -> IslandParts:
    """The island loss of its parts; with reduction "none" every row that counts carries the pairs."""
    term = weight * pairs.to(center.dtype)
    if reduction == "none":
        term = term * reference.counted(labels, ignore_index)
    return IslandParts(center + term, center, pairs)


def detached_loss(
    features: Tensor,
    labels: Tensor,
    centers: Tensor,
    attention: Tensor | None,
    logits: bool,
    reduction: str,
    ignore_index: int,
) -> Tensor:
    """The loss with a graph that keeps gradients and not the centers: these may change before the backward pass."""
    if is_sharded(centers):
        return _sharded(features, labels, centers.detach(), attention, logits, reduction, ignore_index, False)
    a = None if attention is None else attention_of(features, attention, logits)
    return _center_loss(features, labels, centers, a, logits, reduction, ignore_index, False, store=True)


def loss_and_update(
    features: Tensor,
    labels: Tensor,
    centers: Tensor,
    attention: Tensor | None,
    logits: bool,
    reduction: str,
    ignore_index: int,
    alpha: float,
    ema: bool,
    island_weight: float,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """The (sparse) center loss and its gradient from the centers as they are, then their update: one call.

    The graph keeps the gradients and not the centers, which change; there is no second derivative.
    """
    fast = None if is_compiling() or process_group is not None or is_sharded(centers) else _backend.fast(features)
    if fast is not None:
        update = (alpha, ema, island_weight)
        loss = fast.center_loss(features, labels, centers, attention, logits, reduction, ignore_index, False, update)
        if loss is not None:
            return loss
    if is_sharded(centers):
        rule = (alpha, ema, island_weight)
        return _sharded(features, labels, centers.detach(), attention, logits, reduction, ignore_index, False, rule)
    a = None if attention is None else attention_of(features, attention, logits)
    loss = _center_loss(features, labels, centers, a, logits, reduction, ignore_index, False, store=True)
    with torch.no_grad():
        update_anywhere_(
            centers, features, labels, a, logits, alpha, ema, island_weight, ignore_index, process_group
        )  # fmt: skip
    return loss


# Inside ---------------------------------------------------------------------------------------------------------------


def _sharded(features: Tensor, labels: Tensor, centers: Tensor, *options: Any) -> Tensor:
    from ._sharded_centers import loss_of_shards

    return loss_of_shards(_center_loss, features, labels, centers, *options)


def _center_loss(
    features: Tensor,
    labels: Tensor,
    centers: Tensor,
    attention: Tensor | None,
    logits: bool,
    reduction: str,
    ignore_index: int,
    higher_order: bool,
    store: bool = False,
) -> Tensor:
    """store: keep the gradients also of reduction "none", so that the backward pass needs no centers."""
    code = _checks.reduction_code(reduction)
    check_arguments(features, labels, centers, ignore_index)
    x, y, a = prepared(features, labels, attention)
    plain = _backend.choose(features.device.type, "center_loss_fwd") == "reference" or has_tangent(x, centers, a)
    if plain or (transforms_active() and code != NONE):
        if plain:
            check_labels(y, centers.shape[0], ignore_index)
            # With `store` the centers are about to change under a graph that would have saved them.
            rows = reference.center_loss(x, y, centers.clone() if store else centers, a, logits, ignore_index)
        else:
            rows = CenterLoss.call(x, y, centers, a, logits, ignore_index, NONE, False, True)[0]
        if code == NONE:
            return rows
        return rows.sum() / reference.divisor(y, ignore_index, rows.dtype) if code == MEAN else rows.sum()
    centers_too = wants_grad(centers)
    need_grad = wants_grad(x, a) and not centers_too and (code in (MEAN, SUM) or store)
    return CenterLoss.call(
        x, y, centers.contiguous(), a, logits, ignore_index, code, need_grad, higher_order or centers_too
    )[0]


def island_pairs(centers: Tensor) -> Tensor:
    """sum over ordered pairs of cos + 1, differentiable in the centers."""
    if is_sharded(centers):
        from ._sharded_centers import pairs_of_shards

        return pairs_of_shards(centers)
    if _backend.choose(centers.device.type, "island_pairs_fwd") == "reference" or has_tangent(centers):
        return reference.island_pairs(centers)
    return IslandPairs.call(centers.contiguous())[0]
