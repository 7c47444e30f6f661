"""The optimizers that `check` and `profile` run: some steps with given gradients, fused and in plain PyTorch."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import dlkernels as dk

from .._backend import interpreting
from . import _eager_optimizers
from ._budget import Sample

Shape = tuple[int, ...]
CLASSES = {"adamw": "AdamW", "sgdw": "SGDW"}
LEARNING_RATE, DECAY = 0.05, 0.2  # large: what is left must not be what was there before
RATES = (1.0, 0.5, 0.25, 0.8, 0.1)  # of a schedule
NORMS = (1.0, 4.0, 0.25, 2.0, 0.5)  # of the gradients, step after step
MASTER = "master_weights"


@dataclass(frozen=True)
class OptimizerCase:
    """Five steps of a few tensors. The value is what is left of the parameters, as one vector: no gradients.

    Of `extras`: "schedule" changes the learning rate at each step, "decades" spreads the gradients over many orders
    of magnitude, so that eps counts, "channels_last" is the layout of tensors of four dimensions.

    Without a master copy, half precision rounds moments and parameters at each step, eager as fused, and that is most
    of the error: it hides what is wrong by less than a few eps. With one the value is the copy, in float32.
    """

    op: str
    shapes: tuple[Shape, ...]
    extras: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        words = [" ".join("x".join(map(str, shape)) or "1" for shape in self.shapes), *self.extras]
        return ", ".join([" ".join(words), *(f"{k}={v}" for k, v in self.options.items())])

    def sample(self, dtype: torch.dtype, device: str, seed: int) -> Sample:
        """One draw of parameters and of the gradients of every step, bound to the fused and to the eager optimizer."""
        generator = torch.Generator().manual_seed(seed)
        count = sum(math.prod(shape) for shape in self.shapes)
        start = 0.2 * torch.randn(count, generator=generator)
        # Away from zero: the square of a small float16 is none.
        size = 0.5 + 1.5 * torch.rand(len(NORMS), count, generator=generator)
        grads = size * torch.randn(count, generator=generator).sign() * torch.tensor(NORMS)[:, None]
        if "decades" in self.extras:
            grads *= 10 ** (1 - 10 * torch.rand(count, generator=generator))
        runs = (self._run(prepare) for prepare in (self._fused, self._eager))
        return Sample(*runs, start.to(device, dtype), parameters=(grads.to(device, dtype),))

    def _run(self, prepare: Callable[..., Any]) -> Callable[[Tensor, Tensor], Tensor]:
        def run(start: Tensor, grads: Tensor) -> Tensor:
            params = [p.clone().requires_grad_(True) for p in self._split(start)]
            step, left = prepare(params)
            for grad, rate in zip(grads.detach(), RATES, strict=True):
                for p, g in zip(params, self._split(grad), strict=True):
                    p.grad = g.clone()
                step(LEARNING_RATE * (rate if "schedule" in self.extras else 1.0))
            return torch.cat([p.detach().flatten() for p in left()])

        return run

    def _split(self, vector: Tensor) -> list[Tensor]:
        parts = vector.detach().split([math.prod(shape) for shape in self.shapes])
        tensors = [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]
        if "channels_last" in self.extras:
            tensors = [t.to(memory_format=torch.channels_last) if t.dim() == 4 else t for t in tensors]
        return tensors

    def _fused(self, params: list[Tensor]) -> tuple[Callable[[float], None], Callable[[], Sequence[Tensor]]]:
        make = getattr(dk.optim, CLASSES[self.op])
        optimizer = make(params, lr=LEARNING_RATE, weight_decay=DECAY, **self.options)

        def step(lr: float) -> None:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()

        def left() -> list[Tensor]:
            copies = [optimizer.state[p].get("master_param", p) for p in params]
            if interpreting() and params[0].dtype == torch.bfloat16:
                return copies  # Triton's interpreter rounds bfloat16 toward zero
            if not all(torch.equal(p, copy.to(p.dtype)) for p, copy in zip(params, copies, strict=True)):
                raise AssertionError("a parameter is not its master copy, rounded")
            return copies

        return step, left

    def _eager(self, params: list[Tensor]) -> tuple[Callable[[float], None], Callable[[], Sequence[Tensor]]]:
        options = dict(self.options)
        master, max_norm = options.pop(MASTER, False), options.pop("max_grad_norm", None)
        half = master and params[0].dtype in (torch.float16, torch.bfloat16)
        stepped = [p.detach().float().requires_grad_(True) for p in params] if half else params
        form = getattr(_eager_optimizers, self.op)
        step = form(stepped, lr=LEARNING_RATE, weight_decay=DECAY, **options)
        if max_norm is not None:
            step = _eager_optimizers.clipped(step, stepped, max_norm)
        if half:
            step = _eager_optimizers.with_master(step, params, stepped)
        return step, lambda: stepped


def profiled(
    op: str, shape: Shape, dtype: torch.dtype, device: str
) -> tuple[str, Callable[[], Any], Callable[[], Any]]:
    """A name, and the steps of both forms, with usual arguments, on shape[0] tensors of the rest of the shape."""
    count, each = (shape[0], shape[1:]) if len(shape) > 1 else (1, shape)
    generator = torch.Generator().manual_seed(0)

    def draw() -> list[Tensor]:
        tensors = [torch.randn(each, generator=generator).to(device, dtype).requires_grad_(True) for _ in range(count)]
        for t in tensors:
            t.grad = torch.randn(each, generator=generator).to(device, dtype)
        return tensors

    if op == "adamw":
        fused, eager, other = dk.optim.AdamW(draw()).step, torch.optim.AdamW(draw()).step, "torch.optim.AdamW"
    else:
        options = {"lr": 1e-3, "weight_decay": 1e-4}
        fused, other = dk.optim.SGDW(draw(), **options).step, "decay, then torch.optim.SGD"
        eager = functools.partial(_eager_optimizers.sgdw(draw(), momentum_scaling="gradient", **options), 1e-3)
    sizes = " x ".join(map(str, each))
    return f"{op} of {count} tensor{'s' if count > 1 else ''} of {sizes}; eager: {other}", fused, eager


def _case(op: str, shapes: tuple[Shape, ...], *extras: str, **options: Any) -> OptimizerCase:
    return OptimizerCase(op, shapes, extras, options)


_adamw = functools.partial(_case, "adamw")
_sgdw = functools.partial(_case, "sgdw")
SEVERAL: tuple[Shape, ...] = ((33, 17), (7,), (), (0, 3), (1025,))

CASES: list[OptimizerCase] = [
    _adamw(((4099,),)),
    _adamw(SEVERAL, "schedule"),
    _adamw(SEVERAL, betas=(0.8, 0.7), amsgrad=True, maximize=True),
    _adamw(SEVERAL, betas=(0.8, 0.9), max_grad_norm=30.0),
    _adamw(((8, 3, 5, 5), (5,)), "schedule", "channels_last", decoupling="schedule"),
    _adamw(SEVERAL, "decades", master_weights=True),
    _adamw(SEVERAL, "schedule", master_weights=True, max_grad_norm=30.0, decoupling="schedule"),
    _sgdw(((4099,),), "schedule"),
    _sgdw(SEVERAL, "schedule", decoupling="lr", maximize=True),
    _sgdw(SEVERAL, "schedule", momentum_scaling="gradient", nesterov=True),
    _sgdw(SEVERAL, momentum=0.0, max_grad_norm=30.0),
    _sgdw(((8, 3, 5, 5), (5,)), "channels_last", "decades"),
    _sgdw(SEVERAL, "schedule", master_weights=True, max_grad_norm=30.0),
]
