"""The GCCS loss: values, gradients, edges, errors.

The formula below is written down a second time on purpose, class by class: what it is compared with is not its source.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from _layers import INF, NAN, backend_fixture
from torch import Tensor

import dlkernels as dk
from dlkernels.ops.gccs_loss import _warn_small_batch
from dlkernels.reference import gccs_loss as reference
from dlkernels.testing import assert_bitwise, assert_within_budget, layouts, num_threads, relative_error, unmodified

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
REDUCTIONS = ("none", "mean", "sum")

backend = backend_fixture("gccs_loss")
pytestmark = [
    pytest.mark.filterwarnings("ignore:gccs_loss. a batch of fewer:UserWarning"),
    pytest.mark.usefixtures("tensors_on_device"),
]


# The formula, again ---------------------------------------------------------------------------------------------------


def plain(
    z: Tensor, y: Tensor, *, target_mean: float = 40.0, target_std: float = 1.0, covariance: str = "diagonal",
    kurtosis_weight: float = 0.0, reduction: str = "sum", ignore_index: int = -100, eps: float = 1e-5, flaw: str = "",
) -> Tensor:  # fmt: skip
    """One class after another. `flaw` changes one detail: the comparison has to notice."""
    classes, s2 = z.shape[1], target_std**2
    losses, present = [], 0
    for c in range(classes):
        rows = z[(y == c) & (y != ignore_index)]
        if len(rows) == 0:
            losses.append(z.sum() * 0 if z.isfinite().all() else z.new_zeros(()))
            continue
        present += 1
        mean, vertex = rows.mean(0), torch.zeros_like(z[0])
        vertex[(c + 1) % classes if flaw == "vertex" else c] = target_mean
        half = 1.0 if flaw == "half" else 0.5
        loss = half * ((mean - vertex) ** 2 / s2).sum()
        if len(rows) > 1:
            d = rows - mean
            v = (d**2).sum(0) / (len(rows) - (flaw == "unbiased"))
            if covariance == "full":
                sigma = d.T @ d / len(rows) + eps * torch.eye(classes, dtype=z.dtype)
                loss = loss + half * (classes * math.log(s2) - torch.logdet(sigma) - classes + v.sum() / s2)
            else:
                u = v if flaw == "eps" else v + eps
                loss = loss + half * ((s2 / u).log() - 1 + (u if flaw == "eps twice" else v) / s2).sum()
            if kurtosis_weight > 0:
                k = (d**4).mean(0) / (v + eps) ** 2
                k = (k - (0 if flaw == "excess" else 3)).abs()
                loss = loss + kurtosis_weight * (k.sum() if flaw == "kurtosis sum" else k.mean())
        losses.append(loss)
    if reduction == "none":
        return torch.stack(losses)
    return torch.stack(losses).sum() / (max(present, 1) if reduction == "mean" else 1)


def batch(n: int, classes: int, seed: int = 0, mean: float = 40.0, std: float = 1.0) -> tuple[Tensor, Tensor]:
    """Features near their targets, and labels: some negative, some classes missing, one of one row."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(-1, classes, (n,), generator=generator, device="cpu")
    if classes > 4 and n > 20:
        y[y == 1] = -100
        y[(y == 2).nonzero()[1:]] = 3
    noise = torch.randn(n, classes, generator=generator, dtype=torch.float64, device="cpu")
    spread = 0.5 + torch.rand(classes, generator=generator, dtype=torch.float64, device="cpu")
    target = mean * torch.nn.functional.one_hot(y.clamp(min=0), classes)
    where = torch.get_default_device()
    return (target + std * (0.3 + spread * noise)).to(where), y.to(where)


