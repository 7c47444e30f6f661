"""The stochastic-depth launcher against the formula: ragged shapes, dtypes, and the bytes that it moves."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from dlkernels._traffic import eager_traffic, interpreter_traffic
from dlkernels.testing import assert_bitwise, assert_within_budget, poisoned_empty
from dlkernels.triton import stochastic_depth

SHAPES = ((1, 1), (5, 1), (1, 37), (6, 7), (4, 16), (3, 130), (2, 4097))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """What a kernel does not write is NaN."""
    with poisoned_empty():
        yield


def tensors(shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """What is dropped, every third row from the second one on, is NaN."""
    torch.manual_seed(sum(shape))
    x, r = (torch.randn(shape).to(dtype) for _ in range(2))
    f = (1 + torch.rand(shape[0])).to(dtype)
    f[1::3], x[1::3] = 0, float("nan")
    return x, f, r


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("residual", [True, False])
def test_matches_float64(shape: tuple[int, int], dtype: torch.dtype, residual: bool) -> None:
    x, f, r = tensors(shape, dtype)
    for noise in (f, f.float()) if dtype != torch.float64 else (f,):
        y = stochastic_depth.stochastic_depth_fwd(x, noise, r if residual else None)
        exact = torch.nan_to_num(x.double()) * f.double().unsqueeze(-1) + (r.double() if residual else 0)
        assert y.dtype == dtype and y.is_contiguous()
        if dtype == torch.float64:
            assert (y - exact).abs().max() <= 1e-15 * exact.abs().max()
        else:
            assert_within_budget(y, exact)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)], ids=str)
def test_empty(shape: tuple[int, int]) -> None:
    y = stochastic_depth.stochastic_depth_fwd(torch.zeros(shape), torch.ones(shape[0]), None)
    assert y.shape == shape


def test_strided_arguments() -> None:
    x, f, r = tensors((6, 37), torch.float32)
    expected = stochastic_depth.stochastic_depth_fwd(x, f, r)
    given = x.T.contiguous().T, f.repeat_interleave(2)[::2], r.T.contiguous().T
    assert_bitwise(stochastic_depth.stochastic_depth_fwd(*given), expected)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=lambda d: str(d)[6:])
def test_dropped_rows_are_not_read(dtype: torch.dtype) -> None:
    """Read the residual and what is kept, write y; the backward pass reads and writes half as much again."""
    x, f, r = tensors((6, 1001), dtype)
    one, kept = x.numel() * x.element_size(), 4 / 6
    with interpreter_traffic(x=x, r=r) as traffic:
        y = stochastic_depth.stochastic_depth_fwd(x, f, r)
    assert traffic.by_tensor == {"x": [int(kept * one), 0], "r": [one, 0]}
    least = (2 + kept) * one
    assert least <= traffic.total <= 1.01 * least
    with interpreter_traffic() as traffic:
        stochastic_depth.stochastic_depth_fwd(torch.ones_like(y), f, None)
    assert (1 + kept) * one <= traffic.total <= 1.01 * (1 + kept) * one
    with eager_traffic() as eager:
        r + x * f.unsqueeze(-1)
    print(f"stochastic depth {dtype}: {least / one:.2f} passes, eager {eager.total / one:.2f}")
    assert eager.total > 1.8 * least


def test_a_dropped_row_costs_a_read_where_it_is_kept() -> None:
    """The count would show a kernel that reads what is dropped."""
    x, f, _ = tensors((6, 100), torch.float32)
    counts = []
    for noise in (f, torch.ones_like(f)):
        with interpreter_traffic(x=x) as traffic:
            stochastic_depth.stochastic_depth_fwd(x, noise, None)
        counts.append(traffic.by_tensor["x"][0])
    assert counts == [1600, 2400]
