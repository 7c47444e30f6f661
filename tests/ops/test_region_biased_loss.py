"""Region biased loss and region attention: against loops written out here, at kinks, with masks, with bad inputs.

The formulas below are written down here a second time on purpose: what they are compared with is not their source.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from _layers import backend_fixture, rejects
from torch import Tensor, nn

import dlkernels as dk
from dlkernels.testing import assert_bitwise, assert_within_budget, num_threads, poisoned_empty, relative_error

INF, NAN = float("inf"), float("nan")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
backend = backend_fixture("region_biased_loss", interpreted=True)
pytestmark = pytest.mark.usefixtures("tensors_on_device")


class Case(NamedTuple):
    shape: tuple[int, int]
    origin: int = 0
    margin: float = 0.3
    normalize: str | None = None
    masked: bool = False

    def __str__(self) -> str:
        words = ("x".join(map(str, self.shape)), self.origin, self.margin, self.normalize or "raw")
        return "-".join(map(str, words)) + ("-masked" if self.masked else "")

    @property
    def options(self) -> dict[str, Any]:
        return {"origin_index": self.origin, "margin": self.margin, "normalize": self.normalize}


SHAPES = ((1, 2), (5, 1), (7, 3), (15, 6), (16, 6), (17, 6), (33, 7), (3, 32), (5, 33), (4, 129), (2, 300))
CASES = [
    *(Case(shape, -1, normalize=n, masked=m) for shape in SHAPES for n in (None, "softmax") for m in (False, True)),
    *(Case((19, 6), origin, margin) for origin, margin in ((0, 0.02), (5, 0.1), (2, 1.5), (-6, -0.2), (3, 0))),
    *(Case((19, 6), origin, margin, "softmax", True) for origin, margin in ((0, 0.1), (5, 0.8), (-4, 0.3), (3, 0))),
]


def draw(case: Case, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """Weights (of both signs and up to 2), a mask of two thirds with a row without crops, and a gradient per row."""
    generator = torch.Generator().manual_seed(seed)
    drawn: dict[str, Any] = {"generator": generator, "dtype": torch.float64, "device": "cpu"}
    x = (0.7 * torch.randn(case.shape, **drawn) + 0.5).to(dtype)
    g = 0.5 + torch.rand(case.shape[:1], **drawn)
    mask = torch.rand(case.shape, **drawn) < 0.67
    mask[-1] = case.shape[0] == 1
    device = torch.get_default_device()
    return x.to(device), mask.to(device) if case.masked else None, g.to(device)


# What is compared with ------------------------------------------------------------------------------------------------


def by_hand(x: Tensor, mask: Tensor | None, case: Case, grad_output: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, gradient) of float64 weights, one row and one region after the other."""
    rows, regions = x.shape
    o = case.origin % regions
    losses, gradient = torch.zeros(rows, dtype=torch.float64), torch.zeros_like(x)
    for n in range(rows):
        z = x[n].tolist()
        crops = [r for r in range(regions) if r != o and (mask is None or bool(mask[n, r]))]
        if not crops:
            continue
        parts = sorted([*crops, o])
        mu = dict(zip(parts, (z[r] for r in parts), strict=True))
        if case.normalize == "softmax":
            total = math.fsum(math.exp(z[r]) for r in parts)
            mu = {r: math.exp(z[r]) / total for r in parts}
        best = crops[0]
        for r in crops:
            best = r if mu[r] > mu[best] else best
        loss = case.margin - (mu[best] - mu[o])
        if loss <= 0:
            continue
        losses[n] = loss
        mean = mu[o] - mu[best]  # of dL/dmu under mu
        in_mu = {r: (r == o) - (r == best) for r in parts}
        for r in parts:
            gradient[n, r] = in_mu[r] if case.normalize is None else mu[r] * (in_mu[r] - mean)
        gradient[n] *= grad_output[n]
    return losses, gradient


def plain(x: Tensor, mask: Tensor | None, case: Case) -> Tensor:
    """Rows in eager PyTorch, in the dtype of x."""
    o = case.origin % x.shape[1]
    parts = torch.ones_like(x, dtype=torch.bool) if mask is None else mask.clone()
    parts[:, o] = True
    crops = parts.clone()
    crops[:, o] = False
    mu = x.masked_fill(~parts, -INF).softmax(1) if case.normalize else x
    best = mu.masked_fill(~crops, -INF).max(1).values
    return torch.where(crops.any(1), (case.margin - (best - mu[:, o])).clamp(min=0), 0)


