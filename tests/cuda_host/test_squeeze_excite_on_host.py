"""Squeeze-and-excitation: CUDA C++ on the host, in every regime, against float64 and against Triton's launchers."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dlkernels.reference import squeeze_excite as reference
from dlkernels.reference._activation import ACTIVATIONS, GATES, activate, gate
from dlkernels.testing import assert_bitwise, assert_within_budget, unmodified
from dlkernels.triton import squeeze_excite as triton

OPS = torch.ops.dlkernels_cuda_host
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SILU = ACTIVATIONS["silu"]
HARD = GATES["hard_sigmoid"]
LAYOUTS = pytest.mark.parametrize("last", [False, True], ids=["first", "last"])


class Case(NamedTuple):
    """x and residual as (N, C, S) or, with `last`, (N, S, C); the operator's codes."""

    x: Tensor
    w1: Tensor | None
    b1: Tensor | None
    w2: Tensor
    b2: Tensor | None
    residual: Tensor | None
    activation: int
    gate: int
    residual_activation: int
    last: bool


def make(
    shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float32, given: str = "12", *, act: int = 1,
    gate: int = 0, after: int = 0, last: bool = False, seed: int = 0,
) -> Case:  # fmt: skip
    """`shape`: N, C, R (0: one layer), S. `given`: 1 = b1, 2 = b2, r = residual. Weights in float32 beside float16."""
    torch.manual_seed(seed)
    n, c, r, s = shape
    own = torch.float32 if dtype == torch.float16 else dtype
    dims = (n, s, c) if last else (n, c, s)
    x = torch.randn(dims) + torch.randn((n, 1, c) if last else (n, c, 1))

    def layer(out: int, inputs: int) -> Tensor:
        return (torch.randn(out, inputs) * 1.2 / inputs**0.5).to(own)

    return Case(
        x.to(dtype),
        layer(r, c) if r else None,
        (0.4 + torch.randn(r)).to(own) if r and "1" in given else None,
        layer(c, r or c),
        (0.2 + torch.randn(c)).to(own) if "2" in given else None,
        torch.randn(dims).to(dtype) if "r" in given else None,
        act, gate, after, last,
    )  # fmt: skip


def exact(case: Case, *tensors: Tensor | None) -> Tensor:
    x, *weights, residual = tensors
    if case.last:
        x, residual = x.mT, None if residual is None else residual.mT
    y = reference.squeeze_excite(x, *weights, residual, *case[6:9])
    return y.mT if case.last else y


def eager(case: Case, *tensors: Tensor | None) -> Tensor:
    """As PyTorch code writes it, every step in the dtype of x."""
    x, w1, b1, w2, b2, residual = (None if t is None else t.to(tensors[0].dtype) for t in tensors)
    positions = 1 if case.last else 2
    z = x.mean(positions)
    if w1 is not None:
        z = activate(F.linear(z, w1, b1), case.activation)
    y = x * gate(F.linear(z, w2, b2), case.gate).unsqueeze(positions)
    return y if residual is None else activate(y + residual, case.residual_activation)


def gradients(function: Callable[..., Tensor], case: Case, dy: Tensor, dtype: torch.dtype | None) -> list[Any]:
    """Output and gradients of the six tensors, computed in `dtype` (None: each in its own)."""
    leaves = [None if t is None else (t if dtype is None else t.to(dtype)).detach().requires_grad_() for t in case[:6]]
    y = function(case, *leaves)
    grads = iter(torch.autograd.grad(y, [t for t in leaves if t is not None], dy.to(y.dtype)))
    return [y.detach(), *(None if t is None else next(grads) for t in leaves)]


def saved(case: Case, dtype: torch.dtype) -> list[Tensor]:
    x, w1, b1, w2, b2 = (None if t is None else t.to(dtype) for t in case[:5])
    z = mean = x.mean(1 if case.last else 2)
    hidden = z.new_empty(z.shape[0], 0)
    if w1 is not None:
        hidden = F.linear(z, w1, b1)
        z = activate(hidden, case.activation)
    return [mean, hidden, gate(F.linear(z, w2, b2), case.gate)]


NAMES = ("y", "dx", "dw1", "db1", "dw2", "db2", "dresidual")


def run(case: Case, dy: Tensor, of: Any = OPS) -> tuple[list[Tensor], list[Tensor]]:
    """(y and the six gradients, mean and hidden and gate)."""
    y, *kept = of.squeeze_excite_fwd(*case)
    return [y, *of.squeeze_excite_bwd(dy, case.x, *kept, *case[1:])], kept


def upstream(case: Case) -> Tensor:
    return torch.randn(case.x.shape, generator=torch.Generator().manual_seed(7)).to(case.x.dtype)


def check(case: Case, dy: Tensor | None = None, of: Any = OPS) -> list[Tensor]:
    """Both operators against float64. Gives back all results."""
    dy = upstream(case) if dy is None else dy
    with unmodified(*case[:6], dy):
        found, kept = run(case, dy, of)
    right, theirs = gradients(exact, case, dy, torch.float64), gradients(eager, case, dy, None)
    for name, given, ours, e, b in zip(NAMES, (case.x, *case[:6]), found, right, theirs, strict=True):
        if given is None:
            assert ours.shape == (0,), name
            continue
        assert ours.dtype == given.dtype and ours.is_contiguous(), name
        assert_within_budget(ours, e, b, what=name)
    for name, ours, e, b in zip(
        ("mean", "hidden", "gate"), kept, saved(case, torch.float64), saved(case, torch.float32), strict=True
    ):
        assert ours.dtype == torch.float32, name
        assert_within_budget(ours, e, b, what=name)
    return [*found, *kept]


