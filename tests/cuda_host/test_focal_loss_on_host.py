"""Sigmoid focal loss in CUDA C++, on the host."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dlkernels.reference import focal_loss as reference
from dlkernels.testing import assert_bitwise, assert_within_budget
from dlkernels.triton import focal_loss as triton

OPS = torch.ops.dlkernels_cuda_host
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NONE, MEAN, SUM = 0, 1, 2
TWO_MULTIPROCESSORS = (90, 2, 232448, 233472, 2048, 50 << 20)  # so that few elements fill the grid more than once

FLOATS = ("hard", "soft", "mixed", "float32")
LABELS = ("bool", "uint8", "int32", "int64")
CLASSES = ("classes_uint8", "classes_int32", "classes_int64")


def targets(kind: str, x: Tensor, ignore: int = -100) -> Tensor:
    if kind == "hard":
        return torch.randint(0, 2, x.shape).to(x.dtype)
    if kind == "soft":
        return torch.rand(x.shape).to(x.dtype)
    if kind in ("mixed", "float32"):  # most packs are hard, some are not
        y = torch.randint(0, 2, x.shape).float()
        y.view(-1)[5::37] = torch.rand(y.view(-1)[5::37].shape)
        return y if kind == "float32" else y.to(x.dtype)
    dtype = getattr(torch, kind.removeprefix("classes_"))
    if kind.startswith("classes"):
        low = 0 if dtype == torch.uint8 else -1
        y = torch.randint(low, min(x.shape[-1], 200), x.shape[:-1]).to(dtype)
    else:
        y = torch.randint(0, 2, x.shape).to(dtype)
    if dtype != torch.bool and (0 <= ignore < 256 or dtype != torch.uint8):
        y.view(-1)[2::7] = ignore
    return y


def forward(x: Tensor, y: Tensor, reduction: int, *, alpha: float = 0.25, gamma: float = 2.0, ignore: int = -100,
            normalizer: Tensor | None = None, need_grad: bool = True) -> tuple[Tensor, ...]:  # fmt: skip
    return OPS.sigmoid_focal_loss_fwd(x, y, normalizer, alpha, gamma, ignore, reduction, need_grad, True)


def exact(x: Tensor, y: Tensor, reduction: int, dtype: torch.dtype = torch.float64, *, alpha: float = 0.25,
          gamma: float = 2.0, ignore: int = -100, normalizer: Tensor | None = None,
          grad_output: Tensor | None = None) -> tuple[Tensor, ...]:  # fmt: skip
    """Loss, gradient (of what grad_output weights) and divisor, by the reference."""
    x = x.to(dtype).requires_grad_()
    y = y.to(dtype) if y.is_floating_point() else y
    rows = reference.sigmoid_focal_loss(x, y, alpha, gamma, ignore)
    divisor = torch.ones((), dtype=dtype) if normalizer is None else normalizer.to(dtype)
    if reduction == MEAN:
        divisor = torch.as_tensor(reference.sigmoid_divisor(x, y, ignore)).to(dtype)
    loss = rows if reduction == NONE else rows.sum() / divisor
    weight = torch.ones_like(loss) if grad_output is None else grad_output.to(dtype)
    (grad,) = torch.autograd.grad(loss, x, weight)
    return loss.detach(), grad, divisor


def check(x: Tensor, y: Tensor, **options: Any) -> None:
    """All reductions, forward and backward."""
    for reduction in (NONE, MEAN, SUM):
        loss, grad, divisor = forward(x, y, reduction, **options)
        right = exact(x, y, reduction, **options)
        eager = exact(x, y, reduction, x.dtype if x.dtype == torch.float32 else torch.float32, **options)
        assert_within_budget(loss, right[0], eager[0], reduction != NONE, f"loss {reduction}")
        assert loss.dtype == divisor.dtype == torch.float32
        assert divisor.double() == right[2].float().double()
        if reduction == NONE:
            assert grad.shape == (0,)
            continue
        assert grad.dtype == x.dtype
        assert grad.is_contiguous()
        expected = right[1] * right[2] if x.dtype == torch.float16 else right[1]  # float16 is stored undivided
        assert_within_budget(grad, expected, eager[1] * (expected / right[1]).nan_to_num(1.0), what="stored gradient")
        without = forward(x, y, reduction, need_grad=False, **options)
        assert_bitwise(without[2], divisor)
        assert_within_budget(without[0], right[0], eager[0], True, "loss without gradient")
        assert without[1].shape == (0,)
    options.pop("normalizer", None)
    each = torch.linspace(-1.5, 2.0, x.numel()).view(x.shape)
    for g in (each, torch.tensor(0.7).expand(x.shape)):
        grad = OPS.sigmoid_focal_loss_bwd(
            g, x, y, options.get("alpha", 0.25), options.get("gamma", 2.0), options.get("ignore", -100)
        )
        right = exact(x, y, NONE, grad_output=g, **options)
        eager = exact(x, y, NONE, torch.float32, grad_output=g, **options)
        assert_within_budget(grad, right[1], eager[1], what="gradient")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", FLOATS + LABELS + CLASSES)
@pytest.mark.parametrize("shape", [(3, 7), (40, 80), (29, 91)], ids=str)
def test_is_the_reference(shape: tuple[int, int], kind: str, dtype: torch.dtype, twin: Any) -> None:
    x = (2.5 * torch.randn(shape)).to(dtype)
    check(x, targets(kind, x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["mixed", "float32", "uint8", "int64", "classes_int32"])
def test_a_grid_that_goes_round(kind: str, dtype: torch.dtype, twin: Any) -> None:
    """More elements than the grid has at a time, and some left over."""
    twin.module.machine(*TWO_MULTIPROCESSORS)
    x = (2.5 * torch.randn(451, 91)).to(dtype)
    y = targets(kind, x)
    loss, grad, _ = forward(x, y, MEAN)
    right = exact(x, y, MEAN)
    assert_within_budget(loss, right[0], scalar=True)
    expected = right[1] * right[2] if dtype == torch.float16 else right[1]
    assert_within_budget(
        grad, expected, exact(x, y, MEAN, torch.float32)[1].to(dtype) * (expected / right[1]).nan_to_num(1.0)
    )
    assert {launch["grid"] for launch in twin.launches() if launch["op"] == "sigmoid_focal_loss_fwd"} <= {1, 2, 3, 6, 8}
    forward(x, y, NONE)
    OPS.sigmoid_focal_loss_bwd(loss.expand(x.shape), x, y, 0.25, 2.0, -100)
    assert [launch["grid"] for launch in twin.launches()] == [8, 6]


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 3.7])
@pytest.mark.parametrize("kind", ["hard", "soft", "classes_int64"])
@pytest.mark.parametrize("alpha", [-1.0, 0.0, 0.75])
def test_options(alpha: float, kind: str, gamma: float, twin: Any) -> None:
    for dtype in DTYPES[:2]:
        x = (2.5 * torch.randn(11, 23)).to(dtype)
        check(x, targets(kind, x), alpha=alpha, gamma=gamma)


@pytest.mark.parametrize("kind", LABELS + CLASSES)
@pytest.mark.parametrize("ignore", [-1, 0, 1, 5, 255])
def test_ignored_labels(ignore: int, kind: str, twin: Any) -> None:
    x = torch.randn(13, 21)
    check(x, targets(kind, x, ignore), ignore=ignore)


@pytest.mark.parametrize("kind", ["uint8", "int32", "classes_uint8", "classes_int32"])
def test_labels_that_cannot_hold_the_ignored_one(kind: str, twin: Any) -> None:
    """Nothing is left out, not what the number would wrap around to."""
    x = torch.randn(13, 21)
    y = targets(kind, x, 0)
    for a, b in zip(forward(x, y, MEAN, ignore=2**40), forward(x, y, MEAN, ignore=-100), strict=True):
        assert_bitwise(a, b)


def test_normalizer(twin: Any) -> None:
    for dtype in DTYPES:
        x = torch.randn(7, 31).to(dtype)
        for normalizer in (torch.tensor(37.0), torch.tensor(37.0, dtype=torch.float64)):
            check_sum = forward(x, targets("hard", x), SUM, normalizer=normalizer)
            assert check_sum[2] == 37.0
        y = targets("mixed", x)
        loss, grad, _ = forward(x, y, SUM, normalizer=torch.tensor(37.0))
        right = exact(x, y, SUM, normalizer=torch.tensor(37.0))
        assert_within_budget(loss, right[0], scalar=True)
        assert_within_budget(grad, right[1] * (37 if dtype == torch.float16 else 1), exact(x, y, SUM)[1].to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["mixed", "float32", "uint8", "int32", "int64", "classes_int64"])
@pytest.mark.parametrize("offset", [(1, 0), (0, 1), (3, 5)], ids=str)
def test_unaligned(offset: tuple[int, int], kind: str, dtype: torch.dtype, twin: Any) -> None:
    """Tensors that begin anywhere, and end where memory ends."""
    rows, classes = 9, 77
    x = torch.randn(rows * classes + offset[0]).to(dtype)[offset[0] :].view(rows, classes)
    y = targets(kind, x)
    y = torch.cat([torch.zeros(offset[1], dtype=y.dtype), y.flatten()])[offset[1] :].view(y.shape)
    check(x, y)


@pytest.mark.parametrize("numel", [1, 3, 7, 8, 9, 2047, 2048, 2049])
def test_sizes(numel: int, twin: Any) -> None:
    for dtype in DTYPES[:2]:
        x = torch.randn(numel).to(dtype)
        check(x, targets("mixed", x))
        check(x, targets("int64", x))


@pytest.mark.parametrize("classes", [1, 2, 3, 5, 8, 9, 4099])
def test_few_and_many_classes(classes: int, twin: Any) -> None:
    """Rows shorter than a pack, and longer than a block has elements."""
    for dtype in DTYPES[:2]:
        x = torch.randn(max(3, 60 // classes), classes).to(dtype)
        check(x, targets("classes_int64", x))


def test_no_elements(twin: Any) -> None:
    x = torch.empty(0, 5)
    loss, grad, divisor = forward(x, torch.empty(0, dtype=torch.int64), MEAN)
    assert loss.isnan()
    assert divisor == 0
    assert grad.shape == (0, 5)
    assert forward(x, x, SUM)[0] == 0
    assert forward(x, x, NONE)[0].shape == (0, 5)
    assert OPS.sigmoid_focal_loss_bwd(x, x, x, 0.25, 2.0, -100).shape == (0, 5)
    assert not twin.launches()


@pytest.mark.parametrize("kind", ["uint8", "int32", "int64", "classes_uint8", "classes_int32", "classes_int64"])
@pytest.mark.parametrize("bad", [-2, 2, 77, 200])
def test_labels_out_of_range(bad: int, kind: str, twin: Any) -> None:
    """NaN, that element or row alone, in losses and gradients; nothing is read or written out of bounds."""
    x = torch.randn(5, 19)
    y = torch.zeros(
        5, *([] if kind.startswith("classes") else [19]), dtype=getattr(torch, kind.removeprefix("classes_"))
    )
    if (bad < 0 and y.dtype == torch.uint8) or (bad == 2 and kind.startswith("classes")):
        return
    y.view(-1)[-3] = bad
    wrong = (y == bad).view(5, -1).expand(5, 19)
    loss = forward(x, y, NONE)[0]
    assert torch.equal(loss.isnan(), wrong)
    grad = OPS.sigmoid_focal_loss_bwd(torch.ones(5, 19), x, y, 0.25, 2.0, -100)
    assert torch.equal(grad.isnan(), wrong)
    assert forward(x, y, MEAN)[0].isnan()
    clean = y.clone()
    clean.view(-1)[-3] = 0
    assert_bitwise(loss[~wrong], forward(x, clean, NONE)[0][~wrong])


def test_left_out_elements_are_zero_whatever_they_meet(twin: Any) -> None:
    for dtype in DTYPES:
        x = torch.randn(6, 40).to(dtype)
        y = torch.randint(0, 40, (6,))
        y[2], y[4] = -100, -100
        x[2], x[4, 3] = float("nan"), float("inf")
        loss, grad, divisor = forward(x, y, MEAN)
        assert loss.isfinite()
        assert divisor == 160
        assert not grad[[2, 4]].any()
        g = torch.full((6, 40), float("inf"))
        assert not OPS.sigmoid_focal_loss_bwd(g, x, y, 0.25, 2.0, -100)[[2, 4]].any()
        loss, grad, divisor = forward(x, torch.full((6,), -100), MEAN)
        assert loss.isnan()
        assert divisor == 0
        assert not grad.any()


@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_small_losses_keep_their_digits(gamma: float, twin: Any) -> None:
    """Element by element, not in a norm: log(1 + e), exp and 1 / (1 + e) at all sizes of e."""
    x = torch.cat([torch.linspace(-87 / (1 + gamma), 0, 4001), torch.linspace(0, 60, 999)])
    y = torch.zeros_like(x)
    loss = forward(x, y, NONE, alpha=-1.0, gamma=gamma)[0].double()
    right = exact(x, y, NONE, alpha=-1.0, gamma=gamma)[0]
    assert ((loss - right).abs() / right).max() < 6e-7
    half = x.bfloat16()
    loss = forward(half, y, NONE, alpha=-1.0, gamma=gamma)[0].double()
    right = exact(half, y, NONE, alpha=-1.0, gamma=gamma)[0]
    assert ((loss - right).abs() / right).max() < 4e-7 + (1 + gamma) * 87 / 2 * 1.2e-7


# How ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["mixed", "float32", "uint8", "int32", "int64", "classes_int64"])
def test_traffic(kind: str, dtype: torch.dtype, twin: Any) -> None:
    """Everything is read once and written once; labels that are counted first, by few blocks, once more."""
    x = torch.randn(32, 96).to(dtype)
    y = targets(kind, x)
    each = not kind.startswith("classes")
    with twin.traffic(x=x, y=y) as moved:
        loss = forward(x, y, NONE)[0]
    assert (moved["x"].loaded, moved["x"].again, moved["all"].stored) == (x.nbytes, 0, loss.nbytes + 4)
    if each:
        assert (moved["y"].loaded, moved["y"].again) == (y.nbytes, 0)
    else:
        assert moved["y"].loaded == x.nbytes // 16 * y.element_size()  # one label per pack
    with twin.traffic(x=x, y=y) as moved:
        forward(x, y, SUM)
    assert (moved["x"].loaded, moved["x"].again) == (x.nbytes, 0)
    assert x.nbytes <= moved["all"].stored <= x.nbytes + 64
    with twin.traffic(x=x, y=y) as moved:
        OPS.sigmoid_focal_loss_bwd(loss, x, y, 0.25, 2.0, -100)
    assert (moved["x"].loaded, moved["all"].stored) == (x.nbytes, x.nbytes)
    assert moved["all"].loaded == x.nbytes + loss.nbytes + moved["y"].loaded


@pytest.mark.parametrize("machine", ["h200", "a100", "t4"])
def test_launches(machine: str, twin: Any) -> None:
    """One; two where many labels are counted before a gradient can be divided."""
    twin.machine(machine)
    for dtype in DTYPES:
        few, many = torch.randn(20, 80).to(dtype), torch.randn(2100, 4).to(dtype)
        for kind, counted in (("hard", 1), ("uint8", 1), ("bool", 1), ("int64", 2), ("classes_int64", 2)):
            for x in (few, many):
                y = targets(kind, x)
                stored = dtype != torch.float16 and x is many and y.nbytes > 16 << 10
                for reduction, need_grad, launches in (
                    (NONE, False, 1), (SUM, True, 1), (MEAN, False, 1), (MEAN, True, counted if stored else 1),
                ):  # fmt: skip
                    twin.launches()
                    loss, _, divisor = forward(x, y, reduction, need_grad=need_grad)
                    made = twin.launches()
                    assert len(made) == launches, (kind, reduction, need_grad)
                    assert made[-1]["overlap"] == (launches == 2)
                    if reduction == MEAN:
                        right = exact(x, y, MEAN)
                        assert divisor == right[2]
                        assert_within_budget(loss, right[0], scalar=True)


def test_the_count_of_many_labels(twin: Any) -> None:
    """By several blocks, from memory that is not aligned too."""
    twin.module.machine(*TWO_MULTIPROCESSORS)
    for dtype in (torch.uint8, torch.int32, torch.int64):
        for offset in (0, 1):
            y = torch.randint(0, 3, (33_333 + offset,)).to(dtype)[offset:]
            x = torch.randn(33_333, 1)
            _, _, divisor = forward(x.expand(33_333, 1), y.clamp(max=1), MEAN, ignore=1)
            assert divisor == (y == 0).sum()
            assert [launch["grid"] for launch in twin.launches()][-1] == 8


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_same_bits_in_any_order_of_threads(dtype: torch.dtype, twin: Any) -> None:
    twin.module.machine(*TWO_MULTIPROCESSORS)
    x = torch.randn(131, 91).to(dtype)
    y = targets("classes_int64", x)
    expected = forward(x, y, MEAN)
    for seed in range(4):
        twin.module.seed(seed)
        for a, b in zip(forward(x, y, MEAN), expected, strict=True):
            assert_bitwise(a, b)


@pytest.mark.parametrize("kind", ["mixed", "float32", "uint8", "classes_int64"])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_is_tritons(dtype: torch.dtype, kind: str, twin: Any) -> None:
    x = torch.randn(33, 35).to(dtype)
    y = targets(kind, x)
    close = {"rtol": 1e-2 if dtype == torch.bfloat16 else 2e-6, "atol": 1e-9}
    for reduction in (NONE, MEAN, SUM):
        args = (x, y, None, 0.25, 2.0, -100, reduction, True, True)
        ours, theirs = OPS.sigmoid_focal_loss_fwd(*args), triton.sigmoid_focal_loss_fwd(*args)
        torch.testing.assert_close(ours[0], theirs[0], rtol=4e-6, atol=1e-9)
        torch.testing.assert_close(ours[1], theirs[1], **close)
        assert_bitwise(ours[2], theirs[2])
        assert [t.stride() for t in ours] == [t.stride() for t in theirs]


def test_float64_is_tritons(twin: Any) -> None:
    x = torch.randn(3, 5, dtype=torch.float64)
    y = torch.rand(3, 5, dtype=torch.float64)
    args = (x, y, None, 0.25, 2.0, -100, MEAN, True, True)
    for a, b in zip(OPS.sigmoid_focal_loss_fwd(*args), triton.sigmoid_focal_loss_fwd(*args), strict=True):
        assert_bitwise(a, b)
    assert not twin.launches()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_every_barrier_is_needed(dtype: torch.dtype, twin: Any) -> None:
    """Counted before (float32) and along the way (float16), by one block and by several."""
    twin.module.machine(*TWO_MULTIPROCESSORS)
    cases = [
        (x, torch.randint(-1, 9, (len(x),))) for x in (torch.randn(600, 9).to(dtype), torch.randn(50, 9).to(dtype))
    ]
    cases.append((torch.randn(9000, 1).to(dtype), torch.randint(-1, 1, (9000,))))
    expected = [forward(*case, MEAN, ignore=-1) for case in cases]

    def check() -> None:
        for case, right in zip(cases, expected, strict=True):
            for a, b in zip(forward(*case, MEAN, ignore=-1), right, strict=True):
                assert_bitwise(a, b)

    # One of the two barriers of last_block() keeps order in memory between blocks, which fibers have anyway.
    assert twin.unnoticed_barriers(check) in ([], *([b] for b in twin_memory_order_barriers()))


def twin_memory_order_barriers() -> list[str]:
    return []
