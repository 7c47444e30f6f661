"""The layers as people write them in plain PyTorch: what `check`, `demo` and `profile` compare the fused ones with.

They share no code with dlkernels and run in the dtype that they are given.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda y: y,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
}
GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "hard_sigmoid": lambda z: F.relu6(z + 3) / 6,  # F.hardsigmoid multiplies by 1/6 in float32, in float64 too
    "relu": F.relu,
}


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: str | None = None,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """F.group_norm, then the modulation, the residual and the activation one after the other."""
    y = F.group_norm(input, num_groups, weight, bias, eps)
    ones = [1] * (input.dim() - 2)
    if scale is not None:
        y = y * (1 + scale.reshape(*scale.shape, *ones))
    if shift is not None:
        y = y + shift.reshape(*shift.shape, *ones)
    if residual is not None:
        y = y + residual
    return ACTIVATIONS[activation](y)


def squeeze_excite(
    x: Tensor,
    w1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str = "relu",
    gate: str = "sigmoid",
    residual: Tensor | None = None,
    residual_activation: str | None = None,
    layout: str = "channels_first",
) -> Tensor:
    """Mean, Linear, activation, Linear, gate, product; Linear where others have 1x1 convolutions."""
    first = layout == "channels_first"
    z = x.flatten(2).mean(2) if first else x.flatten(1, -2).mean(1)
    if w1 is not None:
        z = ACTIVATIONS[activation](F.linear(z, w1.flatten(1), b1))
    e = GATES[gate](F.linear(z, w2.flatten(1), b2))
    ones = [1] * (x.dim() - 2)
    y = x * (e.reshape(*e.shape, *ones) if first else e.reshape(e.shape[0], *ones, e.shape[1]))
    return ACTIVATIONS[residual_activation](y if residual is None else y + residual)


def weight_norm(v: Tensor, g: Tensor, dim: int | None = 0) -> Tensor:
    """The composition that autograd differentiates by itself: g v / |v|, the norm over all dimensions but one."""
    dims = None if dim is None else [i for i in range(v.dim()) if i != dim]
    return v * (g / torch.linalg.vector_norm(v, dim=dims, keepdim=dim is not None))


def stochastic_depth(
    input: Tensor,
    p: float,
    mode: str = "row",
    training: bool = True,
    residual: Tensor | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """torchvision.ops.stochastic_depth, with the sum that follows it; `noise` in place of a draw."""
    y = input
    if training and p > 0:
        if noise is None:
            size = [input.shape[0] if mode == "row" else 1, *[1] * (input.dim() - 1)]
            noise = torch.empty(size, dtype=input.dtype, device=input.device).bernoulli_(1 - p)
            noise = noise.div_(1 - p) if p < 1 else noise
        y = input * noise.to(input.dtype)
    return y if residual is None else residual + y
