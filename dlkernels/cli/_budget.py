"""Parity of one loss with its eager form: both against float64, by the error budget of `dlkernels.testing`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..testing import error_budget, relative_error


@dataclass(frozen=True)
class Sample:
    """The same loss twice, as functions of the logits, and the logits; `grad_output` is for unreduced losses."""

    fused: Callable[[Tensor], Tensor]
    eager: Callable[[Tensor], Tensor]
    x: Tensor
    grad_output: Tensor | None = None


@dataclass
class Parity:
    """Errors against float64, and what the fused one may have; `ratio` above 1 is a violation."""

    error: float = 0.0
    eager_error: float = 0.0
    allowed: float = 0.0

    @property
    def ratio(self) -> float:
        return self.error / self.allowed if self.allowed > 0 else (0.0 if self.error == 0 else math.inf)


def value_and_grad(
    loss: Callable[[Tensor], Tensor], x: Tensor, grad_output: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The loss and its gradient in x. `grad_output` is cast to the dtype of the loss; scalars start from 1."""
    x = x.detach().requires_grad_(True)
    out = loss(x)
    seed = None if grad_output is None or out.dim() == 0 else grad_output.to(out.dtype)
    (grad,) = torch.autograd.grad(out, x, seed)
    return out.detach(), grad


def _error(value: Tensor, exact: Tensor) -> float:
    """Relative error; infinity for another shape, and for NaN and infinities that float64 has not."""
    if value.shape != exact.shape or not torch.equal(torch.isfinite(value), torch.isfinite(exact.to(value.dtype))):
        return math.inf
    return relative_error(value, exact)


def compare(samples: Iterable[Sample]) -> tuple[Parity, Parity]:
    """Parity of the loss and of its gradient over samples: the worst fused error against the largest budget."""
    parts = (Parity(), Parity())
    for sample in samples:
        exact = value_and_grad(sample.eager, sample.x.double(), sample.grad_output)
        fused = value_and_grad(sample.fused, sample.x, sample.grad_output)
        eager = value_and_grad(sample.eager, sample.x, sample.grad_output)
        for part, e, f, p in zip(parts, exact, fused, eager, strict=True):
            part.error = max(part.error, _error(f, e))
            part.eager_error = max(part.eager_error, relative_error(p, e))
            part.allowed = max(part.allowed, error_budget(e, p, f.dtype, scalar=f.dim() == 0))
    return parts
