"""The scale of a stored gradient: CUDA C++ on the host."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dlkernels.testing import assert_bitwise
from dlkernels.triton import stored_grad as triton

OPS = torch.ops.dlkernels_cuda_host
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("numel", [1, 7, 8, 1023, 4096, 9001])
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "unaligned"])
def test_scale(numel: int, offset: int, dtype: torch.dtype, twin: Any) -> None:
    x = torch.randn(numel + offset).to(dtype)[offset:]
    factor, divisor = torch.tensor(2.5), torch.tensor(3.0)
    expected = (x.float() * (factor / divisor)).to(dtype)
    assert_bitwise(OPS.scale_stored_grad(factor, x, divisor), expected)
    OPS.scale_stored_grad_(x, factor, divisor)
    assert_bitwise(x, expected)
    assert len(twin.launches()) == 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_tritons(dtype: torch.dtype, twin: Any) -> None:
    x = torch.randn(5000).to(dtype)
    factor = torch.tensor(0.37)
    assert_bitwise(OPS.scale_stored_grad(factor, x, factor), triton.scale_stored_grad(factor, x, factor))


def test_zeros_stay_zeros(twin: Any) -> None:
    x = torch.tensor([0.0, 1.0, -0.0])
    out = OPS.scale_stored_grad(torch.tensor(1.0), x, torch.tensor(0.0))
    assert out.tolist() == [0.0, float("inf"), 0.0]


def test_traffic(twin: Any) -> None:
    """One read and one write; in place with a factor of 1, nothing."""
    x = torch.randn(10000)
    with twin.traffic(x=x) as moved:
        OPS.scale_stored_grad_(x, torch.tensor(2.0), None)
    assert (moved["x"].loaded, moved["x"].stored, moved["x"].again) == (x.nbytes, x.nbytes, 0)
    with twin.traffic(x=x) as moved:
        OPS.scale_stored_grad_(x, torch.tensor(1.0), None)
    assert (moved["x"].loaded, moved["x"].stored) == (0, 0)
