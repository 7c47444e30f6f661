"""The four operators behind the focal-loss family: sigmoid and softmax, forward and backward.

Forward: (loss, grad, divisor). `reduction` 0 none, 1 mean, 2 sum. With `need_grad` a scalar reduction writes its
gradient while the logits are at hand: `grad` is d loss / d input already divided by `divisor`, except in float16, where
1 / N would underflow before a loss scale can help: there the backward pass divides.
Backward: the gradient of the per-row (per-element) losses, recomputed from the input.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .._library import FusedFunction, accumulate_dtype, batch_first, loop_over_batch, register, second_derivative
from ..reference import focal_loss as reference_focal_loss
from ._reduced import NONE, reduced_backward, save

# Sigmoid --------------------------------------------------------------------------------------------------------------


class SigmoidFocalLoss(FusedFunction):
    schema = (
        "sigmoid_focal_loss_fwd(Tensor input, Tensor target, Tensor? normalizer, float alpha, float gamma, "
        "int ignore_index, int reduction, bool need_grad, bool higher_order) -> (Tensor, Tensor, Tensor)"
    )
    family = "focal_loss"

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        input, target, _, ctx.alpha, ctx.gamma, ctx.ignore_index = inputs[:6]
        save(ctx, inputs, output, (input, target))

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> Any:
        if grad_output is None:
            return (None,) * 9
        input, target, _ = ctx.saved_tensors

        def recompute(g: Tensor) -> Tensor:
            return SigmoidFocalLossBackward.call(g, input, target, ctx.alpha, ctx.gamma, ctx.ignore_index)

        if ctx.reduction == NONE:
            return recompute(grad_output), *(None,) * 8
        return reduced_backward(ctx, grad_output, None if input is None else input.shape, recompute), *(None,) * 8

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        if args[6] != NONE:
            return loop_over_batch(SigmoidFocalLoss.call, info, in_dims, args)
        input, target = (batch_first(a, d, info.batch_size) for a, d in zip(args[:2], in_dims[:2], strict=True))
        # 0-d logits with 0-d class targets do not exist, so that a batch in front changes no meaning.
        return SigmoidFocalLoss.call(input, target, *args[2:]), (0, None, None)


class SigmoidFocalLossBackward(FusedFunction):
    schema = (
        "sigmoid_focal_loss_bwd(Tensor grad_output, Tensor input, Tensor target, float alpha, float gamma, "
        "int ignore_index) -> Tensor"
    )
    family = "focal_loss"

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.options = inputs[3:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        grad_output, input, target = ctx.saved_tensors
        rows = lambda x: reference_focal_loss.sigmoid_focal_loss(x, target, *ctx.options)  # noqa: E731
        in_grad_output, (in_input,) = second_derivative(rows, grad_output, [input], [grad])
        return in_grad_output, in_input, *(None,) * 4

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        tensors = (batch_first(a, d, info.batch_size) for a, d in zip(args[:3], in_dims[:3], strict=True))
        return SigmoidFocalLossBackward.call(*tensors, *args[3:]), 0


# Softmax --------------------------------------------------------------------------------------------------------------


class SoftmaxFocalLoss(FusedFunction):
    schema = (
        "softmax_focal_loss_fwd(Tensor input, Tensor target, Tensor? weight, Tensor? normalizer, float gamma, "
        "float label_smoothing, int ignore_index, bool mean_of_weights, int reduction, bool need_grad, "
        "bool higher_order) -> (Tensor, Tensor, Tensor)"
    )
    family = "focal_loss"

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        input, target, weight, _, ctx.gamma, ctx.label_smoothing, ctx.ignore_index = inputs[:7]
        save(ctx, inputs, output, (input, target, weight))

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> Any:
        if grad_output is None:
            return (None,) * 11
        input, target, weight, _ = ctx.saved_tensors

        def recompute(g: Tensor) -> Tensor:
            return SoftmaxFocalLossBackward.call(
                g, input, target, weight, ctx.gamma, ctx.label_smoothing, ctx.ignore_index
            )

        if ctx.reduction == NONE:
            return recompute(grad_output), *(None,) * 10
        rows = None if input is None else (input.shape[0], *input.shape[2:])
        return reduced_backward(ctx, grad_output, rows, recompute), *(None,) * 10

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        if args[8] != NONE or in_dims[2] is not None:
            return loop_over_batch(SoftmaxFocalLoss.call, info, in_dims, args)
        (input, target), restore = _fold(info, in_dims[:2], args[:2])
        loss, grad, divisor = SoftmaxFocalLoss.call(input, target, *args[2:])
        return (restore(loss), grad, divisor), (0, None, None)


class SoftmaxFocalLossBackward(FusedFunction):
    schema = (
        "softmax_focal_loss_bwd(Tensor grad_output, Tensor input, Tensor target, Tensor? weight, float gamma, "
        "float label_smoothing, int ignore_index) -> Tensor"
    )
    family = "focal_loss"

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:4])
        ctx.options = inputs[4:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        grad_output, input, target, weight = ctx.saved_tensors
        rows = lambda x: reference_focal_loss.softmax_focal_loss(x, target, weight, *ctx.options)  # noqa: E731
        in_grad_output, (in_input,) = second_derivative(rows, grad_output, [input], [grad])
        return in_grad_output, in_input, *(None,) * 5

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        if in_dims[3] is not None:
            return loop_over_batch(SoftmaxFocalLossBackward.call, info, in_dims, args)
        tensors, restore = _fold(info, in_dims[:3], args[:3])
        return restore(SoftmaxFocalLossBackward.call(*tensors, *args[3:])), 0


def _fold(info: Any, in_dims: Any, tensors: Any) -> tuple[list[Tensor], Any]:
    """Fold the vmap dimension into the rows: (B, N, ...) -> (B N, ...), and the way back."""
    size = info.batch_size
    folded = [batch_first(a, d, size).flatten(0, 1) for a, d in zip(tensors, in_dims, strict=True)]
    return folded, lambda out: out.unflatten(0, (size, -1 if size else out.shape[0]))


# Fakes ----------------------------------------------------------------------------------------------------------------


def _forward_outputs(input: Tensor, rows_shape: Any, reduction: int, need_grad: bool) -> tuple[Tensor, ...]:
    dtype = accumulate_dtype(input.dtype)
    loss = input.new_empty(rows_shape if reduction == NONE else (), dtype=dtype)
    grad = input.new_empty(input.shape if need_grad and reduction != NONE else (0,))
    return loss, grad, input.new_empty((), dtype=dtype)


def _sigmoid_fwd_fake(input, target, normalizer, alpha, gamma, ignore_index, reduction, need_grad, higher_order):
    return _forward_outputs(input, input.shape, reduction, need_grad)


def _softmax_fwd_fake(
    input, target, weight, normalizer, gamma, label_smoothing, ignore_index, mean_of_weights, reduction, need_grad,
    higher_order,
):  # fmt: skip
    return _forward_outputs(input, (input.shape[0], *input.shape[2:]), reduction, need_grad)


def _like_input(grad_output, input, *_):
    return input.new_empty(input.shape)


register(SigmoidFocalLoss, _sigmoid_fwd_fake)
register(SigmoidFocalLossBackward, _like_input)
register(SoftmaxFocalLoss, _softmax_fwd_fake)
register(SoftmaxFocalLossBackward, _like_input)
