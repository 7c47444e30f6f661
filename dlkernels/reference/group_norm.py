"""Group normalisation with its neighbours: y = act(GN(x) * (1 + scale) + shift + residual).

Wu and He, "Group Normalization", eq. 1 to 3: x_hat = (x - mean) / sqrt(var + eps), statistics over C/G channels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._activation import activate, compute


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: int,
    residual: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
) -> Tensor:
    """x (N, C, d1, ...); weight and bias (C,); scale and shift (N, C); residual like x. Returns the dtype of x."""
    groups = compute(x).reshape(x.shape[0], num_groups, x.shape[1] // num_groups, math.prod(x.shape[2:]))
    mean = groups.mean((2, 3), keepdim=True)
    centred = groups - mean
    variance = centred.square().mean((2, 3), keepdim=True)
    y = (centred * torch.rsqrt(variance + eps)).reshape(x.shape)

    ones = [1] * (x.dim() - 2)
    if weight is not None:
        y = y * compute(weight).view(1, -1, *ones)
    if bias is not None:
        y = y + compute(bias).view(1, -1, *ones)
    if scale is not None:
        y = y * (1 + compute(scale).view(*scale.shape, *ones))
    if shift is not None:
        y = y + compute(shift).view(*shift.shape, *ones)
    if residual is not None:
        y = y + compute(residual)
    return activate(y, activation).to(x.dtype)
