"""The weight-norm launchers against float64: every tile form, ragged shapes, dtypes, and the bytes that they move."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from dlkernels._traffic import interpreter_traffic
from dlkernels.testing import assert_bitwise, assert_within_budget, poisoned_empty, relative_error
from dlkernels.triton import weight_norm

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# (A, K, B): rows, columns, what lies between; one element, one row, one column.
SHAPES = (
    *((1, 1, 1), (1, 5, 1), (1, 1, 37), (1, 5, 7), (1, 3, 130), (1, 2, 501)),
    *((9, 1, 1), (13, 5, 1), (70, 33, 1), (3, 40, 1)),
    *((5, 3, 4), (4, 7, 3), (3, 2, 65), (7, 1, 2)),
)


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """What a kernel does not write is NaN."""
    with poisoned_empty():
        yield


@pytest.fixture
def tiny_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of more than 32 elements are cut into segments, of more than one tile where there would be over 3."""
    monkeypatch.setattr(weight_norm, "MAX_RESIDENT", 32)
    monkeypatch.setattr(weight_norm, "MAX_RESIDENT_BACKWARD", 32)
    monkeypatch.setattr(weight_norm, "MAX_SEGMENTS", 3)


def plain(v: Tensor, g: Tensor, dw: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """w, norm, dv, dg, written out."""
    n = v.square().sum((0, 2)).sqrt()
    along = (slice(None), None)
    dg = (dw * v).sum((0, 2)) / n
    return (g / n)[along] * v, n, (g / n)[along] * (dw - (dg / n)[along] * v), dg


def tensors(shape: tuple[int, int, int], dtype: torch.dtype, wide_g: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(sum(shape))
    v, dw = ((torch.randn(shape) + c).to(dtype) for c in (0.8, 0.7))
    return v, (2 * torch.randn(shape[1])).to(torch.float32 if wide_g else dtype), dw


def check(shape: tuple[int, int, int], dtype: torch.dtype, wide_g: bool = False) -> None:
    v, g, dw = tensors(shape, dtype, wide_g)
    w, norm = weight_norm.weight_norm_fwd(v, g)
    dv, dg = weight_norm.weight_norm_bwd(dw, v, g, norm)
    exact = plain(v.double(), g.double(), dw.double())
    eager = plain(v, g.to(dtype), dw)
    assert (w.dtype, norm.dtype, dv.dtype, dg.dtype) == (
        *(dtype, torch.float64 if dtype == torch.float64 else torch.float32, dtype, g.dtype),
    )
    for name, a, e, t in zip(("w", "norm", "dv", "dg"), (w, norm, dv, dg), exact, eager, strict=True):
        assert a.is_contiguous() and bool(torch.isfinite(a).all()), name
        if name == "dv" and shape[0] * shape[2] == 1:  # rows of one element: dv is 0 but for rounding
            assert a.double().abs().max() <= 1e-6 * (g.double() / v.double().squeeze() * dw.double()).abs().max()
        elif dtype == torch.float64:
            assert relative_error(a, e) <= 1e-13, name
        else:
            assert_within_budget(a, e, t, what=name)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_in_registers(shape: tuple[int, int, int]) -> None:
    assert weight_norm.plan(*shape, weight_norm.MAX_RESIDENT_BACKWARD).segments == 1
    for dtype in DTYPES[:2]:
        check(shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES[2:], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shape", [(1, 3, 37), (9, 5, 1)], ids=str)
def test_other_dtypes(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    check(shape, dtype)


def test_many_short_rows_share_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    assert weight_norm.plan(1, 4096, 9, weight_norm.MAX_RESIDENT).block_k == 32
    whole = weight_norm.plan(1, 21, 9, weight_norm.MAX_RESIDENT)
    monkeypatch.setattr(weight_norm, "plan", lambda *_: whole._replace(block_k=16))
    check((1, 21, 9), torch.float32)


@pytest.mark.parametrize("shape", [s for s in SHAPES if s[0] * s[2] > 1], ids=str)
@pytest.mark.usefixtures("tiny_tiles")
def test_rows_in_segments(shape: tuple[int, int, int]) -> None:
    check(shape, torch.float32)


@pytest.mark.usefixtures("tiny_tiles")
def test_segments_of_every_kind_occur() -> None:
    plans = [weight_norm.plan(*s, weight_norm.MAX_RESIDENT) for s in SHAPES]
    assert any(p.segments == p.steps == 1 for p in plans) and any(p.segments > 1 == p.steps for p in plans)
    assert any(p.steps > 1 for p in plans) and any(p.tiles_b > 1 for p in plans)


@pytest.mark.parametrize("shape", [(1, 5, 33), (9, 5, 1)], ids=str)
def test_g_in_float32(shape: tuple[int, int, int]) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        check(shape, dtype, wide_g=True)


@pytest.mark.parametrize("tiny", [False, True])
@pytest.mark.parametrize("shape", [(1, 4, 70), (70, 4, 1), (5, 4, 9)], ids=str)
def test_rows_of_zeros(shape: tuple[int, int, int], tiny: bool, request: pytest.FixtureRequest) -> None:
    """w, dv and dg are 0, whatever the upstream gradient is; the neighbours are not touched."""
    if tiny:
        request.getfixturevalue("tiny_tiles")
    v, g, dw = tensors(shape, torch.float32)
    v[:, 2], dw[:, 2] = 0, float("inf")
    w, norm = weight_norm.weight_norm_fwd(v, g)
    dv, dg = weight_norm.weight_norm_bwd(dw, v, g, norm)
    assert (w[:, 2] == 0).all() and norm[2] == 0 and (dv[:, 2] == 0).all() and dg[2] == 0
    keep = [0, 1, 3]
    exact = plain(*(t.double() for t in (v[:, keep], g[keep], dw[:, keep])))
    for a, e in zip((w[:, keep], norm[keep], dv[:, keep], dg[keep]), exact, strict=True):
        assert_within_budget(a, e)


@pytest.mark.parametrize("shape", [(1, 0, 5), (1, 5, 0), (0, 5, 1), (3, 0, 4)], ids=str)
def test_empty(shape: tuple[int, int, int]) -> None:
    v, g = torch.zeros(shape), torch.ones(shape[1])
    w, norm = weight_norm.weight_norm_fwd(v, g)
    dv, dg = weight_norm.weight_norm_bwd(v, v, g, norm)
    assert w.shape == dv.shape == shape and (norm == 0).all() and (dg == 0).all()


def test_strided_arguments() -> None:
    v, g, _dw = tensors((4, 5, 6), torch.float32)
    expected = weight_norm.weight_norm_fwd(v, g)
    given = v.transpose(0, 1).contiguous().transpose(0, 1), g.repeat_interleave(2)[::2]
    for a, b in zip(weight_norm.weight_norm_fwd(*given), expected, strict=True):
        assert_bitwise(a, b)
    one = torch.ones(()).expand(4, 5, 6)
    for a, b in zip(
        weight_norm.weight_norm_bwd(one, *given, expected[1]),
        weight_norm.weight_norm_bwd(one.contiguous(), v, g, expected[1]),
        strict=True,
    ):
        assert_bitwise(a, b)


# Traffic --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shape", [(1, 9, 501), (200, 20, 1), (20, 9, 20)], ids=str)
def test_two_passes_forward_and_three_backward(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """While a row fits: read v, write w; read dw and v, write dv."""
    v, g, dw = tensors(shape, dtype)
    one = v.numel() * v.element_size()
    with interpreter_traffic(v=v) as traffic:
        _, norm = weight_norm.weight_norm_fwd(v, g)
    assert traffic.by_tensor["v"] == [one, 0] and 2 * one <= traffic.total <= 2.02 * one, traffic.total / one
    with interpreter_traffic(v=v, dw=dw) as traffic:
        weight_norm.weight_norm_bwd(dw, v, g, norm)
    assert traffic.by_tensor == {"v": [one, 0], "dw": [one, 0]}
    assert 3 * one <= traffic.total <= 3.02 * one, traffic.total / one


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("shape", [(1, 2, 1001), (600, 3, 1)], ids=str)
def test_segments_are_read_twice(shape: tuple[int, int, int]) -> None:
    v, g, dw = tensors(shape, torch.float32)
    one = v.numel() * v.element_size()
    with interpreter_traffic(v=v) as traffic:
        _, norm = weight_norm.weight_norm_fwd(v, g)
    assert traffic.by_tensor["v"] == [2 * one, 0] and traffic.total <= 3.1 * one
    with interpreter_traffic(v=v, dw=dw) as traffic:
        weight_norm.weight_norm_bwd(dw, v, g, norm)
    assert traffic.by_tensor == {"v": [2 * one, 0], "dw": [2 * one, 0]} and traffic.total <= 5.1 * one