def everything(call: Callable[[Tensor], Tensor], x: Tensor, g: Tensor | None) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y = call(x)
    return y.detach(), torch.autograd.grad(y, x, None if g is None else g.to(y.dtype))[0]


Loss = Callable[..., Tensor]


def check(loss: Loss, case: Case, dtype: torch.dtype, seeds: int = 3) -> None:
    """The three reductions and their gradients, from which rows are active to the last digit."""
    for seed in range(seeds):
        x, mask, g = draw(case, dtype, seed)
        rows, gradient = by_hand(x.double(), mask, case, g)
        eager = everything(lambda z, m=mask: plain(z, m, case), x, g)
        ours = everything(lambda z, m=mask: loss(z, mask=m, reduction="none", **case.options), x, g)
        assert ours[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert ours[1].dtype == dtype and ours[1].shape == case.shape
        compare(ours, (rows, gradient), eager, "none")
        ones = torch.ones_like(g)
        full = by_hand(x.double(), mask, case, ones)[1]
        theirs = everything(lambda z, m=mask: plain(z, m, case), x, ones)[1]
        for reduction, by in (("sum", 1), ("mean", case.shape[0])):
            value, dx = everything(lambda z, m=mask, r=reduction: loss(z, mask=m, reduction=r, **case.options), x, None)
            compare((value, dx), (rows.sum() / by, full / by), (None, theirs.double() / by), reduction)


def compare(ours: tuple[Tensor, ...], exact: tuple[Tensor, ...], eager: tuple[Any, ...], what: str) -> None:
    for name, a, e, t in zip(("loss", "gradient"), ours, exact, eager, strict=True):
        if a.dtype == torch.float64:
            assert (a - e).abs().max() <= 1e-14 * max(1.0, e.abs().max().item()), f"{name}, {what}"
        else:
            assert_within_budget(a, e, t, scalar=a.dim() == 0, what=f"{name}, {what}")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_a_loop(case: Case, backend: str, device: torch.device) -> None:
    if backend == "triton" and device.type == "cpu":
        if case.shape not in ((7, 3), (17, 6), (5, 33)):
            pytest.skip("by design: in the slow interpreter three shapes stand for all")
        check(dk.region_biased_loss, case, torch.float32, 1)
        return
    for dtype in DTYPES:
        check(dk.region_biased_loss, case, dtype, 1)


# Known values ---------------------------------------------------------------------------------------------------------

MU = [[0.5, 0.6, 0.4], [0.5, 0.51, 0.4], [0.9, 0.2, 0.1]]


@pytest.mark.parametrize(
    ("margin", "rows", "mean"), [(0.02, [0, 0.01, 0.72], 0.2433333333), (0.1, [0, 0.09, 0.8], 0.2966666667)]
)
def test_known_values(margin: float, rows: list[float], mean: float, backend: str) -> None:
    """Column 0 is the face. With the larger margin row 0 just reaches it, but for rounding."""
    mu = torch.tensor(MU, dtype=torch.float64, requires_grad=True)
    found = dk.region_biased_loss(mu, margin=margin, reduction="none")
    torch.testing.assert_close(found, torch.tensor(rows, dtype=torch.float64), rtol=0, atol=1e-12)
    loss = dk.region_biased_loss(mu, margin=margin)
    torch.testing.assert_close(loss.item(), mean, rtol=0, atol=1e-9)
    if margin == 0.1:  # whether 0.6 - 0.5 reaches 0.1 is up to their rounding
        return
    loss.backward()
    third = torch.tensor([[0, 0, 0], [1, -1, 0], [1, -1, 0]], dtype=torch.float64) / 3
    torch.testing.assert_close(mu.grad, third, rtol=0, atol=1e-15)


def published(weights: Tensor) -> Tensor:
    """The loss as its authors publish it: sigmoids through a softmax over six regions, the face last, margin 0.1."""
    alphas = torch.softmax(weights, 1)
    part, whole = alphas[:, 0:5].max(1)[0], alphas[:, 5]
    loss = torch.zeros((), dtype=weights.dtype)
    for i in range(whole.shape[0]):
        loss = loss + torch.clamp(0.1 - (part[i] - whole[i]), min=0)
    return loss / whole.shape[0]


def test_reproduces_the_published_code(backend: str) -> None:
    torch.manual_seed(0)
    weights = torch.sigmoid(2 * torch.randn(9, 6, dtype=torch.float64)).requires_grad_()
    ours = dk.region_biased_loss(weights, origin_index=-1, margin=0.1, normalize="softmax")
    theirs = published(weights)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-15)
    pair = (torch.autograd.grad(loss, weights)[0] for loss in (ours, theirs))
    torch.testing.assert_close(*pair, rtol=0, atol=1e-15)
    assert ours > 0.01 and dk.region_biased_loss(weights.detach(), origin_index=-1, margin=0.1) != ours