# Machines that bring a regime out at sizes that fibers can do: arch, multiprocessors, bytes of shared memory, L2.
def machine(twin: Any, arch: int, shared: int, l2: int = 50 << 20, multiprocessors: int = 16) -> None:
    twin.module.machine(arch, multiprocessors, shared, 2 * shared + 2048, 2048, l2)


def sweeps(twin: Any, l2: int = 50 << 20) -> None:
    """A sample does not fit into shared memory."""
    machine(twin, 80, 20 << 10, l2)


SWEPT = (3, 12, 2, 1100)  # 26 KB and more


# Clusters -------------------------------------------------------------------------------------------------------------


def with_clusters(twin: Any, size: int, call: Callable[[], Any]) -> Any:
    """The call's result on the machine with the most shared memory that takes clusters of at least this size."""
    low, high = 256, 64 << 10
    result = None
    while low + 32 < high:
        shared = (low + high) // 2
        machine(twin, 90, shared)
        twin.launches()
        try:
            now = call()
            first, *more = twin.launches()
            clusters = 32 if more else first["cluster"]
        except RuntimeError as error:  # a machine of less than what sweeps want
            assert "bytes of shared memory" in str(error)
            clusters = 32
        low, high = (low, shared) if clusters < size else (shared, high)
        result = now if clusters == size else result
    assert result is not None, f"no machine asks for clusters of {size}"
    return result


@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 2, 4, 8, 16])
def test_clusters(size: int, dtype: torch.dtype, last: bool, twin: Any) -> None:
    """Two layers and one, with an activation behind the residual and without."""

    class Ops:
        @staticmethod
        def squeeze_excite_fwd(*args: Any) -> Any:
            return with_clusters(twin, size, lambda: OPS.squeeze_excite_fwd(*args))

        @staticmethod
        def squeeze_excite_bwd(*args: Any) -> Any:
            return with_clusters(twin, size, lambda: OPS.squeeze_excite_bwd(*args))

    for given, r, after in (("12r", 3, SILU), ("2", 3, 0), ("2", 0, 0)):
        check(make((1, 32, r, 100), dtype, given, after=after, last=last), of=Ops)


def test_no_cluster_of_16(twin: Any) -> None:
    """A device that cannot run one walks."""
    case = make((1, 16, 2, 1024))
    machine(twin, 90, 8 << 10)
    OPS.squeeze_excite_fwd(*case)
    assert [launch["cluster"] for launch in twin.launches()] == [16]
    machine(twin, 90, 8 << 10, multiprocessors=15)
    check(case)
    assert [launch["cluster"] for launch in twin.launches()] == [1] * 4


# Two sweeps -----------------------------------------------------------------------------------------------------------


@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [(3, 4, 2, 2100), (2, 5, 3, 1999), (3, 40, 2, 132), (1, 1, 1, 9000), (2, 300, 3, 24), (1, 2, 0, 4100)],
    ids=str,
)
def test_walk(shape: tuple[int, ...], dtype: torch.dtype, last: bool, twin: Any) -> None:
    """Long rows and many, in packs, across packs and one by one; several batches."""
    machine(twin, 80, 8 << 10, 40 << 10)
    after = random.Random(str(shape)).choice((0, SILU))
    check(make(shape, dtype, "12r" if after else "2", act=SILU, after=after, last=last))
    launches = twin.launches()
    assert len(launches) >= 4 and len(launches) % 2 == 0 and {x["cluster"] for x in launches} == {1}


def test_batches(twin: Any) -> None:
    """As many samples as half of L2 holds: 3 of 16 KB forward, 1 of twice 16 KB backward."""
    case = make((7, 4, 1, 1024))
    machine(twin, 80, 8 << 10, 96 << 10)
    y, *kept = OPS.squeeze_excite_fwd(*case)
    grids = [x["grid"] for x in twin.launches()]
    assert len(grids) == 6 and grids[::2] == [3 * grids[4], 3 * grids[4], grids[4]]
    OPS.squeeze_excite_bwd(y, case.x, *kept, *case[1:])
    assert len(twin.launches()) == 14


# Matrix products ------------------------------------------------------------------------------------------------------


@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 20, 9, 5), (2, 12, 0, 7), (5, 33, 8, 1), (2, 64, 200, 70), (3, 8, 40, 49)], ids=str)
def test_matmul(shape: tuple[int, ...], dtype: torch.dtype, last: bool, twin: Any) -> None:
    """Weights larger than samples."""
    machine(twin, 90, 64 << 10, 1 << 10)
    for after in (0, SILU):
        check(make(shape, dtype, "12r" if after else "1", act=SILU, gate=HARD, after=after, last=last))
        points = 3 if shape[2] else 1
        assert len(twin.launches()) == 2 + (points + 1) // 2 + 2 + points, "no sum needs another launch"
