"""The two operators behind `squeeze_excite`, on (N, C, S) or, with channels_last, (N, S, C).

Forward: (y, mean (N, C), hidden (N, R) before its activation, gate (N, C)), the last three in float32 (float64).
Backward: one sweep for the gate's gradient, the two small layers, one sweep for dx.
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
from ..reference import squeeze_excite as reference


class SqueezeExcite(FusedFunction):
    schema = (
        "squeeze_excite_fwd(Tensor input, Tensor? w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? residual, "
        "int activation, int gate, int residual_activation, bool channels_last) -> (Tensor, Tensor, Tensor, Tensor)"
    )
    family = "squeeze_excite"

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        input, w1, b1, w2, b2, residual = inputs[:6]
        ctx.options = inputs[6:]
        _, mean, hidden, gate = output
        ctx.mark_non_differentiable(mean, hidden, gate)
        ctx.set_materialize_grads(False)
        ctx.has_residual = residual is not None
        # Without an activation behind the sum the residual's gradient is the upstream one.
        kept = residual if ctx.options[2] else None
        ctx.save_for_backward(input, mean, hidden, gate, w1, b1, w2, b2, kept)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> Any:
        if grad_output is None:
            return (None,) * 10
        saved = ctx.saved_tensors
        w1, b1, _, b2, residual = saved[4:]
        dx, dw1, db1, dw2, db2, dresidual = SqueezeExciteBackward.call(grad_output, *saved, *ctx.options)
        if ctx.has_residual and residual is None:
            dresidual = grad_output
        return (
            dx,
            None if w1 is None else dw1,
            None if b1 is None else db1,
            dw2,
            None if b2 is None else db2,
            dresidual if ctx.has_residual else None,
            *(None,) * 4,
        )

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        if any(d is not None for d in in_dims[1:5]):
            return loop_over_batch(SqueezeExcite.call, info, in_dims, args)
        x, residual = fold(info, (in_dims[0], in_dims[5]), (args[0], args[5]))
        return unfold(info, *SqueezeExcite.call(x, *args[1:5], residual, *args[6:])), (0, 0, 0, 0)


class SqueezeExciteBackward(FusedFunction):
    schema = (
        "squeeze_excite_bwd(Tensor grad_output, Tensor input, Tensor mean, Tensor hidden, Tensor gate_value, "
        "Tensor? w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? residual, int activation, int gate, "
        "int residual_activation, bool channels_last) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    )
    family = "squeeze_excite"

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.options = inputs[10:]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:2], *inputs[5:10])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        grad_output, *tensors = ctx.saved_tensors
        activation, gate, residual_activation, channels_last = ctx.options

        def function(x: Tensor, w1: Any, b1: Any, w2: Tensor, b2: Any, residual: Any) -> Tensor:
            if channels_last:
                x, residual = x.mT, None if residual is None else residual.mT
            y = reference.squeeze_excite(x, w1, b1, w2, b2, residual, activation, gate, residual_activation)
            return y.mT if channels_last else y

        in_grad, grads = second_derivative(function, grad_output, tensors, cotangents)
        return in_grad, grads[0], None, None, None, *grads[1:], *(None,) * 4

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return loop_over_batch(SqueezeExciteBackward.call, info, in_dims, args)


def _forward_fake(input, w1, b1, w2, b2, residual, activation, gate, residual_activation, channels_last):
    dtype = accumulate_dtype(input.dtype)
    per_channel = (input.shape[0], input.shape[2 if channels_last else 1])
    return (
        input.new_empty(input.shape),
        input.new_empty(per_channel, dtype=dtype),
        input.new_empty((input.shape[0], 0 if w1 is None else w1.shape[0]), dtype=dtype),
        input.new_empty(per_channel, dtype=dtype),
    )


def _backward_fake(grad_output, input, mean, hidden, gate_value, w1, b1, w2, b2, residual, *_):
    def like(t: Tensor | None) -> Tensor:
        return input.new_empty((0,)) if t is None else t.new_empty(t.shape)

    return like(input), like(w1), like(b1), like(w2), like(b2), like(residual)


register(SqueezeExcite, _forward_fake)
register(SqueezeExciteBackward, _backward_fake)