# Kinks, masks, numbers that are none ----------------------------------------------------------------------------------


def gradient_of(x: list[float], dtype: torch.dtype = torch.float32, **options: Any) -> tuple[float, list[float]]:
    z = torch.tensor([x], dtype=dtype, requires_grad=True)
    loss = dk.region_biased_loss(z, reduction="sum", **options)
    return loss.item(), torch.autograd.grad(loss, z)[0][0].tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_at_equality_the_gradient_is_zero(dtype: torch.dtype, backend: str) -> None:
    """Numbers that every dtype holds exactly; a step to either side is on one side of the kink."""
    assert gradient_of([0.25, 0.75, 0.5], dtype, margin=0.5) == (0.0, [0, 0, 0])
    assert gradient_of([0.25, 0.71875, 0.5], dtype, margin=0.5) == (0.03125, [1, -1, 0])
    assert gradient_of([0.25, 0.78125, 0.5], dtype, margin=0.5) == (0.0, [0, 0, 0])
    # Through a softmax: equal weights reach a margin of 0 exactly.
    assert gradient_of([2.0, 2.0, 2.0, 2.0], dtype, margin=0.0, normalize="softmax") == (0.0, [0, 0, 0, 0])


@pytest.mark.parametrize("origin", [0, 2, 3])
def test_of_equal_crops_the_first_gets_the_gradient(origin: int, backend: str) -> None:
    x = [0.5, 0.5, 0.5, 0.5]
    first = 1 if origin == 0 else 0
    expected = [float(r == origin) - float(r == first) for r in range(4)]
    assert gradient_of(x, origin_index=origin, margin=0.25) == (0.25, expected)
    x[first] = 0.25  # now the next one
    second = next(r for r in range(4) if r not in (origin, first))
    expected = [float(r == origin) - float(r == second) for r in range(4)]
    assert gradient_of(x, origin_index=origin, margin=0.25) == (0.25, expected)
    mask = torch.tensor([[r != second for r in range(4)]])
    x[first] = 0.5
    expected = [float(r == origin) - float(r == first) for r in range(4)]
    assert gradient_of(x, origin_index=origin, margin=0.25, mask=mask) == (0.25, expected)


