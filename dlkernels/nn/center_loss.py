"""Modules of the center-loss family: the losses with the centers that they move."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks
from ..ops._center_checks import is_sharded
from ..ops.center_loss import (
    IslandParts,
    center_loss,
    detached_loss,
    island_loss,
    island_pairs,
    loss_and_update,
    sparse_center_loss,
    update_centers_,
    with_pairs,
)

UPDATES = {"alpha": 0, "ema": 1, "grad": 2}
WHEN = {"forward": 0, "backward": 1}


class _SharedGroup:
    """A process group: copies of a module share it, and it cannot be written to a file."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def __deepcopy__(self, memo: Any) -> _SharedGroup:
        return self

    def __reduce__(self) -> Any:
        raise TypeError("a module with a process_group cannot be pickled: set it to None, or save the state_dict")


class _UpdateInBackward(torch.autograd.Function):
    """The identity on the loss. When the first backward pass comes through, the centers are updated."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, update: Any, features: Tensor, labels: Tensor, attention: Any) -> Tensor:
        ctx.update = update
        ctx.save_for_backward(features, labels, attention)
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        if ctx.update is not None:
            update, ctx.update = ctx.update, None
            update(*ctx.saved_tensors)
        return grad, None, None, None, None


class _CenterModule(nn.Module):
    """What the three losses share: the centers, the update rule, and where the centers are."""

    centers: Tensor
    _logits = False  # attention is given as logits
    _island_weight = 0.0

    def __init__(
        self,
        num_classes: int,
        feat_dim: int,
        alpha: float,
        update: str,
        update_in: str,
        reduction: str,
        ignore_index: int,
        process_group: Any,
        device: Any,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        for name, size in (("num_classes", num_classes), ("feat_dim", feat_dim)):
            if _checks.integer(name, size) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {size}")
        _checks.one_of("update", update, UPDATES)
        _checks.one_of("update_in", update_in, WHEN)
        _checks.reduction_code(reduction)
        for name, given in (("process_group", process_group is not None), ("update_in", update_in != "forward")):
            if update == "grad" and given:
                raise ValueError(
                    f"`{name}` belongs to update='alpha' and 'ema': with 'grad' an optimizer moves the centers"
                )
        self.num_classes, self.feat_dim = num_classes, feat_dim
        self.alpha = _checks.in_unit_interval("alpha", alpha)
        self.update, self.update_in, self.reduction = update, update_in, reduction
        self.ignore_index = _checks.integer("ignore_index", ignore_index)
        self.process_group = process_group
        self._own(_checks.floating("centers", torch.empty(num_classes, feat_dim, device=device, dtype=dtype)))
        self.reset_parameters()

    def _own(self, centers: Tensor) -> None:
        """Keep them under the one name that both kinds have in a state_dict."""
        if self.update == "grad":
            self.centers = nn.Parameter(centers)
        else:
            self.register_buffer("centers", centers)

    @property
    def process_group(self) -> Any:
        """The ranks whose rows move the centers, for replicas of them; None is this process alone."""
        return None if self._group is None else self._group.group

    @process_group.setter
    def process_group(self, group: Any) -> None:
        self._group = None if group is None else _SharedGroup(group)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the centers from N(0, 1). Shards draw apart, also on ranks that share a seed."""
        if not is_sharded(self.centers):
            nn.init.normal_(self.centers)
            return
        local = self.centers.to_local()
        generator = torch.Generator(local.device)
        seed = torch.randint(2**48, (), dtype=torch.int64).item()
        local.normal_(generator=generator.manual_seed(seed + self.centers.device_mesh.get_local_rank()))

    def shard_(self, mesh: Any) -> Any:
        """Keep on each rank the centers of its share of the classes: a DTensor, (Shard(0),) on a 1-D mesh.

        Loss, gradients and update stay what they are without shards, for this rank's own rows; the update counts the
        rows of all ranks. From then on every rank takes part in every forward pass, also with an empty batch. Centers
        on the meta device are made and drawn shard by shard, so that no rank ever holds all; else rank 0's are kept.
        With update="grad" the gradient is that of the sum of the ranks' losses, not of their mean.
        """
        from torch.distributed.tensor import Shard, distribute_tensor

        from ..ops._sharded_centers import shard, share_of

        if mesh.ndim != 1:
            raise ValueError(f"`mesh` must have 1 dimension, got {mesh.ndim}")
        if self.process_group is not None:
            raise ValueError("`process_group` must be None for centers that are sharded: their mesh has the ranks")
        if not self.centers.is_meta:
            self._own(distribute_tensor(self.centers.detach(), mesh, [Shard(0)]))
            return self
        size = len(share_of(self.num_classes, mesh))
        local = torch.empty(size, self.feat_dim, dtype=self.centers.dtype, device=mesh.device_type)
        self._own(shard(local, self.num_classes, mesh))
        self.reset_parameters()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """All centers load into shards too: each rank takes its own."""
        name = prefix + "centers"
        value = state_dict.get(name)
        if is_sharded(self.centers) and isinstance(value, Tensor) and not is_sharded(value):
            from ..ops._sharded_centers import shard, share_of

            if value.shape == self.centers.shape:
                mesh = self.centers.device_mesh
                share = share_of(self.num_classes, mesh)
                own = value[share.start : share.stop].to(self.centers.device)
                state_dict = {**state_dict, name: shard(own, self.num_classes, mesh)}
        super()._load_from_state_dict(state_dict, prefix, *rest)

    @property
    def _moves(self) -> bool:
        return self.training and self.update != "grad"

    def _update(self, features: Tensor, labels: Tensor, attention: Tensor | None) -> None:
        update_centers_(
            self.centers, features, labels, self.alpha, attention=attention, island_weight=self._island_weight,
            ignore_index=self.ignore_index, process_group=self.process_group, ema=self.update == "ema",
            attention_logits=self._logits,
        )  # fmt: skip

    def _loss_and_update(self, features: Tensor, labels: Tensor, attention: Tensor | None = None) -> Tensor:
        given = (features, labels, self.centers, attention, self._logits, self.reduction, self.ignore_index)
        if self.update_in == "forward":
            rule = (self.alpha, self.update == "ema", self._island_weight)
            return loss_and_update(*given, *rule, self.process_group)
        loss = detached_loss(*given)
        attention = None if attention is None else attention.detach()
        return _UpdateInBackward.apply(loss, self._update, features.detach(), labels, attention)

    def update_centers_(self, features: Tensor, labels: Tensor) -> None:
        """Move the centers by the rule, without a loss, in any mode."""
        self._update(features, labels, None)

    def init_centers_(self, features: Tensor, labels: Tensor) -> None:
        """Put the centers of the classes that are present at the mean of their features: (N, D), (N,)."""
        update_centers_(
            self.centers, features, labels, 1.0, ema=True, ignore_index=self.ignore_index,
            process_group=self.process_group,
        )  # fmt: skip

    def extra_repr(self) -> str:
        text = f"{self.num_classes}, {self.feat_dim}, update={self.update!r}"
        if self.update != "grad":
            text += f", alpha={self.alpha}"
        if self.update_in != "forward":
            text += f", update_in={self.update_in!r}"
        text += f", reduction={self.reduction!r}"
        return text + (f", shards={self.centers.device_mesh.size()}" if is_sharded(self.centers) else "")


