"""Optimizers as people write them in plain PyTorch, for `check` and `profile`: a step is a call with its learning rate.

They share no code with dlkernels and run in the dtype of the parameters that they are given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Step = Callable[[float], None]


def adamw(params: Sequence[Tensor], *, lr: float, decoupling: str = "lr", weight_decay: float, **options: Any) -> Step:
    """torch.optim.AdamW; the decay that follows the schedule alone is one divided by the first learning rate."""
    decay = weight_decay / lr if decoupling == "schedule" else weight_decay
    optimizer = torch.optim.AdamW(params, lr=lr, weight_decay=decay, **options)

    def step(lr: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()

    return step


def sgdw(
    params: Sequence[Tensor],
    *,
    lr: float,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    momentum_scaling: str = "paper",
    decoupling: str = "schedule",
    maximize: bool = False,
    **options: Any,
) -> Step:
    """The decay apart from the gradient, then torch.optim.SGD, or the paper's momentum line by line."""
    base = 1.0 if decoupling == "lr" else lr
    optimizer = torch.optim.SGD(params, lr=lr, momentum=momentum, maximize=maximize, **options)
    moments = [torch.zeros_like(p) for p in params]

    @torch.no_grad()
    def paper(lr: float) -> None:
        for p, m in zip(params, moments, strict=True):
            m.mul_(momentum).add_(p.grad, alpha=-lr if maximize else lr)
            p.sub_(m + lr / base * weight_decay * p)

    @torch.no_grad()
    def gradient(lr: float) -> None:
        torch._foreach_mul_(params, 1 - lr / base * weight_decay)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()

    return paper if momentum_scaling == "paper" else gradient


def clipped(step: Step, params: Sequence[Tensor], max_norm: float) -> Step:
    """Clip the norm of all gradients before the step."""

    def call(lr: float) -> None:
        torch.nn.utils.clip_grad_norm_(params, max_norm)
        step(lr)

    return call


def with_master(step: Step, params: Sequence[Tensor], masters: Sequence[Tensor]) -> Step:
    """Gradients to the float32 copies, a step of these, and the copies back to the parameters."""

    @torch.no_grad()
    def call(lr: float) -> None:
        for p, master in zip(params, masters, strict=True):
            master.grad = p.grad.float()
        step(lr)
        for p, master in zip(params, masters, strict=True):
            p.copy_(master)

    return call
