"""Sigmoid focal loss, softmax focal loss, cross entropy: values, gradients, edges, errors.

The formulas below are written down here a second time on purpose: what they are compared with is not their source.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from _layers import backend_fixture
from torch import Tensor

import dlkernels as dk
from dlkernels.testing import assert_bitwise, assert_within_budget, layouts, relative_error

INF, NAN = float("inf"), float("nan")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

backend = backend_fixture("focal_loss", interpreted=True)
# For tests that can do without the softmax losses, of which CUDA C++ has no kernels: Triton serves them.
sigmoid_backend = backend_fixture("focal_loss", interpreted=True, ops="sigmoid_focal_loss")


# The formulas, again --------------------------------------------------------------------------------------------------


def dense(x: Tensor, y: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Sigmoid targets as numbers of the shape of x, and which elements count."""
    if y.is_floating_point() or y.dtype == torch.bool:
        return y.to(x.dtype), torch.ones_like(x, dtype=torch.bool)
    if y.shape == x.shape:
        keep = y != ignore_index
        return torch.where(keep, y, 0).to(x.dtype), keep
    keep = (y != ignore_index).unsqueeze(-1).expand(x.shape)
    hot = F.one_hot(torch.where(y == ignore_index, -1, y).long() + 1, x.shape[-1] + 1)[..., 1:]
    return hot.to(x.dtype), keep


def reduced(rows: Tensor, reduction: str, divisor: Any, normalizer: Any) -> Tensor:
    if reduction == "none":
        return rows
    if reduction == "mean":
        return rows.sum() / divisor
    return rows.sum() if normalizer is None else rows.sum() / normalizer


def plain_sigmoid_focal(
    x: Tensor, y: Tensor, alpha: float | None = 0.25, gamma: float = 2.0, reduction: str = "none",
    ignore_index: int = -100, normalizer: Any = None,
) -> Tensor:  # fmt: skip
    """torchvision.ops.sigmoid_focal_loss, line by line, with what dlkernels adds around it."""
    y, keep = dense(x, y, ignore_index)
    p = torch.sigmoid(x)
    ce = F.binary_cross_entropy_with_logits(x, y, reduction="none")
    p_t = p * y + (1 - p) * (1 - y)
    loss = ce * ((1 - p_t) ** gamma)
    if alpha is not None and alpha >= 0:
        loss = (alpha * y + (1 - alpha) * (1 - y)) * loss
    return reduced(torch.where(keep, loss, 0), reduction, keep.sum(), normalizer)


def plain_softmax_focal(
    z: Tensor, y: Tensor, alpha: Any = None, gamma: float = 2.0, reduction: str = "mean", ignore_index: int = -100,
    label_smoothing: float = 0.0, normalizer: Any = None, weighted_mean: bool = False,
) -> Tensor:  # fmt: skip
    """sum_c q_c alpha_c (1 - p_c)^gamma (-log p_c), as one writes it first."""
    classes = z.shape[1]
    if y.is_floating_point():
        q, keep = y.to(z.dtype), torch.ones(z.shape[:1] + z.shape[2:], dtype=torch.bool, device=z.device)
    else:
        keep = y != ignore_index
        q = F.one_hot(torch.where(keep, y, 0).long(), classes).movedim(-1, 1).to(z.dtype)
    hot = q
    if label_smoothing > 0:
        q = (1 - label_smoothing) * q + label_smoothing / classes
    weight = torch.ones(classes, device=z.device, dtype=z.dtype)
    if alpha is not None:
        weight = weight * alpha if not isinstance(alpha, Tensor) else alpha.to(z.dtype)
    weight = weight.view(-1, *[1] * (z.dim() - 2))
    log_p = torch.log_softmax(z, 1)
    focus = (1 - log_p.exp()) ** gamma if gamma > 0 else torch.ones_like(log_p)
    rows = torch.where(keep, -(q * weight * focus * log_p).sum(1), 0)
    divisor = keep.sum()
    if weighted_mean and not y.is_floating_point():
        divisor = torch.where(keep, (hot * weight).sum(1), 0).sum()
    return reduced(rows, reduction, divisor, normalizer)


# CASES ----------------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    loss: str  # sigmoid, softmax, cross_entropy
    shape: tuple[int, ...]
    target: str  # a key of SIGMOID_TARGETS or SOFTMAX_TARGETS
    options: dict[str, Any]

    def __str__(self) -> str:
        options = "-".join(f"{k}={v}" for k, v in self.options.items())
        return f"{self.loss}-{'x'.join(map(str, self.shape)) or 'scalar'}-{self.target}-{options}"


def _integers(low: int, high: int, shape: Any, dtype: torch.dtype, ignore: int | None = None) -> Tensor:
    y = torch.randint(low, high, tuple(shape)).to(dtype)
    if ignore is not None and y.numel() > 2:
        y.view(-1)[1::5] = ignore
    return y


SIGMOID_TARGETS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "hard": lambda x, _: _integers(0, 2, x.shape, x.dtype),
    "soft": lambda x, _: torch.rand(x.shape).to(x.dtype),
    "mixed": lambda x, _: (1.6 * torch.rand(x.shape) - 0.3).clamp(0, 1).to(x.dtype),  # some exactly 0, some exactly 1
    "soft_float32": lambda x, _: torch.rand(x.shape),
    "soft_float16": lambda x, _: torch.rand(x.shape).half(),
    "soft_bfloat16": lambda x, _: torch.rand(x.shape).bfloat16(),
    "soft_float64": lambda x, _: torch.rand(x.shape, dtype=torch.float64).float().double(),
    "bool": lambda x, _: _integers(0, 2, x.shape, torch.bool),
    "uint8": lambda x, ignore: _integers(0, 2, x.shape, torch.uint8, ignore if ignore >= 0 else None),
    "int8": lambda x, ignore: _integers(0, 2, x.shape, torch.int8, ignore),
    "int16": lambda x, ignore: _integers(0, 2, x.shape, torch.int16, ignore),
    "int32": lambda x, ignore: _integers(0, 2, x.shape, torch.int32, ignore),
    "int64": lambda x, ignore: _integers(0, 2, x.shape, torch.int64, ignore),
    "classes_int8": lambda x, ignore: _integers(-1, min(x.shape[-1], 90), x.shape[:-1], torch.int8, ignore),
    "classes_int32": lambda x, ignore: _integers(-1, x.shape[-1], x.shape[:-1], torch.int32, ignore),
    "classes_int64": lambda x, ignore: _integers(-1, x.shape[-1], x.shape[:-1], torch.int64, ignore),
}

