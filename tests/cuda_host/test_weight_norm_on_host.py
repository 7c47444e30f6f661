"""Weight normalisation: CUDA C++ on the host."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from dlkernels.testing import assert_bitwise, assert_within_budget
from dlkernels.triton import weight_norm as triton

OPS = torch.ops.dlkernels_cuda_host
REDUCE = Path(__file__).parents[2] / "csrc" / "common" / "cuda_reduce.h"
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
    Case((1, 132, 7300)),  # what a block does not hold is read again
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


# Edges ----------------------------------------------------------------------------------------------------------------

# One of each form: short rows, a block's row, columns, columns of several elements, a cluster, two launches.
FORMS = [
    ((1, 40, 5), "h200"),
    ((1, 4, 300), "h200"),
    ((40, 5, 1), "h200"),
    ((7, 8, 3), "h200"),
    ((1, 4, 9000), "h200"),
    ((1600, 4, 4), "h200"),
    ((1, 4, 30000), "a100"),
    ((9000, 4, 1), "a100"),
]
forms = pytest.mark.parametrize(("shape", "machine"), FORMS, ids=lambda x: x if isinstance(x, str) else str(Case(x)))


@forms
def test_zeros_and_not_finite(shape: Any, machine: str, twin: Any) -> None:
    """A row of zeros gives zeros whatever its gradient; what is not finite stays in its row."""
    twin.machine(machine)
    v, g, dw = tensors(shape, torch.float32)
    v[:, 1] = 0
    dw[:, 1] = float("nan")
    v[0, 2, 0] = float("inf")
    actual = everything(v, g, dw)
    for t in actual:
        assert (t.movedim(1, 0)[1] == 0).all() if t.dim() == 3 else t[1] == 0
    assert actual[0][0, 2, 0].isnan() and actual[1][2].isinf()
    keep = [0, 3]
    check(v[:, keep], g[keep], dw[:, keep], tuple(t[:, keep] if t.dim() == 3 else t[keep] for t in actual))


@forms
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_squares_out_of_range(scale: float, shape: Any, machine: str, twin: Any) -> None:
    """Rows whose squares leave float's range are computed in double, beside rows that are not."""
    twin.machine(machine)
    v, g, _ = tensors(shape, torch.float32)
    v[:, 0] *= scale
    v[:, 3] *= scale
    dw = v.sign() + 0.1  # dg adds up what does not cancel
    w, norm, dv, dg = everything(v, g, dw)
    exact = plain(v.double(), g.double(), dw.double())
    for a, e in zip((w, norm, dg), (exact[0], exact[1], exact[3]), strict=True):
        assert_within_budget(a, e)
    for k in range(4):
        assert_within_budget(dv[:, k], exact[2][:, k])
    half = v.bfloat16()
    assert_within_budget(OPS.weight_norm_fwd(half, g.bfloat16())[0], plain(half.double(), g.bfloat16().double(), v)[0])


@pytest.mark.parametrize("shape", [(0, 3, 2), (2, 0, 3), (1, 3, 0)], ids=str)
def test_empty(shape: Any, twin: Any) -> None:
    v, g, dw = tensors(shape, torch.float32)
    w, norm, dv, dg = everything(v, g, dw)
    assert w.shape == dv.shape == shape and (norm == 0).all() and (dg == 0).all() and dg.shape == norm.shape == g.shape
    assert not twin.launches()


@pytest.mark.parametrize("shape", [(1, 7, 64), (1, 3, 600), (5, 8, 4)], ids=str)
def test_unaligned_and_strided(shape: Any, twin: Any) -> None:
    """Tensors at any address are read where they lie, others are copied."""
    v, g, dw = tensors(shape, torch.float32)
    expected = everything(v, g, dw)
    shifted = [torch.cat([torch.zeros(1), t.flatten()])[1:].view(shape) for t in (v, dw)]
    check(v, g, dw, everything(shifted[0], g, shifted[1]))
    strided = [t.transpose(0, 2).contiguous().transpose(0, 2) for t in (v, dw)]
    for a, e in zip(everything(strided[0], g, strided[1]), expected, strict=True):
        assert_bitwise(a, e)


# What launches promise ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize(
    ("shape", "machine", "again"),
    [
        *(((1, 64, 96), "h200", 0), ((1, 5, 4608), "h200", 0), ((60, 32, 1), "h200", 0), ((6, 8, 9), "h200", 0)),
        *(((1, 1, 7168), "a100", 0), ((1, 2, 8192 + 4608), "h200", 0), ((1600, 16, 1), "h200", 0)),
        *(((1, 1, 60000), "a100", 1), ((15000, 8, 1), "a100", 1)),
    ],
    ids=str,
)
def test_traffic(shape: Any, machine: str, again: int, dtype: torch.dtype, twin: Any) -> None:
    """One read of each input and one write, also of units that clusters share; in two launches two reads."""
    twin.machine(machine)
    v, g, dw = tensors(shape, dtype)
    with twin.traffic(v=v) as moved:
        w, norm = OPS.weight_norm_fwd(v, g)
    assert (moved["v"].loaded, moved["v"].again) == ((1 + again) * v.nbytes, again * v.nbytes)
    assert w.nbytes + norm.nbytes <= moved["all"].stored
    if not again:
        assert moved["all"].stored == w.nbytes + norm.nbytes
    with twin.traffic(v=v, dw=dw) as moved:
        _, dg = OPS.weight_norm_bwd(dw, v, g, norm)
    assert moved["v"].loaded == moved["dw"].loaded == (1 + again) * v.nbytes
    if not again:
        assert moved["all"].stored == v.nbytes + dg.nbytes


