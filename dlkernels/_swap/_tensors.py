"""Which tensors a fused forward takes; a subclass has a meaning of its own, which the original forward keeps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

TENSORS = (Tensor, nn.Parameter)
_WHEN_TRACED = ("FakeTensor", "FunctionalTensor")


def traced(x: Any) -> bool:
    """What export and compile put in the place of plain tensors."""
    return torch.compiler.is_compiling() and type(x).__name__ in _WHEN_TRACED


def plain_tensor(x: Any) -> bool:
    """A tensor of no subclass, strided."""
    return (type(x) in TENSORS or traced(x)) and x.layout is torch.strided


def is_served(x: Any) -> bool:
    """Whether a value is a tensor that our ops take, on a CPU or a CUDA device, and no trace is being made."""
    return (
        plain_tensor(x)
        and x.is_floating_point()
        and x.device.type in ("cpu", "cuda")
        and torch._C._get_tracing_state() is None
    )