SOFTMAX_TARGETS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "probabilities": lambda z, _: torch.softmax(2 * torch.randn(z.shape), 1).to(z.dtype),
    "probabilities_float32": lambda z, _: torch.softmax(2 * torch.randn(z.shape), 1),
    "unnormalised": lambda z, _: torch.rand(z.shape).to(z.dtype),  # rows that do not sum to 1 are legal
    "sparse": lambda z, _: (
        F.one_hot(torch.randint(0, z.shape[1], z.shape[:1] + z.shape[2:]), z.shape[1]).movedim(-1, 1).to(z.dtype)
    ),
    **{
        f"index_{str(dtype)[6:]}": lambda z, ignore, dtype=dtype: _integers(
            0,
            min(z.shape[1], 100),
            z.shape[:1] + z.shape[2:],
            dtype,
            None if dtype == torch.uint8 and ignore < 0 else ignore,
        )
        for dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
    },
}

SHAPES = ((), (1,), (7,), (16,), (33,), (3, 5), (2, 3, 4), (2, 3, 5, 7), (1025,), (64, 130))
ROWS = ((1, 1), (5, 1), (4, 2), (3, 7), (9, 16), (6, 17), (2, 31), (33, 33), (3, 257), (2, 4099), (130, 91))
SPATIAL = ((2, 5, 3), (2, 1, 4), (1, 19, 33), (2, 3, 4, 5), (2, 21, 9, 7), (1, 4, 2, 3, 5))
GAMMAS = (0.0, 0.5, 1.0, 2.0, 3.7, 5.0)
IGNORED = (-100, -1, 0, 3)

CASES = [
    *(Case("sigmoid", shape, kind, {}) for shape in SHAPES for kind in ("hard", "mixed")),
    *(Case("sigmoid", (5, 19), kind, {}) for kind in SIGMOID_TARGETS),
    *(Case("sigmoid", s, "classes_int64", {}) for s in ((1,), (4, 1), (3, 2), (2, 7, 80), (130, 91), (2, 3, 4, 5))),
    *(Case("sigmoid", (5, 19), kind, {"gamma": g}) for g in GAMMAS for kind in ("hard", "soft", "classes_int64")),
    *(Case("sigmoid", (5, 19), kind, {"alpha": a}) for a in (None, -1, 0, 0.75, 1) for kind in ("soft", "int64")),
    *(Case("sigmoid", (6, 9), k, {"ignore_index": i}) for i in (-7, -2, 5, 99) for k in ("int64", "classes_int64")),
    Case("sigmoid", (6, 9), "uint8", {"ignore_index": 255}),
    Case("sigmoid", (6, 9), "classes_int64", {"ignore_index": 0}),
    Case("sigmoid", (6, 9), "classes_int64", {"ignore_index": -1}),
    *(Case("softmax", shape, "index_int64", {}) for shape in ROWS + SPATIAL),
    *(Case("softmax", shape, "probabilities", {}) for shape in ((5, 1), (3, 7), (3, 257), (2, 5, 3), (2, 3, 4, 5))),
    *(Case("softmax", (7, 19), kind, {}) for kind in SOFTMAX_TARGETS),
    *(
        Case("softmax", (7, 19), kind, {"gamma": gamma, "label_smoothing": eps})
        for gamma in GAMMAS
        for kind, eps in (("index_int64", 0.0), ("index_int64", 0.1), ("probabilities", 0.0))
    ),
    *(Case("softmax", (7, 19), "index_int64", {"alpha": a}) for a in (0, 0.25, 1.0, "per_class")),
    *(Case("softmax", (2, 5, 3, 4), k, {"alpha": "per_class"}) for k in ("index_int64", "probabilities")),
    *(Case("softmax", (7, 19), "index_int64", {"ignore_index": i}) for i in IGNORED),
    *(Case("softmax", (7, 19), "index_int64", {"label_smoothing": 1.0, "ignore_index": i}) for i in IGNORED[1:3]),
    *(Case("cross_entropy", shape, "index_int64", {}) for shape in ROWS + SPATIAL),
    *(Case("cross_entropy", shape, "probabilities", {}) for shape in ((5, 1), (3, 257), (2, 5, 3), (2, 3, 4, 5))),
    *(Case("cross_entropy", (7, 19), kind, {}) for kind in SOFTMAX_TARGETS),
    *(
        Case("cross_entropy", shape, kind, {"weight": weight, "label_smoothing": eps})
        for shape in ((7, 19), (2, 5, 3, 4))
        for kind in ("index_int64", "probabilities")
        for weight in (None, "per_class")
        for eps in (0.1, 1.0)
    ),
    *(Case("cross_entropy", (7, 19), "index_int64", {"weight": "per_class", "ignore_index": i}) for i in IGNORED),
]

LONG_ROWS = [
    Case(loss, shape, kind, {})
    for loss in ("softmax", "cross_entropy")
    for shape in ((3, 32_768), (2, 70_001), (2, 262_144))
    for kind in ("index_int64", "probabilities")
]


class Problem(NamedTuple):
    """A case with its tensors: dlkernels and the formula above, as functions of the logits and the reduction."""

    x: Tensor
    y: Tensor
    fused: Callable[[Tensor, str], Tensor]
    plain: Callable[[Tensor, str], Tensor]


def problem(case: Case, dtype: torch.dtype, device: torch.device, seed: int, scale: float = 2.5) -> Problem:
    torch.manual_seed(seed)
    x = (scale * torch.randn(case.shape)).to(dtype)
    options = dict(case.options)
    ignore = options.get("ignore_index", -100)
    y = (SIGMOID_TARGETS if case.loss == "sigmoid" else SOFTMAX_TARGETS)[case.target](x, ignore).to(device)
    x = x.to(device)
    for name in ("alpha", "weight"):
        if options.get(name) == "per_class":
            options[name] = torch.linspace(0.3, 1.9, case.shape[1], device=device)
    if case.loss == "sigmoid":
        return Problem(
            x,
            y,
            lambda x, reduction: dk.sigmoid_focal_loss(x, y, reduction=reduction, **options),
            lambda x, reduction: plain_sigmoid_focal(x, y, reduction=reduction, **options),
        )
    if case.loss == "softmax":
        return Problem(
            x,
            y,
            lambda z, reduction: dk.softmax_focal_loss(z, y, reduction=reduction, **options),
            lambda z, reduction: plain_softmax_focal(z, y, reduction=reduction, **options),
        )

    def torchs(z: Tensor, reduction: str) -> Tensor:
        target = y.to(z.dtype) if y.is_floating_point() else y.long()
        given = {**options, "weight": None if options.get("weight") is None else options["weight"].to(z.dtype)}
        return F.cross_entropy(z, target, reduction=reduction, **given)

    return Problem(x, y, lambda z, reduction: dk.cross_entropy(z, y, reduction=reduction, **options), torchs)


