"""Centers sharded by class: a DTensor, (Shard(0),) on a 1-D mesh, with a batch of its own on every rank.

Loss: each rank fetches the centers of its own rows, c_{y_i} (N, D): it sends the labels round, every rank writes those
centers that it has among zeros, and a reduce-scatter hands them out (one owner each, so the sums are exact). From there
on it is the ordinary loss of N rows with N centers: loss, gradients and their derivatives are those of the unsharded
one. The gradient in the shards is that of the sum of the ranks' losses: rows gathered, and summed by class.

Update: rows of all ranks gathered, and the ordinary update of the classes in the shard.

Memory O(P N D + K / P D) on each rank. Every rank must take part in every call, also with an empty batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, Shard

from .. import _backend
from ..reference import center_loss as reference
from ._center_checks import attention_of, check_arguments
from ._center_loss import IslandPairs, IslandPairsBackward
from ._center_updates import apply_update_
from ._distributed_centers import Rows, all_gather, class_sums, exchange, reduce_scatter


class Shards(NamedTuple):
    """local: (K_r, D), classes `start` to `start` + K_r of `classes`; see `share_of`."""

    local: Tensor
    start: int
    classes: int
    group: Any


def share_of(num_classes: int, mesh: Any) -> range:
    """The classes of this rank by torch.chunk's rule, the last ranks' may be none."""
    chunk, rank = -(-num_classes // mesh.size()), mesh.get_local_rank()
    return range(min(rank * chunk, num_classes), min((rank + 1) * chunk, num_classes))


def shard(local: Tensor, num_classes: int, mesh: Any) -> DTensor:
    """This rank's centers as its share of all."""
    shape, stride = (num_classes, local.shape[1]), (local.shape[1], 1)
    return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)


def shards_of(centers: DTensor) -> Shards:
    mesh, placements = centers.device_mesh, centers.placements
    if mesh.ndim != 1 or type(placements[0]) is not Shard or placements[0].dim != 0:
        raise ValueError(
            f"`centers` as a DTensor must have placements (Shard(dim=0),) on a 1-D mesh, got {placements} on a "
            f"{mesh.ndim}-D mesh"
        )
    return Shards(centers.to_local(), share_of(centers.shape[0], mesh).start, centers.shape[0], mesh.get_group())


def _met(features: Tensor, labels: Tensor, centers: DTensor, ignore_index: int) -> tuple[Shards, Rows]:
    """The shards and the rows of all ranks, once this rank's arguments have passed the checks."""
    shards = shards_of(centers)
    for name, tensor in (("features", features), ("labels", labels)):
        if isinstance(tensor, DTensor):
            raise ValueError(f"`{name}` must be this rank's own rows as a plain tensor beside sharded centers")
    check_arguments(features, labels, centers, ignore_index)
    return shards, exchange(labels, shards.classes, ignore_index, shards.group)


# The centers of this rank's rows --------------------------------------------------------------------------------------


def _in_shard(labels: Tensor, start: int, size: int) -> Tensor:
    """Labels counted from the shard's first class; -1 where the class is another rank's."""
    return torch.where((labels >= start) & (labels < start + size), labels - start, -1)


