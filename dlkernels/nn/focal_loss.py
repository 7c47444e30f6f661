"""Modules of the focal-loss family."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import _checks
from ..ops import focal_loss as ops


class SigmoidFocalLoss(nn.Module):
    """`dlkernels.sigmoid_focal_loss` as a module.

    Args:
        alpha, gamma, reduction, ignore_index, higher_order: as in the function; `reduction` defaults to "mean".

    Shape:
        inputs: any; targets: the shape of inputs, or inputs.shape[:-1] for class indices.
        forward also takes `normalizer` (with reduction="sum"), which changes from batch to batch.
    """

    def __init__(
        self,
        alpha: float | None = 0.25,
        gamma: float = 2.0,
        reduction: str = "mean",
        *,
        ignore_index: int = -100,
        higher_order: bool = True,
    ) -> None:
        super().__init__()
        _checks.reduction_code(reduction)
        if alpha is not None and not _checks.number("alpha", alpha) < 0:
            _checks.in_unit_interval("alpha", alpha)
        self.alpha = alpha
        self.gamma = _checks.non_negative("gamma", gamma)
        self.reduction = reduction
        self.ignore_index = _checks.integer("ignore_index", ignore_index)
        self.higher_order = higher_order

    def forward(self, inputs: Tensor, targets: Tensor, normalizer: float | Tensor | None = None) -> Tensor:
        return ops.sigmoid_focal_loss(
            inputs, targets, self.alpha, self.gamma, self.reduction,
            ignore_index=self.ignore_index, normalizer=normalizer, higher_order=self.higher_order,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, gamma={self.gamma}, reduction={self.reduction!r}"


class SoftmaxFocalLoss(nn.Module):
    """`dlkernels.softmax_focal_loss` as a module.

    Args:
        alpha: None, a number in [0, 1], or a sequence or tensor (C,) of per-class weights, kept as a buffer.
        gamma, reduction, ignore_index, label_smoothing, higher_order: as in the function.

    Shape:
        input: (N, C) or (N, C, d1, ...); target: (N,), (N, d1, ...) or probabilities of the shape of input.
    """

    def __init__(
        self,
        alpha: float | Tensor | None = None,
        gamma: float = 2.0,
        reduction: str = "mean",
        *,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        higher_order: bool = True,
    ) -> None:
        super().__init__()
        _checks.reduction_code(reduction)
        if isinstance(alpha, (Tensor, list, tuple)):
            self.register_buffer("alpha", torch.as_tensor(alpha, dtype=torch.float32))
        else:
            self.alpha = None if alpha is None else _checks.in_unit_interval("alpha", alpha)
        self.gamma = _checks.non_negative("gamma", gamma)
        self.reduction = reduction
        self.ignore_index = _checks.integer("ignore_index", ignore_index)
        self.label_smoothing = _checks.in_unit_interval("label_smoothing", label_smoothing)
        self.higher_order = higher_order

    def forward(self, input: Tensor, target: Tensor, normalizer: float | Tensor | None = None) -> Tensor:
        return ops.softmax_focal_loss(
            input, target, self.alpha, self.gamma, self.reduction, ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing, normalizer=normalizer, higher_order=self.higher_order,
        )  # fmt: skip

    def extra_repr(self) -> str:
        alpha = f"({self.alpha.numel()} classes)" if isinstance(self.alpha, Tensor) else self.alpha
        return f"alpha={alpha}, gamma={self.gamma}, reduction={self.reduction!r}"


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """`torch.nn.CrossEntropyLoss` on the fused cross entropy: same arguments, buffers and state_dict.

    Args:
        weight, ignore_index, reduction, label_smoothing: as torch's; the legacy arguments must stay None.
        higher_order: as in `dlkernels.cross_entropy`.

    Shape:
        input: (C,), (N, C) or (N, C, d1, ...); target: (), (N,), (N, d1, ...) or probabilities of the shape of input.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: None = None,
        ignore_index: int = -100,
        reduce: None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        higher_order: bool = True,
    ) -> None:
        if size_average is not None or reduce is not None:
            raise ValueError("`size_average` and `reduce` must be None: use `reduction`")
        _checks.reduction_code(reduction)
        _checks.in_unit_interval("label_smoothing", label_smoothing)
        super().__init__(
            weight=weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
        )  # fmt: skip
        self.higher_order = higher_order

    def forward(self, input: Tensor, target: Tensor, normalizer: float | Tensor | None = None) -> Tensor:
        return ops.cross_entropy(
            input, target, self.weight, None, self.ignore_index, None, self.reduction, self.label_smoothing,
            normalizer=normalizer, higher_order=self.higher_order,
        )  # fmt: skip