def value_and_gradient(loss: Callable[[Tensor, str], Tensor], x: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    out = loss(x, reduction)
    g = torch.linspace(0.5, 1.5, max(out.numel(), 1), device=x.device, dtype=torch.float64)
    g = g[: out.numel()].to(out.dtype).double().view(out.shape)
    return out.detach(), torch.autograd.grad(out, x, g.to(out.dtype))[0]


def check(p: Problem, reductions: tuple[str, ...] = ("none", "mean", "sum")) -> None:
    """Loss and gradient within twice eager's error plus 4 eps, scalars within 8 eps."""
    for reduction in reductions:
        actual = value_and_gradient(p.fused, p.x, reduction)
        exact = value_and_gradient(p.plain, p.x.double(), reduction)
        eager = value_and_gradient(p.plain, p.x, reduction)
        assert actual[0].dtype == (torch.float64 if p.x.dtype == torch.float64 else torch.float32)
        assert actual[1].dtype == p.x.dtype
        if p.x.dtype == torch.float64:  # the plain formula is no more exact than what it judges
            assert all(relative_error(a, e) <= 1e-12 for a, e in zip(actual, exact, strict=True))
            continue
        assert_within_budget(actual[0], exact[0], eager[0], reduction != "none", f"{reduction} loss")
        assert_within_budget(actual[1], exact[1], eager[1], what=f"gradient of {reduction}")


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_reference(case: Case, dtype: torch.dtype, sigmoid_backend: str, device: torch.device) -> None:
    """Every case, dtype and reduction against float64 and against eager PyTorch."""
    backend = sigmoid_backend
    if backend == "cuda" and (dtype == torch.float64 or case.loss != "sigmoid"):
        pytest.skip("by design: Triton serves float64 and the softmax losses")
    if backend == "triton" and (dtype == torch.float64 or (device.type == "cpu" and dtype == torch.float16)):
        pytest.skip("by design: in the slow interpreter float32 and bfloat16 stand for all dtypes")
    for seed in range(1 if backend in ("triton", "cuda") and device.type == "cpu" else 3):
        check(problem(case, dtype, device, seed))


@pytest.mark.parametrize("case", LONG_ROWS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_long_rows(case: Case, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    """Up to 262,144 classes, the target anywhere in the row."""
    if backend == "triton" and device.type == "cpu" and case.shape[1] > 40_000:
        pytest.skip("by design: too slow in the interpreter")
    p = problem(case, dtype, device, 0)
    if case.target == "index_int64":
        p.y[-1] = case.shape[1] - 1
    check(p, ("none", "mean"))


@pytest.mark.parametrize("name", ["contiguous", "offset", "strided", "transposed", "reversed", "channels_last"])
def test_layouts_of_logits_and_targets(name: str, sigmoid_backend: str, device: torch.device) -> None:
    """Targets of another layout than the logits meet the right logits."""
    torch.manual_seed(0)
    x = torch.randn(3, 5, 4, 6, device=device)
    y = torch.rand_like(x)
    a, b = dict(layouts(x))[name], dict(layouts(y))[name]
    for left, right in ((a, y), (x, b), (a, b)):
        for fused, plain in (
            (dk.sigmoid_focal_loss, plain_sigmoid_focal),
            (dk.softmax_focal_loss, plain_softmax_focal),
        )[: 1 if sigmoid_backend == "cuda" else 2]:
            for reduction in ("none", "mean"):
                actual = value_and_gradient(lambda z, r: fused(z, right, reduction=r), left, reduction)  # noqa: B023
                exact = value_and_gradient(lambda z, r: plain(z, y, reduction=r), x.double(), reduction)  # noqa: B023
                assert_within_budget(actual[0], exact[0], what=name)
                assert relative_error(actual[1], exact[1]) < 1e-6


# Against PyTorch itself -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7,), (6, 7), (3, 7, 4), (2, 7, 3, 2)], ids=str)
@pytest.mark.parametrize("soft", [False, True], ids=["index", "probabilities"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_cross_entropy_is_torchs(
    shape: tuple[int, ...], soft: bool, weighted: bool, backend: str, device: torch.device
) -> None:
    """Same positions, same values, same gradients, for every option."""
    if backend == "triton":
        pytest.skip("by design: float64, in the slow interpreter")
    torch.manual_seed(1)
    x = torch.randn(shape, dtype=torch.float64, device=device)
    target_shape = shape[:1] + shape[2:] if len(shape) > 1 else ()
    y = torch.softmax(torch.randn_like(x), min(1, len(shape) - 1)) if soft else torch.randint(0, 7, target_shape)
    y = y.to(device)
    weight = torch.rand(7, dtype=torch.float64, device=device) if weighted else None
    for reduction, eps, ignore in itertools.product(
        ("none", "mean", "sum"), (0.0, 0.1, 1.0), (-100,) if soft else (-100, 3, -1)
    ):
        args = (y, weight, None, ignore, None, reduction, eps)
        z, t = x.clone().requires_grad_(), x.clone().requires_grad_()
        ours, torchs = dk.cross_entropy(z, *args), F.cross_entropy(t, *args)
        torch.testing.assert_close(ours, torchs, rtol=1e-13, atol=1e-14, equal_nan=True)
        ours.sum().backward()
        torchs.sum().backward()
        if torchs.isfinite().all():
            torch.testing.assert_close(z.grad, t.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_gamma_zero_without_alpha_is_binary_cross_entropy(
    reduction: str, sigmoid_backend: str, device: torch.device
) -> None:
    torch.manual_seed(2)
    x = 3 * torch.randn(40, 17, device=device)
    y = torch.rand(40, 17, device=device)
    for target in (y, y.round()):
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        ours = dk.sigmoid_focal_loss(a, target, -1, 0, reduction)
        torchs = F.binary_cross_entropy_with_logits(b, target, reduction=reduction)
        torch.testing.assert_close(ours, torchs)
        ours.sum().backward()
        torchs.sum().backward()
        torch.testing.assert_close(a.grad, b.grad)


def test_properties_of_the_sigmoid_loss(sigmoid_backend: str, device: torch.device) -> None:
    """fvcore's: the ratio to cross entropy is alpha_t (1 - p_t)^gamma; alpha = 1 silences negatives, 0 positives."""
    torch.manual_seed(3)
    x = torch.randn(300, device=device)
    y = torch.randint(0, 2, (300,), device=device).float()
    p_t = torch.where(y == 1, torch.sigmoid(x), torch.sigmoid(-x))
    ce = F.binary_cross_entropy_with_logits(x, y, reduction="none")
    loss = dk.sigmoid_focal_loss(x, y)
    alpha_t = torch.where(y == 1, 0.25, 0.75)
    torch.testing.assert_close(loss / ce, alpha_t * (1 - p_t) ** 2, rtol=1e-5, atol=0)
    assert (dk.sigmoid_focal_loss(x, y, 1)[y == 0] == 0).all() and (dk.sigmoid_focal_loss(x, y, 1)[y == 1] > 0).all()
    assert (dk.sigmoid_focal_loss(x, y, 0)[y == 1] == 0).all() and (dk.sigmoid_focal_loss(x, y, 0)[y == 0] > 0).all()
    assert_bitwise(dk.sigmoid_focal_loss(x, y, None), dk.sigmoid_focal_loss(x, y, -1.0), "alpha off")
    torch.testing.assert_close(dk.sigmoid_focal_loss(x, y, 0.5), 0.5 * dk.sigmoid_focal_loss(x, y, None))
    torch.testing.assert_close(dk.sigmoid_focal_loss(x, y, 0.3), dk.sigmoid_focal_loss(-x, 1 - y, 0.7))


def test_all_spellings_of_a_sigmoid_target_agree(sigmoid_backend: str, device: torch.device) -> None:
    """bool, every integer type, floats and class indices say the same thing."""
    torch.manual_seed(4)
    x = torch.randn(12, 9, device=device)
    index = torch.randint(-1, 9, (12,), device=device)
    hot = F.one_hot(index + 1, 10)[:, 1:]
    expected = dk.sigmoid_focal_loss(x, hot.float())
    for dtype in (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16):
        torch.testing.assert_close(dk.sigmoid_focal_loss(x, hot.to(dtype)), expected, rtol=1e-6, atol=1e-9)
    for dtype in (torch.int8, torch.int16, torch.int32, torch.int64):
        torch.testing.assert_close(dk.sigmoid_focal_loss(x, index.to(dtype)), expected, rtol=1e-6, atol=1e-9)


def test_softmax_of_two_classes_is_the_sigmoid_loss(backend: str, device: torch.device) -> None:
    torch.manual_seed(5)
    z = 3 * torch.randn(50, 2, device=device)
    y = torch.randint(0, 2, (50,), device=device)
    softmax = dk.softmax_focal_loss(z, y, torch.tensor([0.75, 0.25], device=device), 2.0, "none")
    sigmoid = dk.sigmoid_focal_loss(z[:, 1] - z[:, 0], y)
    torch.testing.assert_close(softmax, sigmoid, rtol=1e-5, atol=1e-8)


def test_one_hot_probabilities_are_the_index(backend: str, device: torch.device) -> None:
    torch.manual_seed(6)
    z = torch.randn(20, 11, 3, device=device)
    y = torch.randint(0, 11, (20, 3), device=device)
    q = F.one_hot(y, 11).movedim(-1, 1).float()
    for gamma in GAMMAS:
        for eps in (0.0, 0.1):
            a, b = z.clone().requires_grad_(), z.clone().requires_grad_()
            index = dk.softmax_focal_loss(a, y, 0.5, gamma, label_smoothing=eps)
            soft = dk.softmax_focal_loss(b, q, 0.5, gamma, label_smoothing=eps)
            torch.testing.assert_close(index, soft)
            index.backward()
            soft.backward()
            torch.testing.assert_close(a.grad, b.grad, rtol=2e-5, atol=1e-8)


def test_gradients_of_targets_and_weights(device: torch.device) -> None:
    """Floating targets and per-class weights get gradients when they ask."""
    torch.manual_seed(7)
    x = torch.randn(6, 5, dtype=torch.float64, device=device)
    q = torch.softmax(torch.randn_like(x), 1)
    w = torch.rand(5, dtype=torch.float64, device=device) + 0.5
    for ours, plain, tensors in (
        (lambda x, q: dk.sigmoid_focal_loss(x, q).sum(), lambda x, q: plain_sigmoid_focal(x, q).sum(), (x, q)),
        (lambda x, q: dk.softmax_focal_loss(x, q), lambda x, q: plain_softmax_focal(x, q), (x, q)),
        (lambda x, q, w: dk.cross_entropy(x, q, w), lambda x, q, w: F.cross_entropy(x, q, w), (x, q, w)),
    ):
        a = [t.clone().requires_grad_() for t in tensors]
        b = [t.clone().requires_grad_() for t in tensors]
        for mine, right in zip(torch.autograd.grad(ours(*a), a), torch.autograd.grad(plain(*b), b), strict=True):
            torch.testing.assert_close(mine, right, rtol=1e-10, atol=1e-12)


def test_normalizer(sigmoid_backend: str, device: torch.device) -> None:
    """A number, or one element on the device, of any dtype; a constant to autograd."""
    torch.manual_seed(8)
    x = torch.randn(30, 7, device=device)
    y = torch.randint(0, 7, (30,), device=device)
    for loss in (
        lambda x, **o: dk.sigmoid_focal_loss(x, y, reduction="sum", **o),
        lambda x, **o: dk.softmax_focal_loss(x, y, reduction="sum", **o),
        lambda x, **o: dk.cross_entropy(x, y, reduction="sum", **o),
    )[: 1 if sigmoid_backend == "cuda" else 3]:
        a = x.clone().requires_grad_()
        total = loss(a)
        (gradient,) = torch.autograd.grad(total, a)
        for value in (5, 5.0, torch.tensor(5), torch.tensor([5.0]), torch.tensor(5.0, dtype=torch.float64),
                      torch.tensor([[5.0]], dtype=torch.float16)):  # fmt: skip
            value = value.to(device) if isinstance(value, Tensor) else value
            b = x.clone().requires_grad_()
            out = loss(b, normalizer=value)
            assert out.shape == ()
            torch.testing.assert_close(out, total / 5)
            torch.testing.assert_close(torch.autograd.grad(out, b)[0], gradient / 5)
    if sigmoid_backend != "cuda":
        assert dk.cross_entropy(x, y, reduction="sum", normalizer=0).item() == INF


# Known numbers --------------------------------------------------------------------------------------------------------


@pytest.fixture
def f(backend: str, device: torch.device) -> Callable[..., Tensor]:
    """Tensors of the dtype that known numbers are checked in: float64, or float32 for Triton."""
    return lambda value: torch.tensor(
        value, dtype=torch.float32 if backend == "triton" else torch.float64, device=device
    )


def close(actual: Tensor, expected: Any, digits: float = 1e-9) -> None:
    rtol = 2e-6 if actual.dtype == torch.float32 else digits
    expected = torch.tensor(expected, dtype=actual.dtype, device=actual.device)
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=5e-11 if digits < 1e-8 else digits)


def test_vectors_cross_entropy(f: Any, device: torch.device) -> None:
    z = f([[2, 1, 0], [0, 0, 3], [1, -1, 0]])
    y = torch.tensor([0, 1, -100], device=device)
    w = f([1, 2, 0.5])
    close(dk.cross_entropy(z, y, reduction="none"), [0.4076059644, 3.0949229564, 0.0])
    close(dk.cross_entropy(z, y), 1.7512644604)
    close(dk.cross_entropy(z, y, w), 2.1991506258)
    close(dk.cross_entropy(z, y, w, reduction="none", label_smoothing=0.1), [0.5143993972, 5.8819356665, 0.0])
    close(dk.cross_entropy(z, y, w, label_smoothing=0.1), 2.1321116879)


def test_vectors_softmax_focal(f: Any, device: torch.device) -> None:
    z = f([[2, 1, 0], [0, 0, 3], [1, -1, 0]]).requires_grad_()
    y = torch.tensor([0, 1, -100], device=device)
    rows = dk.softmax_focal_loss(z, y, gamma=2, reduction="none")
    close(rows, [0.0456777990, 2.8210010471, 0.0])
    close(dk.softmax_focal_loss(z, y, gamma=2), 1.4333394231)
    close(dk.softmax_focal_loss(z, y, gamma=0.5, reduction="none")[0], 0.2358341481)
    rows.sum().backward()
    close(z.grad[0], [-0.09828779, 0.07185414, 0.02643366], 1e-8)
    close(z.grad[2], [0.0, 0.0, 0.0])


def test_vectors_focal_at_given_probabilities(f: Any, device: torch.device) -> None:
    """The Keras docstring's numbers among them; the last three replace TF-Addons', whose arguments are swapped."""
    p = f([0.95, 0.9, 0.5, 0.1])
    expected = [3.2058309e-5, 2.6340129e-4, 4.3321698e-2, 4.6627348e-1]
    x = torch.log(p / (1 - p))
    close(dk.sigmoid_focal_loss(x, torch.ones_like(x), 0.25, 2), expected, 1e-7)
    zero = torch.zeros_like(x)
    y = torch.zeros(4, dtype=torch.int64, device=device)
    close(dk.softmax_focal_loss(torch.stack([x, zero], 1), y, 0.25, 2, "none"), expected, 1e-7)
    p, y = f([0.97, 0.91, 0.03]), f([1, 1, 0])
    close(dk.sigmoid_focal_loss(torch.log(p / (1 - p)), y, 0.25, 2), [6.85332e-6, 1.909791e-4, 2.055997e-5], 1e-5)


def test_vectors_sigmoid_focal(f: Any, device: torch.device) -> None:
    x = f([2, -1, 0]).requires_grad_()
    loss = dk.sigmoid_focal_loss(x, f([1, 1, 0]))
    close(loss, [0.00045089, 0.17546708, 0.12996510], 1e-8)
    loss.sum().backward()
    close(x.grad, [-0.00121774, -0.19205868, 0.22371510], 1e-8)


# Any shape, any options -----------------------------------------------------------------------------------------------


@pytest.mark.needs("hypothesis")
def test_random_shapes_and_options(device: torch.device) -> None:
    from hypothesis import given
    from hypothesis import strategies as st

    losses = st.sampled_from(["sigmoid", "softmax", "cross_entropy"])
    extents = st.lists(st.integers(1, 9), min_size=2, max_size=5)

    @given(losses, extents, st.integers(1, 300), st.sampled_from(DTYPES[:3]), st.data())
    def holds(loss: str, extent: list[int], classes: int, dtype: torch.dtype, data: Any) -> None:
        options: dict[str, Any] = {}
        ignore = data.draw(st.sampled_from([-100, -1, -7, 0, 2, 1000]))
        if loss == "sigmoid":
            shape = (*extent[:3], classes)
            target = data.draw(st.sampled_from(sorted(SIGMOID_TARGETS)))
            options["alpha"] = data.draw(st.one_of(st.none(), st.floats(0, 1, width=16)))
            if target.startswith("classes") and target != "classes_int8":
                options["ignore_index"] = ignore
        else:
            shape = (extent[0], classes, *extent[2:4])
            target = data.draw(st.sampled_from(sorted(SOFTMAX_TARGETS)))
            options["label_smoothing"] = data.draw(st.sampled_from([0.0, 0.1, 1.0]))
            options["alpha" if loss == "softmax" else "weight"] = data.draw(st.sampled_from([None, "per_class"]))
            if target == "index_int64":
                options["ignore_index"] = ignore
        if loss != "cross_entropy":
            options["gamma"] = data.draw(st.one_of(st.sampled_from(GAMMAS), st.floats(0, 6, width=16)))
        p = problem(Case(loss, shape, target, options), dtype, device, data.draw(st.integers(0, 9)))
        actual = value_and_gradient(p.fused, p.x, "none")
        exact = value_and_gradient(p.plain, p.x.double(), "none")
        eager = value_and_gradient(p.plain, p.x, "none")
        assert_within_budget(actual[0], exact[0], eager[0])
        assert_within_budget(actual[1], torch.nan_to_num(exact[1]), eager[1])

    holds()


# Extreme logits -------------------------------------------------------------------------------------------------------

EXTREME = (-INF, -1000.0, -90.0, -20.0, -1.0, 0.0, 1.0, 20.0, 90.0, 1000.0, INF)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_sigmoid_at_extreme_logits(
    gamma: float, dtype: torch.dtype, sigmoid_backend: str, device: torch.device
) -> None:
    """Losses are right in every digit, from 1e-36 up, and no gradient is NaN, whatever the target."""
    x = torch.tensor(EXTREME, dtype=dtype, device=device)
    for y in (0.0, 0.3, 1.0):
        a = x.clone().requires_grad_()
        loss = dk.sigmoid_focal_loss(a, torch.full_like(a, y), None, gamma)
        (gradient,) = torch.autograd.grad(loss.sum(), a)
        finite = x.isfinite()
        assert not loss[finite].isnan().any() and not gradient[finite].isnan().any(), (y, loss, gradient)
        if y in (0.0, 1.0):
            assert not loss.isnan().any() and not gradient.isnan().any(), (y, loss, gradient)
            d = x.double() * (1 if y == 1 else -1)
            u, ell = torch.sigmoid(-d), F.softplus(-d)
            exact = u**gamma * torch.where(d == INF, 0.0, ell)
            right = exact > 1e-36
            torch.testing.assert_close(loss[right].double(), exact[right], rtol=1e-5, atol=0)
            slope = (1 if y == 0 else -1) * u**gamma * (u + gamma * (torch.sigmoid(d) * ell).nan_to_num(0.0))
            eps = 4 * torch.finfo(dtype).eps + 1e-5
            torch.testing.assert_close(
                gradient.double(), slope, rtol=eps, atol=6e-8 if dtype == torch.float16 else 1e-36
            )


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_softmax_at_extreme_logits(
    reduction: str, gamma: float, dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    """1 - p is never formed by subtraction: every digit at any gap between the classes, and no NaN gradient."""
    gaps = torch.tensor([g for g in EXTREME if g != INF], dtype=dtype, device=device)
    for classes, column in ((2, 0), (40, 17)):
        z = torch.full((len(gaps), classes), -INF, dtype=dtype, device=device)
        z[:, column], z[:, -1] = gaps, 0.0
        for y in (column, classes - 1):
            a = z.clone().requires_grad_()
            labels = torch.full((len(gaps),), y, device=device)
            loss = dk.softmax_focal_loss(a, labels, None, gamma, reduction)
            (gradient,) = torch.autograd.grad(loss.sum(), a)
            assert not loss.isnan().any() and not gradient.isnan().any(), (classes, y, loss, gradient)
            d = gaps.double() * (1 if y == column else -1)
            exact = torch.sigmoid(-d) ** gamma * torch.where(d == INF, 0.0, F.softplus(-d))
            if reduction == "none":
                right = exact > 1e-36
                torch.testing.assert_close(loss[right].double(), exact[right], rtol=1e-5, atol=0)
            assert (gradient[:, 0 if classes > 2 else 2 :][:, : 0 if classes == 2 else 17] == 0).all()


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_nan_is_not_hidden_by_the_sigmoid_loss(soft: bool, sigmoid_backend: str, device: torch.device) -> None:
    """A NaN logit gives a NaN loss, and leaves the others alone."""
    x = torch.randn(5, 6, device=device)
    x[1, 2] = NAN
    y = torch.rand(5, 6, device=device) if soft else torch.ones(5, 6, device=device)
    loss = dk.sigmoid_focal_loss(x, y)
    assert loss.isnan().nonzero().tolist() == [[1, 2]]
    assert dk.sigmoid_focal_loss(x, y, reduction="sum").isnan()


@pytest.mark.parametrize("soft", [False, True], ids=["index", "probabilities"])
def test_nan_is_not_hidden(soft: bool, backend: str, device: torch.device) -> None:
    """NaN logits, rows of -inf and rows with +inf give NaN losses, and leave the other rows alone."""
    x = torch.randn(5, 6, device=device)
    x[1, 2] = NAN
    x[3] = -INF
    x[4, 1] = INF
    target = torch.softmax(torch.randn(5, 6, device=device), 1) if soft else torch.randint(0, 6, (5,), device=device)
    for gamma in (0.0, 0.5, 2.0):
        a = x.clone().requires_grad_()
        rows = dk.softmax_focal_loss(a, target, None, gamma, "none")
        assert rows.isnan().tolist() == [False, True, False, True, True], rows
        rows.sum().backward()
        assert a.grad[[0, 2]].isfinite().all() and a.grad[[1, 3, 4]].isnan().any(1).all()
        assert dk.softmax_focal_loss(x, target, None, gamma).isnan()


@pytest.mark.parametrize("soft", [False, True], ids=["index", "probabilities"])
def test_masked_classes_cost_nothing(soft: bool, backend: str, device: torch.device) -> None:
    """-inf logits of classes with target probability 0: the loss of the classes that are left."""
    torch.manual_seed(9)
    z = torch.randn(8, 6, device=device)
    y = torch.randint(0, 4, (8,), device=device)
    target = F.pad(F.one_hot(y, 4).float(), (0, 2)) if soft else y
    masked = z.clone()
    masked[:, 4:] = -INF
    for gamma in (0.0, 0.5, 2.0):
        a, b = masked.clone().requires_grad_(), z[:, :4].clone().requires_grad_()
        ours = dk.softmax_focal_loss(a, target, None, gamma, "none")
        left = dk.softmax_focal_loss(b, target[:, :4] if soft else y, None, gamma, "none")
        torch.testing.assert_close(ours, left)
        ours.sum().backward()
        left.sum().backward()
        torch.testing.assert_close(a.grad, F.pad(b.grad, (0, 2)))


def test_ignored_rows_are_not_looked_at(sigmoid_backend: str, device: torch.device) -> None:
    """Loss 0, gradient 0, even where the logits are NaN; the mean is over the others."""
    torch.manual_seed(10)
    x = torch.randn(6, 4, device=device)
    y = torch.tensor([1, -100, 2, 0, -100, 3], device=device)
    clean = x.clone()
    x[1], x[4, 2] = NAN, INF
    keep = y != -100
    for reduction in ("none", "mean", "sum"):
        for loss in (
            lambda x, y: dk.sigmoid_focal_loss(x, y, reduction=reduction),  # noqa: B023
            lambda x, y: dk.softmax_focal_loss(x, y, 0.5, 0.5, reduction),  # noqa: B023
            lambda x, y: dk.softmax_focal_loss(x, y, None, 2.0, reduction, label_smoothing=0.1),  # noqa: B023
            lambda x, y: dk.cross_entropy(x, y, reduction=reduction),  # noqa: B023
        )[: 1 if sigmoid_backend == "cuda" else 4]:
            a, b = x.clone().requires_grad_(), clone_rows(clean, keep)
            out, left = loss(a, y), loss(b, y[keep])
            torch.testing.assert_close(out[keep] if reduction == "none" else out, left)
            if reduction == "none":
                assert (out[~keep] == 0).all()
            out.sum().backward()
            left.sum().backward()
            assert (a.grad[~keep] == 0).all()
            torch.testing.assert_close(a.grad[keep], b.grad)


def clone_rows(x: Tensor, keep: Tensor) -> Tensor:
    return x[keep].clone().requires_grad_()


def test_all_rows_ignored(sigmoid_backend: str, device: torch.device) -> None:
    """The mean over nothing is NaN, its gradient zero; the sum is zero."""
    y = torch.full((3,), -100, device=device)
    for loss in (dk.sigmoid_focal_loss, dk.softmax_focal_loss, dk.cross_entropy)[
        : 1 if sigmoid_backend == "cuda" else 3
    ]:
        for reduction, expected in (("mean", NAN), ("sum", 0.0)):
            x = torch.randn(3, 4, device=device).requires_grad_()
            out = loss(x, y, reduction=reduction)
            assert out.isnan() if expected != 0.0 else out == 0, (loss, reduction, out)
            out.backward()
            assert (x.grad == 0).all(), (loss, reduction, x.grad)


def test_float16_with_a_large_loss_scale(backend: str, device: torch.device) -> None:
    """A loss scale above float16's range times a small gradient is in range: the scale itself is not rounded."""
    x = torch.tensor([[2.5, -2.5], [3.0, -2.0]], device=device)
    y = torch.zeros(2, dtype=torch.int64, device=device)
    for reduction, scale in itertools.product(("none", "mean", "sum"), (2.0**17, 2.0**19 + 4096, 2.0**-12)):
        for loss in (dk.cross_entropy, dk.softmax_focal_loss):
            a, b = x.half().requires_grad_(), x.double().requires_grad_()
            gamma = {} if loss is dk.cross_entropy else {"gamma": 0.5}
            (scale * loss(a, y, reduction=reduction, **gamma)).sum().backward()
            (scale * plain_softmax_focal(b, y, None, gamma.get("gamma", 0.0), reduction)).sum().backward()
            torch.testing.assert_close(a.grad.double(), b.grad, rtol=2.1e-3, atol=6e-8)


def test_one_class(backend: str, device: torch.device) -> None:
    """With one class p = 1: no loss, no gradient, for any gamma."""
    for gamma in GAMMAS:
        x = torch.tensor([[-3.0], [1000.0], [0.0]], device=device).requires_grad_()
        y = torch.zeros(3, dtype=torch.int64, device=device)
        loss = dk.softmax_focal_loss(x, y, None, gamma, "none")
        loss.sum().backward()
        assert (loss == 0).all() and (x.grad == 0).all()


# Errors: type, one line, what was expected and what came --------------------------------------------------------------

X = torch.zeros(4, 3)
Y = torch.zeros(4, dtype=torch.int64)
SIG, FOC, CE = dk.sigmoid_focal_loss, dk.softmax_focal_loss, dk.cross_entropy

REJECTED: dict[str, tuple[type[Exception], Callable[[], Any], tuple[str, ...]]] = {
    "sigmoid_shape": (ValueError, lambda: SIG(X, torch.zeros(4, 2)), ("`targets`", "(4, 3)", "(4, 2)")),
    "sigmoid_index_shape": (ValueError, lambda: SIG(X, Y[:3]), ("`targets`", "(4,)", "(3,)")),
    "sigmoid_bool_index": (ValueError, lambda: SIG(X, Y.bool()), ("`targets`", "(4, 3)", "bool")),
    "sigmoid_broadcast": (ValueError, lambda: SIG(X, torch.zeros(1, 3)), ("`targets`", "(4, 3)", "(1, 3)")),
    "sigmoid_integer_logits": (TypeError, lambda: SIG(X.int(), X), ("`inputs`", "float32", "int32")),
    "sigmoid_complex_logits": (TypeError, lambda: SIG(X.cfloat(), X), ("`inputs`", "float32", "complex64")),
    "sigmoid_complex_target": (TypeError, lambda: SIG(X, X.cfloat()), ("`targets`", "complex64")),
    "sigmoid_list": (TypeError, lambda: SIG([1.0], X), ("`inputs`", "Tensor", "list")),
    "sigmoid_target_list": (TypeError, lambda: SIG(X, [1.0]), ("`targets`", "Tensor", "list")),
    "sigmoid_sparse": (TypeError, lambda: SIG(X.to_sparse(), X), ("`inputs`", "strided", "sparse")),
    "sigmoid_device": (ValueError, lambda: SIG(X, X.to("meta")), ("`targets`", "device", "cpu", "meta")),
    "sigmoid_normalizer_device": (
        ValueError,
        lambda: SIG(X, X, reduction="sum", normalizer=torch.ones((), device="meta")),
        ("`normalizer`", "device", "meta"),
    ),
    "sigmoid_gamma_negative": (ValueError, lambda: SIG(X, X, gamma=-1), ("`gamma`", ">= 0", "-1")),
    "sigmoid_gamma_nan": (ValueError, lambda: SIG(X, X, gamma=NAN), ("`gamma`", ">= 0", "nan")),
    "sigmoid_gamma_infinite": (ValueError, lambda: SIG(X, X, gamma=INF), ("`gamma`", "finite", "inf")),
    "sigmoid_gamma_text": (TypeError, lambda: SIG(X, X, gamma="two"), ("`gamma`", "number", "str")),
    "sigmoid_alpha_above_one": (ValueError, lambda: SIG(X, X, 1.5), ("`alpha`", "[0, 1]", "1.5")),
    "sigmoid_alpha_nan": (ValueError, lambda: SIG(X, X, NAN), ("`alpha`", "[0, 1]", "nan")),
    "sigmoid_alpha_text": (TypeError, lambda: SIG(X, X, "a"), ("`alpha`", "number", "str")),
    "sigmoid_reduction": (ValueError, lambda: SIG(X, X, reduction="avg"), ("`reduction`", "'mean'", "'avg'")),
    "sigmoid_reduction_none": (ValueError, lambda: SIG(X, X, reduction=None), ("`reduction`", "'none'", "None")),
    "sigmoid_ignore_index": (TypeError, lambda: SIG(X, Y, ignore_index=1.0), ("`ignore_index`", "int", "float")),
    "sigmoid_normalizer_alone": (ValueError, lambda: SIG(X, X, normalizer=2), ("`normalizer`", "'sum'", "'none'")),
    "sigmoid_normalizer_shape": (
        ValueError,
        lambda: SIG(X, X, reduction="sum", normalizer=torch.ones(2)),
        ("`normalizer`", "one element", "(2,)"),
    ),
    "sigmoid_normalizer_text": (
        TypeError,
        lambda: SIG(X, X, reduction="sum", normalizer="x"),
        ("`normalizer`", "number", "str"),
    ),
    "softmax_no_dimension": (ValueError, lambda: FOC(X[0, 0], Y[0]), ("`input`", "(N, C)", "()")),
    "softmax_no_class": (ValueError, lambda: FOC(torch.zeros(4, 0), Y), ("`input`", "one class", "(4, 0)")),
    "softmax_shape": (ValueError, lambda: FOC(X, Y[:3]), ("`target`", "(4,)", "(3,)")),
    "softmax_probabilities_shape": (ValueError, lambda: FOC(X, X[:, :2]), ("`target`", "(4, 3)", "(4, 2)")),
    "softmax_spatial_shape": (
        ValueError,
        lambda: FOC(torch.zeros(2, 3, 4, 5), torch.zeros(2, 5, 4, dtype=torch.int64)),
        ("`target`", "(2, 4, 5)", "(2, 5, 4)"),
    ),
    "softmax_bool": (TypeError, lambda: FOC(X, Y.bool()), ("`target`", "integer", "bool")),
    "softmax_integer_logits": (TypeError, lambda: FOC(X.long(), Y), ("`input`", "float32", "int64")),
    "softmax_device": (ValueError, lambda: FOC(X, Y.to("meta")), ("`target`", "device", "meta")),
    "softmax_gamma": (ValueError, lambda: FOC(X, Y, gamma=-0.5), ("`gamma`", ">= 0", "-0.5")),
    "softmax_gamma_nan": (ValueError, lambda: FOC(X, Y, gamma=NAN), ("`gamma`", ">= 0", "nan")),
    "softmax_alpha": (ValueError, lambda: FOC(X, Y, 2.0), ("`alpha`", "[0, 1]", "2.0")),
    "softmax_alpha_nan": (ValueError, lambda: FOC(X, Y, NAN), ("`alpha`", "[0, 1]", "nan")),
    "softmax_alpha_negative": (ValueError, lambda: FOC(X, Y, -1.0), ("`alpha`", "[0, 1]", "-1")),
    "softmax_alpha_shape": (ValueError, lambda: FOC(X, Y, torch.ones(4)), ("`alpha`", "(C,) = (3,)", "(4,)")),
    "softmax_alpha_dtype": (TypeError, lambda: FOC(X, Y, torch.ones(3).int()), ("`alpha`", "float32", "int32")),
    "softmax_alpha_device": (
        ValueError,
        lambda: FOC(X, Y, torch.ones(3, device="meta")),
        ("`alpha`", "device", "meta"),
    ),
    "softmax_smoothing": (ValueError, lambda: FOC(X, Y, label_smoothing=1.5), ("`label_smoothing`", "[0, 1]", "1.5")),
    "softmax_smoothing_nan": (
        ValueError,
        lambda: CE(X, Y, label_smoothing=NAN),
        ("`label_smoothing`", "[0, 1]", "nan"),
    ),
    "softmax_reduction": (
        ValueError,
        lambda: FOC(X, Y, reduction="batchmean"),
        ("`reduction`", "'sum'", "'batchmean'"),
    ),
    "softmax_ignored_probabilities": (
        ValueError,
        lambda: FOC(X, X, ignore_index=0),
        ("`ignore_index`", "negative", "0"),
    ),
    "softmax_normalizer": (ValueError, lambda: FOC(X, Y, normalizer=2), ("`normalizer`", "'sum'", "'mean'")),
    "cross_entropy_weight_number": (TypeError, lambda: CE(X, Y, 0.5), ("`weight`", "Tensor", "float")),
    "cross_entropy_weight_shape": (ValueError, lambda: CE(X, Y, torch.ones(2)), ("`weight`", "(3,)", "(2,)")),
    "cross_entropy_size_average": (ValueError, lambda: CE(X, Y, size_average=True), ("`size_average`", "`reduction`")),
    "cross_entropy_reduce": (ValueError, lambda: CE(X, Y, reduce=False), ("`reduce`", "None", "`reduction`")),
    "module_alpha": (ValueError, lambda: dk.nn.SigmoidFocalLoss(alpha=2), ("`alpha`", "[0, 1]", "2")),
    "module_gamma": (ValueError, lambda: dk.nn.SoftmaxFocalLoss(gamma=-1), ("`gamma`", ">= 0", "-1")),
    "module_reduction": (ValueError, lambda: dk.nn.CrossEntropyLoss(reduction="x"), ("`reduction`", "'mean'", "'x'")),
    "module_legacy": (ValueError, lambda: dk.nn.CrossEntropyLoss(size_average=True), ("`size_average`", "None")),
}


@pytest.mark.parametrize("name", REJECTED)
def test_rejects(name: str) -> None:
    """The right exception, in one line that names the argument, the expectation and the fact."""
    error, call, words = REJECTED[name]
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert type(caught.value) is error
    assert "\n" not in message, f"more than one line: {message!r}"
    for word in words:
        assert word in message, f"{word!r} is missing: {message!r}"


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int8], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("bad", ["above", "below"])
@pytest.mark.parametrize("kind", ["sigmoid", "sigmoid_index", "softmax", "cross_entropy"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_labels_out_of_range(
    kind: str, bad: str, dtype: torch.dtype, reduction: str, sigmoid_backend: str, device: torch.device
) -> None:
    """IndexError that names the range and the label, wherever it stands; NaN on CUDA, where asking would wait."""
    if sigmoid_backend == "cuda" and not kind.startswith("sigmoid"):
        pytest.skip("by design: Triton serves the softmax losses")
    n = 301
    x = torch.randn(n, 5, device=device).requires_grad_()
    y = torch.zeros((n, 5) if kind == "sigmoid" else (n,), dtype=dtype, device=device)
    high, low = {"sigmoid": (2, -1), "sigmoid_index": (5, -2)}.get(kind, (5, -1))
    value = high if bad == "above" else low
    loss = {"softmax": FOC, "cross_entropy": CE}.get(kind, SIG)
    for position in (0, n // 2, n - 1):
        labels = y.clone()
        labels.view(n, -1)[position, -1] = value
        if device.type == "cuda" or sigmoid_backend in ("triton", "cuda"):
            out = loss(x, labels, reduction=reduction)
            assert out.isnan().any()
            continue
        with pytest.raises(IndexError) as caught:
            loss(x, labels, reduction=reduction)
        message = str(caught.value)
        assert re.search(rf"(?<![\d-]){value}(?!\d)", message) and str(high) in message, message
        assert "\n" not in message
    assert x.grad is None


def test_a_rejected_call_changes_nothing(backend: str, device: torch.device) -> None:
    """After an error the same tensors give the same results."""
    if backend == "triton":
        pytest.skip("by design: labels raise on CPU backends only")
    x = torch.randn(50, 5, device=device).requires_grad_()
    y = torch.randint(0, 5, (50,), device=device)
    before = x.detach().clone()
    expected = FOC(x, y)
    with pytest.raises(IndexError):
        FOC(x, torch.where(torch.arange(50, device=device) == 49, 7, y))
    assert x.grad is None
    assert_bitwise(x, before, "logits")
    assert_bitwise(FOC(x, y), expected, "loss after an error")


# Negative controls: the comparisons above can fail --------------------------------------------------------------------


def _last_element_lost(x: Tensor, y: Tensor, reduction: str) -> Tensor:
    if reduction != "none":
        return SIG(x.flatten()[:-1], y.flatten()[:-1], 0.25, 2.0, reduction)
    mask = torch.ones_like(x)
    mask.view(-1)[-1] = 0
    return mask * SIG(x, y, 0.25, 2.0)


def _one_nan(x: Tensor) -> Tensor:
    return torch.where(torch.arange(x.numel()).view(x.shape) == 3, NAN, x)


WRONG: dict[str, Callable[[Tensor, Tensor, str], Tensor]] = {
    "gamma": lambda x, y, r: SIG(x, y, 0.25, 2.001, r),
    "alpha_ignored": lambda x, y, r: SIG(x, y, None, 2.0, r),
    "alpha_swapped": lambda x, y, r: SIG(x, y, 0.75, 2.0, r),
    "off_by_a_thousandth": lambda x, y, r: 1.001 * SIG(x, y, 0.25, 2.0, r),
    "targets_shifted": lambda x, y, r: SIG(x, y.roll(1, 0), 0.25, 2.0, r),
    "half_precision_inside": lambda x, y, r: SIG(x.bfloat16(), y, 0.25, 2.0, r),
    "last_element_lost": _last_element_lost,
    "divisor": lambda x, y, r: SIG(x, y, 0.25, 2.0, r) * (1 - 1 / x.numel()),
    "gradient_cut": lambda x, y, r: SIG(x.detach() + 0 * x, y, 0.25, 2.0, r),
    "one_nan": lambda x, y, r: SIG(_one_nan(x), y, 0.25, 2.0, r),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_negative_control(name: str, reduction: str) -> None:
    """A loss that is wrong in this way does not pass `check`, in any reduction; the right one does."""
    p = problem(Case("sigmoid", (5, 19), "hard", {}), torch.float32, torch.device("cpu"), 0)
    check(p, (reduction,))
    with pytest.raises(AssertionError):
        check(p._replace(fused=lambda x, r: WRONG[name](x, p.y, r)), (reduction,))


def test_negative_control_of_the_ratio() -> None:
    """relative_error is a norm over all: it must still see a wrong tail of a tensor that is mostly right."""
    exact = torch.linspace(0.1, 1, 1000, dtype=torch.float64)
    off = exact.float().clone()
    off[-3:] *= 1.001
    with pytest.raises(AssertionError, match="relative error"):
        assert_within_budget(off, exact, exact.float())
    assert_within_budget(exact.float(), exact, exact.float())
    with pytest.raises(AssertionError, match="inf"):
        assert_within_budget(torch.full((2,), INF), torch.ones(2, dtype=torch.float64))
    with pytest.raises(AssertionError, match="shape"):
        assert_within_budget(torch.ones(2), torch.ones(1, 2, dtype=torch.float64))