@pytest.mark.parametrize("normalize", [None, "softmax"])
def test_masked_regions_are_not_looked_at(normalize: str | None, backend: str) -> None:
    """NaN and infinities in them change nothing; the whole face takes part whatever the mask says of it."""
    torch.manual_seed(1)
    x, mask = torch.randn(20, 7), torch.rand(20, 7) < 0.5
    options = {"origin_index": 3, "margin": 0.4, "normalize": normalize}
    results = []
    for fill, origin in ((NAN, True), (INF, False), (-INF, True), (100.0, False)):
        parts = mask.clone()
        parts[:, 3] = origin
        z = x.masked_fill(~mask & (torch.arange(7) != 3), fill).requires_grad_()
        loss = dk.region_biased_loss(z, mask=parts, reduction="none", **options)
        dx = torch.autograd.grad(loss.sum(), z)[0]
        assert (dx[~parts & (torch.arange(7) != 3)] == 0).all()
        results.append((loss.detach(), dx + 0.0))
    for loss, dx in results[1:]:
        assert_bitwise(loss, results[0][0])
        assert_bitwise(dx, results[0][1])
    # Leaving regions out by hand is the same.
    for n in range(20):
        kept = [r for r in range(7) if r == 3 or mask[n, r]]
        row = dk.region_biased_loss(
            x[n : n + 1, kept], origin_index=kept.index(3), margin=0.4, normalize=normalize, reduction="sum"
        )
        torch.testing.assert_close(row, results[0][0][n], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("normalize", [None, "softmax"])
def test_rows_without_a_crop_cost_nothing(normalize: str | None, backend: str) -> None:
    """One region, or none but the face; even where the face is NaN, and whatever gradient arrives."""
    for shape, mask in (((6, 1), None), ((6, 4), torch.zeros(6, 4, dtype=torch.bool))):
        x = torch.randn(shape)
        x[2] = NAN
        for reduction in ("none", "mean", "sum"):
            z = x.clone().requires_grad_()
            loss = dk.region_biased_loss(z, margin=5.0, normalize=normalize, mask=mask, reduction=reduction)
            assert (loss == 0).all()
            assert (torch.autograd.grad(loss, z, torch.full_like(loss, INF))[0] == 0).all()


@pytest.mark.parametrize("normalize", [None, "softmax"])
def test_nan_propagates(normalize: str | None, backend: str) -> None:
    """In the face or in any crop, also one that is not the largest: loss and gradient of that row, and no other."""
    x = torch.rand(8, 5)
    for n, r in ((1, 0), (3, 1), (5, 4)):
        x[n, r] = NAN
    mask = torch.ones(8, 5, dtype=torch.bool)
    mask[3, 2] = mask[6, 1] = False
    bad = torch.tensor([1, 3, 5])
    for m in (None, mask):
        for reduction in ("none", "sum"):
            z = x.clone().requires_grad_()
            loss = dk.region_biased_loss(z, margin=2.0, normalize=normalize, mask=m, reduction=reduction)
            dx = torch.autograd.grad(loss.sum(), z)[0]
            assert loss.isnan().all() if reduction == "sum" else torch.equal(loss.isnan().nonzero()[:, 0], bad)
            parts = torch.ones(8, 5, dtype=torch.bool) if m is None else m
            expected = torch.zeros(8, 5, dtype=torch.bool)
            expected[bad] = parts[bad]
            assert torch.equal(dx.isnan(), expected)


def test_infinities(backend: str) -> None:
    """Without a softmax: what the formula says; several crops of -inf, masked or not, still have a first one."""
    assert gradient_of([INF, 0.0, 1.0]) == (INF, [1, 0, -1])
    assert gradient_of([0.0, INF, 1.0]) == (0.0, [0, 0, 0])
    assert gradient_of([0.0, -INF, -INF]) == (INF, [1, -1, 0])
    mask = torch.tensor([[True, False, True, True]])
    assert gradient_of([0.0, -INF, -INF, -INF], mask=mask) == (INF, [1, 0, -1, 0])
    loss, dx = gradient_of([INF, INF, 1.0])
    assert math.isnan(loss) and all(math.isnan(d) for d in dx)
    # A logit of -inf is a weight of 0.
    loss, dx = gradient_of([0.0, -INF, 0.0], normalize="softmax", margin=0.25)
    assert loss == 0.25 and dx == [0.5, 0, -0.5]
    assert math.isnan(gradient_of([0.0, INF, 0.0], normalize="softmax")[0])


@pytest.mark.parametrize("normalize", [None, "softmax"])
@pytest.mark.parametrize("regions", [4, 7, 40, 300])
def test_edges_in_rows_of_any_length(regions: int, normalize: str | None, backend: str, device: torch.device) -> None:
    """Ties, equality, infinities and NaN, inside and outside of a mask: wherever the four numbers stand in a row."""
    if backend == "triton" and device.type == "cpu":
        pytest.skip("by design: the launcher's own tests have these edges")
    four = torch.tensor(
        [
            [0.25, 0.75, 0.5, 0.75], [0.5, 0.5, 0.5, 0.5], [0.0, -INF, -INF, -INF], [INF, 0.0, 1.0, 2.0],
            [NAN, 0.0, 0.5, 0.0], [0.0, NAN, 2.0, 1.0], [0.0, 1.0, NAN, 3.0], [0.0, INF, INF, 0.0],
        ],
        dtype=torch.float64,
    )  # fmt: skip
    masks = [None, *(torch.tensor(m, dtype=torch.bool) for m in ([0, 1, 0, 1], [1, 0, 1, 1], [0, 0, 0, 0]))]
    finite = four.isfinite().all(1)
    for begin in {0, (regions - 4) // 2, regions - 4}:
        x = torch.full((8, regions), -INF, dtype=torch.float64)
        x[:, begin : begin + 4] = four
        for m in masks:
            mask = None if m is None else torch.zeros(8, regions, dtype=torch.bool)
            if mask is not None:
                mask[:, begin : begin + 4] = m
            case = Case((8, regions), begin, 0.5, normalize)
            call = lambda z, c=case, m=mask: dk.region_biased_loss(z, mask=m, reduction="none", **c.options)  # noqa: E731
            ours = everything(call, x.float(), torch.ones(8))
            exact = by_hand(x[finite], None if mask is None else mask[finite], case, torch.ones(8))
            for a, e in zip(ours, exact, strict=True):
                torch.testing.assert_close(a[finite].double(), e, rtol=1e-6, atol=1e-7)
            with dk.backend("reference"):
                expected = everything(call, x.float(), torch.ones(8))
            for a, e in zip(ours, expected, strict=True):
                torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-7, equal_nan=True)


def test_empty_batch(backend: str) -> None:
    x = torch.zeros(0, 6, requires_grad=True)
    for reduction, shape in (("none", (0,)), ("mean", ()), ("sum", ())):
        loss = dk.region_biased_loss(x, reduction=reduction)
        assert loss.shape == shape and (loss == 0).all()
        assert torch.autograd.grad(loss, x, torch.ones_like(loss))[0].shape == (0, 6)


@pytest.mark.parametrize("normalize", [None, "softmax"])
def test_many_regions(normalize: str | None, backend: str) -> None:
    """The largest crop far behind, in the middle, and at once; rows longer than any tile."""
    torch.manual_seed(0)
    for regions in (1000, 9001):
        x = torch.rand(3, regions, dtype=torch.float64)
        x[0, regions - 1], x[1, 1], x[2, regions // 2] = 1.25, 1.25, 1.25
        case, ones = Case((3, regions), 0, 1.5, normalize), torch.ones(3, dtype=torch.float64)
        for dtype, allowed in ((torch.float64, 1e-13), (torch.float32, 2e-6)):
            z = x.to(dtype)
            ours = everything(lambda z, c=case: dk.region_biased_loss(z, reduction="none", **c.options), z, ones)
            exact = by_hand(z.double(), None, case, ones)
            assert all(relative_error(a, e) < allowed for a, e in zip(ours, exact, strict=True))


@pytest.mark.needs("cpp")
def test_runs_and_threads_are_bitwise_equal() -> None:
    x = torch.randn(30_011, 6)
    mask = torch.rand(x.shape) < 0.7
    found = []
    for threads in (1, 2, 3, 1):
        with num_threads(threads), poisoned_empty():
            found.append(everything(lambda z: dk.region_biased_loss(z, normalize="softmax", mask=mask), x, None))
    for loss, dx in found[1:]:
        assert_bitwise(loss, found[0][0])
        assert_bitwise(dx, found[0][1])


@pytest.mark.needs("cpp")
def test_second_derivatives_through_the_softmax() -> None:
    torch.manual_seed(3)
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, True, False, True]] * 5)
    for m in (None, mask):
        options = {"origin_index": 1, "margin": 0.7, "normalize": "softmax", "mask": m}
        assert torch.autograd.gradgradcheck(lambda z, o=options: dk.region_biased_loss(z, **o), x)