class CenterLoss(_CenterModule):
    r"""Center loss with its centers: `dlkernels.center_loss`, and the rule by which the centers follow the features.

    While training, forward takes the loss and its gradient from the centers as they are, and then moves them:

        "alpha"   c_j <- c_j + alpha sum_{y_i = j} (x_i - c_j) / (1 + n_j)     the paper's rule; a fused call
        "ema"     c_j <- (1 - alpha) c_j + alpha mean_j                        of the classes present; a fused call
        "grad"    the centers are a Parameter with the exact gradient, and an optimizer moves them

    Args:
        num_classes, feat_dim: K and D. The centers (K, D) are drawn from N(0, 1), as most published code does; the
            authors' is Xavier's: `torch.nn.init.xavier_uniform_(loss.centers)`. See also `init_centers_`.
        alpha: the centers' learning rate, in [0, 1]. The weight that the loss is given in a sum has no part in it.
        update: "alpha", "ema" or "grad".
        update_in: "forward", or "backward": the centers move when the backward pass first reaches the loss. For
            activation checkpointing, which runs forward twice. Without a backward pass (also: under no_grad) nothing
            moves; a second backward pass over a retained graph moves nothing more.
        reduction: "mean" over the rows that count, "sum" or "none". The update is the same with each.
        ignore_index: labels of this value, and negative ones, leave their row out.
        process_group: for replicas of the centers: classes are summed and counted over these ranks, before the
            division, so that replicas stay equal to the bit. Every rank takes part, also with an empty batch.
        device, dtype: of the centers. float32 centers serve half-precision features and stay exact under autocast;
            `module.half()` rounds them, as any buffer, and small steps are lost from then on.

    Shape:
        features: (N, D); labels: (N,); the output is a scalar, or (N,) with reduction="none".

    Note:
        In eval mode nothing moves. In training mode the centers move under no_grad too, as BatchNorm's statistics do.
        For a step of one's own, keep the loss in eval mode and call `update_centers_`. With gradient accumulation the
        centers move with every forward pass. With "alpha" and "ema" there is no second derivative while training.

        The state_dict has one entry, `centers`, whichever the rule: checkpoints go from one to another, and those of
        modules that keep a Parameter `centers` (K, D) load. torch.compile(fullgraph=True) takes the fused call.

        DistributedDataParallel: give `process_group`, or replicas drift apart and rank 0's alone are kept. With it,
        broadcast_buffers=False saves a broadcast of the centers, if the ranks start from equal ones (one seed, or a
        checkpoint): the constructor leaves buffers alone then. For more classes than one device holds: `shard_(mesh)`.
    """

    def __init__(
        self,
        num_classes: int,
        feat_dim: int,
        *,
        alpha: float = 0.5,
        update: str = "alpha",
        update_in: str = "forward",
        reduction: str = "mean",
        ignore_index: int = -100,
        process_group: Any = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_classes, feat_dim, alpha, update, update_in, reduction, ignore_index, process_group, device, dtype
        )  # fmt: skip

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        if self._moves:
            return self._loss_and_update(features, labels)
        return center_loss(
            features, labels, self.centers, reduction=self.reduction, ignore_index=self.ignore_index
        )  # fmt: skip


