"""Center, sparse center and island loss, and the centers' update: values, gradients, classes, errors, determinism.

The formulas below are written down here a second time on purpose: what they are compared with is not their source.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from typing import Any, NamedTuple

import pytest
import torch
from _layers import backend_fixture
from torch import Tensor

import dlkernels as dk
from dlkernels.ops.center_loss import loss_and_update
from dlkernels.testing import (
    assert_bitwise,
    assert_within_budget,
    error_budget,
    num_threads,
    poisoned_empty,
    relative_error,
    unmodified,
)

INF, NAN = float("inf"), float("nan")
DTYPES = [
    pytest.param((torch.float32, torch.float32), id="float32"),
    pytest.param((torch.float16, torch.float32), id="float16-float32"),
    pytest.param((torch.bfloat16, torch.float32), id="bfloat16-float32"),
    pytest.param((torch.bfloat16, torch.bfloat16), id="bfloat16"),
    pytest.param((torch.float64, torch.float64), id="float64"),
]

GPU_BACKENDS = ("triton", "cuda")
backend = backend_fixture("center_loss", interpreted=True)


def pairs_on(backend: str) -> Any:
    """The backend of the island's pairs where this one serves the rest: CUDA C++ leaves them to Triton."""
    return dk.backend("triton") if backend == "cuda" else contextlib.nullcontext()


# Written from the papers ----------------------------------------------------------------------------------------------


def plain_rows(x: Tensor, y: Tensor, c: Tensor, a: Tensor | None, ignore: int = -100) -> Tensor:
    """1/2 sum_d A (x - c_y)^2 by gathering, in the dtype of x and c together."""
    kept = (y >= 0) & (y != ignore)
    d = x - c[torch.where(kept, y, 0).long()]
    weighed = d * d if a is None else a * d * d
    return torch.where(kept, 0.5 * weighed.sum(1), 0.0)


def plain_reduced(rows: Tensor, y: Tensor, reduction: str, ignore: int = -100) -> Tensor:
    if reduction == "none":
        return rows
    kept = int(((y >= 0) & (y != ignore)).sum())
    return rows.sum() if reduction == "sum" else rows.sum() / max(kept, 1)


def looped_update(
    c: Tensor, x: Tensor, y: Tensor, a: Tensor | None, alpha: float, ema: bool, island: float, ignore: int = -100
) -> Tensor:
    """Wen et al., eq. 4, class by class and row by row; the island's term pair by pair."""
    new = c.clone()
    for j in range(c.shape[0]):
        rows = [i for i in range(len(y)) if int(y[i]) == j != ignore]
        delta = torch.zeros_like(c[j])
        for i in rows:
            delta += (c[j] - x[i]) * (1 if a is None else a[i])
        if rows:
            delta /= len(rows) if ema else 1 + len(rows)
        if island:
            norm = c[j].norm()
            pushes = torch.zeros_like(delta)
            for k in range(c.shape[0]):
                if k != j and norm > 0 and c[k].norm() > 0:
                    pushes += c[k] / (c[k].norm() * norm) - (c[k] @ c[j]) * c[j] / (c[k].norm() * norm**3)
            delta += island / max(c.shape[0] - 1, 1) * pushes
        new[j] = c[j] - alpha * delta
    return new


def plain_pairs(c: Tensor) -> Tensor:
    """Ordered pairs one by one, a center of norm 0 with cosine 0."""
    norms = c.square().sum(1).sqrt()
    safe = torch.where(norms > 0, norms, 1.0)
    cosines = (c @ c.T) / safe[:, None] / safe[None, :]
    return (cosines + 1).sum() - (cosines.diagonal() + 1).sum()


# CASES ----------------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    n: int
    k: int
    d: int
    labels: str = "some"  # some left out; one: all rows in one class; own: a class of its own for each row; all

    def __str__(self) -> str:
        return f"{self.n}x{self.d}-{self.k}-{self.labels}"