def value_and_gradient(loss: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
    z = z.detach().requires_grad_()
    out = loss(z)
    g = torch.linspace(0.5, 1.5, max(out.numel(), 1), dtype=out.dtype)[: out.numel()].view(out.shape)
    return out.detach(), torch.autograd.grad(out, z, g)[0]


def check(z: Tensor, y: Tensor, **options: Any) -> None:
    """Loss and gradient within twice eager's error plus 4 eps, scalars within 8 eps. Eager computes in float32."""
    wide = z if z.dtype == torch.float64 else z.float()
    for reduction in REDUCTIONS:
        options["reduction"] = reduction
        with unmodified(z, y):
            actual = value_and_gradient(lambda z: dk.gccs_loss(z, y, **options), z)
        exact = value_and_gradient(lambda z: plain(z, y, **options), z.double())
        eager = value_and_gradient(lambda z: plain(z, y, **options), wide)
        assert actual[0].dtype == wide.dtype and actual[1].dtype == z.dtype
        if z.dtype == torch.float64:
            assert all(relative_error(a, e) <= 1e-12 for a, e in zip(actual, exact, strict=True))
            continue
        assert_within_budget(actual[0], exact[0], eager[0], reduction != "none", f"{reduction} loss")
        assert_within_budget(actual[1], exact[1], eager[1], what=f"gradient of {reduction}")


# Values ---------------------------------------------------------------------------------------------------------------


def test_worked_example(backend: str) -> None:
    z = torch.tensor([[1.0, 0], [4, 2], [0, 1], [2, 5]], dtype=torch.float64)
    y = torch.tensor([0, 0, 1, 1])
    expected = torch.tensor([0.8445348919, 1.8068528194], dtype=torch.float64)
    for reduction, value in (("none", expected), ("sum", expected.sum()), ("mean", expected.mean())):
        loss = dk.gccs_loss(z, y, target_mean=2.0, eps=0.0, reduction=reduction)
        torch.testing.assert_close(loss, value, rtol=0, atol=5e-11)


OPTIONS: tuple[dict[str, Any], ...] = (
    {"kurtosis_weight": 0.3},
    {"target_mean": 7.0, "target_std": 2.5, "eps": 1e-2},
    {"ignore_index": 0, "kurtosis_weight": 2.0, "target_mean": -3.0},
)
CASES = [
    *((shape, {}) for shape in ((1, 1), (9, 1), (2, 2), (300, 4), (40, 5), (90, 17))),
    *((shape, options) for shape in ((40, 5), (90, 17)) for options in OPTIONS),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(("shape", "options"), CASES, ids=str)
def test_matches_the_formula(shape: tuple[int, int], options: dict[str, Any], dtype: torch.dtype, backend: str) -> None:
    for seed in range(2 if dtype == torch.float32 else 1):
        z, y = batch(*shape, seed, options.get("target_mean", 40.0))
        check(z.to(dtype), y, **options)


@pytest.mark.parametrize("kurtosis_weight", [0.0, 0.3])
def test_long_classes(kurtosis_weight: float, backend: str) -> None:
    """Many blocks of rows, and a batch in which they are spread out. (index_add sums one row after the other.)"""
    z, y = batch(4000, 3)
    check(z.double() if backend == "reference" else z.float(), y, kurtosis_weight=kurtosis_weight)


@pytest.mark.needs("cpp")
@pytest.mark.parametrize("shape", [(600, 300), (5000, 640), (5100, 650)], ids=str)
def test_slabs_and_streams(shape: tuple[int, int]) -> None:
    """More columns than a task takes; a gradient that is written past the caches, in aligned rows and others."""
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(shape, generator=generator, device="cpu") + 2
    y = torch.randint(-1, 9, shape[:1], generator=generator, device="cpu")
    y[y == 8] = shape[1] - 1
    results = []
    for name, dtype in (("cpp", torch.float32), ("reference", torch.float64)):
        with dk.backend(name):
            results.append(value_and_gradient(lambda z: dk.gccs_loss(z, y, reduction="mean"), z.to(dtype)))
    assert_within_budget(results[0][0], results[1][0], scalar=True)
    assert_within_budget(results[0][1], results[1][1])


def test_a_spread_far_below_the_mean(backend: str) -> None:
    """Standard deviation 1e-3 around 40: nothing cancels. The two-moment form has no digit left, and shows it."""
    z, y = batch(300, 4, std=1e-3)
    z = z.float()
    check(z, y, target_std=1e-3, eps=1e-11, kurtosis_weight=0.1)
    rows = z[y == 1]
    exact = rows.double().var(0, unbiased=False)
    assert relative_error(rows.square().mean(0) - rows.mean(0).square(), exact) > 0.1


@pytest.mark.needs("cpp")
def test_a_distribution_near_its_target() -> None:
    """Variances next to target_std^2, where r - 1 and log r all but cancel: ten times closer than eager PyTorch."""
    z, y = batch(900, 3)
    for c in range(3):
        rows = z[y == c]
        z[y == c] = (rows - rows.mean(0)) / rows.std(0, unbiased=False) * (1 + 1e-3)
    z = z.float()
    options: dict[str, Any] = {"target_mean": 0.0, "eps": 0.0, "reduction": "none"}
    exact = plain(z.double(), y, **options)
    assert exact.max() < 1e-5
    assert relative_error(dk.gccs_loss(z, y, **options), exact) < 0.1 * relative_error(plain(z, y, **options), exact)


@pytest.mark.parametrize(
    ("flaw", "options"),
    [
        ("unbiased", {}),
        ("half", {}),
        ("vertex", {}),
        ("eps", {"eps": 1e-3}),
        ("eps twice", {"eps": 1e-3}),
        ("excess", {"kurtosis_weight": 0.3}),
        ("kurtosis sum", {"kurtosis_weight": 0.3}),
    ],
)
def test_the_comparison_would_notice(flaw: str, options: dict[str, Any], backend: str) -> None:
    """One detail of the formula changed, and neither the loss nor the gradient is within the budget."""
    z, y = batch(70, 7)
    actual = value_and_gradient(lambda z: dk.gccs_loss(z, y, reduction="none", **options), z.float())
    exact = value_and_gradient(lambda z: plain(z, y, reduction="none", flaw=flaw, **options), z.float().double())
    for a, e in zip(actual, exact, strict=True):
        if flaw in ("eps twice", "excess") and a.dim() == 2:
            continue  # a constant, or a sign that holds for every column: no gradient
        with pytest.raises(AssertionError, match="relative error"):
            assert_within_budget(a, e)


# Gradients ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kurtosis_weight", [0.0, 0.3])
def test_first_and_second_derivatives(kurtosis_weight: float, reduction: str, backend: str) -> None:
    z, y = batch(12, 3, mean=2.0)
    z.requires_grad_()
    call = lambda z: dk.gccs_loss(  # noqa: E731
        z, y, target_mean=2.0, kurtosis_weight=kurtosis_weight, reduction=reduction
    )
    assert torch.autograd.gradcheck(call, (z,), nondet_tol=1e-9)
    assert torch.autograd.gradgradcheck(call, (z,), nondet_tol=1e-9)


def test_gradient_of_some_classes(backend: str) -> None:
    """Upstream gradients that are 0, infinite or expanded reach their own class only."""
    z, y = batch(40, 5)
    z.requires_grad_()
    loss = dk.gccs_loss(z, y, reduction="none")
    (only,) = torch.autograd.grad(loss[3], z, retain_graph=True)
    assert not only[y != 3].any() and only[y == 3].all()
    (every,) = torch.autograd.grad(loss.sum(), z, retain_graph=True)
    assert_bitwise(every[y == 3], only[y == 3])
    (infinite,) = torch.autograd.grad(loss, z, torch.tensor([INF, 1, 1, 1, 1], dtype=z.dtype))
    assert infinite[y > 0].isfinite().all() and not infinite[y == 0].isfinite().any()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_transforms(reduction: str, backend: str) -> None:
    """vmap over batches of their own, and its gradient: what a loop gives."""
    batches = [batch(20, 4, seed) for seed in range(3)]
    z, y = (torch.stack(ts) for ts in zip(*batches, strict=True))
    call = lambda z, y: dk.gccs_loss(z, y, reduction=reduction, kurtosis_weight=0.1, ignore_index=2)  # noqa: E731
    per_batch = torch.func.vmap(torch.func.grad(lambda z, y: call(z, y).sum()))(z, y)
    for i, (a, b) in enumerate(batches):
        loss, grad = value_and_gradient(lambda z: call(z, b).sum(), a)  # noqa: B023
        assert relative_error(per_batch[i], grad / 0.5) <= 1e-12
        assert relative_error(torch.func.vmap(call)(z, y)[i].sum(), loss) <= 1e-12


# Edges ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [0.0, 1e-5])
def test_a_class_of_one_row(eps: float, backend: str) -> None:
    """Only its mean counts, kurtosis or not; also where eps is 0."""
    z = torch.tensor([[1.0, 2.0, 4.0]], requires_grad=True)
    loss = dk.gccs_loss(z, torch.tensor([1]), target_mean=3.0, target_std=2.0, kurtosis_weight=0.5, eps=eps)
    assert loss.item() == 0.5 * (1 + 1 + 16) / 4
    (grad,) = torch.autograd.grad(loss, z)
    assert grad.tolist() == [[0.25, -0.25, 1.0]]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("n", [0, 5])
def test_nothing_counts(n: int, reduction: str, backend: str) -> None:
    """An empty batch, or one that is left out as a whole: 0, with gradients of 0."""
    z = torch.full((n, 3), NAN, requires_grad=True)
    y = torch.tensor([-1, -100, 2, -7, 2])[:n]
    loss = dk.gccs_loss(z, y, reduction=reduction, ignore_index=2, kurtosis_weight=0.1)
    assert loss.shape == ((3,) if reduction == "none" else ()) and not loss.any()
    loss.sum().backward()
    assert z.grad is not None and not z.grad.any()


def test_rows_left_out_are_not_read(backend: str) -> None:
    z, y = batch(60, 5)
    out = (y < 0) | (y == 4)
    z[out] = torch.tensor([NAN, INF, -INF, 1e300, 0.0], dtype=z.dtype)
    actual = value_and_gradient(lambda z: dk.gccs_loss(z, y, ignore_index=4, kurtosis_weight=0.1), z)
    expected = value_and_gradient(lambda z: plain(z, y[~out], kurtosis_weight=0.1), z[~out])
    assert relative_error(actual[0], expected[0]) <= 1e-12
    assert relative_error(actual[1][~out], expected[1]) <= 1e-12
    assert not actual[1][out].any()


def test_nan_and_infinity_are_not_hidden(backend: str) -> None:
    z, y = batch(40, 5)
    for value in (NAN, INF):
        z[(y == 3).nonzero()[0], 2] = value
        loss = dk.gccs_loss(z, y, reduction="none", kurtosis_weight=0.1)
        assert loss[3].isnan() and loss[[0, 1, 2, 4]].isfinite().all()


def test_columns_that_do_not_vary(backend: str) -> None:
    """They cost log(s^2 / eps); with eps = 0, infinity."""
    z, y = torch.full((6, 2), 40.0), torch.zeros(6, dtype=torch.int64)
    z[:, 1] = 0
    loss = dk.gccs_loss(z, y)
    torch.testing.assert_close(loss, torch.tensor(-math.log(1e-5) - 1), rtol=1e-6, atol=0)
    assert dk.gccs_loss(z, y, eps=0.0) == INF


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8], ids=str)
@pytest.mark.parametrize("ignore_index", [-100, 3, 1 << 40])
def test_label_dtypes(dtype: torch.dtype, ignore_index: int, backend: str) -> None:
    z, y = batch(40, 5)
    y = y.clamp(min=0)
    loss = dk.gccs_loss(z, y.to(dtype), ignore_index=ignore_index)
    assert_bitwise(loss, dk.gccs_loss(z, y, ignore_index=ignore_index))
    assert relative_error(loss, plain(z, y, ignore_index=ignore_index)) <= 1e-12


