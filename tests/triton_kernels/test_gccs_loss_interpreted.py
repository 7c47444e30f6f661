"""The GCCS launchers against float64: slabs, tiles, ragged classes, left-out rows, dtypes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from dlkernels.reference import gccs_loss as reference
from dlkernels.testing import Canary, assert_bitwise, assert_within_budget, poisoned_empty, relative_error
from dlkernels.triton import gccs_loss

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NONE, MEAN, SUM = 0, 1, 2
# One column, a slab minus and plus one, several slabs; no rows, fewer rows than a tile, several tiles.
SHAPES = ((1, 1), (19, 1), (3, 5), (25, 4), (22, 9))


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a kernel does not write is NaN. Slabs of 4 columns, tiles of 8 rows."""
    monkeypatch.setattr(gccs_loss, "BLOCK_COLUMNS", 4)
    monkeypatch.setattr(gccs_loss, "TILE", 32)
    with poisoned_empty():
        yield


def batch(n: int, classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Labels -1 and -100, one class without rows, one with a single row, one with most of them."""
    torch.manual_seed(n + classes)
    y = torch.randint(-1, classes, (n,))
    y[::2] = classes - 1
    if classes > 3 and n > 18:
        y[y == 1] = -100
        y[(y == 2).nonzero()[1:]] = 0
    return (2 * torch.randn(n, classes, dtype=torch.float64) + 40).to(dtype), y


def check(z: Tensor, y: Tensor, kurtosis_weight: float, ignore_index: int = -100) -> None:
    options = (7.0, 1.5, 1e-3, kurtosis_weight, ignore_index)
    classes = z.shape[1]
    g = torch.linspace(0.5, 1.5, classes, dtype=torch.float64)
    rows, pull = torch.func.vjp(lambda z: reference.gccs_loss(z, y, *options), z.double())
    eager, eager_pull = torch.func.vjp(lambda z: reference.gccs_loss(z, y, *options), z)
    present = int(reference.classes_present(z, y, ignore_index))
    canary = Canary(z)

    def compare(actual: Tensor, exact: Tensor, theirs: Tensor | None, scalar: bool, what: str) -> None:
        assert actual.is_contiguous()
        if z.dtype == torch.float64:
            assert relative_error(actual, exact) <= 1e-12, what
        else:
            assert_within_budget(actual, exact, theirs, scalar, what)

    for reduction, divisor in ((NONE, 1), (MEAN, present)):
        loss, grad, by = gccs_loss.gccs_loss_fwd(canary.tensor, y, *options, reduction, True, True)
        assert by.item() == divisor and loss.dtype == eager.dtype
        compare(loss, rows if reduction == NONE else rows.sum() / divisor, eager, reduction != NONE, "loss")
        if reduction == NONE:
            assert grad.numel() == 0
            continue
        ones = torch.ones_like(rows) / (1 if z.dtype == torch.float16 else divisor)
        compare(grad, pull(ones)[0], eager_pull(ones.to(eager.dtype))[0], False, "stored gradient")
    strided = g.to(eager.dtype).repeat_interleave(2)[::2]
    dz = gccs_loss.gccs_loss_bwd(strided, canary.tensor, y, *options)
    compare(dz, pull(g)[0], eager_pull(g.to(eager.dtype))[0], False, "gradient")
    canary.check("features")
    left_out = (y < 0) | (y == ignore_index)
    assert not dz[left_out].any()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_slabs_and_tiles(shape: tuple[int, int]) -> None:
    z, y = batch(*shape, torch.float32)
    check(z, y, 0.3 if shape[1] % 2 else 0.0)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=lambda d: str(d)[6:])
def test_other_dtypes(dtype: torch.dtype) -> None:
    z, y = batch(20, 5, dtype)
    check(z, y.int(), 0.3, ignore_index=3)


def test_a_spread_far_below_the_mean() -> None:
    """Rows relative to the first of their class: a deviation of 1e-3 around 40 keeps its digits."""
    torch.manual_seed(0)
    z, y = 40 + 1e-3 * torch.randn(60, 2), torch.arange(60) % 2
    options = (40.0, 1e-3, 1e-11, 0.0, -100)
    exact = reference.gccs_loss(z.double(), y, *options)
    loss = gccs_loss.gccs_loss_fwd(z, y, *options, NONE, False, True)[0]
    assert_within_budget(loss, exact, reference.gccs_loss(z, y, *options))


@pytest.mark.parametrize("n", [0, 5])
def test_nothing_counts(n: int) -> None:
    z, y = torch.full((n, 3), float("nan")), torch.full((n,), -1)
    for reduction in (NONE, MEAN, SUM):
        loss, grad, divisor = gccs_loss.gccs_loss_fwd(z, y, 40.0, 1.0, 1e-5, 0.1, -100, reduction, True, True)
        assert not loss.any() and not grad.any() and divisor == 1
    assert not gccs_loss.gccs_loss_bwd(torch.ones(3), z, y, 40.0, 1.0, 1e-5, 0.1, -100).any()


@pytest.mark.parametrize("bad", [5, 2**31 - 1, 2**40])
def test_a_label_that_is_too_large(bad: int) -> None:
    """Every loss is NaN; the other rows' gradients are what they are without that row, whose own is 0."""
    z, y = batch(20, 5, torch.float32)
    y[7] = bad
    options = (7.0, 1.5, 1e-3, 0.3, -100)
    kept = torch.arange(20) != 7
    for reduction in (NONE, SUM):
        loss, grad, _ = gccs_loss.gccs_loss_fwd(z, y, *options, reduction, True, True)
        assert loss.isnan().all()
        if reduction != NONE:
            expected = gccs_loss.gccs_loss_fwd(z[kept], y[kept], *options, reduction, True, True)[1]
            assert_bitwise(grad[kept], expected)
            assert not grad[7].any()
    loss = gccs_loss.gccs_loss_fwd(z, y, *options[:-1], bad, SUM, False, True)[0]
    assert loss.isfinite()