# Negative controls: each of these mistakes is noticed -----------------------------------------------------------------


def wrong(*, origin_in_max: bool = False, sign: float = 1.0, scale: float = 1.0, last_of_ties: bool = False,
          masked_in_softmax: bool = False, at_zero: float = 0.0) -> Loss:  # fmt: skip
    """The loss with one detail flipped; with none it is right."""

    def loss(
        x: Tensor, *, origin_index: int, margin: float, normalize: str | None, mask: Tensor | None, reduction: str
    ) -> Tensor:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        o, z = origin_index % x.shape[1], x.to(dtype)
        parts = torch.ones_like(x, dtype=torch.bool) if mask is None else mask.clone()
        parts[:, o] = True
        crops = parts.clone()
        crops[:, o] = False
        mu = z
        if normalize:
            mu = (z if masked_in_softmax else z.masked_fill(~parts, -INF)).softmax(1)
        among = mu.masked_fill(~(parts if origin_in_max else crops), -INF)
        best = (x.shape[1] - 1 - among.flip(1).argmax(1)) if last_of_ties else among.argmax(1)
        value = scale * margin - sign * (mu.gather(1, best.unsqueeze(1)).squeeze(1) - mu[:, o])
        rows = torch.where(crops.any(1) & (value > at_zero), value, 0.0)
        return rows if reduction == "none" else rows.sum() if reduction == "sum" else rows.mean()

    return loss


CONTROLS = {
    "max over the whole face too": {"origin_in_max": True},  # as a re-implementation has it
    "sign": {"sign": -1.0},
    "scale of the margin": {"scale": 1.00001},
    "softmax over masked regions": {"masked_in_softmax": True},
    "a threshold above zero": {"at_zero": 0.05},
}