@forms
def test_any_order_gives_the_same_bits(shape: Any, machine: str, twin: Any) -> None:
    twin.machine(machine)
    given = tensors(shape, torch.float32)
    first = everything(*given)
    for seed in range(3):
        twin.module.seed(seed)
        for a, b in zip(everything(*given), first, strict=True):
            assert_bitwise(a, b)


def last_block_at() -> int:
    return next(i for i, line in enumerate(REDUCE.read_text().splitlines(), 1) if "bool last_block(" in line)


def test_every_barrier_is_needed(twin: Any) -> None:
    """By one of the forms at least."""
    given = [tensors((*shape[:1], min(4, shape[1]), *shape[2:]), torch.float32) for shape, _ in FORMS]
    for v, *_ in given:
        v[:, 3] *= 1e30  # in double

    def all_forms() -> list[tuple[Tensor, ...]]:
        results = []
        for (_, machine), tensors in zip(FORMS, given, strict=True):
            twin.machine(machine)
            results.append(everything(*tensors))
        return results

    expected = all_forms()

    def check() -> None:
        for results, others in zip(all_forms(), expected, strict=True):
            for a, b in zip(results, others, strict=True):
                assert_bitwise(a, b)

    # The twin runs blocks one after another: what a block wrote is there for the last one, whoever takes the ticket.
    first = 1 + REDUCE.read_text().splitlines().index("  __syncthreads();", last_block_at() - 1)
    assert twin.unnoticed_barriers(check) == [f"cuda_reduce.h:{first}"]


@pytest.mark.parametrize("shape", [(1, 9, 7), (1, 2, 300), (6, 5, 1), (4, 3, 5), (2, 3, 70)], ids=str)
def test_is_tritons(shape: Any, twin: Any) -> None:
    v, g, dw = tensors(shape, torch.float32)
    w, norm = triton.weight_norm_fwd(v, g)
    check(v, g, dw, (w, norm, *triton.weight_norm_bwd(dw, v, g, norm)))
    for a, b in zip(everything(v, g, dw), (w, norm, *triton.weight_norm_bwd(dw, v, g, norm)), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)


def test_double_goes_to_triton(twin: Any) -> None:
    v, g, dw = tensors((1, 3, 5), torch.float64)
    for a, b in zip(everything(v, g, dw), plain(v, g, dw), strict=True):
        assert a.dtype == torch.float64 and torch.allclose(a, b, rtol=1e-12)
    assert not twin.launches()


# The weights of a model -----------------------------------------------------------------------------------------------


def test_many_weights(twin: Any) -> None:
    """Each bitwise as alone; a launch a dtype, one per weight that several blocks share, and more for long lists."""
    shapes = [c.shape for c in (*ROWS[3:8], *COLUMNS[2:6])] + [(1, 1, 20000), (2, 0, 3)]
    lists: tuple[list[Tensor], ...] = ([], [], [])
    for i, shape in enumerate(shapes * 2):
        for some, t in zip(lists, tensors(shape, DTYPES[i % 2], seed=i), strict=True):
            some.append(t)
    v, g, dw = lists
    w, norm = OPS.weight_norm_multi_fwd(v, g)
    dv, dg = OPS.weight_norm_multi_bwd(dw, v, g, norm)
    launches = twin.launches()
    assert [x["op"] for x in launches] == ["weight_norm_multi_fwd"] * 4 + ["weight_norm_multi_bwd"] * 4
    assert sorted(x["cluster"] for x in launches[:4]) == [1, 1, 4, 8]
    for i in range(len(v)):
        for a, b in zip((w[i], norm[i], dv[i], dg[i]), everything(v[i], g[i], dw[i]), strict=True):
            assert_bitwise(a, b)


def test_more_weights_than_a_table_holds(twin: Any) -> None:
    v, g, dw = zip(*(tensors((1, 1 + i % 3, 2), torch.float32, seed=i) for i in range(900)), strict=True)
    w, norm = OPS.weight_norm_multi_fwd(v, g)
    launches = twin.launches()
    assert len(launches) == 3 and sum(x["grid"] for x in launches) == 900
    for i in (0, 407, 408, 815, 816, 899):
        assert_bitwise(w[i], OPS.weight_norm_fwd(v[i], g[i])[0])
        assert_within_budget(norm[i], plain(v[i].double(), g[i].double(), dw[i].double())[1])
