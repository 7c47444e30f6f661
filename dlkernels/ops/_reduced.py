"""What the losses share: reductions, and a gradient that the forward pass has stored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._library import ScaleStoredGrad, scale_in_place, stored_grad_is_free

NONE, MEAN, SUM = 0, 1, 2
FORWARD_HINT = "pass higher_order=True (the default) to the loss to keep its input for second derivatives"


def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...], tensors: tuple[Any, ...]) -> None:
    """What a forward operator keeps. inputs[-3:]: reduction, need_grad, higher_order; output: loss, grad, divisor."""
    _, grad, divisor = output
    reduction, need_grad, higher_order = inputs[-3:]
    ctx.mark_non_differentiable(grad, divisor)
    ctx.set_materialize_grads(False)
    ctx.reduction = reduction
    stored = need_grad and reduction != NONE
    ctx.stored = (grad, divisor) if stored else None
    ctx.dropped_input = stored and not higher_order
    ctx.save_for_backward(*((None,) * len(tensors) if ctx.dropped_input else tensors), divisor)


def reduced_backward(ctx: Any, grad_output: Tensor, rows_shape: Any, recompute: Callable[[Tensor], Tensor]) -> Tensor:
    """Backward of a reduced loss: scale what the forward pass stored, or recompute when a graph is being made of it."""
    if ctx.stored is not None and not torch.is_grad_enabled():
        return scale_stored(ctx, grad_output, *ctx.stored)
    if ctx.dropped_input:
        raise RuntimeError(f"this loss kept its gradient but not its input: {FORWARD_HINT}")
    divisor = ctx.saved_tensors[-1]
    return recompute((grad_output / divisor).expand(rows_shape))


def scale_stored(ctx: Any, grad_output: Tensor, stored: Tensor, divisor: Tensor) -> Tensor:
    """A stored gradient times the upstream one; float16 was stored undivided. In place where this is its last use."""
    by = divisor if stored.dtype == torch.float16 else None
    if not stored_grad_is_free(stored, grad_output):
        return ScaleStoredGrad.call(grad_output, stored, by)
    ctx.stored = None  # .grad takes the buffer over without a copy
    return scale_in_place(grad_output, stored, by)
