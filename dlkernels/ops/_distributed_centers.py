"""Replicas of the centers on several ranks, and the collectives that replicas and shards share.

What every rank has to know before a collective is the same on all: rows are padded to the longest batch, and a rank
with a label out of range says so in what it sends, so that all raise in place of waiting for it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .. import _backend
from .._library import accumulate_dtype
from ..reference import center_loss as reference
from ._center_checks import prepared
from ._center_loss import CenterLossBackward
from ._center_updates import apply_update_

# Sums of up to this many elements (8 MB in float32) are all-reduced without asking how many rows there are.
SMALL = 1 << 21

# Named anew in torch 2.13.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Rows(NamedTuple):
    """The batches of all ranks, each padded to the longest.

    labels: (P n,) int64, every rank's classes in the order of the ranks; -1 for padding and for rows left out.
    own: how many rows this rank has, and `padded` = n >= 1.
    """

    labels: Tensor
    own: int
    padded: int
    group: Any


def all_gather(x: Tensor, padded: int, group: Any) -> Tensor:
    """(N, ...) of every rank, padded with zeros to n rows each: (P n, ...)."""
    if x.shape[0] != padded:
        x = torch.cat([x, x.new_zeros(padded - x.shape[0], *x.shape[1:])])
    out = x.new_empty(dist.get_world_size(group) * padded, *x.shape[1:])
    _all_gather(out, x.contiguous(), group=group)
    return out


def reduce_scatter(x: Tensor, padded: int, group: Any) -> Tensor:
    """(P n, ...) summed over the ranks; each gets the n rows that it gave to `all_gather`."""
    out = x.new_empty(padded, *x.shape[1:])
    _reduce_scatter(out, x.contiguous(), group=group)
    return out


def split_labels(labels: Tensor, num_classes: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Classes as int64, -1 in the rows that are left out; and whether any label is out of range, on the device."""
    y = labels.long()
    counted = reference.counted(y, ignore_index)
    fits = counted & (y < num_classes)
    return torch.where(fits, y, -1), (counted & ~fits).any()


def out_of_range(num_classes: int, where: str) -> IndexError:
    return IndexError(f"labels must be in [0, {num_classes}), negative or ignore_index: not so on {where}")


def exchange(labels: Tensor, num_classes: int, ignore_index: int, group: Any) -> Rows:
    """All ranks' labels. The lengths are read by the host: the one wait for the device.

    Raises:
        IndexError: on every rank, when one of them has a label out of range.
    """
    y, bad = split_labels(labels, num_classes, ignore_index)
    head = torch.stack([torch.full_like(bad, labels.shape[0], dtype=torch.int64), bad.long()])
    heads = all_gather(head[None], 1, group).tolist()
    if wrong := [str(rank) for rank, (_, bad) in enumerate(heads) if bad]:
        raise out_of_range(num_classes, f"rank {', '.join(wrong)}")
    padded = max(1, *(n for n, _ in heads))
    y = torch.cat([y, y.new_full((padded - y.shape[0],), -1)])
    return Rows(all_gather(y, padded, group), labels.shape[0], padded, group)


def class_sums(x: Tensor, y: Tensor, centers: Tensor, attention: Tensor | None, logits: bool) -> tuple[Tensor, Tensor]:
    """sum A_i (x_i - c_j) over the rows of class j (K, D) and their number (K,); y of int64, negative is left out."""
    x, y, attention = prepared(x, y, attention)
    if _backend.choose(x.device.type, "center_loss_bwd") == "reference":
        return reference.class_sums(x, y, centers, attention, logits, -1)
    # The gradient of the summed loss in the centers, times -1: the operator adds the rows in a fixed order.
    dtype = accumulate_dtype(x.dtype)
    minus = torch.full_like(y, -1, dtype=dtype)
    _, sums, _ = CenterLossBackward.call(minus, x, y, centers.to(dtype), attention, logits, -1, True)
    counts = torch.zeros_like(sums[:, 0]).index_add_(0, y.clamp(min=0), (y >= 0).to(dtype))
    return sums, counts


def update_replicas_(
    centers: Tensor,
    features: Tensor,
    labels: Tensor,
    attention: Tensor | None,
    logits: bool,
    alpha: float,
    ema: bool,
    island_weight: float,
    ignore_index: int,
    group: Any,
) -> None:
    """`update_centers_` of replicas with the rows of all ranks: replicas that are equal stay so, to the bit.

    Few classes: sums and counts are all-reduced, in one call, before the division. More classes than rows: the rows
    are gathered instead and every rank updates as if it had them all, so that nothing of size K x D is sent or made.
    """
    k, d = centers.shape
    features, attention = features.detach(), None if attention is None else attention.detach()
    rule = (alpha, ema, island_weight)
    if dist.get_world_size(group) == 1:
        apply_update_(centers, features, labels, attention, logits, *rule, ignore_index)
        return
    if k * d > SMALL:
        rows = exchange(labels, k, ignore_index, group)
        if k > rows.labels.shape[0]:
            x, a = (None if t is None else all_gather(t, rows.padded, group) for t in (features, attention))
            apply_update_(centers, x, rows.labels, a, logits, *rule, -1)
            return
    y, bad = split_labels(labels, k, ignore_index)
    sums, counts = class_sums(features, y, centers, attention, logits)
    packed = torch.cat([sums.flatten(), counts, bad.to(sums.dtype)[None]])
    dist.all_reduce(packed, group=group)
    if centers.device.type == "cpu" and packed[-1] > 0:  # elsewhere such rows are left out, and nothing waits
        raise out_of_range(k, "this rank" if bad else "another rank")
    sums, counts = packed[: k * d].view(k, d), packed[k * d : -1]
    centers.copy_(reference.updated_centers(centers, sums, counts, *rule))
