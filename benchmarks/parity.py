"""Correctness on the very inputs that are timed: every candidate against float64."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import dlkernels as dk
from dlkernels.testing import error_budget, relative_error

if TYPE_CHECKING:
    from harness import Case, Family

OURS = "dlkernels"
STEPS = (1.0, -2.0, 4.0)  # the gradients of each step, as multiples of the given ones: exact in half precision
Function = Callable[..., Any]
Tensors = tuple[Tensor, ...]


def as_tuple(outputs: Tensor | Sequence[Tensor]) -> Tensors:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


class forced:
    """A function whose ops one backend serves, in its backward pass too."""

    def __init__(self, backend: str, function: Function) -> None:
        self.backend, self.function = backend, function

    def __call__(self, *tensors: Tensor) -> Any:
        return self.function(*tensors)


def upstream(case: Case, outputs: Tensors, seed: int = 99) -> list[Tensor | None]:
    """The gradient that arrives at each output: None (= 1) or the loss scale at a scalar, random numbers elsewhere.

    A layer's has the values of the case's dtype in float64 too, and the output's own memory layout.
    """
    grads: list[Tensor | None] = []
    for i, out in enumerate(outputs):
        if out.dim() == 0 and case.reduction is not None:
            grads.append(None if case.loss_scale == 1.0 else torch.full_like(out, case.loss_scale))
            continue
        generator = torch.Generator(out.device).manual_seed(seed + i)
        g = torch.randn(out.shape, generator=generator, device=out.device)
        grads.append(torch.empty_like(out).copy_(g if case.reduction is not None else g.to(case.dtype)).detach())
    return grads


def evaluate(case: Case, function: Function, tensors: Tensors) -> tuple[Tensors, Tensors]:
    """The outputs, and the gradients of the tensors that require them (none for a forward pass alone).

    Of an optimizer: the parameters, master copies and averages after some steps.
    """
    if isinstance(function, forced):
        with dk.backend(function.backend):
            return evaluate(case, function.function, tensors)
    if case.steps:
        return _after_steps(function, tensors), ()
    tensors = tuple(t.detach().requires_grad_(t.requires_grad) for t in tensors)
    with torch.set_grad_enabled(case.backward):
        outputs = as_tuple(function(*tensors))
        if not case.backward:
            return outputs, ()
        wanted = [t for t in tensors if t.requires_grad]
        grads = torch.autograd.grad(outputs, wanted, upstream(case, outputs))
    return tuple(out.detach() for out in outputs), grads


def _after_steps(function: Function, tensors: Tensors) -> Tensors:
    with torch.no_grad():
        step = function(*tensors)
        for factor in STEPS:
            step.load(factor)
            step.run()
        results = step.results()
    del step
    gc.collect()  # torch's optimizers are in cycles
    return results


def in_float64(tensors: Tensors) -> Tensors:
    return tuple(
        t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in tensors
    )  # fmt: skip


def check(
    family: Family, case: Case, candidates: dict[str, Function], tensors: Tensors, draws: Tensors = ()
) -> dict[str, Any]:
    """Errors of every candidate against the float64 reference; ours has to stay in the error budget (design.md).

    The reference itself is held to the formula that people write, in float64. Candidates other than ours are held to a
    loose bound: a peer that computes something else is not compared.
    """
    tensors = (*tensors, *draws)
    exact = in_float64(tensors)
    with dk.backend("reference"):
        truth = evaluate(case, family.ours(case), exact)
    agree = max(max(part) for part in _errors(evaluate(case, family.eager(case), exact), truth) if part)
    values = {name: evaluate(case, function, tensors) for name, function in candidates.items()}
    errors = {name: [max(part, default=0.0) for part in _errors(value, truth)] for name, value in values.items()}
    failures = [] if agree < 1e-9 else [f"the float64 reference and the eager formula differ by {agree:.1e}"]
    loss = case.reduction is not None
    for what, *parts in zip(("loss" if loss else "output", "gradient"), values[OURS], values["eager"], truth):
        for i, (ours, eager, exact_value) in enumerate(zip(*parts, strict=True)):
            name = what if i == 0 else f"{what} {i}"
            if ours.shape != exact_value.shape or not torch.isfinite(ours).all():
                failures.append(f"{name}: shape {tuple(ours.shape)} or values not finite")
                continue
            error = relative_error(ours, exact_value)
            budget = error_budget(exact_value, eager, ours.dtype, scalar=loss and ours.dim() == 0)
            if not error <= budget:
                failures.append(f"{name} error {error:.1e} > {budget:.1e}")
    # A small gradient, summed in half precision, is far off for whoever computes as eager does.
    loose = max(1e-4 if case.dtype == torch.float32 else 0.05, 2 * max(errors["eager"]))
    return {
        "errors": {n: dict(zip(("loss" if loss else "output", "grad"), e, strict=True)) for n, e in errors.items()},
        "failures": failures,
        "not_same": {n: max(e) for n, e in errors.items() if n not in (OURS, "eager") and not max(e) < loose},
    }


def _errors(value: tuple[Tensors, Tensors], truth: tuple[Tensors, Tensors]) -> list[list[float]]:
    """Relative errors of the outputs and of the gradients; infinite for another shape."""
    return [
        [relative_error(v, t) if v.shape == t.shape else math.inf for v, t in zip(mine, right, strict=True)]
        for mine, right in zip(value, truth, strict=True)
    ]
