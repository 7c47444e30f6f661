"""The two operators behind `group_norm`, on (N, C, S) or, with channels_last, (N, S, C).

Forward: (y, mean, rstd), the statistics (N, G) in float32 (float64). Backward: recomputes what lies between x and y
from x and the statistics; y is never kept, so that whoever gets it may change it in place.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .._library import (
    FusedFunction,
    accumulate_dtype,
    fold,
    loop_over_batch,
    register,
    second_derivative,
    unfold,
)
from ..reference import group_norm as reference


class GroupNorm(FusedFunction):
    schema = (
        "group_norm_fwd(Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? scale, Tensor? shift, "
        "int num_groups, float eps, int activation, bool channels_last) -> (Tensor, Tensor, Tensor)"
    )
    family = "group_norm"

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        input, weight, bias, residual, scale, shift, ctx.num_groups, ctx.eps, ctx.activation, ctx.channels_last = inputs
        _, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.has_residual = residual is not None
        # Without an activation the residual's gradient is the upstream one, and its values are not needed.
        ctx.save_for_backward(input, mean, rstd, weight, bias, residual if ctx.activation else None, scale, shift)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> Any:
        if grad_output is None:
            return (None,) * 10
        saved = ctx.saved_tensors
        weight, bias, residual, scale, shift = saved[3:]
        options = (ctx.num_groups, ctx.eps, ctx.activation, ctx.channels_last)
        dx, dweight, dbias, dresidual, dscale, dshift = GroupNormBackward.call(grad_output, *saved, *options)
        if ctx.has_residual and residual is None:
            dresidual = grad_output
        given = (weight, bias, dresidual if ctx.has_residual else None, scale, shift)
        grads = (dweight, dbias, dresidual, dscale, dshift)
        return dx, *(None if t is None else g for t, g in zip(given, grads, strict=True)), *(None,) * 4

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        if in_dims[1] is not None or in_dims[2] is not None:
            return loop_over_batch(GroupNorm.call, info, in_dims, args)
        x, residual, scale, shift = fold(info, (in_dims[0], *in_dims[3:6]), (args[0], *args[3:6]))
        out = GroupNorm.call(x, args[1], args[2], residual, scale, shift, *args[6:])
        return unfold(info, *out), (0, 0, 0)


class GroupNormBackward(FusedFunction):
    schema = (
        "group_norm_bwd(Tensor grad_output, Tensor input, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, "
        "Tensor? residual, Tensor? scale, Tensor? shift, int num_groups, float eps, int activation, "
        "bool channels_last) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    )
    family = "group_norm"

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        grad_output, input, _, _, weight, bias, residual, scale, shift = inputs[:9]
        ctx.num_groups, ctx.eps, ctx.activation, ctx.channels_last = inputs[9:]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad_output, input, weight, bias, residual, scale, shift)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        grad_output, *tensors = ctx.saved_tensors
        around = _like_reference(ctx)
        in_grad, grads = second_derivative(around, grad_output, tensors, cotangents)
        return in_grad, grads[0], None, None, *grads[1:], *(None,) * 4

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return loop_over_batch(GroupNormBackward.call, info, in_dims, args)


def _like_reference(ctx: Any) -> Any:
    """The reference as a function of the operator's tensors."""

    def function(x: Tensor, weight: Any, bias: Any, residual: Any, scale: Any, shift: Any) -> Tensor:
        if ctx.channels_last:
            x, residual = x.mT, None if residual is None else residual.mT
        y = reference.group_norm(x, ctx.num_groups, weight, bias, ctx.eps, ctx.activation, residual, scale, shift)
        return y.mT if ctx.channels_last else y

    return function


def _forward_fake(input, weight, bias, residual, scale, shift, num_groups, eps, activation, channels_last):
    statistics = (input.shape[0], num_groups)
    dtype = accumulate_dtype(input.dtype)
    return (
        input.new_empty(input.shape),
        input.new_empty(statistics, dtype=dtype),
        input.new_empty(statistics, dtype=dtype),
    )


def _backward_fake(grad_output, input, mean, rstd, weight, bias, residual, scale, shift, *_):
    def like(t: Tensor | None) -> Tensor:
        return input.new_empty((0,)) if t is None else t.new_empty(t.shape)

    return like(input), like(weight), like(bias), like(residual), like(scale), like(shift)


register(GroupNorm, _forward_fake)
register(GroupNormBackward, _backward_fake)
