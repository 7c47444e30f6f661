"""What the tests of the optimizers share: small sets of parameters, gradients of a step, comparisons of trees."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from _runs import backends
from torch import Tensor, nn

import dlkernels as dk
from dlkernels import _backend
from dlkernels.testing import assert_bitwise

BACKENDS: list[Any] = backends()[:2]
if _backend.TWIN is not None:
    BACKENDS.append(pytest.param("cuda", marks=pytest.mark.needs("twin")))
F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
CLOSE = {F32: 1e-6, F64: 1e-14}  # relative, of two programs that round in another order
SHAPES = ((3,), (17,), (4, 5), (2, 3, 2, 2), (1,))


@pytest.fixture(params=BACKENDS)
def backend_fixture(request: pytest.FixtureRequest) -> Any:
    """Every backend that can take a step on CPU tensors; a test file takes it as `backend = backend_fixture`."""
    with dk.backend(request.param):
        yield request.param


def made(dtype: torch.dtype = F32, seed: int = 0, shapes: Any = SHAPES) -> list[nn.Parameter]:
    random = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=random, dtype=F64).to(dtype)) for shape in shapes]


def grads(params: list[nn.Parameter], step: int, present: Any = None) -> None:
    random = torch.Generator().manual_seed(1000 + step)
    for i, p in enumerate(params):
        grad = torch.randn(p.shape, generator=random, dtype=F64).to(p.dtype)
        p.grad = grad if present is None or present[i] else None


def train(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        grads(params, step)
        optimizer.step()


def close(ours: list[nn.Parameter], theirs: list[nn.Parameter]) -> None:
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert (a - b).norm() <= CLOSE[a.dtype] * b.norm(), f"parameter {i}"


def flat(tree: Any) -> list[Any]:
    """Leaves of a state_dict, with their places, in order."""
    if isinstance(tree, dict):
        return [(k, *leaf) for k, v in tree.items() for leaf in flat(v)]
    if isinstance(tree, (list, tuple)):
        return [(i, *leaf) for i, v in enumerate(tree) for leaf in flat(v)]
    return [(tree,)]


def same_bits(a: dict[str, Any], b: dict[str, Any]) -> None:
    for x, y in zip(flat(a), flat(b), strict=True):
        assert x[:-1] == y[:-1]
        if isinstance(x[-1], Tensor) and x[-1].is_meta:
            assert y[-1].is_meta and x[-1].shape == y[-1].shape
        elif isinstance(x[-1], Tensor):
            assert_bitwise(x[-1], y[-1], str(x[:-1]))
        else:
            assert x[-1] == y[-1], x[:-1]