def test_layouts(backend: str) -> None:
    z, y = batch(40, 5)
    z = z.float()
    expected = value_and_gradient(lambda z: dk.gccs_loss(z, y), z)
    strided = torch.stack([y, torch.full_like(y, 99)], 1)[:, 0]
    for name, laid in layouts(z):
        for a, e in zip(value_and_gradient(lambda z: dk.gccs_loss(z, strided), laid), expected, strict=True):
            assert_bitwise(a, e, name)


@pytest.mark.needs("cpp")
@pytest.mark.parametrize("kurtosis_weight", [0.0, 0.3])
def test_the_same_bits_for_any_number_of_threads(kurtosis_weight: float) -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(3000, 300, generator=generator, device="cpu")
    y = torch.randint(-1, 300, (3000,), generator=generator, device="cpu")
    found = []
    for threads in (1, 2, 3, 5):
        with num_threads(threads):
            call = lambda z: dk.gccs_loss(z, y, reduction="mean", kurtosis_weight=kurtosis_weight)  # noqa: E731
            found.append(value_and_gradient(call, z))
    for other in found[1:]:
        assert all(map(lambda a, b: assert_bitwise(a, b) is None, other, found[0]))


def test_a_small_batch_warns_once() -> None:
    z, y = batch(8, 5)
    _warn_small_batch.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dk.gccs_loss(z[:0], y[:0])
        dk.gccs_loss(z.repeat(2, 1), y.repeat(2))
        assert not caught
        for _ in range(2):
            dk.gccs_loss(z, y)
            dk.gccs_loss(z, y, covariance="full")
    assert [str(w.message)[:9] for w in caught] == ["gccs_loss"] and caught[0].filename == __file__


