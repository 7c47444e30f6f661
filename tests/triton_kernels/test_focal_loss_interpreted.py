"""Every focal-loss launcher against the float64 reference: ragged shapes, each target, each tile, each edge."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import dlkernels as dk
from dlkernels.reference import focal_loss as reference
from dlkernels.testing import assert_bitwise, assert_within_budget, poisoned_empty, relative_error
from dlkernels.triton import _common, _rows, focal_loss, stored_grad

NONE, MEAN, SUM = 0, 1, 2
INF, NAN = float("inf"), float("nan")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GAMMAS = (0.0, 0.5, 1.0, 2.0, 3.7)

Rows = Callable[[Tensor], Tensor]  # logits -> losses without a reduction


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """What a kernel does not write is NaN."""
    with poisoned_empty():
        yield


@pytest.fixture
def tiny_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of more than 64 classes no longer fit a tile: they run in loops."""
    monkeypatch.setattr(_rows, "MAX_RESIDENT", 64)
    monkeypatch.setattr(_rows, "MAX_RESIDENT_DENSE", 64)


def gradient(rows: Rows, x: Tensor, g: Tensor) -> Tensor:
    x = x.detach().clone().requires_grad_()
    return torch.autograd.grad(rows(x), x, g.expand_as(rows(x)))[0]


def check(
    forward: Callable[..., tuple[Tensor, Tensor, Tensor]], backward: Callable[[Tensor], Tensor], rows: Rows, x: Tensor,
    divisor: Callable[[Tensor], Tensor], normalizer: float | None = None,
) -> None:  # fmt: skip
    """The three reductions with and without a gradient, and the backward launcher, against float64 autograd."""
    exact, eager = rows(x.double()), rows(x)
    loss, grad, one = forward(None, NONE, True)
    assert loss.is_contiguous() and grad.shape == (0,) and one == 1
    assert_within_budget(loss, exact, eager, what="rows")

    full = gradient(rows, x.double(), torch.ones((), dtype=torch.float64))
    theirs = gradient(rows, x, torch.ones((), dtype=eager.dtype))
    given = None if normalizer is None else torch.tensor(normalizer, dtype=loss.dtype)
    for reduction, norm in ((MEAN, None), (SUM, None), (SUM, given)):
        by = divisor(x.double()) if reduction == MEAN else torch.tensor(1.0 if norm is None else normalizer).double()
        for need_grad in (True, False) if reduction == MEAN else (True,):
            loss, grad, found = forward(norm, reduction, need_grad)
            assert_within_budget(found, by.double(), scalar=True, what="divisor")
            assert_within_budget(loss, exact.sum() / by, scalar=True, what=f"reduction {reduction}")
            assert grad.shape == (x.shape if need_grad else (0,)) and grad.dtype == x.dtype and grad.is_contiguous()
            if need_grad:
                fold = by if x.dtype != torch.float16 and by != 0 else 1.0  # float16 stores it undivided
                assert_within_budget(grad, full / fold, theirs.double() / fold, what=f"gradient, reduction {reduction}")

    g = torch.randn(exact.shape)
    assert_within_budget(backward(g), gradient(rows, x.double(), g.double()), gradient(rows, x, g.to(eager.dtype)))
    expanded = torch.tensor(-1.7).expand(exact.shape)
    assert_within_budget(
        backward(expanded), gradient(rows, x.double(), expanded.double()), gradient(rows, x, expanded.to(eager.dtype))
    )


# Sigmoid --------------------------------------------------------------------------------------------------------------

SIGMOID_TARGETS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "hard": lambda x, _: torch.randint(0, 2, x.shape).to(x.dtype),
    "soft": lambda x, _: torch.rand(x.shape).to(x.dtype),
    "mixed float32": lambda x, _: (1.6 * torch.rand(x.shape) - 0.3).clamp(0, 1),
    "bool": lambda x, _: torch.rand(x.shape) < 0.3,
    "uint8": lambda x, i: with_ignored(torch.randint(0, 2, x.shape, dtype=torch.uint8), i if i >= 0 else 1),
    "int32": lambda x, i: with_ignored(torch.randint(0, 2, x.shape, dtype=torch.int32), i),
    "int64": lambda x, i: with_ignored(torch.randint(0, 2, x.shape), i),
    "classes int32": lambda x, i: with_ignored(torch.randint(-1, x.shape[-1], x.shape[:-1], dtype=torch.int32), i),
    "classes int64": lambda x, i: with_ignored(torch.randint(-1, x.shape[-1], x.shape[:-1]), i),
    "classes uint8": lambda x, i: torch.randint(0, min(x.shape[-1], 250), x.shape[:-1], dtype=torch.uint8),
}


