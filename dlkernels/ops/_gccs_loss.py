"""The two operators behind `gccs_loss`: forward and backward, on features (N, D) and labels (N,), int32 or int64.

Forward: (loss, grad, divisor), `reduction` 0 none, 1 mean, 2 sum; with `need_grad` a scalar reduction writes its
gradient too, divided by `divisor` except in float16, as the focal losses do. The divisor of a mean is the number of
classes present, at least 1.
Backward: the gradient of the per-class losses, grad_output (D,), recomputed from the features.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .._library import FusedFunction, accumulate_dtype, loop_over_batch, register, second_derivative
from ..reference import gccs_loss as reference
from ._reduced import NONE, reduced_backward, save


class GCCSLoss(FusedFunction):
    schema = (
        "gccs_loss_fwd(Tensor features, Tensor labels, float target_mean, float target_std, float eps, "
        "float kurtosis_weight, int ignore_index, int reduction, bool need_grad, bool higher_order) "
        "-> (Tensor loss, Tensor grad, Tensor divisor)"
    )
    family = "gccs_loss"

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        features, labels = inputs[:2]
        ctx.options = inputs[2:7]
        ctx.classes = features.shape[1:]
        save(ctx, inputs, output, (features, labels))

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> Any:
        if grad_output is None:
            return (None,) * 10
        features, labels, _ = ctx.saved_tensors

        def recompute(g: Tensor) -> Tensor:
            return GCCSLossBackward.call(g, features, labels, *ctx.options)

        if ctx.reduction == NONE:
            return recompute(grad_output), *(None,) * 9
        return reduced_backward(ctx, grad_output, ctx.classes, recompute), *(None,) * 9

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return loop_over_batch(GCCSLoss.call, info, in_dims, args)


class GCCSLossBackward(FusedFunction):
    schema = (
        "gccs_loss_bwd(Tensor grad_output, Tensor features, Tensor labels, float target_mean, float target_std, "
        "float eps, float kurtosis_weight, int ignore_index) -> Tensor"
    )
    family = "gccs_loss"

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.options = inputs[3:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        grad_output, features, labels = ctx.saved_tensors
        classes = lambda z: reference.gccs_loss(z, labels, *ctx.options)  # noqa: E731
        in_grad_output, (in_features,) = second_derivative(classes, grad_output, [features], [grad])
        return in_grad_output, in_features, *(None,) * 6

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return loop_over_batch(GCCSLossBackward.call, info, in_dims, args)


# Fakes ----------------------------------------------------------------------------------------------------------------


def _forward_fake(
    features, labels, target_mean, target_std, eps, kurtosis_weight, ignore_index, reduction, need_grad, higher_order
):
    dtype = accumulate_dtype(features.dtype)
    loss = features.new_empty(features.shape[1:] if reduction == NONE else (), dtype=dtype)
    grad = features.new_empty(features.shape if need_grad and reduction != NONE else (0,))
    return loss, grad, features.new_empty((), dtype=dtype)


def _backward_fake(grad_output, features, *_):
    return features.new_empty(features.shape)


register(GCCSLoss, _forward_fake)
register(GCCSLossBackward, _backward_fake)