# Full covariance ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shape", [(9, 1), (60, 4), (400, 9)], ids=str)
def test_full_covariance(shape: tuple[int, int], dtype: torch.dtype, backend: str) -> None:
    z, y = batch(*shape)
    check((z @ (torch.eye(shape[1]) + 0.1).double()).to(dtype), y, covariance="full", eps=1e-3)


def test_full_covariance_of_one_column_is_diagonal() -> None:
    z, y = batch(9, 1)
    assert relative_error(dk.gccs_loss(z, y, covariance="full"), dk.gccs_loss(z, y)) <= 1e-12


def test_full_covariance_edges() -> None:
    """One row; fewer rows than columns, which the ridge makes regular; without it, NaN."""
    z, y = torch.randn(3, 5, dtype=torch.float64), torch.tensor([0, 0, 2])
    for eps in (0.0, 1e-3):
        loss = dk.gccs_loss(z, y, covariance="full", eps=eps, reduction="none")
        assert loss[[1, 3, 4]].tolist() == [0, 0, 0]
        assert relative_error(loss[2], dk.gccs_loss(z[2:], y[2:])) <= 1e-12
        assert (
            loss[0].isnan()
            if eps == 0
            else relative_error(loss[0], plain(z, y, covariance="full", eps=eps, reduction="none")[0]) < 1e-9
        )
    assert dk.gccs_loss(z[:0], y[:0], covariance="full") == 0