def with_ignored(t: Tensor, ignore_index: int) -> Tensor:
    t.view(-1)[:: random.randint(3, 7)] = ignore_index
    return t


def check_sigmoid(x: Tensor, t: Tensor, alpha: float, gamma: float, ignore_index: int) -> None:
    def forward(normalizer: Tensor | None, reduction: int, need_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
        options = (normalizer, alpha, gamma, ignore_index, reduction, need_grad, True)
        return focal_loss.sigmoid_focal_loss_fwd(x, t, *options)

    wide = t.int() if t.dtype == torch.uint8 else t  # uint8 == -100 is true of 156
    check(
        forward,
        lambda g: focal_loss.sigmoid_focal_loss_bwd(g, x, t, alpha, gamma, ignore_index),
        lambda z: reference.sigmoid_focal_loss(z, wide, alpha, gamma, ignore_index),
        x,
        lambda z: reference.sigmoid_divisor(z, wide, ignore_index),
        normalizer=3.25,
    )


def ragged(generator: random.Random) -> tuple[int, ...]:
    """One program and several, never a multiple of a block."""
    rows, columns = generator.choice(((1, 1), (1, 37), (23, 1), (13, 80), (31, 91), (3, 1027), (2, 1401)))
    return (rows, columns + generator.randint(0, 2)) if generator.random() < 0.5 else (1, rows, columns)


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("kind", SIGMOID_TARGETS)
def test_sigmoid(kind: str, gamma: float) -> None:
    generator = random.Random(f"{kind} {gamma}")
    dtype = generator.choice(DTYPES)
    x = (generator.choice((1, 4)) * torch.randn(ragged(generator))).to(dtype)
    ignore_index = generator.choice((-100, -2, 0, 7, 255))
    t = SIGMOID_TARGETS[kind](x, ignore_index)
    check_sigmoid(x, t, generator.choice((-1.0, 0.0, 0.25, 1.0)), gamma, ignore_index)


@pytest.mark.parametrize("classes", (1, 2, 3, 80, 1023, 1024, 1025, 2500))
def test_sigmoid_class_indices_find_their_class(classes: int) -> None:
    """The division by the number of classes, for every way it is done."""
    x = torch.randn(-(-2600 // classes), classes)
    check_sigmoid(x, torch.randint(-1, classes, x.shape[:1]), 0.25, 2.0, -100)


def test_sigmoid_several_steps_per_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(focal_loss, "_sigmoid_grid", lambda numel: (-(-numel // 3072), 3))
    x = torch.randn(71, 91)
    check_sigmoid(x, torch.rand(x.shape), 0.25, 2.0, -100)
    check_sigmoid(x, torch.randint(-1, 91, (71,)), 0.25, 2.0, 5)


def test_sigmoid_float64() -> None:
    """Scalars reach the kernel as doubles, not as floats."""
    x = torch.randn(13, 17, dtype=torch.float64)
    for gamma, t in itertools.product((0.0, 2.0, 3.7), (torch.rand(13, 17).double(), torch.randint(0, 2, (13, 17)))):
        check_sigmoid(x, t, 0.3, gamma, -100)


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("kind", ("hard", "int64", "classes int64", "soft"))
def test_sigmoid_saturated(kind: str, gamma: float) -> None:
    """Logits up to infinity: no NaN, gradients at their limit."""
    x = torch.tensor([-INF, -1000.0, -100.0, -30.0, -5.0, 5.0, 30.0, 100.0, 1000.0, INF]).repeat(2, 1)
    if kind == "classes int64":
        x, t = x.T.contiguous(), torch.tensor([0] * 5 + [-1] * 5)
        y = torch.tensor([[1.0, 0.0]] * 5 + [[0.0, 0.0]] * 5)
    else:
        y = torch.stack([torch.zeros(10), torch.ones(10)]) if kind != "soft" else torch.full((2, 10), 0.25)
        t = y.long() if kind == "int64" else y
    loss, grad, _ = focal_loss.sigmoid_focal_loss_fwd(x, t, None, 0.25, gamma, -100, SUM, True, True)
    rows = focal_loss.sigmoid_focal_loss_fwd(x, t, None, 0.25, gamma, -100, NONE, False, True)[0]
    assert not grad.isnan().any() and grad.isfinite().all()
    assert loss == rows.sum() == INF and not rows.isnan().any()
    finite = x.isfinite()
    assert relative_error(
        rows[finite], reference.sigmoid_focal_loss(x.double(), y.double(), 0.25, gamma, -100)[finite]
    ) < 1e-6  # fmt: skip
    limit = torch.where(finite, x, x.sign() * 500).double()
    exact = gradient(
        lambda z: reference.sigmoid_focal_loss(z, y.double(), 0.25, gamma, -100), limit, torch.ones(()).double()
    )
    assert relative_error(grad, exact) < 1e-6


def test_sigmoid_nan_and_labels_out_of_range() -> None:
    x = torch.randn(4, 9)
    x[1, 2] = NAN
    run = focal_loss.sigmoid_focal_loss_fwd
    for t in (torch.zeros(4, 9), torch.zeros(4, 9).long(), torch.rand(4, 9)):
        rows = run(x, t, None, 0.25, 2.0, -100, NONE, False, True)[0]
        loss, grad, _ = run(x, t, None, 0.25, 2.0, -100, SUM, True, True)
        expected = x.isnan()
        assert torch.equal(rows.isnan(), expected) and torch.equal(grad.isnan(), expected) and loss.isnan()

    x[1, 2] = 0.5
    t = torch.zeros(4, 9).long()
    t[0, 0], t[3, 8] = 2, -1
    assert torch.equal(run(x, t, None, 0.25, 2.0, -100, NONE, False, True)[0].isnan(), t != 0)
    classes = torch.tensor([9, -2, 3, 2**40])
    rows = run(x, classes, None, 0.25, 2.0, -100, NONE, False, True)[0]
    assert torch.equal(rows.isnan(), (classes != 3).unsqueeze(1).expand(4, 9))


def test_sigmoid_left_out_elements_are_not_looked_at() -> None:
    x = torch.full((3, 5), NAN)
    x[1] = torch.randn(5)
    t = torch.tensor([-7, 2, -7])
    loss, grad, divisor = focal_loss.sigmoid_focal_loss_fwd(x, t, None, 0.25, 2.0, -7, MEAN, True, True)
    assert loss.isfinite() and divisor == 5
    assert torch.equal(grad[::2], torch.zeros(2, 5)) and grad[1].isfinite().all()
    grad = focal_loss.sigmoid_focal_loss_bwd(torch.full((3, 5), INF), x, t, 0.25, 2.0, -7)
    assert torch.equal(grad[::2], torch.zeros(2, 5))


# Softmax --------------------------------------------------------------------------------------------------------------

SHAPES = ((1, 1), (7, 1), (9, 2), (5, 7), (300, 3), (3, 65), (17, 130), (2, 1000), (1, 2049))
SPATIAL = ((2, 5, 3), (1, 3, 70), (3, 21, 33), (2, 70, 5), (1, 130, 17), (4, 1, 9))


def softmax_target(kind: str, x: Tensor, ignore_index: int) -> Tensor:
    shape = x.shape[:1] + x.shape[2:]
    if kind == "probabilities":
        return torch.softmax(2 * torch.randn(x.shape), 1).to(x.dtype)
    if kind == "probabilities float32":
        q = torch.rand(x.shape)
        q[torch.rand(x.shape) < 0.3] = 0
        return q
    return with_ignored(
        torch.randint(0, x.shape[1], shape, dtype=torch.int32 if "int32" in kind else None), ignore_index
    )


def check_softmax(
    x: Tensor, t: Tensor, weight: Tensor | None, gamma: float, eps: float, ignore_index: int, of_weights: bool
) -> None:
    def forward(normalizer: Tensor | None, reduction: int, need_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
        options = (normalizer, gamma, eps, ignore_index, of_weights, reduction, need_grad, True)
        return focal_loss.softmax_focal_loss_fwd(x, t, weight, *options)

    def rows(z: Tensor) -> Tensor:
        return reference.softmax_focal_loss(z, t, weight, gamma, eps, ignore_index)

    check(
        forward,
        lambda g: focal_loss.softmax_focal_loss_bwd(g, x, t, weight, gamma, eps, ignore_index),
        rows,
        x,
        lambda z: reference.softmax_divisor(z, t, weight if of_weights else None, ignore_index),
        normalizer=0.375,
    )


def random_softmax(seed: str, kind: str, gamma: float, shapes: Any) -> None:
    generator = random.Random(seed)
    dtype = generator.choice(DTYPES)
    x = (generator.choice((1, 4)) * torch.randn(generator.choice(shapes))).to(dtype)
    ignore_index = generator.choice((-100, -1, 0, 255))
    weight = torch.rand(x.shape[1]) + 0.1 if generator.random() < 0.5 else None
    eps = 0.0 if kind.startswith("index") else generator.choice((0.1, 1.0)) if kind == "smoothed" else 0.0
    t = softmax_target(kind, x, ignore_index)
    check_softmax(x, t, weight, gamma, eps, ignore_index, weight is not None and generator.random() < 0.5)


KINDS = ("index", "index int32", "smoothed", "probabilities", "probabilities float32")


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("kind", KINDS)
def test_softmax(kind: str, gamma: float) -> None:
    random_softmax(f"{kind} {gamma}", kind, gamma, SHAPES)


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("kind", KINDS)
def test_softmax_strided(kind: str, gamma: float) -> None:
    random_softmax(f"strided {kind} {gamma}", kind, gamma, SPATIAL)


@pytest.mark.parametrize("gamma", (0.0, 0.5, 2.0))
@pytest.mark.parametrize("kind", KINDS)
def test_softmax_looped(kind: str, gamma: float, tiny_tiles: None) -> None:
    assert _rows.plan(3, 130, 1, _rows.MAX_RESIDENT).looped and _rows.plan(2, 21, 5, _rows.MAX_RESIDENT).looped
    random_softmax(f"looped {kind} {gamma}", kind, gamma, ((3, 65), (2, 130), (1, 201)))
    random_softmax(f"looped strided {kind} {gamma}", kind, gamma, ((2, 21, 5), (1, 9, 17)))


def test_softmax_long_row() -> None:
    """A row that does not fit the tile of a GPU either."""
    x = torch.randn(2, _rows.MAX_RESIDENT + 3)
    check_softmax(x, torch.tensor([_rows.MAX_RESIDENT + 2, 5]), None, 2.0, 0.0, -100, False)


def test_softmax_float64() -> None:
    x = 3 * torch.randn(11, 13, dtype=torch.float64)
    for kind, gamma, eps in (("index", 3.7, 0.0), ("index", 2.0, 0.1), ("probabilities", 0.5, 0.0)):
        check_softmax(x, softmax_target(kind, x, -100), torch.rand(13).double(), gamma, eps, -100, False)


def test_softmax_gradient_strides() -> None:
    """grad_output of the backward launcher may have any strides."""
    x, t = torch.randn(3, 5, 7), torch.randint(0, 5, (3, 7))
    g = torch.randn(7, 3).T
    expected = focal_loss.softmax_focal_loss_bwd(g.contiguous(), x, t, None, 2.0, 0.0, -100)
    assert_bitwise(focal_loss.softmax_focal_loss_bwd(g, x, t, None, 2.0, 0.0, -100), expected)
    g = torch.randn(3, 1).expand(3, 7)
    expected = focal_loss.softmax_focal_loss_bwd(g.contiguous(), x, t, None, 2.0, 0.0, -100)
    assert_bitwise(focal_loss.softmax_focal_loss_bwd(g, x, t, None, 2.0, 0.0, -100), expected)


@pytest.mark.parametrize("looped", (False, True))
@pytest.mark.parametrize("eps", (0.0, 0.1))
@pytest.mark.parametrize("gamma", GAMMAS)
def test_softmax_edges(gamma: float, eps: float, looped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saturated, masked, NaN and infinite rows; labels out of range and left out."""
    if looped:
        monkeypatch.setattr(_rows, "MAX_RESIDENT", 2)
        monkeypatch.setattr(_rows, "MAX_RESIDENT_DENSE", 2)
    x = torch.tensor(
        [
            [1000.0, -1000.0, 0.0],
            [1000.0, -1000.0, 0.0],
            [60.0, 0.0, 0.0],
            [-INF, -INF, -INF],
            [INF, 0.0, 0.0],
            [NAN, 0.0, 1.0],
            [0.5, 0.0, 1.0],
            [0.5, 0.0, 1.0],
            [NAN, -INF, INF],
            [2.0, 2.0, 2.0],
        ]
    )
    t = torch.tensor([0, 1, 0, 0, 1, 1, 3, -1, -100, 2])
    options = (gamma, eps, -100, False)
    rows = focal_loss.softmax_focal_loss_fwd(x, t, None, None, *options, NONE, False, True)[0]
    nan = [3, 4, 5, 6, 7]
    assert rows[nan].isnan().all() and rows[8] == 0
    fine = [0, 1, 2, 9]
    exact = reference.softmax_focal_loss(x[fine].double(), t[fine], None, gamma, eps, -100)
    assert rows[fine].isfinite().all()
    torch.testing.assert_close(rows[fine].double(), exact, rtol=1e-6, atol=1e-30)
    grad = focal_loss.softmax_focal_loss_bwd(torch.tensor(1.0).expand(10), x, t, None, gamma, eps, -100)
    assert grad[nan].isnan().all() and torch.equal(grad[8], torch.zeros(3))
    exact = gradient(
        lambda z: reference.softmax_focal_loss(z, t[fine], None, gamma, eps, -100),
        x[fine].double(),
        torch.ones(()).double(),
    )
    torch.testing.assert_close(grad[fine].double(), exact, rtol=2e-6, atol=1e-30)
    loss, grad, divisor = focal_loss.softmax_focal_loss_fwd(x, t, None, None, *options, MEAN, True, True)
    assert loss.isnan() and divisor == 9 and torch.equal(grad[8], torch.zeros(3))


@pytest.mark.parametrize("looped", (False, True))
def test_softmax_masked_classes(looped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A class with logit -inf and no target weight costs nothing."""
    if looped:
        monkeypatch.setattr(_rows, "MAX_RESIDENT", 2)
        monkeypatch.setattr(_rows, "MAX_RESIDENT_DENSE", 2)
    x = torch.tensor([[0.3, -INF, 1.0, -INF, 0.1], [-INF, -INF, 0.4, -INF, -INF]])
    q = torch.tensor([[0.5, 0.0, 0.25, 0.0, 0.25], [0.0, 0.0, 1.0, 0.0, 0.0]])
    kept = x[0, [0, 2, 4]][None]
    for t, small in ((q, q[:1, [0, 2, 4]]), (torch.tensor([2, 2]), torch.tensor([1]))):
        loss = focal_loss.softmax_focal_loss_fwd(x, t, None, None, 0.5, 0.0, -100, False, NONE, False, True)[0]
        exact = reference.softmax_focal_loss(kept.double(), small, None, 0.5, 0.0, -100)
        assert_within_budget(loss[:1], exact)
        assert loss[1] == 0
        grad = focal_loss.softmax_focal_loss_bwd(torch.ones(2), x, t, None, 0.5, 0.0, -100)
        assert grad.isfinite().all() and not grad[1].any() and not grad[0, [1, 3]].any()


def test_softmax_mean_over_nothing() -> None:
    for shape in ((4, 5), (600, 5), (2, 5, 3)):
        x = torch.full(shape, NAN)
        t = torch.full(shape[:1] + shape[2:], 3)
        for of_weights in (False, True):
            loss, grad, divisor = focal_loss.softmax_focal_loss_fwd(
                x, t, torch.ones(5), None, 2.0, 0.0, 3, of_weights, MEAN, True, True
            )
            assert loss.isnan() and divisor == 0 and torch.equal(grad, torch.zeros(shape))
        g = torch.tensor(INF).expand(t.shape)
        assert torch.equal(focal_loss.softmax_focal_loss_bwd(g, x, t, None, 2.0, 0.0, 3), torch.zeros(shape))
    half = torch.zeros(3, dtype=torch.float16)
    assert torch.equal(stored_grad.scale_stored_grad(torch.tensor(1.0), half, torch.tensor(0.0)), half)


def test_no_rows() -> None:
    for reduction, loss_shape, value, by in ((NONE, (0,), None, 1), (MEAN, (), NAN, 0), (SUM, (), 0.0, 1)):
        loss, _, divisor = focal_loss.softmax_focal_loss_fwd(
            torch.empty(0, 5), torch.empty(0).long(), None, None, 2.0, 0.0, -100, False, reduction, True, True
        )
        assert loss.shape == loss_shape and divisor == by
        again = focal_loss.sigmoid_focal_loss_fwd(
            torch.empty(0, 5), torch.empty(0, 5), None, 0.25, 2.0, -100, reduction, True, True
        )[0]
        if value is not None:
            assert torch.equal(loss, torch.tensor(value)) or (loss.isnan() and again.isnan())
    assert focal_loss.softmax_focal_loss_bwd(
        torch.empty(0), torch.empty(0, 5), torch.empty(0).long(), None, 2.0, 0.0, -100
    ).shape == (0, 5)


# Shared kernels -------------------------------------------------------------------------------------------------------


def test_divisor_of_many_labels() -> None:
    """Several counting programs, then their sum: what batches of segmentation maps need."""
    per_program = _common.COUNT_BLOCK * _common.COUNT_STEPS
    t = torch.randint(0, 3, (1, 2 * per_program + 77))
    t[0, ::5] = -100
    x = torch.zeros(1, 1, t.shape[1]).expand(1, 3, -1).contiguous()
    weight = torch.tensor([0.5, 1.0, 3.0])
    for of_weights in (False, True):
        loss, _, divisor = focal_loss.softmax_focal_loss_fwd(
            x, t, weight, None, 0.0, 0.0, -100, of_weights, MEAN, False, True
        )
        expected = reference.softmax_divisor(x.double(), t, weight if of_weights else None, -100)
        assert_within_budget(divisor, expected, scalar=True)
        rows = reference.softmax_focal_loss(x.double(), t, weight, 0.0, 0.0, -100)
        assert_within_budget(loss, rows.sum() / expected, scalar=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numel", (0, 1, 777, 1024, 5001))
def test_scale_stored_gradient(dtype: torch.dtype, numel: int) -> None:
    stored = torch.randn(numel).to(dtype)
    before = stored.clone()
    for factor, divisor in ((1.0, None), (-2.5, None), (3.0, 7.0), (7.0, 7.0)):
        by = None if divisor is None else torch.tensor(divisor)
        exact = stored.double() * factor / (divisor or 1.0)
        out = stored_grad.scale_stored_grad(torch.tensor(factor), stored, by)
        assert_within_budget(out, exact, exact.to(dtype))
        assert (torch.equal(stored, before) and out.data_ptr() != stored.data_ptr()) or numel == 0
        again = stored.clone()
        stored_grad.scale_stored_grad_(again, torch.tensor(factor), by)
        assert_bitwise(again, out)


def test_nothing_waits_for_the_device() -> None:
    """No .item(), no nonzero: the launchers can be captured in a CUDA graph."""

    class NoSync(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = func._schema.name
            assert name not in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero"), name
            return func(*args, **(kwargs or {}))

    x, t = torch.randn(40, 70), torch.randint(0, 70, (40,))
    norm = torch.tensor(3.0)
    with NoSync():
        for reduction, given in ((NONE, None), (MEAN, None), (SUM, norm)):
            focal_loss.sigmoid_focal_loss_fwd(x, t, given, 0.25, 2.0, -1, reduction, True, True)
            focal_loss.softmax_focal_loss_fwd(x, t, None, given, 2.0, 0.0, -1, False, reduction, True, True)
        stored_grad.scale_stored_grad_(x.clone(), norm, norm)


def test_bitwise_equal_between_runs() -> None:
    x, t = torch.randn(300, 33), torch.randint(0, 33, (300,))
    runs = [
        focal_loss.softmax_focal_loss_fwd(x, t, None, None, 3.7, 0.1, -100, False, MEAN, True, True) for _ in range(2)
    ]
    for first, second in zip(*runs):
        assert_bitwise(first, second)


# Public functions -----------------------------------------------------------------------------------------------------


@pytest.fixture
def triton() -> Iterator[None]:
    with dk.backend("triton"):
        yield


def test_vectors(triton: None) -> None:
    """Values worked out by hand in float64."""
    z, y = torch.tensor([[2.0, 1, 0], [0, 0, 3], [1, -1, 0]]), torch.tensor([0, 1, -100])
    w = torch.tensor([1, 2, 0.5])
    close = lambda a, b: torch.testing.assert_close(a, torch.tensor(b), rtol=2e-6, atol=1e-8)  # noqa: E731
    close(dk.cross_entropy(z, y, reduction="none"), [0.4076059644, 3.0949229564, 0])
    close(dk.cross_entropy(z, y), 1.7512644604)
    close(dk.cross_entropy(z, y, w), 2.1991506258)
    close(dk.cross_entropy(z, y, w, reduction="none", label_smoothing=0.1), [0.5143993972, 5.8819356665, 0])
    close(dk.cross_entropy(z, y, w, label_smoothing=0.1), 2.1321116879)
    close(dk.softmax_focal_loss(z, y, reduction="none"), [0.0456777990, 2.8210010471, 0])
    close(dk.softmax_focal_loss(z, y), 1.4333394231)
    close(dk.softmax_focal_loss(z, y, gamma=0.5, reduction="none")[0], 0.2358341481)
    z.requires_grad_()
    dk.softmax_focal_loss(z, y, reduction="none")[0].backward()
    close(z.grad[0], [-0.09828779, 0.07185414, 0.02643366])
    x = torch.tensor([2.0, -1, 0], requires_grad=True)
    rows = dk.sigmoid_focal_loss(x, torch.tensor([1.0, 1, 0]))
    close(rows, [0.00045089, 0.17546708, 0.12996510])
    rows.sum().backward()
    close(x.grad, [-0.00121774, -0.19205868, 0.22371510])


LOSSES: dict[str, Callable[[Tensor, str], Tensor]] = {
    "sigmoid": lambda x, r: dk.sigmoid_focal_loss(x, torch.eye(5, 7), gamma=1.3, reduction=r),
    "softmax": lambda x, r: dk.softmax_focal_loss(x, torch.tensor([0, 6, -100, 2, 3]), gamma=1.3, reduction=r),
    "cross entropy": lambda x, r: dk.cross_entropy(x, torch.eye(5, 7), reduction=r, label_smoothing=0.1),
}


@pytest.mark.parametrize("reduction", ("none", "mean", "sum"))
@pytest.mark.parametrize("name", LOSSES)
def test_autograd(name: str, reduction: str) -> None:
    """A kept graph, a factor on the loss, and a second derivative, against the reference in float64."""
    x = torch.randn(5, 7)
    direction = torch.randn(5, 7)
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        z = x.to(dtype).requires_grad_()
        with dk.backend(backend):
            loss = (LOSSES[name](z, reduction) * 3.5).sum()
            first = torch.autograd.grad(loss, z, retain_graph=True)[0]
            again = torch.autograd.grad(loss, z, retain_graph=True)[0]
            kept = torch.autograd.grad(loss, z, create_graph=True)[0]
            second = torch.autograd.grad((kept * direction.to(dtype)).sum(), z)[0]
        assert_bitwise(again, first)
        results.append((loss.detach(), first, kept.detach(), second))
    (loss, first, kept, second), exact = results
    assert_within_budget(loss, exact[0], scalar=True)
    for ours, right in ((first, exact[1]), (kept, exact[2]), (second, exact[3])):
        assert relative_error(ours, right) < 1e-6


def test_half_mean_under_a_loss_scale(triton: None) -> None:
    """1 / N times a small gradient is below float16: the division waits until the scale is there."""
    x = (torch.randn(300, 40) - 6).half().requires_grad_()
    t = torch.zeros(300, 40)
    (dk.sigmoid_focal_loss(x, t, reduction="mean") * 65536).backward()
    z = x.detach().double().requires_grad_()
    with dk.backend("reference"):
        (dk.sigmoid_focal_loss(z, t.double(), reduction="mean") * 65536).backward()
    assert relative_error(x.grad, z.grad) < 2e-2
    plain = x.detach().clone().requires_grad_()
    dk.sigmoid_focal_loss(plain, t, reduction="mean").backward()
    assert plain.grad.count_nonzero() < x.grad.count_nonzero()


def test_views_and_layouts(triton: None) -> None:
    x = torch.randn(2, 6, 4, 5)
    for view in (x.transpose(0, 1), x.to(memory_format=torch.channels_last), x[:, ::2], x[..., 1:]):
        t = torch.randint(0, view.shape[1], (view.shape[0], *view.shape[2:]))
        z = view.detach().requires_grad_()
        dk.softmax_focal_loss(z, t).backward()
        right = view.double().detach().requires_grad_()
        with dk.backend("reference"):
            dk.softmax_focal_loss(right, t).backward()
        assert relative_error(z.grad, right.grad) < 1e-6
        z = view.detach().requires_grad_()
        dk.sigmoid_focal_loss(z, torch.full(z.shape, 0.3)).backward(view)
        assert z.grad is not None and z.grad.isfinite().all()
