"""The two operators behind `weight_norm`, on v (A, K, B) and g (K,): one norm per k, over A and B.

Forward: (w, norm), the norm (K,) in float32 (float64). Backward: (dv, dg) from v, g and the norm; w is never kept.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .._library import FusedFunction, accumulate_dtype, batch_first, register, second_derivative
from ..reference import weight_norm as reference


class WeightNorm(FusedFunction):
    schema = "weight_norm_fwd(Tensor v, Tensor g) -> (Tensor, Tensor)"
    family = "weight_norm"

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, output[1])

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> Any:
        if grad_output is None:
            return None, None
        return WeightNormBackward.call(grad_output, *ctx.saved_tensors)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        w, norm = WeightNorm.call(*_fold(info, in_dims, args))
        return (_unfold(info, w), norm.unflatten(0, (info.batch_size, -1))), (1, 0)


class WeightNormBackward(FusedFunction):
    schema = "weight_norm_bwd(Tensor grad_output, Tensor v, Tensor g, Tensor norm) -> (Tensor, Tensor)"
    family = "weight_norm"

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:3])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        grad_output, *tensors = ctx.saved_tensors
        in_grad, grads = second_derivative(_like_reference, grad_output, tensors, cotangents)
        return in_grad, *grads, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        dv, dg = WeightNormBackward.call(*_fold(info, in_dims, args))
        return (_unfold(info, dv), dg.unflatten(0, (info.batch_size, -1))), (1, 0)


def _fold(info: Any, in_dims: Any, args: Any) -> list[Tensor]:
    """The vmap dimension beside k: (A, V K, B) and (V K,)."""
    folded = [batch_first(t, d, info.batch_size) for t, d in zip(args, in_dims, strict=True)]
    return [t.movedim(0, 1).flatten(1, 2) if t.dim() == 4 else t.flatten(0, 1) for t in folded]


def _unfold(info: Any, x: Tensor) -> Tensor:
    return x.unflatten(1, (info.batch_size, x.shape[1] // info.batch_size if info.batch_size else x.shape[1]))


def _like_reference(v: Tensor, g: Tensor) -> Tensor:
    """The reference as a function of the operator's tensors."""
    return reference.weight_norm(v, g.unsqueeze(-1), (0, 2))[0]


def _forward_fake(v: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), v.new_empty((v.shape[1],), dtype=accumulate_dtype(v.dtype))


def _backward_fake(grad_output: Tensor, v: Tensor, g: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), g.new_empty(g.shape)


register(WeightNorm, _forward_fake)
register(WeightNormBackward, _backward_fake)
