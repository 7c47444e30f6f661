"""Stochastic depth: whole residual branches are dropped, one sample (or batch) at a time.

Huang et al., "Deep Networks with Stochastic Depth", eq. 2, with the division by the survival rate in training.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._activation import compute


def draw_noise(input: Tensor, p: float, rows: int) -> Tensor:
    """(rows,) factors: 1 / (1 - p) with probability 1 - p, else 0; torchvision's draws from the same seed."""
    noise = torch.empty((rows,), dtype=input.dtype, device=input.device).bernoulli_(1.0 - p)
    return noise.div_(1.0 - p) if p < 1.0 else noise


def stochastic_depth(x: Tensor, noise: Tensor, residual: Tensor | None) -> Tensor:
    """x (N, M), noise (N,), residual (N, M) or None. Returns the dtype of x. What is dropped does not count at all."""
    f = compute(noise).unsqueeze(-1)
    y = torch.where(f == 0, 0, compute(x)) * f
    if residual is not None:
        y = y + compute(residual)
    return y.to(x.dtype)