def test_full_covariance_derivatives() -> None:
    z, y = batch(12, 2, mean=2.0)
    call = lambda z: dk.gccs_loss(z, y, target_mean=2.0, covariance="full", reduction="none")  # noqa: E731
    assert torch.autograd.gradcheck(call, (z.requires_grad_(),), nondet_tol=1e-9)
    assert torch.autograd.gradgradcheck(call, (z,), nondet_tol=1e-9)
    hessian = torch.func.hessian(lambda z: call(z).sum())(z.detach())
    assert relative_error(hessian, torch.autograd.functional.hessian(lambda z: call(z).sum(), z.detach())) <= 1e-12


def test_full_covariance_keeps_no_matrix_per_class() -> None:
    """What the graph holds is a few times the features, not D times."""
    z, y = batch(100, 24)
    z.requires_grad_()
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        dk.gccs_loss(z, y, covariance="full").backward()
    one = z.numel() * z.element_size()
    assert one < sum(kept.values()) < 16 * one


# Errors ---------------------------------------------------------------------------------------------------------------

Z, Y = torch.randn(8, 3), torch.tensor([0, 1, 2, 0, 1, 2, -1, 0])


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (TypeError, "`features` must be a Tensor, got list", lambda: dk.gccs_loss([[1.0]], Y)),
        (TypeError, "`features` must be float32, .*got torch.int64", lambda: dk.gccs_loss(Z.long(), Y)),
        (ValueError, r"`features` must have shape \(N, D\), got \(8,\)", lambda: dk.gccs_loss(Z[:, 0], Y)),
        (ValueError, "at least one class", lambda: dk.gccs_loss(Z[:, :0], Y)),
        (TypeError, "`labels` must be a Tensor, got list", lambda: dk.gccs_loss(Z, [0] * 8)),
        (TypeError, "`labels` must be integer, got torch.float32", lambda: dk.gccs_loss(Z, Y.float())),
        (TypeError, "`labels` must be integer, got torch.bool", lambda: dk.gccs_loss(Z, Y > 0)),
        (ValueError, r"`labels` must have shape \(N,\) = \(8,\), got \(7,\)", lambda: dk.gccs_loss(Z, Y[:7])),
        (ValueError, "`labels` must be on the device of `features`", lambda: dk.gccs_loss(Z, Y.to("meta"))),
        (ValueError, "`target_mean` must be a finite number", lambda: dk.gccs_loss(Z, Y, target_mean=NAN)),
        (TypeError, "`target_mean` must be a number, got NoneType", lambda: dk.gccs_loss(Z, Y, target_mean=None)),
        *(
            (ValueError, "`target_std` must be a finite number > 0", lambda v=v: dk.gccs_loss(Z, Y, target_std=v))
            for v in (0.0, -1.0, NAN, INF, 1e-200)
        ),
        *(
            (ValueError, f"`{name}` must be a finite number >= 0", lambda n=name, v=v: dk.gccs_loss(Z, Y, **{n: v}))
            for name in ("eps", "kurtosis_weight")
            for v in (-1e-9, NAN, INF)
        ),
        (ValueError, "`covariance` must be one of 'diagonal', 'full'", lambda: dk.gccs_loss(Z, Y, covariance="block")),
        (ValueError, "`covariance` must be one of", lambda: dk.gccs_loss(Z, Y, covariance=None)),
        (
            ValueError,
            "`kurtosis_weight` needs covariance='diagonal'",
            lambda: dk.gccs_loss(Z, Y, covariance="full", kurtosis_weight=0.1),
        ),
        (ValueError, "`reduction` must be 'none', 'mean' or 'sum'", lambda: dk.gccs_loss(Z, Y, reduction="batchmean")),
        (TypeError, "`ignore_index` must be an int", lambda: dk.gccs_loss(Z, Y, ignore_index=1.5)),
        (ValueError, "`target_std` must be", lambda: dk.nn.GCCSLoss(target_std=0)),
        (ValueError, "`reduction` must be", lambda: dk.nn.GCCSLoss(reduction="")),
        (ValueError, "`covariance` must be one of", lambda: dk.nn.GCCSLoss(covariance="")),
    ],
)
def test_rejects(error: type[Exception], match: str, call: Callable[[], Any], backend: str) -> None:
    with pytest.raises(error, match=match):
        call()


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8], ids=str)
@pytest.mark.parametrize("bad", [3, 100])
def test_labels_out_of_range(bad: int, dtype: torch.dtype, covariance: str, backend: str) -> None:
    where = torch.get_default_device()
    z, y = Z.to(where), Y.clamp(min=0).to(where, dtype)
    y[5] = bad
    if where.type == "cuda":
        assert dk.gccs_loss(z, y, covariance=covariance).isnan()
    else:
        with pytest.raises(IndexError, match=f"`labels` must be below 3, negative or ignore_index, got {bad}"):
            dk.gccs_loss(z, y, covariance=covariance)
    assert dk.gccs_loss(z, y, covariance=covariance, ignore_index=bad).isfinite()


