"""The operators behind the center-loss family: the loss and its gradients, the centers' update, the island's pairs.

`attention` (N, D) weighs each square; with `logits` it is the argument of a sigmoid. Labels below 0 and ignore_index
leave their row out. `reduction` 0 none, 1 mean, 2 sum. With `need_grad` the forward pass stores the gradients in
features and attention while they are at hand: of a row's own loss for "none", else divided by `divisor` as in the
focal-loss family. The gradient in the centers comes from the backward operator alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._library import (
    FusedFunction,
    accumulate_dtype,
    fold,
    loop_over_batch,
    register,
    register_mutation,
    second_derivative,
    unfold,
)
from ..reference import center_loss as reference
from ._reduced import FORWARD_HINT, NONE, scale_stored


class CenterLoss(FusedFunction):
    schema = (
        "center_loss_fwd(Tensor features, Tensor labels, Tensor centers, Tensor? attention, bool logits, "
        "int ignore_index, int reduction, bool need_grad, bool higher_order) -> (Tensor, Tensor, Tensor, Tensor)"
    )
    family = "center_loss"

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        features, labels, centers, attention, ctx.logits, ctx.ignore_index = inputs[:6]
        ctx.reduction, need_grad, higher_order = inputs[6:]
        _, grad, grad_attention, divisor = output
        ctx.mark_non_differentiable(grad, grad_attention, divisor)
        ctx.set_materialize_grads(False)
        ctx.stored = (grad, grad_attention if attention is not None else None) if need_grad else None
        ctx.dropped_input = need_grad and not higher_order
        kept = (None,) * 4 if ctx.dropped_input else (features, labels, centers, attention)
        ctx.save_for_backward(*kept, divisor)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> Any:
        if grad_output is None:
            return (None,) * 9
        features, labels, centers, attention, divisor = ctx.saved_tensors
        if ctx.stored is not None and not torch.is_grad_enabled():
            dx, dattention = (None if t is None else _scaled(ctx, grad_output, t, divisor) for t in ctx.stored)
            return dx, None, None, dattention, *(None,) * 5
        if ctx.dropped_input:
            raise RuntimeError(f"this loss kept its gradient but not its input: {FORWARD_HINT}")
        rows = grad_output if ctx.reduction == NONE else (grad_output / divisor).expand(labels.shape)
        need_centers = ctx.needs_input_grad[2]
        dx, dcenters, dattention = CenterLossBackward.call(
            rows, features, labels, centers, attention, ctx.logits, ctx.ignore_index, need_centers
        )
        return (
            *(dx, None, dcenters if need_centers else None, None if attention is None else dattention),
            *(None,) * 5,
        )

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        if args[6] != NONE or in_dims[2] is not None:
            return loop_over_batch(CenterLoss.call, info, in_dims, args)
        x, y, a = fold(info, (*in_dims[:2], in_dims[3]), (*args[:2], args[3]))
        loss, grad, grad_attention, divisor = CenterLoss.call(x, y, args[2], a, *args[4:])
        return (*unfold(info, loss), grad, grad_attention, divisor), (0, None, None, None)


def _scaled(ctx: Any, grad_output: Tensor, stored: Tensor, divisor: Tensor) -> Tensor:
    if ctx.reduction == NONE:
        return (stored * grad_output[:, None]).to(stored.dtype)
    return scale_stored(ctx, grad_output, stored, divisor)


class CenterLossBackward(FusedFunction):
    schema = (
        "center_loss_bwd(Tensor grad_output, Tensor features, Tensor labels, Tensor centers, Tensor? attention, "
        "bool logits, int ignore_index, bool need_centers) -> (Tensor, Tensor, Tensor)"
    )
    family = "center_loss"

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        grad_output, features, labels, centers, attention, ctx.logits, ctx.ignore_index, ctx.need_centers = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad_output, features, centers, attention, labels)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        grad_output, *tensors, labels = ctx.saved_tensors
        if not ctx.need_centers:  # that output is empty
            cotangents = (cotangents[0], None, cotangents[2])

        def rows(x: Tensor, c: Tensor, a: Tensor | None) -> Tensor:
            return reference.center_loss(x, labels, c, a, ctx.logits, ctx.ignore_index)

        in_grad, (dx, dcenters, dattention) = second_derivative(rows, grad_output, tensors, cotangents)
        return in_grad, dx, None, dcenters, dattention, *(None,) * 3

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return loop_over_batch(CenterLossBackward.call, info, in_dims, args)


class IslandPairs(FusedFunction):
    """sum over ordered pairs of cos + 1. Outputs: the value, S (D,) and 1 / ||c_j|| (K,), for the backward pass."""

    schema = "island_pairs_fwd(Tensor centers) -> (Tensor, Tensor, Tensor)"
    family = "center_loss"

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, *output[1:])

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> Any:
        return None if grad_output is None else IslandPairsBackward.call(grad_output, *ctx.saved_tensors)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return loop_over_batch(IslandPairs.call, info, in_dims, args)


class IslandPairsBackward(FusedFunction):
    schema = "island_pairs_bwd(Tensor grad_output, Tensor centers, Tensor total, Tensor inverse_norms) -> Tensor"
    family = "center_loss"

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        grad_output, centers = ctx.saved_tensors
        in_grad, (dcenters,) = second_derivative(reference.island_pairs, grad_output, (centers,), (grad,))
        return in_grad, dcenters, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return loop_over_batch(IslandPairsBackward.call, info, in_dims, args)


def _forward_fake(features, labels, centers, attention, logits, ignore_index, reduction, need_grad, higher_order):
    dtype = accumulate_dtype(features.dtype)
    grad = features.new_empty(features.shape if need_grad else (0,))
    like = features if attention is None else attention
    grad_attention = like.new_empty(like.shape if need_grad and attention is not None else (0,))
    loss = features.new_empty(labels.shape if reduction == NONE else (), dtype=dtype)
    return loss, grad, grad_attention, features.new_empty((), dtype=dtype)


def _backward_fake(grad_output, features, labels, centers, attention, logits, ignore_index, need_centers):
    like = features if attention is None else attention
    return (
        features.new_empty(features.shape),
        centers.new_empty(centers.shape if need_centers else (0,)),
        like.new_empty(like.shape if attention is not None else (0,)),
    )


def _pairs_fake(centers):
    dtype = accumulate_dtype(centers.dtype)
    return tuple(centers.new_empty(shape, dtype=dtype) for shape in ((), centers.shape[1:], centers.shape[:1]))


def _pairs_backward_fake(grad_output, centers, total, inverse_norms):
    return centers.new_empty(centers.shape)


register(CenterLoss, _forward_fake)
register(CenterLossBackward, _backward_fake)
register(IslandPairs, _pairs_fake)
register(IslandPairsBackward, _pairs_backward_fake)

# centers <- their update. Not differentiable; features of a loss beside it see the centers from before.
update_centers_ = register_mutation(
    "update_centers_(Tensor(a!) centers, Tensor features, Tensor labels, Tensor? attention, bool logits, "
    "float alpha, bool ema, float island_weight, int ignore_index) -> ()",
    "center_loss",
)