class IslandLoss(_CenterModule):
    r"""Island loss with its centers: `dlkernels.island_loss`, and centers that follow the features and part.

    "alpha" and "ema" move the centers as in `CenterLoss`, and apart by the paper's term,
    - alpha island_weight / (K - 1) sum_{k != j} d cos(c_j, c_k) / d c_j, for all classes, present or not.

    Args:
        num_classes, feat_dim: as in `CenterLoss`. Centers of norm 0 are not moved apart: start elsewhere.
        island_weight: lambda_1 of the paper, >= 0.
        alpha, update, update_in, reduction, ignore_index, process_group, device, dtype: as in `CenterLoss`.

    Shape:
        features: (N, D); labels: (N,); the output is a scalar, or (N,) with reduction="none".
        forward(features, labels, return_parts=True) gives a named tuple (loss, center, pairs), with
        loss = center + island_weight * pairs, all of the centers before they move.
    """

    def __init__(
        self,
        num_classes: int,
        feat_dim: int,
        island_weight: float = 10.0,
        *,
        alpha: float = 0.5,
        update: str = "alpha",
        update_in: str = "forward",
        reduction: str = "mean",
        ignore_index: int = -100,
        process_group: Any = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_classes, feat_dim, alpha, update, update_in, reduction, ignore_index, process_group, device, dtype
        )  # fmt: skip
        self.island_weight = _checks.non_negative("island_weight", island_weight)

    @property
    def _island_weight(self) -> float:
        return self.island_weight

    def forward(self, features: Tensor, labels: Tensor, return_parts: bool = False) -> Tensor | IslandParts:
        if not self._moves:
            return island_loss(
                features, labels, self.centers, self.island_weight,
                reduction=self.reduction, ignore_index=self.ignore_index, return_parts=return_parts,
            )  # fmt: skip
        pairs = island_pairs(self.centers)
        center = self._loss_and_update(features, labels)
        parts = with_pairs(center, pairs, self.island_weight, labels, self.reduction, self.ignore_index)
        return parts if return_parts else parts.loss

    def extra_repr(self) -> str:
        return super().extra_repr() + f", island_weight={self.island_weight}"


class SparseCenterLoss(_CenterModule):
    r"""Sparse center loss with its centers: `dlkernels.sparse_center_loss`, and centers that follow the features.

    "alpha" and "ema" move the centers as in `CenterLoss`, with A_i (x_i - c_j) for x_i - c_j: c_j + alpha
    sum_{y_i = j} A_i (x_i - c_j) / (1 + n_j). A row counts in n_j whatever its attention.

    Args:
        num_classes, feat_dim: as in `CenterLoss`.
        attention_logits: forward takes the attention's logits, (N, D) or (N, D, 2).
        alpha, update, update_in, reduction, ignore_index, process_group, device, dtype: as in `CenterLoss`.

    Shape:
        features: (N, D); labels: (N,); attention: (N, D) in [0, 1], or logits, see `dlkernels.sparse_center_loss`.
        The output is a scalar, or (N,) with reduction="none".
    """

    def __init__(
        self,
        num_classes: int,
        feat_dim: int,
        *,
        alpha: float = 0.5,
        update: str = "alpha",
        update_in: str = "forward",
        reduction: str = "mean",
        ignore_index: int = -100,
        process_group: Any = None,
        attention_logits: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_classes, feat_dim, alpha, update, update_in, reduction, ignore_index, process_group, device, dtype
        )  # fmt: skip
        self._logits = self.attention_logits = attention_logits

    def forward(self, features: Tensor, labels: Tensor, attention: Tensor) -> Tensor:
        if self._moves:
            return self._loss_and_update(features, labels, attention)
        return sparse_center_loss(
            features, labels, self.centers, attention, reduction=self.reduction,
            ignore_index=self.ignore_index, attention_logits=self.attention_logits,
        )  # fmt: skip

    def update_centers_(self, features: Tensor, labels: Tensor, attention: Tensor) -> None:
        """Move the centers by the rule, without a loss, in any mode."""
        self._update(features, labels, attention)
