"""Parity of one op with its eager form: both against float64, by the error budget of `dlkernels.testing`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..testing import error_budget, relative_error


@dataclass(frozen=True)
class Sample:
    """The same op twice, as functions of its input x and of the `parameters` of a layer: all of them take gradients.

    `grad_output` is for whatever is not a scalar loss.
    """

    fused: Callable[..., Tensor]
    eager: Callable[..., Tensor]
    x: Tensor
    grad_output: Tensor | None = None
    parameters: tuple[Tensor, ...] = ()


@dataclass
class Parity:
    """Errors against float64, and what the fused one may have; `ratio` above 1 is a violation."""

    error: float = 0.0
    eager_error: float = 0.0
    allowed: float = 0.0

    @property
    def ratio(self) -> float:
        return self.error / self.allowed if self.allowed > 0 else (0.0 if self.error == 0 else math.inf)


def value_and_grads(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], grad_output: Tensor | None = None
) -> tuple[Tensor, ...]:
    """The value, and its gradient in every input, or the value alone where it has none, as of an update in place.

    `grad_output` is cast to the value's dtype; scalars start at 1.
    """
    inputs = tuple(t.detach().requires_grad_(True) for t in inputs)
    out = function(*inputs)
    if not out.requires_grad:
        return (out,)
    seed = None if grad_output is None or out.dim() == 0 else grad_output.to(out.dtype)
    return out.detach(), *torch.autograd.grad(out, inputs, seed)


def _error(value: Tensor, exact: Tensor) -> float:
    """Relative error; infinity for another shape, and for NaN and infinities that float64 has not."""
    if value.shape != exact.shape or not torch.equal(torch.isfinite(value), torch.isfinite(exact.to(value.dtype))):
        return math.inf
    return relative_error(value, exact)


def compare(samples: Iterable[Sample]) -> tuple[Parity, Parity]:
    """Parity of the value and of its gradients over samples: the worst fused error against the largest budget.

    Every input's gradient has a budget of its own; the one that uses the largest share of it is returned.
    """
    parts: list[Parity] = []
    for sample in samples:
        inputs = (sample.x, *sample.parameters)
        exact = value_and_grads(sample.eager, tuple(t.double() for t in inputs), sample.grad_output)
        fused = value_and_grads(sample.fused, inputs, sample.grad_output)
        eager = value_and_grads(sample.eager, inputs, sample.grad_output)
        parts = parts or [Parity() for _ in exact]
        for i, (part, e, f, p) in enumerate(zip(parts, exact, fused, eager, strict=True)):
            part.error = max(part.error, _error(f, e))
            part.eager_error = max(part.eager_error, relative_error(p, e))
            part.allowed = max(part.allowed, error_budget(e, p, f.dtype, scalar=i == 0 and f.dim() == 0))
    value, *grads = parts
    return value, max(grads, key=lambda parity: parity.ratio, default=Parity())
