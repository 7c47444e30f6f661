"""Compile a function or a module with the backend and hold it to its eager self: values, gradients, and the report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dlkernels as dk
import dlkernels.compile  # in a checkout, this names the backend to torch.compile

TOLERANCE = 1e-12

needs_kernels = pytest.mark.needs("cpp")


def leaf(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal values that want a gradient."""
    generator = torch.Generator().manual_seed(seed + 17 * sum(shape))
    return torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()


def randomised(module: nn.Module) -> nn.Module:
    """In float64 with parameters that are neither 0 nor 1, so that none can be left out unseen."""
    module.double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module


def compiled(function: Callable[..., Any], *, then: Any = "aot_eager", **options: Any) -> Callable[..., Any]:
    """The function behind the backend, from a clean start."""
    torch._dynamo.reset()
    dk.compile_report().clear()
    dynamic = options.pop("dynamic", None)
    options = {"then": then, **options}
    return torch.compile(function, backend="dlkernels", fullgraph=True, dynamic=dynamic, options=options)


def found() -> list[str]:
    """What was replaced, in the order of the graphs."""
    assert not [graph.error for graph in dk.compile_report().graphs if graph.error]
    return [find.what for find in dk.compile_report().replaced]


def left() -> list[str]:
    """Why something recognised was left."""
    assert not [graph.error for graph in dk.compile_report().graphs if graph.error]
    return [find.reason for find in dk.compile_report().left]


def tensors_of(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, (tuple, list)) else [result]


def relative(made: Tensor, expected: Tensor) -> float:
    made, expected = made.detach().double(), expected.detach().double()
    return ((made - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def assert_equal(
    function: Callable[..., Any], made: Callable[..., Any], args: Sequence[Any], limit: float = TOLERANCE
) -> None:
    """Outputs, gradients in every input and parameter, and changes of inputs."""
    sides = []
    for call in (function, made):
        leaves = [a.detach().clone().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a for a in args]
        outputs = tensors_of(call(*leaves))
        wanted = [a for a in leaves if isinstance(a, Tensor) and a.requires_grad]
        wanted += list(function.parameters()) if isinstance(function, nn.Module) else []
        generator = torch.Generator().manual_seed(3)
        loss = sum(
            (torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype) * y).sum()
            for y in outputs
            if y.is_floating_point() and y.requires_grad
        )
        grads = torch.autograd.grad(loss, wanted, allow_unused=True) if wanted and isinstance(loss, Tensor) else []
        sides.append((outputs, grads, leaves))
    (expected, expected_grads, expected_leaves), (outputs, grads, leaves) = sides
    for y, e in zip(outputs, expected, strict=True):
        assert y.dtype == e.dtype and y.shape == e.shape and y.stride() == e.stride()
        assert relative(y, e) <= limit, f"an output differs by {relative(y, e):.1e}"
    for g, e in zip(grads, expected_grads, strict=True):
        assert (g is None) == (e is None)
        assert g is None or relative(g, e) <= limit, f"a gradient differs by {relative(g, e):.1e}"
    for a, e in zip(leaves, expected_leaves, strict=True):
        assert not isinstance(a, Tensor) or torch.equal(a, e), "an input was changed differently"


def check(function: Callable[..., Any], *args: Any, replaced: Sequence[str], **options: Any) -> None:
    """The backend replaces exactly this, and nothing else changes."""
    made = compiled(function, **options)
    assert_equal(function, made, args)
    assert found() == list(replaced)


def check_left(function: Callable[..., Any], *args: Any, reason: str | None, **options: Any) -> None:
    """The backend replaces nothing; `reason` is part of what the report says, None where nothing is recognised."""
    made = compiled(function, **options)
    assert_equal(function, made, args)
    assert found() == []
    if reason is None:
        assert left() == []
    else:
        assert any(reason in text for text in left()), left()
