"""The two operators behind `region_biased_loss`: forward and backward, on attention (N, R) and a mask (N, R) or None.

Forward: (loss, grad, divisor), `reduction` 0 none, 1 mean, 2 sum; with `need_grad` a scalar reduction writes its
gradient too, divided by `divisor` except in float16, as the focal losses do. A mean over no row at all is 0.
Backward: the gradient of the per-row losses, recomputed from the attention.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .._library import FusedFunction, accumulate_dtype, fold, loop_over_batch, register, second_derivative, unfold
from ..reference import region_biased_loss as reference
from ._reduced import NONE, reduced_backward, save


class RegionBiasedLoss(FusedFunction):
    schema = (
        "region_biased_loss_fwd(Tensor attention, Tensor? mask, int origin_index, float margin, bool softmax, "
        "int reduction, bool need_grad, bool higher_order) -> (Tensor loss, Tensor grad, Tensor divisor)"
    )
    family = "region_biased_loss"

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        attention, mask = inputs[:2]
        ctx.options = inputs[2:5]
        save(ctx, inputs, output, (attention, mask))

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> Any:
        if grad_output is None:
            return (None,) * 8
        attention, mask, _ = ctx.saved_tensors

        def recompute(g: Tensor) -> Tensor:
            return RegionBiasedLossBackward.call(g, attention, mask, *ctx.options)

        if ctx.reduction == NONE:
            return recompute(grad_output), *(None,) * 7
        rows = None if attention is None else attention.shape[:1]
        return reduced_backward(ctx, grad_output, rows, recompute), *(None,) * 7

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        if args[5] != NONE:
            return loop_over_batch(RegionBiasedLoss.call, info, in_dims, args)
        loss, grad, divisor = RegionBiasedLoss.call(*fold(info, in_dims[:2], args[:2]), *args[2:])
        return (*unfold(info, loss), grad, divisor), (0, None, None)


class RegionBiasedLossBackward(FusedFunction):
    schema = (
        "region_biased_loss_bwd(Tensor grad_output, Tensor attention, Tensor? mask, int origin_index, float margin, "
        "bool softmax) -> Tensor"
    )
    family = "region_biased_loss"

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.options = inputs[3:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        grad_output, attention, mask = ctx.saved_tensors
        rows = lambda x: reference.region_biased_loss(x, mask, *ctx.options)  # noqa: E731
        in_grad_output, (in_attention,) = second_derivative(rows, grad_output, [attention], [grad])
        return in_grad_output, in_attention, *(None,) * 4

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return unfold(info, RegionBiasedLossBackward.call(*fold(info, in_dims[:3], args[:3]), *args[3:]))[0], 0


# Fakes ----------------------------------------------------------------------------------------------------------------


def _forward_fake(attention, mask, origin_index, margin, softmax, reduction, need_grad, higher_order):
    dtype = accumulate_dtype(attention.dtype)
    loss = attention.new_empty(attention.shape[:1] if reduction == NONE else (), dtype=dtype)
    grad = attention.new_empty(attention.shape if need_grad and reduction != NONE else (0,))
    return loss, grad, attention.new_empty((), dtype=dtype)


def _backward_fake(grad_output, attention, *_):
    return attention.new_empty(attention.shape)


register(RegionBiasedLoss, _forward_fake)
register(RegionBiasedLossBackward, _backward_fake)
