"""SGDW. Loshchilov & Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, algorithm 1: line 9, not line 6."""

from __future__ import annotations

from torch import Tensor


def sgdw(
    theta: Tensor, g: Tensor, m: Tensor | None, *, lr: float, beta: float, decay: float, paper: bool, nesterov: bool
) -> tuple[Tensor, Tensor | None]:
    """theta and m after a step. With `paper` the momentum accumulates lr * g, else g, and lr multiplies the sum."""
    gain, rate = (lr, 1.0) if paper else (1.0, lr)
    step = gain * g
    if m is not None:
        m = step = beta * m + gain * g
    if nesterov:
        step = g + beta * step
    return theta - decay * theta - rate * step, m