@pytest.mark.parametrize("name", CONTROLS)
def test_the_comparison_notices(name: str) -> None:
    """The unfused form passes every case; with one detail flipped it fails some."""
    cases = [Case((33, 6), -1), Case((33, 6), 0, 0.3, "softmax", True)]
    for case in cases:
        check(wrong(), case, torch.float32)
    failed = 0
    for case in cases:
        try:
            check(wrong(**CONTROLS[name]), case, torch.float32)
        except AssertionError:
            failed += 1
    assert failed >= (1 if name == "softmax over masked regions" else 2)


def test_the_tie_test_notices(monkeypatch: pytest.MonkeyPatch) -> None:
    def last(x: Tensor, **options: Any) -> Tensor:
        given = {"origin_index": 0, "margin": 0.02, "normalize": None, "mask": None, "reduction": "mean"}
        return wrong(last_of_ties=True)(x, **given | options)

    monkeypatch.setattr(dk, "region_biased_loss", last)
    with pytest.raises(AssertionError):
        test_of_equal_crops_the_first_gets_the_gradient(0, "none")


# Errors ---------------------------------------------------------------------------------------------------------------

X, M = torch.zeros(4, 6), torch.ones(4, 6, dtype=torch.bool)
BAD: list[tuple[type[Exception], tuple[Any, ...], dict[str, Any], tuple[str, ...]]] = [
    (TypeError, ([[0.1]],), {}, ("`attention`", "must be a Tensor", "list")),
    (TypeError, (X.long(),), {}, ("`attention`", "float32, float16, bfloat16 or float64", "torch.int64")),
    (TypeError, (X.to_sparse(),), {}, ("`attention`", "strided")),
    (ValueError, (X[0],), {}, ("`attention`", "(N, R)", "(6,)")),
    (ValueError, (X.unsqueeze(0),), {}, ("`attention`", "(N, R)", "(1, 4, 6)")),
    (ValueError, (X[:, :0],), {}, ("`attention`", "regions", "got 0")),
    (ValueError, (X,), {"origin_index": 6}, ("`origin_index`", "[-6, 6)", "got 6")),
    (ValueError, (X,), {"origin_index": -7}, ("`origin_index`", "[-6, 6)", "got -7")),
    (TypeError, (X,), {"origin_index": 1.0}, ("`origin_index`", "int", "float")),
    (TypeError, (X,), {"origin_index": True}, ("`origin_index`", "int", "bool")),
    (ValueError, (X,), {"margin": NAN}, ("`margin`", "finite", "nan")),
    (ValueError, (X,), {"margin": INF}, ("`margin`", "finite", "inf")),
    (TypeError, (X,), {"margin": "0.1"[:0]}, ("`margin`", "number", "str")),
    (TypeError, (X,), {"margin": None}, ("`margin`", "number", "NoneType")),
    (ValueError, (X,), {"normalize": "sigmoid"}, ("`normalize`", "None, 'softmax'", "'sigmoid'")),
    (ValueError, (X,), {"normalize": True}, ("`normalize`", "True")),
    (TypeError, (X,), {"mask": [True]}, ("`mask`", "must be a Tensor", "list")),
    (TypeError, (X,), {"mask": M.float()}, ("`mask`", "torch.bool", "torch.float32")),
    (ValueError, (X,), {"mask": M[:, :5]}, ("`mask`", "(N, R) = (4, 6)", "(4, 5)")),
    (ValueError, (X,), {"mask": M[0]}, ("`mask`", "(N, R) = (4, 6)", "(6,)")),
    (ValueError, (X,), {"mask": M.to("meta")}, ("`mask`", "cpu", "meta")),
    (ValueError, (X,), {"reduction": "batchmean"}, ("`reduction`", "'none', 'mean' or 'sum'", "'batchmean'")),
]


@pytest.mark.parametrize(("error", "args", "options", "words"), BAD)
def test_rejects(
    error: type[Exception], args: tuple[Any, ...], options: dict[str, Any], words: tuple[str, ...]
) -> None:
    rejects(error, lambda: dk.region_biased_loss(*args, **options), words)


def test_options_are_by_name_only() -> None:
    rejects(TypeError, lambda: dk.region_biased_loss(X, 0), ("positional",))


# Modules --------------------------------------------------------------------------------------------------------------


