"""What one step works on: parameters that have a gradient, their state, the scalars of each group and counter."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._sharding import is_sharded, like_parameter, local_of


@dataclass(slots=True)
class Item:
    """One parameter of a step. All tensors are local, dense and of one memory layout.

    Args:
        position: of the parameter among all parameters of the optimizer.
        param, grad: of one dtype and shape. A gradient is held for the time of a step only: whoever sets it to None
            wants the memory back.
        slots: the moments, None where there is none; AdamW: exp_avg, exp_avg_sq, max_exp_avg_sq; SGDW: momentum_buffer.
        master: the parameter in float32, or None.
        average: moving average of the parameter (float32, float64 beside float64), or None.
        row: of the plan's rows.
        norm_set: parameters whose squares are summed over the same ranks.
        offset, period, full_period: local element i is element i // period * full_period + offset + i % period of the
            whole parameter.
    """

    position: int
    param: Tensor
    grad: Tensor | None
    slots: tuple[Tensor | None, ...]
    master: Tensor | None
    average: Tensor | None
    row: int
    norm_set: int
    offset: int
    period: int
    full_period: int

    @property
    def index(self) -> int:
        return self.position


@dataclass(slots=True)
class Scalars:
    """The scalars of a parameter group, anew for each step.

    `values` begin with lr (a number, or a tensor on the parameters' device), decay_rate (lr * decay_rate is the decay)
    and sign (-1 to maximize). AdamW: beta1, beta2, eps follow; SGDW: momentum, paper, nesterov.
    """

    group: int
    values: tuple[Any, ...] = ()


@dataclass(slots=True)
class Row:
    """What the parameters of one group that share a step counter are stepped with."""

    scalars: Scalars
    step: Tensor | None

    @property
    def values(self) -> tuple[Any, ...]:
        return self.scalars.values


# What the moments of a parameter may be.
MOMENTS = {
    torch.float64: (torch.float64,),
    torch.float32: (torch.float32, torch.bfloat16),
    torch.float16: (torch.float16, torch.float32, torch.bfloat16),
    torch.bfloat16: (torch.bfloat16, torch.float32),
}


def is_dense(x: Tensor) -> bool:
    """Whether every element of memory between the first and the last belongs to x, once."""
    return x.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(x)


def has_memory(x: Tensor) -> bool:
    """Whether the elements of x lie where x says: not those of classes that wrap other tensors, or pretend only."""
    return type(x) is Tensor or not torch._C._dispatch_keys(x).has(torch._C.DispatchKey.Python)


def kind_of(x: Tensor) -> str:
    return "DTensor" if is_sharded(x) else "Tensor" if isinstance(x, torch.nn.Parameter) else type(x).__name__


@torch.no_grad()
def follow_parameters(items: list[Item]) -> None:
    """A parameter that somebody else has written since the last step takes its master copy along."""
    for item in items:
        if item.master is not None:
            written = item.master.to(item.param.dtype) != item.param
            item.master.copy_(torch.where(written, item.param.to(item.master.dtype), item.master))


@contextlib.contextmanager
def rolled_back(state: Any, found: list[Found]) -> Iterator[None]:
    """Take out of the state what a step that fails has put there."""
    before = {f.owner: set(state[f.owner]) if f.owner in state else None for f in found}
    try:
        yield
    except BaseException:
        for p, names in before.items():
            for name in set(state.get(p, ())) - (names or set()):
                del state[p][name]
            if names is None:
                state.pop(p, None)
        raise


class Found:
    """A parameter that has a gradient, or waits for one: both local, the gradient checked."""

    def __init__(self, position: int, group: int, owner: Tensor) -> None:
        self.position, self.group, self.owner = position, group, owner
        self.param = local_of(owner.detach())
        if not has_memory(self.param):
            raise TypeError(f"parameter {position} must be a tensor with memory of its own, got {kind_of(self.param)}")
        self.grad: Tensor | None = None if owner.grad is None else self.local_grad()
        self.version = 0

    def local_grad(self) -> Tensor:
        """The gradient of now, or an error that says what is wrong with it."""
        owner, grad = self.owner, self.owner.grad
        where = f"parameter {self.position}"
        if is_sharded(grad) != is_sharded(owner):
            raise TypeError(f"the gradient of {where} must be a {kind_of(owner)} as it is, got {kind_of(grad)}")
        if grad.layout is not torch.strided:
            raise TypeError(f"the gradient of {where} must be a strided (dense) tensor, got {grad.layout}")
        if grad.shape != owner.shape:
            raise ValueError(
                f"the gradient of {where} must have its shape {tuple(owner.shape)}, got {tuple(grad.shape)}"
            )
        if grad.dtype != owner.dtype:
            raise TypeError(f"the gradient of {where} must have its dtype {owner.dtype}, got {grad.dtype}")
        if grad.device != owner.device:
            raise ValueError(f"the gradient of {where} must be on its device {owner.device}, got {grad.device}")
        grad = local_of(like_parameter(grad, owner)).detach().resolve_neg()
        grad = grad.clone() if grad._is_zerotensor() else grad
        if not has_memory(grad):
            raise TypeError(f"the gradient of {where} must be a tensor with memory of its own, got {kind_of(grad)}")
        return grad
