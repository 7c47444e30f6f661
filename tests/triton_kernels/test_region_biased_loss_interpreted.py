"""The region-biased-loss launchers against the reference in float64: ragged shapes, dtypes, tiles, edges."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from dlkernels.reference import region_biased_loss as reference
from dlkernels.testing import assert_bitwise, assert_within_budget, poisoned_empty
from dlkernels.triton import region_biased_loss as launchers

NONE, MEAN, SUM = 0, 1, 2
INF, NAN = float("inf"), float("nan")
SHAPES = ((1, 1), (7, 3), (67, 6), (9, 17), (2, 1025))


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """What a kernel does not write is NaN."""
    with poisoned_empty():
        yield


def tensors(shape: tuple[int, int], dtype: torch.dtype, masked: bool) -> tuple[Tensor, Tensor | None]:
    torch.manual_seed(sum(shape))
    x, mask = torch.randn(shape).to(dtype), torch.rand(shape) < 0.6
    return x, mask if masked else None


def rows_and_gradient(x: Tensor, mask: Tensor | None, g: Tensor, options: tuple[int, float, bool]) -> list[Tensor]:
    rows, pull = torch.func.vjp(lambda z: reference.region_biased_loss(z, mask, *options), x)
    return [rows, pull(g.to(rows.dtype))[0]]


def check(x: Tensor, mask: Tensor | None, options: tuple[int, float, bool]) -> None:
    """Rows, the two reductions with and without a stored gradient, and the backward launcher."""
    n = x.shape[0]
    g = 0.5 + torch.rand(n)
    ones = torch.ones(n)
    exact, full = rows_and_gradient(x.double(), mask, ones, options)
    eager, theirs = rows_and_gradient(x, mask, ones, options)
    loss, grad, one = launchers.region_biased_loss_fwd(x, mask, *options, NONE, True, True)
    assert grad.shape == (0,) and one == 1
    assert_within_budget(loss, exact, eager, what="rows")
    for reduction, need_grad in ((MEAN, True), (MEAN, False), (SUM, True)):
        by = n if reduction == MEAN else 1
        loss, grad, divisor = launchers.region_biased_loss_fwd(x, mask, *options, reduction, need_grad, True)
        assert divisor == by and grad.shape == (x.shape if need_grad else (0,)) and grad.dtype == x.dtype
        assert_within_budget(loss, exact.sum() / by, scalar=True, what=f"reduction {reduction}")
        if need_grad:
            fold = 1 if x.dtype == torch.float16 else by  # float16 stores it undivided
            assert_within_budget(grad, full / fold, theirs.double() / fold, what=f"gradient, reduction {reduction}")
    for given in (torch.tensor(-1.7).expand(n), torch.stack([g, g], 1)[:, 0]):
        dx = launchers.region_biased_loss_bwd(given, x, mask, *options)
        exact_dx, eager_dx = (rows_and_gradient(z, mask, given, options)[1] for z in (x.double(), x))
        assert_within_budget(dx, exact_dx, eager_dx, what="backward")


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_reference(shape: tuple[int, int], softmax: bool) -> None:
    for dtype, masked in ((torch.float32, True), (torch.bfloat16, False)):
        x, mask = tensors(shape, dtype, masked)
        check(x, mask, (shape[1] // 2, 0.4, softmax))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_other_dtypes(dtype: torch.dtype) -> None:
    """float64: the margin reaches the kernel as a double."""
    for softmax, origin in itertools.product((False, True), (0, 5)):
        x, mask = tensors((33, 6), dtype, True)
        if dtype == torch.float16:
            check(x, mask, (origin, 0.3, softmax))
            continue
        loss, grad, _ = launchers.region_biased_loss_fwd(x, mask, origin, 0.3, softmax, SUM, True, True)
        rows, full = rows_and_gradient(x, mask, torch.ones(33), (origin, 0.3, softmax))
        assert (loss - rows.sum()).abs() < 1e-14 * rows.sum() and (grad - full).abs().max() < 1e-14


@pytest.mark.parametrize("softmax", [False, True])
def test_kinks_and_numbers_that_are_none(softmax: bool) -> None:
    """The reference decides: equality, ties, infinities, NaN in and out of the mask, rows without a crop."""
    x = torch.tensor(
        [
            [0.25, 0.75, 0.5, 0.75], [0.5, 0.5, 0.5, 0.5], [0.0, -INF, -INF, -INF], [INF, 0.0, 1.0, 2.0],
            [NAN, 0.0, 0.5, 0.0], [0.0, NAN, 2.0, 1.0], [0.0, 1.0, NAN, 3.0], [0.0, INF, INF, 0.0],
        ]
    )  # fmt: skip
    masks = [
        None,
        *(torch.tensor(m, dtype=torch.bool).expand(8, 4) for m in ([0, 1, 0, 1], [1, 0, 1, 1], [0, 0, 0, 0])),
    ]
    g = torch.linspace(0.5, 2, 8)
    for mask, margin in itertools.product(masks, (0.5, 0.0)):
        options = (0, margin, softmax)
        rows, dx = rows_and_gradient(x, mask, g, options)
        loss, _, _ = launchers.region_biased_loss_fwd(x, mask, *options, NONE, False, True)
        torch.testing.assert_close(loss, rows, equal_nan=True, rtol=1e-6, atol=1e-7)
        ours = launchers.region_biased_loss_bwd(g, x, mask, *options)
        torch.testing.assert_close(ours, dx, equal_nan=True, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("softmax", [False, True])
def test_rows_longer_than_a_tile(softmax: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launchers, "MAX_REGIONS", 16)
    for dtype in (torch.float32, torch.float16):
        x, mask = tensors((9, 33), dtype, True)
        check(x, mask, (32, 0.4, softmax))


def test_several_programs_and_steps_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """However rows are spread over programs, the rows' losses and gradients are the same bits."""
    x, mask = tensors((37, 6), torch.float32, True)
    found = []
    for rows in (1, 4, 64):
        monkeypatch.setattr(launchers, "plan", lambda n, r, rows=rows: launchers.Tile(rows, 8, 1, -(-n // rows)))
        loss = launchers.region_biased_loss_fwd(x, mask, 2, 0.3, True, NONE, False, True)[0]
        found.append((loss, launchers.region_biased_loss_bwd(torch.ones(37), x, mask, 2, 0.3, True)))
    for loss, dx in found[1:]:
        assert_bitwise(loss, found[0][0])
        assert_bitwise(dx, found[0][1])


def test_empty_and_strided() -> None:
    for reduction in (NONE, MEAN, SUM):
        loss, grad, divisor = launchers.region_biased_loss_fwd(
            torch.zeros(0, 6), None, 0, 0.1, False, reduction, True, True
        )
        assert (loss == 0).all() and divisor == 1 and grad.numel() == 0
    assert launchers.region_biased_loss_bwd(torch.zeros(0), torch.zeros(0, 6), None, 0, 0.1, True).shape == (0, 6)
    x, mask = tensors((19, 6), torch.float32, True)
    expected = launchers.region_biased_loss_fwd(x, mask, 0, 0.4, True, SUM, True, True)
    given = x.T.contiguous().T, mask.T.contiguous().T
    for a, e in zip(launchers.region_biased_loss_fwd(*given, 0, 0.4, True, SUM, True, True), expected, strict=True):
        assert_bitwise(a, e)