CASES = [
    Case(9, 4, 5),
    Case(1, 1, 1),
    Case(37, 6, 16),
    Case(64, 10, 2),
    Case(33, 3, 33),
    Case(5, 700, 17),
    Case(300, 5, 40, "one"),
    Case(20, 20, 31, "own"),
    Case(130, 7, 129, "all"),
    Case(600, 2, 18, "all"),
]


class Sample(NamedTuple):
    x: Tensor
    y: Tensor
    c: Tensor
    a: Tensor

    def double(self) -> Sample:
        return Sample(*(t if t.dtype == torch.int64 else t.double() for t in self))


def draw(case: Case, dtypes: tuple[torch.dtype, torch.dtype], device: torch.device, seed: int = 0) -> Sample:
    """Features around their centers, which lie apart, and attention away from its ends."""
    generator = torch.Generator().manual_seed(31 * case.n + seed)
    n, k, d = case.n, case.k, case.d
    c = 2 * torch.randn(k, d, generator=generator)
    y = torch.randint(0, k, (n,), generator=generator)
    if case.labels == "some":
        y[1::4], y[2::7] = -100, -3
    elif case.labels == "one":
        y[:] = k - 1
    elif case.labels == "own":
        y = torch.randperm(k, generator=generator)[:n]
    x = c[y.clamp(min=0)] + torch.randn(n, d, generator=generator)
    a = 0.05 + 0.9 * torch.rand(n, d, generator=generator)
    return Sample(x.to(dtypes[0]).to(device), y.to(device), c.to(dtypes[1]).to(device), a.to(dtypes[0]).to(device))


def fused(s: Sample, weigh: str, reduction: str, **more: Any) -> Tensor:
    if weigh == "none":
        return dk.center_loss(s.x, s.y, s.c, reduction=reduction, **more)
    return dk.sparse_center_loss(
        s.x, s.y, s.c, s.a, reduction=reduction, attention_logits=weigh == "logits", **more
    )  # fmt: skip


def plain(s: Sample, weigh: str, reduction: str) -> Tensor:
    a = {"none": None, "attention": s.a, "logits": s.a.sigmoid()}[weigh]
    return plain_reduced(plain_rows(s.x, s.y, s.c, a), s.y, reduction)


