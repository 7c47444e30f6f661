"""Activations and gates of the layers, by name and by code (the code is what operators and kernels take)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

NEGATIVE_SLOPE = 0.01  # of leaky_relu, torch's default

ACTIVATIONS: dict[str | None, int] = {None: 0, "relu": 1, "leaky_relu": 2, "silu": 3, "gelu": 4, "gelu_tanh": 5}
GATES: dict[str, int] = {"sigmoid": 0, "hard_sigmoid": 1, "relu": 2}

_ACTIVATIONS: list[Callable[[Tensor], Tensor]] = [
    lambda z: z,
    torch.relu,
    lambda z: F.leaky_relu(z, NEGATIVE_SLOPE),
    F.silu,
    F.gelu,
    lambda z: F.gelu(z, approximate="tanh"),
]
_GATES: list[Callable[[Tensor], Tensor]] = [
    torch.sigmoid,
    lambda z: torch.clamp(z + 3, 0, 6) / 6,
    torch.relu,
]


def activate(z: Tensor, code: int) -> Tensor:
    """The activation of this code."""
    return _ACTIVATIONS[code](z)


def gate(z: Tensor, code: int) -> Tensor:
    """The gate of this code."""
    return _GATES[code](z)


def compute(x: Tensor) -> Tensor:
    """In the dtype of arithmetic: float64 stays, everything else is float32."""
    return x if x.dtype == torch.float64 else x.float()