class _Fetch(torch.autograd.Function):
    """(K_r, D) -> (n, D): the centers of this rank's rows, 0 where a row is left out."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, rows: Rows, start: int) -> Tensor:
        ctx.rows, ctx.start, ctx.size = rows, start, local.shape[0]
        y = _in_shard(rows.labels, start, local.shape[0])
        found = local.new_zeros(y.shape[0], local.shape[1])
        if local.shape[0]:
            found = torch.where((y >= 0)[:, None], local.index_select(0, y.clamp(min=0)), found)
        return reduce_scatter(found, rows.padded, rows.group)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return _Bring.apply(g, ctx.rows, ctx.start, ctx.size), None, None


class _Bring(torch.autograd.Function):
    """The transpose of `_Fetch`: (n, D) -> (K_r, D), rows of all ranks summed by class, in a fixed order."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, rows: Rows, start: int, size: int) -> Tensor:
        ctx.rows, ctx.start = rows, start
        every = all_gather(g, rows.padded, rows.group)
        origin = g.new_zeros(size, g.shape[1])
        if not size:
            return origin
        return class_sums(every, _in_shard(rows.labels, start, size), origin, None, False)[0].to(g.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return _Fetch.apply(g, ctx.rows, ctx.start), None, None, None


def loss_of_shards(
    loss: Callable[..., Tensor],
    features: Tensor,
    labels: Tensor,
    centers: DTensor,
    attention: Tensor | None,
    logits: bool,
    reduction: str,
    ignore_index: int,
    higher_order: bool,
    rule: tuple[float, bool, float] | None = None,
) -> Tensor:
    """The (sparse) center loss of this rank's own rows: `loss`, with the centers of these rows for centers.

    rule: alpha, ema and island_weight, to update the centers once these rows have theirs.
    """
    if attention is not None:
        attention = attention_of(features, attention, logits)
    shards, rows = _met(features, labels, centers, ignore_index)
    own = _Fetch.apply(shards.local, rows, shards.start)  # padded: also of an empty batch there is a graph to them
    counted = reference.counted(labels, ignore_index)
    each = torch.where(counted, torch.arange(rows.own, device=labels.device), -1)
    value = loss(features, each, own, attention, logits, reduction, -1, higher_order)
    if rule is not None:
        with torch.no_grad():
            _update(shards, rows, features, attention, logits, *rule)
    return value


# The update -----------------------------------------------------------------------------------------------------------


def update_shards_(
    centers: DTensor,
    features: Tensor,
    labels: Tensor,
    attention: Tensor | None,
    logits: bool,
    alpha: float,
    ema: bool,
    island_weight: float,
    ignore_index: int,
) -> None:
    """`update_centers_` of the classes in this rank's shard, with the rows of all ranks."""
    shards, rows = _met(features, labels, centers.detach(), ignore_index)
    _update(shards, rows, features, attention, logits, alpha, ema, island_weight)


def _update(
    shards: Shards,
    rows: Rows,
    features: Tensor,
    attention: Tensor | None,
    logits: bool,
    alpha: float,
    ema: bool,
    island_weight: float,
) -> None:
    local, start, k, group = shards
    x = all_gather(features.detach(), rows.padded, group)
    a = None if attention is None else all_gather(attention.detach(), rows.padded, group)
    apart = None
    if island_weight and k > 1:
        total, inverse, _ = _total(local, group)
        apart = _direction(local, total, inverse)
    if not local.shape[0]:
        return
    apply_update_(local, x, _in_shard(rows.labels, start, local.shape[0]), a, logits, alpha, ema, 0.0, -1)
    if apart is not None:
        local.sub_(apart, alpha=alpha * island_weight / (k - 1))


# The island's pairs ---------------------------------------------------------------------------------------------------


def _plain(local: Tensor) -> bool:
    """Also where the shard is one center: the operators know that one center has no pairs, and these are of all."""
    return local.shape[0] < 2 or _backend.choose(local.device.type, "island_pairs_fwd") == "reference"


def _total(local: Tensor, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """S of all shards (D,), 1 / ||c_j|| of this one (K_r,), and K', how many centers have a norm above 0."""
    if _plain(local):
        n, inverse = reference.normalised(reference.compute(local))
        total, inverse = n.sum(0), inverse[:, 0]
    else:
        _, total, inverse = IslandPairs.call(local.contiguous())
    packed = torch.cat([total, (inverse > 0).sum().to(total.dtype)[None]])
    dist.all_reduce(packed, group=group)
    return packed[:-1], inverse, packed[-1]


def _direction(local: Tensor, total: Tensor, inverse: Tensor, factor: Tensor | None = None) -> Tensor:
    """(S - (n_j . S) n_j) / ||c_j|| times factor (K_r, D): half the gradient of the pairs."""
    if _plain(local):
        n = reference.compute(local) * inverse[:, None]
        found = inverse[:, None] * (total - (n @ total)[:, None] * n)
        return (found if factor is None else factor * found).to(local.dtype)
    half = torch.full_like(total[0], 0.5) if factor is None else 0.5 * factor
    return IslandPairsBackward.call(half, local.contiguous(), total.contiguous(), inverse)


class _Pairs(torch.autograd.Function):
    """(K_r, D) -> (): the pairs of all shards' centers, the same on every rank."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, k: int, group: Any) -> Tensor:
        total, inverse, some = _total(local, group)
        ctx.group = group
        ctx.save_for_backward(local, total, inverse)
        return (total.square().sum() - some if k > 1 else torch.zeros_like(some)) + k * (k - 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        local, total, inverse = ctx.saved_tensors
        g = 2 * g
        dist.all_reduce(g, group=ctx.group)
        return _direction(local, total, inverse, g), None, None


def pairs_of_shards(centers: DTensor) -> Tensor:
    shards = shards_of(centers)
    return _Pairs.apply(shards.local, shards.classes, shards.group)
