"""The centers' update, wherever the centers are: of one process, replicated over a group, or sharded over a mesh."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from .. import _backend
from ..reference import center_loss as reference
from ._center_checks import check_labels, is_sharded, prepared
from ._center_loss import update_centers_ as update_in_place

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def update_anywhere_(
    centers: Tensor,
    features: Tensor,
    labels: Tensor,
    attention: Tensor | None,
    logits: bool,
    alpha: float,
    ema: bool,
    island_weight: float,
    ignore_index: int,
    process_group: ProcessGroup | None,
) -> None:
    """`update_centers_` of checked arguments: sharded centers, replicas of them, or those of this process alone."""
    rule = (alpha, ema, island_weight, ignore_index)
    if is_sharded(centers):
        from ._sharded_centers import update_shards_

        if process_group is not None:
            raise ValueError("`process_group` must be None for centers that are a DTensor: their mesh has the ranks")
        update_shards_(centers, features, labels, attention, logits, *rule)
    elif process_group is not None:
        from ._distributed_centers import update_replicas_

        update_replicas_(centers, features, labels, attention, logits, *rule, process_group)
    else:
        apply_update_(centers, features, labels, attention, logits, *rule)


def apply_update_(
    centers: Tensor,
    features: Tensor,
    labels: Tensor,
    attention: Tensor | None,
    logits: bool,
    alpha: float,
    ema: bool,
    island_weight: float,
    ignore_index: int,
) -> None:
    """`update_centers_` of checked arguments, on this device alone."""
    x, y, a = prepared(features.detach(), labels, None if attention is None else attention.detach())
    if _backend.choose(centers.device.type, "update_centers_") == "reference":
        check_labels(y, centers.shape[0], ignore_index)
        sums, counts = reference.class_sums(x, y, centers, a, logits, ignore_index)
        centers.copy_(reference.updated_centers(centers, sums, counts, alpha, ema, island_weight))
    else:
        update_in_place(centers, x, y, a, logits, alpha, ema, island_weight, ignore_index)