@pytest.mark.parametrize("full", [False, True])
def test_bad_labels_on_devices_that_cannot_raise(full: bool) -> None:
    """The formula reads nothing out of bounds: every class's loss is NaN, and gradients are those of the other rows."""
    y = Y.clone()
    y[5] = 7
    z = Z.clone().requires_grad_()
    loss = reference.gccs_loss(z, y, 40.0, 1.0, 1e-5, 0.0, -100, full)
    assert loss.shape == (3,) and loss.isnan().all()
    (grad,) = torch.autograd.grad(loss.sum(), z)
    assert grad[:5].isfinite().all() and not grad[5:7].any()


# Module ---------------------------------------------------------------------------------------------------------------


def test_module() -> None:
    options = {"target_mean": 7, "target_std": 2.0, "kurtosis_weight": 0.2, "reduction": "mean", "ignore_index": 2}
    z, y = batch(40, 5)
    module = dk.nn.GCCSLoss(**options)
    assert_bitwise(module(z, y), dk.gccs_loss(z, y, **options))
    assert "target_mean=7.0" in repr(module) and not module.state_dict()
    full = dk.nn.GCCSLoss(covariance="full", eps=1e-2)
    assert_bitwise(full(z, y), dk.gccs_loss(z, y, covariance="full", eps=1e-2))