def test_module_takes_the_functions_options() -> None:
    ours = inspect.signature(dk.nn.RegionBiasedLoss).parameters
    theirs = inspect.signature(dk.region_biased_loss).parameters
    names = [name for name in theirs if name not in ("attention", "mask")]
    assert sorted(ours) == sorted(names)
    assert all(ours[name].default == theirs[name].default for name in names)


@pytest.mark.parametrize(
    ("error", "options", "words"),
    [
        (TypeError, {"origin_index": 0.5}, ("`origin_index`",)),
        (ValueError, {"margin": NAN}, ("`margin`",)),
        (ValueError, {"normalize": "mean"}, ("`normalize`",)),
        (ValueError, {"reduction": "max"}, ("`reduction`",)),
    ],
)
def test_module_rejects_when_it_is_made(error: type[Exception], options: dict[str, Any], words: tuple[str]) -> None:
    rejects(error, lambda: dk.nn.RegionBiasedLoss(**options), words)


# Region attention -----------------------------------------------------------------------------------------------------


def attended(layer: dk.nn.RegionAttention, features: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """One sample and one region after the other, in float64."""
    rows, regions, dim = features.shape
    q0, q1 = (w.weight.detach().double()[0] for w in (layer.self_attention, layer.relation_attention))
    b0, b1 = (0.0 if w.bias is None else w.bias.item() for w in (layer.self_attention, layer.relation_attention))
    pooled, weights = features.new_zeros(rows, 2 * dim), features.new_zeros(rows, regions)
    for n in range(rows):
        kept = [r for r in range(regions) if mask is None or bool(mask[n, r])]
        if not kept:
            continue
        f = features[n, kept]
        mu = torch.tensor([1 / (1 + math.exp(-float(q0 @ v) - b0)) for v in f], dtype=torch.float64)
        mu = mu.exp() / mu.exp().sum() if layer.normalize else mu
        mean = sum(m * v for m, v in zip(mu, f, strict=True)) / mu.sum()
        both = [torch.cat([v, mean]) for v in f]
        nu = torch.tensor([1 / (1 + math.exp(-float(q1 @ v) - b1)) for v in both], dtype=torch.float64)
        nu = nu.exp() / nu.exp().sum() if layer.normalize else nu
        pooled[n] = sum(m * k * v for m, k, v in zip(mu, nu, both, strict=True)) / (mu * nu).sum()
        weights[n, kept] = mu
    return pooled, weights


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("normalize", [None, "softmax"])
def test_attention_matches_a_loop(normalize: str | None, bias: bool, masked: bool) -> None:
    torch.manual_seed(0)
    layer = dk.nn.RegionAttention(5, bias=bias, normalize=normalize, dtype=torch.float64)
    features = torch.randn(7, 4, 5, dtype=torch.float64)
    mask = torch.rand(7, 4) < 0.6 if masked else None
    if mask is not None:
        mask[3] = False
    given = features if mask is None else features.masked_fill(~mask.unsqueeze(-1), NAN)
    pooled, weights = layer(given, mask)
    exact = attended(layer, features, mask)
    torch.testing.assert_close(pooled, exact[0], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(weights, exact[1], rtol=1e-12, atol=1e-13)
    if mask is not None:
        assert (pooled[3] == 0).all() and (weights[3] == 0).all() and (weights[~mask] == 0).all()
    single, _ = layer.float()(given.float(), mask)
    assert single.dtype == torch.float32 and relative_error(single, exact[0]) < 1e-6
    half, mu = layer.bfloat16()(given.bfloat16(), mask)
    assert half.dtype == mu.dtype == torch.bfloat16 and relative_error(half, exact[0]) < 0.03


@pytest.mark.parametrize("normalize", [None, "softmax"])
def test_attention_gradients(normalize: str | None) -> None:
    torch.manual_seed(1)
    layer = dk.nn.RegionAttention(3, normalize=normalize, dtype=torch.float64)
    features = torch.randn(4, 3, 3, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in layer.named_parameters()]
    for mask in (None, torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 0, 1]], dtype=torch.bool)):

        def call(f: Tensor, *parameters: Tensor, m: Tensor | None = mask) -> Any:
            return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (f, m))

        assert torch.autograd.gradcheck(call, (features, *layer.parameters()))


