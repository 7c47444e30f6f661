"""Weight normalisation: CUDA C++ on the host."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from dlkernels.testing import assert_bitwise, assert_within_budget
from dlkernels.triton import weight_norm as triton

OPS = torch.ops.dlkernels_cuda_host
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MACHINES = ("h200", "a100", "t4")


class Case(NamedTuple):
    """v of (A, K, B), and the blocks of a unit: 1, a cluster, or 0 for two launches."""

    shape: tuple[int, int, int]
    h200: int = 1
    others: int = 1  # a100, t4

    def __str__(self) -> str:
        return "x".join(map(str, self.shape))


ROWS = [
    *(Case((1, k, b)) for k, b in ((1, 1), (5, 1), (70, 3), (9, 8), (33, 40), (300, 64), (3, 147), (7, 1024))),
    *(Case((1, k, b)) for k, b in ((2, 4608), (140, 260), (2, 516), (3, 2049))),  # a block's row, of few rows
    Case((3, 2, 64)),  # chunks
    Case((2, 3, 200)),
    Case((5, 2, 77)),
]
COLUMNS = [
    *(Case((a, k, 1)) for a, k in ((2, 1), (3, 5), (40, 8), (17, 64), (130, 33), (70, 300))),
    *(Case((a, k, b)) for a, k, b in ((3, 4, 5), (5, 8, 9), (9, 4, 16), (20, 6, 49), (4, 3, 63), (2, 2, 2))),
    Case((1, 1, 1)),
]
LONG = [
    Case((1, 132, 9000)),  # what a block does not hold is read again
    Case((1, 2, 33001), 16, 0),
    Case((1, 1, 70000), 16, 0),
    Case((2, 2, 17000), 8, 0),
    Case((1, 3, 20000), 8, 1),
    Case((513, 16, 1), 2, 1),
    Case((700, 24, 1), 2, 1),
    Case((2500, 3, 1), 4, 1),
    Case((1500, 4, 9), 8, 0),
    Case((1, 1, 300000), 0, 0),
    Case((11000, 8, 1), 16, 0),
]


def tensors(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0, wide_g: bool = False) -> tuple[Tensor, ...]:
    """v, g, and the gradient of w."""
    torch.manual_seed(seed)
    v = (1.5 * torch.randn(shape) + 0.2).to(dtype)
    g = (2 * torch.randn(shape[1]) + 0.3).to(torch.float32 if wide_g else dtype)
    return v, g, (torch.randn(shape) + 0.5).to(dtype)


def plain(v: Tensor, g: Tensor, dw: Tensor) -> tuple[Tensor, ...]:
    """w, norm, dv, dg."""
    n = v.square().sum((0, 2), keepdim=True).sqrt()
    g, dot = g.view(1, -1, 1), (dw * v).sum((0, 2), keepdim=True)
    return v * (g / n), n.flatten(), g / n * (dw - dot / n / n * v), (dot / n).flatten()


def everything(v: Tensor, g: Tensor, dw: Tensor) -> tuple[Tensor, ...]:
    w, norm = OPS.weight_norm_fwd(v, g)
    return w, norm, *OPS.weight_norm_bwd(dw, v, g, norm)


def check(v: Tensor, g: Tensor, dw: Tensor, actual: tuple[Tensor, ...] | None = None) -> None:
    actual = everything(v, g, dw) if actual is None else actual
    assert [t.dtype for t in actual] == [v.dtype, torch.float32, v.dtype, g.dtype]
    exact = plain(v.double(), g.double(), dw.double())
    eager = plain(v, g.to(v.dtype), dw)
    for name, a, e, t in zip(("w", "norm", "dv", "dg"), actual, exact, eager, strict=True):
        if name == "dv" and v.numel() == g.numel():  # rows of one element: dv is 0 but for rounding
            assert a.abs().max() <= 1e-5 * (g.double() / v.double().flatten() * dw.double().flatten()).abs().max()
        else:
            assert_within_budget(a, e, t, what=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*ROWS, *COLUMNS], ids=str)
def test_one_block(case: Case, dtype: torch.dtype, twin: Any) -> None:
    check(*tensors(case.shape, dtype))
    launches = twin.launches()
    assert [x["op"] for x in launches] == ["weight_norm_fwd", "weight_norm_bwd"]
    assert all(x["cluster"] == 1 for x in launches)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("case", LONG, ids=str)
def test_units_of_several_blocks(case: Case, machine: str, twin: Any) -> None:
    """Clusters of up to 16 on an H200; elsewhere a block reads twice, or two launches do."""
    twin.machine(machine)
    check(*tensors(case.shape, torch.float32))
    launches = twin.launches()
    sharing = case.h200 if machine == "h200" else case.others
    assert len(launches) == (2 if sharing else 4)
    assert {x["cluster"] for x in launches} == {max(1, sharing)}
    if not sharing:
        assert [x["overlap"] for x in launches] == [False, True] * 2


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("machine", ["h200", "a100"])
@pytest.mark.parametrize("shape", [(1, 1, 70000), (3000, 16, 1)], ids=str)
def test_units_of_several_blocks_in_half(shape: Any, machine: str, dtype: torch.dtype, twin: Any) -> None:
    twin.machine(machine)
    check(*tensors(shape, dtype, wide_g=True))