def everything(call: Any, s: Sample, weigh: str, reduction: str, wanted: str) -> list[Tensor]:
    """The loss and its gradients in those of x, a and c that are wanted."""
    leaves = {"x": s.x, "c": s.c, "a": s.a}
    leaves = {k: t.detach().clone().requires_grad_(k in wanted) for k, t in leaves.items()}
    loss = call(Sample(leaves["x"], s.y, leaves["c"], leaves["a"]), weigh, reduction)
    g = torch.linspace(0.5, 1.5, loss.numel(), device=loss.device).to(loss.dtype).reshape(loss.shape)
    return [loss.detach(), *torch.autograd.grad(loss, [t for t in leaves.values() if t.requires_grad], g)]


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_formula(case: Case, dtypes: Any, backend: str, device: torch.device) -> None:
    """Values and gradients, whichever of the inputs asks for one, for every reduction and kind of attention."""
    if backend in GPU_BACKENDS and device.type == "cpu" and (dtypes[0] != torch.float32 or case.n > 100):
        pytest.skip("by design: in slow stand-ins for a GPU float32 stands for all dtypes")
    s = draw(case, dtypes, device)
    for weigh, reduction in itertools.product(("none", "attention", "logits"), ("mean", "sum", "none")):
        for wanted in ("x", "xc", "c", "xca") if weigh == "none" else ("xa", "xca", "a"):
            wanted = wanted.replace("a", "") if weigh == "none" else wanted
            actual = everything(fused, s, weigh, reduction, wanted)
            exact = everything(plain, s.double(), weigh, reduction, wanted)
            eager = everything(plain, s, weigh, reduction, wanted)
            assert actual[0].dtype == (torch.float64 if dtypes[0] == torch.float64 else torch.float32)
            for what, a, e, t in zip(("loss", *wanted), actual, exact, eager, strict=True):
                name = f"{what} {weigh} {reduction} of {wanted}"
                if what == "loss" and a.dtype == torch.float32 and dtypes[0] != torch.float32:
                    t = None  # eager rounds to half precision, where ours is float32
                assert_within_budget(a, e, t, scalar=what == "loss" and reduction != "none", what=name)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_float32_attention(dtype: torch.dtype, reduction: str, backend: str, device: torch.device) -> None:
    """Beside half-precision features; each gradient in its own dtype, with the forward and the backward operator."""
    s = draw(CASES[2], (dtype, torch.float32), device)
    s = s._replace(a=s.a.float())
    for wanted, weigh in itertools.product(("xa", "xca"), ("attention", "logits")):
        actual = everything(fused, s, weigh, reduction, wanted)
        exact = everything(plain, s.double(), weigh, reduction, wanted)
        for name, a, e in zip(("loss", *wanted), actual, exact, strict=True):
            assert_within_budget(a, e, None, scalar=name == "loss" and reduction == "mean", what=f"{name} {weigh}")
        assert [t.dtype for t in actual[1:]] == [torch.float32 if w != "x" else dtype for w in wanted]


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_update_is_the_papers(case: Case, dtypes: Any, backend: str, device: torch.device) -> None:
    """Against the loop of the papers, alone and in one call with the loss, which sees the centers from before."""
    if backend in GPU_BACKENDS and device.type == "cpu" and (dtypes[0] != torch.float32 or case.n > 100):
        pytest.skip("by design: in slow stand-ins for a GPU float32 stands for all dtypes")
    s = draw(case, dtypes, device)
    exact = s.double()
    options = [(0.5, False, 0.0), (0.25, True, 0.0)] + ([(0.5, False, 3.0)] if case.k < 100 else [])
    for weigh, (alpha, ema, island) in itertools.product(("none", "attention", "logits"), options):
        a = {"none": None, "attention": exact.a, "logits": exact.a.sigmoid()}[weigh]
        expected = looped_update(exact.c, exact.x, s.y, a, alpha, ema, island)
        given = None if weigh == "none" else s.a
        logits = weigh == "logits"
        alone, together = s.c.clone(), s.c.clone()
        with unmodified(s.x, s.y, s.a), poisoned_empty():
            returned = dk.update_centers_(
                *(alone, s.x, s.y, alpha), attention=given, island_weight=island, ema=ema, attention_logits=logits
            )
            leaf = s.x.clone().requires_grad_()
            loss = loss_and_update(leaf, s.y, together, given, logits, "mean", -100, alpha, ema, island)
            (dx,) = torch.autograd.grad(loss, leaf, torch.full_like(loss, 0.5))
        assert returned is alone
        # The old center is rounded once when the new one is stored; sums of half a class's rows come before.
        assert_within_budget(alone, expected, s.c.new_tensor(expected.cpu().numpy()).to(s.c.dtype), what="centers")
        assert_within_budget(together, expected, None, what="centers beside the loss")
        before = everything(plain, exact, weigh, "mean", "x")
        assert_within_budget(loss.detach(), before[0], None, scalar=True, what="loss")
        assert_within_budget(dx, before[1], None, what="dx")
        absent = sorted(set(range(case.k)) - set(s.y.tolist()))
        if absent and not island:
            assert_bitwise(alone[absent], s.c[absent], "centers of absent classes")


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=lambda d: str(d)[6:]
)
@pytest.mark.parametrize("shape", [(1, 3), (2, 1), (5, 7), (10, 64), (300, 33)], ids=str)
def test_island_pairs(shape: tuple[int, int], dtype: torch.dtype, backend: str, device: torch.device) -> None:
    """The closed form is the double sum, with and without centers of norm 0."""
    if backend == "cuda":
        pytest.skip("by design: CUDA C++ leaves the island's pairs to Triton")
    if backend in GPU_BACKENDS and device.type == "cpu" and dtype != torch.float32:
        pytest.skip("by design: in slow stand-ins for a GPU float32 stands for all dtypes")
    k, d = shape
    for zeros in (False, True):
        c = torch.randn(k, d, generator=torch.Generator().manual_seed(k)).to(dtype).to(device)
        if zeros:
            c[k // 2] = 0
        x, y = c.new_zeros(4, d), torch.zeros(4, dtype=torch.int64, device=device)
        leaf, exact = c.clone().requires_grad_(), c.double().requires_grad_()
        parts = dk.island_loss(x, y, leaf, 2.5, return_parts=True)
        pairs = plain_pairs(exact)
        # Cosines of -1 leave nothing of the sum: judged by its terms, K (K - 1) of up to 2.
        assert (parts.pairs.detach().double() - pairs.detach()).abs() <= 8 * torch.finfo(parts.pairs.dtype).eps * k * k
        (grad,) = torch.autograd.grad(parts.pairs, leaf)
        expected = torch.autograd.grad(pairs, exact)[0] if k > 1 else torch.zeros_like(exact)
        if zeros:
            expected[k // 2] = 0
            assert not grad[k // 2].any() and torch.isfinite(grad).all()
        # The gradient is a difference of nearly equal vectors where D is 1: judged by the size of its parts.
        size = 2 * k / c.double().norm(dim=1).clamp(min=1e-3)
        error = ((grad.double() - expected).abs() / size[:, None]).max()
        assert error <= 4 * torch.finfo(dtype if dtype != torch.float64 else torch.float64).eps * math.sqrt(k)
        center = dk.center_loss(x, y, c)
        assert_within_budget(
            parts.loss.detach(), center.double() + 2.5 * parts.pairs.detach().double(), None, scalar=True, what="sum"
        )
        rows = dk.island_loss(x, y.index_fill(0, y.new_tensor([1]), -100), c, 2.5, reduction="none")
        assert rows[1] == 0
        assert_within_budget(rows[[0, 2, 3]].mean(), parts.loss.detach().double(), None, scalar=True, what="none")


def test_vectors(backend: str, device: torch.device) -> None:
    """Small numbers worked out by hand."""
    f64 = {"dtype": torch.float64, "device": device}
    if backend in GPU_BACKENDS:
        f64["dtype"] = torch.float32
    x = torch.tensor([[1, 2], [3, 0], [0, 1]], **f64)
    y = torch.tensor([0, 0, 2], device=device)
    c = torch.tensor([[1, 1], [5, 5], [0, -1]], **f64)
    a = torch.tensor([[1, 0.5], [0.5, 1], [0, 1]], **f64)
    near = {"atol": 1e-6, "rtol": 1e-6}

    def close(actual: Tensor, expected: Any) -> None:
        torch.testing.assert_close(actual.detach().cpu(), torch.tensor(expected, dtype=f64["dtype"]), **near)

    close(dk.center_loss(x, y, c, reduction="sum"), 5.0)
    close(dk.center_loss(x, y, c), 5 / 3)
    close(2 * dk.center_loss(x, y, c), 10 / 3)
    close(dk.update_centers_(c.clone(), x, y, 0.5), [[4 / 3, 1], [5, 5], [0, -0.5]])
    x, a = x.requires_grad_(), a.requires_grad_()
    loss = dk.sparse_center_loss(x, y, c, a)
    close(loss, 1.25)
    dx, da = torch.autograd.grad(loss, (x, a))
    close(dx, [[0, 1 / 6], [1 / 3, -1 / 3], [0, 2 / 3]])
    close(da, [[0, 1 / 6], [2 / 3, 1 / 6], [0, 2 / 3]])
    close(dk.update_centers_(c.clone(), x.detach(), y, 1.0, attention=a.detach()), [[4 / 3, 5 / 6], [5, 5], [0, 0]])
    island = torch.tensor([[1.0, 0], [0, 2], [-3, 0]], **f64).requires_grad_()
    with pairs_on(backend):
        pairs = dk.island_loss(x.detach(), y, island, 1.0, return_parts=True).pairs
        (in_centers,) = torch.autograd.grad(pairs, island)
    close(pairs, 4.0)
    close(in_centers, [[0, 2], [0, 0], [0, 2 / 3]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_attention_of_two_logits(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    """(N, D, 2) is a softmax over its last dimension, of which the second value counts; not rounded in between."""
    s = draw(CASES[0], (dtype, torch.float32), device)
    two = torch.randn(*s.x.shape, 2, device=device).to(dtype).requires_grad_()
    loss = dk.sparse_center_loss(s.x, s.y, s.c, two, attention_logits=True)
    exact, by_hand = s.double(), two.detach().double().requires_grad_()
    expected = plain_reduced(plain_rows(exact.x, s.y, exact.c, by_hand.softmax(-1)[..., 1]), s.y, "mean")
    assert_within_budget(loss.detach(), expected.detach(), scalar=True, what="loss")
    (found,), (right,) = torch.autograd.grad(loss, two), torch.autograd.grad(expected, by_hand)
    assert_within_budget(found, right, what="gradient")


@pytest.mark.parametrize("weigh", ["none", "attention", "logits"])
def test_second_derivatives(weigh: str, device: torch.device) -> None:
    s = draw(Case(7, 3, 4), (torch.float64, torch.float64), device)
    x, c, a = (t.clone().requires_grad_() for t in (s.x, s.c, s.a))
    for reduction in ("mean", "none"):
        call = lambda x, c, a: fused(Sample(x, s.y, c, a), weigh, reduction) + 0 * a.sum()  # noqa: E731, B023
        assert torch.autograd.gradcheck(call, (x, c, a))
        assert torch.autograd.gradgradcheck(call, (x, c, a))
    assert torch.autograd.gradgradcheck(lambda c: dk.island_loss(s.x, s.y, c, 0.5), (c,))


def test_dropped_inputs(device: torch.device) -> None:
    """higher_order=False keeps the gradient and nothing else, and says so when more is asked for."""
    s = draw(CASES[0], (torch.float32, torch.float32), device)
    x = s.x.clone().requires_grad_()
    kept = torch.autograd.grad(dk.center_loss(x, s.y, s.c), x)[0]
    loss = dk.center_loss(x, s.y, s.c, higher_order=False)
    assert_bitwise(torch.autograd.grad(loss, x, retain_graph=True)[0], kept, "dx")
    with pytest.raises(RuntimeError, match="higher_order=True"):
        torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
        loss.backward()


# What does not count --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", ["empty", "negative", "ignored"])
def test_nothing_counts(left: str, backend: str, device: torch.device) -> None:
    """No row: loss 0, zero gradients, centers as they were, for every reduction."""
    n = 0 if left == "empty" else 5
    x = torch.full((n, 3), NAN, device=device).requires_grad_()  # never read
    y = torch.full((n,), {"empty": 0, "negative": -1, "ignored": 2}[left], device=device)
    c = torch.randn(4, 3, device=device)
    before = c.clone()
    for reduction in ("mean", "sum", "none"):
        loss = dk.center_loss(x, y, c, reduction=reduction, ignore_index=2)
        assert loss.shape == ((n,) if reduction == "none" else ()) and not loss.detach().any()
        (dx,) = torch.autograd.grad(loss.sum(), x)
        assert dx.shape == x.shape and not dx.any()
    dk.update_centers_(c, x.detach(), y, ignore_index=2)
    assert_bitwise(c, before, "centers")
    with pairs_on(backend):
        assert dk.island_loss(x, y, c, 2.0, ignore_index=2) > 0  # the pairs remain


def test_no_class_and_no_feature(backend: str, device: torch.device) -> None:
    """K = 0 with rows that are left out, D = 0."""
    y = torch.tensor([-1, -1], device=device)
    assert dk.center_loss(torch.ones(2, 3, device=device), y, torch.ones(0, 3, device=device)) == 0
    assert dk.center_loss(torch.ones(2, 0, device=device), y + 1, torch.ones(1, 0, device=device)) == 0


def test_nan_goes_where_it_belongs(backend: str, device: torch.device) -> None:
    """A NaN in a row shows in its loss, its gradient and its center, and in no other; left out, it does not show."""
    s = draw(Case(12, 4, 20, "all"), (torch.float32, torch.float32), device)
    y = torch.arange(12, device=device) % 3
    y[5] = -1
    x = s.x.clone()
    x[4, 7] = x[5, 3] = NAN
    x.requires_grad_()
    rows = dk.center_loss(x, y, s.c, reduction="none")
    assert rows.isnan().nonzero().tolist() == [[4]]
    (dx,) = torch.autograd.grad(rows.sum(), x)
    assert dx.isnan().nonzero().tolist() == [[4, 7]]
    c = s.c.clone()
    dk.update_centers_(c, x.detach(), y)
    assert c.isnan().nonzero().tolist() == [[1, 7]]


def test_label_dtypes_and_strides(backend: str, device: torch.device) -> None:
    s = draw(CASES[2], (torch.float32, torch.float32), device)
    y = torch.where(s.y == -100, -1, s.y)
    expected = dk.center_loss(s.x, y, s.c)
    for dtype in (torch.int64, torch.int32, torch.int16, torch.int8):
        assert_bitwise(dk.center_loss(s.x, y.to(dtype), s.c), expected, str(dtype))
    strided = torch.stack([y, y], 1)[:, 1]
    assert_bitwise(dk.center_loss(s.x.T.contiguous().T, strided, s.c.T.contiguous().T), expected, "strides")
    unsigned = y.clamp(min=0).to(torch.uint8)
    assert_bitwise(dk.center_loss(s.x, unsigned, s.c), dk.center_loss(s.x, y.clamp(min=0), s.c), "uint8")
    far = torch.where(s.y < 0, 255, s.y)  # ignore_index may lie beyond the classes
    assert_bitwise(dk.center_loss(s.x, far, s.c, ignore_index=255), expected, "ignore_index 255")


# Fixed order ----------------------------------------------------------------------------------------------------------


@pytest.mark.needs("cpp")
@pytest.mark.parametrize("labels", ["all", "one", "own"])
def test_same_bits_for_any_number_of_threads(labels: str) -> None:
    """Loss, gradients, centers and pairs, also where all rows share one class."""
    n = 3000
    case = Case(n, n if labels == "own" else 37, 24, labels)
    s = draw(case, (torch.float32, torch.float32), torch.device("cpu"))
    found = []
    for threads in (1, 2, 5):
        with num_threads(threads):
            c = s.c.clone()
            x, leaf = s.x.clone().requires_grad_(), s.c.clone().requires_grad_()
            loss = loss_and_update(x, s.y, c, s.a, False, "mean", -100, 0.5, False, 1.5)
            grads = torch.autograd.grad(dk.island_loss(x, s.y, leaf, 0.1), (x, leaf))
            found.append((loss.detach(), c, *torch.autograd.grad(loss, x), *grads))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert_bitwise(a, b)


@pytest.mark.needs("cpp")
def test_memory_is_that_of_the_rows() -> None:
    """A million classes: nothing of the size of the centers, or of rows times classes, is made in an update."""
    n, k, d = 512, 1_000_000, 4
    c = torch.zeros(k, d)
    x = torch.randn(n, d, requires_grad=True)
    y = torch.randint(0, k, (n,), generator=torch.Generator().manual_seed(0))
    with torch.profiler.profile(profile_memory=True) as profile:
        loss_and_update(x, y, c, None, False, "mean", -100, 0.5, False, 0.0).backward()
    made = [e.cpu_memory_usage for e in profile.key_averages()]
    assert sum(m for m in made if m > 0) <= 16 * n * d * 4 + 65536, made
    assert c.any(1).sum() == len(set(y.tolist()))


# Bad input ------------------------------------------------------------------------------------------------------------

X, Y, CENTERS, A = torch.ones(3, 2), torch.tensor([0, 1, -1]), torch.ones(4, 2), torch.full((3, 2), 0.5)
META = torch.ones(4, 2, device="meta")
BAD = [
    ("features of one dimension", lambda f: f(X[0], Y, CENTERS), ValueError, "`features` must have shape (N, D)"),
    ("integer features", lambda f: f(X.int(), Y, CENTERS), TypeError, "`features` must be float32"),
    ("float labels", lambda f: f(X, Y.float(), CENTERS), TypeError, "`labels` must be of an integer dtype"),
    ("bool labels", lambda f: f(X, Y.bool(), CENTERS), TypeError, "`labels` must be of an integer dtype"),
    ("labels of another length", lambda f: f(X, Y[:2], CENTERS), ValueError, "`labels` must have shape (N,) = (3,)"),
    ("labels in a column", lambda f: f(X, Y[:, None], CENTERS), ValueError, "`labels` must have shape (N,) = (3,)"),
    ("other D", lambda f: f(X, Y, torch.ones(4, 3)), ValueError, "`centers` must have shape (K, D)"),
    ("centers of one dimension", lambda f: f(X, Y, CENTERS[0]), ValueError, "`centers` must have shape (K, D)"),
    ("float64 centers", lambda f: f(X, Y, CENTERS.double()), TypeError, "`centers` must be torch.float32"),
    ("centers elsewhere", lambda f: f(X, Y, META), ValueError, "`centers` must be on the device of `features`"),
    ("labels elsewhere", lambda f: f(X, Y.to("meta"), CENTERS), ValueError, "`labels` must be on the device"),
    ("a label too large", lambda f: f(X, Y + 3, CENTERS), IndexError, "labels must be in [0, 4)"),
    ("no tensor", lambda f: f(X, [0, 1, 2], CENTERS), TypeError, "`labels` must be a Tensor, got list"),
]
FUNCTIONS = {
    "center": lambda x, y, c: dk.center_loss(x, y, c),
    "island": lambda x, y, c: dk.island_loss(x, y, c),
    "update": lambda x, y, c: dk.update_centers_(c, x, y),
    "none": lambda x, y, c: dk.center_loss(x, y, c, reduction="none"),
}


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(("call", "error", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_rejects(call: Any, error: type, message: str, function: str, backend: str) -> None:
    """One line, and nothing changed."""
    if backend in GPU_BACKENDS and error is IndexError:
        pytest.skip("by design: a GPU is not waited for; tests/triton_kernels shows the NaN, and what stays as it was")
    with unmodified(X, Y, CENTERS, A), pytest.raises(error) as raised:
        call(FUNCTIONS[function])
    text = str(raised.value).splitlines()[0]
    assert message in text, text


OPTIONS = [
    (lambda: dk.center_loss(X, Y, CENTERS, reduction="avg"), ValueError, "`reduction` must be"),
    (lambda: dk.center_loss(X, Y, CENTERS, ignore_index=0.5), TypeError, "`ignore_index` must be an int"),
    (lambda: dk.update_centers_(CENTERS, X, Y, 1.5), ValueError, "`alpha` must be in [0, 1]"),
    (lambda: dk.update_centers_(CENTERS, X, Y, -0.1), ValueError, "`alpha` must be in [0, 1]"),
    (lambda: dk.update_centers_(CENTERS, X, Y, NAN), ValueError, "`alpha` must be in [0, 1]"),
    (lambda: dk.update_centers_(CENTERS, X, Y, island_weight=-1.0), ValueError, "`island_weight` must be"),
    (lambda: dk.island_loss(X, Y, CENTERS, -1.0), ValueError, "`island_weight` must be"),
    (lambda: dk.update_centers_(torch.ones(2, 4).T, X, Y), ValueError, "`centers` must be contiguous"),
    (lambda: dk.sparse_center_loss(X, Y, CENTERS, A[:2]), ValueError, "`attention` must have shape (N, D) = (3, 2)"),
    (lambda: dk.sparse_center_loss(X, Y, CENTERS, A.double()), TypeError, "`attention` must be torch.float32"),
    (lambda: dk.sparse_center_loss(X, Y, CENTERS, 3 * A), ValueError, "`attention` must be in [0, 1]"),
    (lambda: dk.sparse_center_loss(X, Y, CENTERS, -A), ValueError, "`attention` must be in [0, 1]"),
    (lambda: dk.update_centers_(CENTERS, X, Y, attention=2 * A + 0.1), ValueError, "`attention` must be in [0, 1]"),
    (lambda: loss_and_update(X, Y, CENTERS, -A, False, "mean", -100, 0.5, False, 0.0), ValueError, "in [0, 1]"),
    (lambda: loss_and_update(X, Y + 3, CENTERS, None, False, "mean", -100, 0.5, False, 1.0), IndexError, "[0, 4)"),
]


@pytest.mark.parametrize(("call", "error", "message"), OPTIONS)
def test_rejects_options(call: Any, error: type, message: str, backend: str) -> None:
    if backend in GPU_BACKENDS and error is IndexError:
        pytest.skip("by design: a GPU is not waited for; tests/triton_kernels shows the NaN, and what stays as it was")
    if backend == "cuda" and message.endswith("in [0, 1]") and "alpha" not in message:
        pytest.skip("by design: a GPU is not waited for; tests/cuda_host shows the NaN")
    with unmodified(X, Y, CENTERS, A), pytest.raises(error) as raised:
        call()
    assert message in str(raised.value).splitlines()[0], str(raised.value)


# The comparison notices -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed",
    [
        lambda s: 2 * plain_reduced(plain_rows(s.x, s.y, s.c, None), s.y, "mean"),  # without the 1/2
        lambda s: plain_rows(s.x, s.y, s.c, None).mean(),  # left-out rows in the divisor
        lambda s: plain_reduced(plain_rows(s.x, s.y, s.c + 1e-4, None), s.y, "mean"),
        lambda s: plain_reduced(plain_rows(s.x, s.y, s.c, s.a), s.y, "mean"),
    ],
    ids=["no half", "divisor", "centers off", "attention"],
)
def test_a_changed_loss_is_noticed(changed: Any) -> None:
    s = draw(CASES[2], (torch.float32, torch.float32), torch.device("cpu")).double()
    exact = plain(s, "none", "mean")
    assert relative_error(changed(s), exact) > 2 * error_budget(exact, None, torch.float32, scalar=True)


@pytest.mark.parametrize(
    "changed",
    [
        lambda c, x, y, a: looped_update(c, x, y, a, 0.5, True, 0.0),  # n in place of 1 + n
        lambda c, x, y, a: looped_update(c, x, y, None, 0.5, False, 0.0),  # the attention forgotten
        lambda c, x, y, a: looped_update(c, x, y, a, 0.5, False, 1e-3),  # an island
        lambda c, x, y, a: looped_update(c, x, y.clamp(min=0), a, 0.5, False, 0.0),  # left-out rows counted
        lambda c, x, y, a: looped_update(c, x, y, a, 0.50001, False, 0.0),
    ],
    ids=["1 + n", "attention", "island", "left out", "alpha"],
)
def test_a_changed_update_is_noticed(changed: Any) -> None:
    s = draw(CASES[2], (torch.float32, torch.float32), torch.device("cpu")).double()
    exact = looped_update(s.c, s.x, s.y, s.a, 0.5, False, 0.0)
    assert relative_error(changed(s.c, s.x, s.y, s.a), exact) > 2 * error_budget(exact, None, torch.float32)