@pytest.mark.parametrize("score", [-1e4, -200.0])
def test_attention_of_weights_that_sum_to_zero(score: float) -> None:
    """Sigmoids that underflow: the output is 0, and every gradient finite."""
    layer = dk.nn.RegionAttention(3)
    with torch.no_grad():
        layer.self_attention.bias.fill_(score)
    features = torch.randn(5, 4, 3, requires_grad=True)
    pooled, mu = layer(features)
    assert (mu == 0).all() and (pooled == 0).all()
    (pooled.sum() + dk.region_biased_loss(mu)).backward()
    for t in (features, *layer.parameters()):
        assert t.grad.isfinite().all()


def test_attention_state_dict_and_repr() -> None:
    layer = dk.nn.RegionAttention(6, normalize="softmax")
    shapes = {name: tuple(t.shape) for name, t in layer.state_dict().items()}
    assert shapes == {
        "self_attention.weight": (1, 6), "self_attention.bias": (1,),
        "relation_attention.weight": (1, 12), "relation_attention.bias": (1,),
    }  # fmt: skip
    assert "dim=6, bias=True, normalize='softmax'" in repr(layer)
    twin = dk.nn.RegionAttention(6, normalize="softmax")
    x = torch.randn(2, 3, 6)
    assert not torch.equal(twin(x)[0], layer(x)[0])
    twin.load_state_dict(layer.state_dict())
    for a, b in zip(twin(x), layer(x), strict=True):
        assert_bitwise(a, b)
    assert [*dk.nn.RegionAttention(6, bias=False).state_dict()] == [
        "self_attention.weight",
        "relation_attention.weight",
    ]


def test_attention_compiles_in_one_graph() -> None:
    layer = dk.nn.RegionAttention(4)

    def step(features: Tensor, mask: Tensor) -> Tensor:
        pooled, mu = layer(features, mask)
        return pooled.square().mean() + dk.region_biased_loss(mu, mask=mask)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    features, mask = torch.randn(5, 6, 4), torch.rand(5, 6) < 0.7
    torch.testing.assert_close(compiled(features, mask), step(features, mask))


@pytest.mark.parametrize(
    ("error", "args", "words"),
    [
        (ValueError, (torch.zeros(2, 3),), ("`features`", "(N, R, D) with D = 4", "(2, 3)")),
        (ValueError, (torch.zeros(2, 3, 5),), ("`features`", "D = 4", "(2, 3, 5)")),
        (TypeError, (torch.zeros(2, 3, 4).int(),), ("`features`", "torch.int32")),
        (TypeError, (torch.zeros(2, 3, 4), torch.ones(2, 3)), ("`mask`", "torch.bool")),
        (ValueError, (torch.zeros(2, 3, 4), torch.ones(2, 4).bool()), ("`mask`", "(N, R) = (2, 3)", "(2, 4)")),
    ],
)
def test_attention_rejects(error: type[Exception], args: tuple[Any, ...], words: tuple[str, ...]) -> None:
    rejects(error, lambda: dk.nn.RegionAttention(4)(*args), words)


def test_attention_rejects_when_it_is_made() -> None:
    rejects(ValueError, lambda: dk.nn.RegionAttention(0), ("`dim`", "got 0"))
    rejects(TypeError, lambda: dk.nn.RegionAttention(4.0), ("`dim`", "int"))
    rejects(ValueError, lambda: dk.nn.RegionAttention(4, normalize="l1"), ("`normalize`", "'l1'"))


def train(weight: float) -> tuple[list[float], float, Tensor]:
    """A face and three crops of 8 numbers, of which crop 2 alone tells the class; the losses, accuracy and weights."""
    torch.manual_seed(0)
    labels = torch.arange(96) % 3
    features = 0.3 * torch.randn(96, 4, 8)
    features[:, 2, :3] += 2.0 * torch.eye(3)[labels]
    layer, head = dk.nn.RegionAttention(8), nn.Linear(16, 3)
    optimizer = torch.optim.Adam([*layer.parameters(), *head.parameters()], lr=0.05)
    losses = []
    for _ in range(60):
        pooled, mu = layer(features)
        logits = head(pooled)
        loss = dk.cross_entropy(logits, labels) + weight * dk.region_biased_loss(mu, margin=0.2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, (logits.argmax(1) == labels).float().mean().item(), mu.detach()


def test_cross_entropy_and_region_biased_loss_train() -> None:
    """The sum falls, the classes are learnt, and with the loss a crop outweighs the face by the margin."""
    losses, accuracy, mu = train(1.0)
    assert losses[-1] < 0.1 * losses[0] and accuracy > 0.95
    gap = mu[:, 1:].amax(1) - mu[:, 0]
    assert (gap > 0.2 - 1e-3).float().mean() > 0.9
