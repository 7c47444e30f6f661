"""The operator behind `stochastic_depth`, on (N, M) rows: y = residual + noise[n] x.

Its backward pass in x is the same operator on the upstream gradient, without the residual, whose gradient is that
gradient itself: derivatives of every order are this operator again.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .._library import FusedFunction, fold, register, unfold


class StochasticDepth(FusedFunction):
    schema = "stochastic_depth_fwd(Tensor input, Tensor noise, Tensor? residual) -> Tensor"
    family = "stochastic_depth"

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, noise, residual = inputs
        ctx.has_residual = residual is not None
        ctx.save_for_backward(noise)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        (noise,) = ctx.saved_tensors
        dx = StochasticDepth.call(grad_output, noise, None) if ctx.needs_input_grad[0] else None
        return dx, None, grad_output if ctx.has_residual else None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return unfold(info, StochasticDepth.call(*fold(info, in_dims, args)))[0], 0


def _forward_fake(input: Tensor, noise: Tensor, residual: Tensor | None) -> Tensor:
    return input.new_empty(input.shape)


register(StochasticDepth, _forward_fake)
