"""What tests of kernels need: error budgets, grids of shapes and layouts, traps for unwritten and foreign memory.

Public, for people who write kernels of their own:

* `assert_within_budget`: no tolerance tables, but an error measured against float64 and against eager PyTorch;
* `SHAPES`, `ROW_SHAPES`, `layouts`: ragged sizes, and one tensor in every memory layout a caller may bring;
* `poisoned_empty`: what a kernel forgets to write is NaN; `Canary`, `guard_page`: what it must not touch tells;
* `unmodified`, `assert_bitwise`, `num_threads`;
* `interpreter_traffic`, `eager_traffic`: bytes read and written, counted (imported on first use: they may need triton).
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import math
import mmap
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "ROW_SHAPES",
    "SHAPES",
    "Canary",
    "assert_bitwise",
    "assert_within_budget",
    "error_budget",
    "guard_page",
    "layouts",
    "no_gc",
    "num_threads",
    "poisoned_empty",
    "relative_error",
    "unmodified",
]

# One element to just past a vector, a cache line, a block; nothing that is a power of two only.
SHAPES = ((), (1,), (7,), (16,), (33,), (3, 5), (2, 3, 4), (2, 3, 5, 7), (1, 2, 3, 4, 5), (1023,), (4, 1025), (70_001,))

# (rows, classes): one class, one row, a vector minus and plus one, long rows, many rows.
ROW_SHAPES = (
    (1, 1),
    (5, 1),
    (1, 2),
    (3, 5),
    (7, 15),
    (4, 16),
    (9, 17),
    (2, 31),
    (33, 33),
    (3, 257),
    (2, 4099),
    (1030, 3),
)

# However wrong eager PyTorch is, a result this far from float64 is a defect. By the dtype of the output.
_CEILING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

_TRAFFIC = ("eager_traffic", "interpreter_traffic")


def __getattr__(name: str) -> Any:
    if name in _TRAFFIC:
        return getattr(importlib.import_module("dlkernels._traffic"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# Error budgets --------------------------------------------------------------------------------------------------------


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """|actual - exact| / |exact| in the Euclidean norm, over the elements that are finite in both.

    Args:
        actual: any floating dtype and shape.
        exact: float64, the shape of actual.

    Returns:
        0 for tensors that agree, infinity where exact is zero and actual is not. Elements of actual closer to exact
        than the smallest normal number of its dtype (float16: the smallest subnormal) count as equal.
    """
    a, e = actual.detach().double(), exact.detach().double()
    finite = torch.isfinite(a) & torch.isfinite(e)
    if not finite.all():
        a, e = a[finite], e[finite]
    info = torch.finfo(actual.dtype)
    quantum = info.smallest_normal * info.eps if actual.dtype == torch.float16 else info.smallest_normal
    difference = (a - e).abs()
    error = torch.where(difference <= quantum, 0.0, difference).norm().item()
    size = e.norm().item()
    return error / size if size > 0 else (0.0 if error == 0 else math.inf)


def error_budget(exact: Tensor, eager: Tensor | None, dtype: torch.dtype, *, scalar: bool = False) -> float:
    """The relative error that a result may have.

    Twice the error of eager PyTorch plus 4 eps of the output dtype, and 8 eps for scalars. However wrong eager is,
    never more than 1e-5 for float32 outputs (float64 1e-12, float16 2e-3, bfloat16 1.6e-2).

    Args:
        exact: the float64 result.
        eager: the result of eager PyTorch in the dtype under test; None counts as exact. Its NaN and infinite elements
            do not count.
        dtype: of the output under test.
        scalar: the output is one number, such as a mean.

    Returns:
        The allowed relative norm error.
    """
    eps = torch.finfo(dtype).eps
    if scalar:
        return 8 * eps
    theirs = relative_error(eager, exact) if eager is not None else 0.0
    return min(2 * theirs + 4 * eps, max(_CEILING[dtype], 4 * eps))


def assert_within_budget(
    actual: Tensor, exact: Tensor, eager: Tensor | None = None, scalar: bool = False, what: str = "result"
) -> None:
    """Compare a result with float64, at the error that eager PyTorch is allowed to set.

    Args:
        actual: the tensor under test.
        exact: the same computation in float64, from the same (already rounded) inputs.
        eager: the same computation by eager PyTorch in the dtype under test, or None.
        scalar: as in `error_budget`.
        what: its name in the message.

    Raises:
        AssertionError: another shape; NaN or an infinity where float64 (rounded to the dtype of actual) has none, or
            the other way round; a relative norm error above `error_budget`.
    """
    assert actual.shape == exact.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    assert exact.dtype == torch.float64, f"{what}: the exact result must be float64, got {exact.dtype}"
    rounded = exact.detach().to(actual.dtype)
    for name, has in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        ours, right = has(actual.detach()), has(rounded)
        assert torch.equal(ours, right), (
            f"{what}: {name} in {int(ours.sum())} elements, expected in {int(right.sum())}, "
            f"{int((ours != right).sum())} elements differ"
        )
    error, allowed = relative_error(actual, exact), error_budget(exact, eager, actual.dtype, scalar=scalar)
    assert error <= allowed, (
        f"{what}: relative error {error:.3g} of {tuple(actual.shape)} {actual.dtype} > {allowed:.3g}"
    )


def assert_bitwise(actual: Tensor, expected: Tensor, what: str = "result") -> None:
    """Same shape, dtype and bits; NaN equals NaN of the same bits, 0 differs from -0.

    Args:
        actual, expected: tensors of one dtype.
        what: their name in the message.

    Raises:
        AssertionError: with the number of elements that differ.
    """
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype}, expected {expected.dtype}"
    differ = _bits(actual) != _bits(expected)
    assert not differ.any(), f"{what}: {int(differ.sum())} of {actual.numel()} elements differ in their bits"


def _bits(x: Tensor) -> Tensor:
    sizes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.detach().contiguous().view(sizes[x.element_size()])


# Layouts --------------------------------------------------------------------------------------------------------------


def layouts(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The same values in every memory layout that a caller may bring, by name.

    Args:
        x: any tensor; it is copied, not changed.

    Returns:
        An iterator over (name, tensor): contiguous; offset (not aligned to a vector); strided (every other element);
        transposed (first two dimensions swapped in memory); reversed (all dimensions); channels_last where it exists.
    """
    x = x.detach()
    yield "contiguous", x.clone(memory_format=torch.contiguous_format)
    yield "offset", x.new_zeros(x.numel() + 1)[1:].view(x.shape).copy_(x)
    if x.dim() >= 1:
        yield "strided", x.new_zeros(*x.shape, 2)[..., 0].copy_(x)
    if x.dim() >= 2:
        yield "transposed", x.transpose(0, 1).contiguous().transpose(0, 1)
    if x.dim() >= 3:
        order = tuple(reversed(range(x.dim())))
        yield "reversed", x.permute(order).contiguous().permute(order)
    if x.dim() == 4:
        yield "channels_last", x.contiguous(memory_format=torch.channels_last)
    if x.dim() == 5:
        yield "channels_last_3d", x.contiguous(memory_format=torch.channels_last_3d)


# Memory traps ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def poisoned_empty() -> Iterator[None]:
    """Fill what `empty`, `empty_like`, `new_empty`, `empty_strided` and `resize_` return: NaN, or the largest integer.

    Holds for Python and for C++ (`at::empty`), CPU and CUDA, in the whole process. What a kernel forgets to write
    shows.

    Note:
        It is torch's own `fill_uninitialized_memory`, which needs deterministic mode; ops without a deterministic
        implementation warn.
    """
    from torch.utils import deterministic

    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        deterministic.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


class Canary:
    """A copy of a tensor with sentinels before and after it in memory: NaN, or an integer that is no label.

    A read outside spoils the result; a write outside is found by `check`.

    Args:
        x: the tensor to copy, contiguous in the copy.
        margin: sentinels on each side.
    """

    def __init__(self, x: Tensor, margin: int = 67) -> None:
        sentinel: Any = float("nan") if x.is_floating_point() else (True if x.dtype == torch.bool else 99)
        self.buffer = torch.full((x.numel() + 2 * margin,), sentinel, dtype=x.dtype, device=x.device)
        self.tensor = self.buffer[margin : margin + x.numel()].view(x.shape)
        self.tensor.copy_(x.detach())
        self._edges = torch.cat([self.buffer[:margin], self.buffer[x.numel() + margin :]])
        self._margin = margin

    def check(self, what: str = "tensor") -> None:
        """Raise AssertionError where a sentinel has changed."""
        edges = torch.cat([self.buffer[: self._margin], self.buffer[-self._margin :]])
        assert_bitwise(edges, self._edges, f"memory around {what}")


def guard_page(x: Tensor, side: str = "after") -> Tensor:
    """A copy of a CPU tensor that ends (or begins) at a page no one may touch: one byte further is a fault.

    Args:
        x: a CPU tensor, contiguous in the copy.
        side: "after" (the last element ends at the guard) or "before" (the first one begins at it).

    Returns:
        The copy. Its pages live until the process ends: use it in a subprocess.

    Raises:
        RuntimeError: where the system has no mprotect.
    """
    page = mmap.PAGESIZE
    size = x.numel() * x.element_size()
    pages = max(1, -(-size // page))
    buffer = mmap.mmap(-1, (pages + 2) * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    protect = getattr(ctypes.CDLL(None, use_errno=True), "mprotect", None)
    guards = (address, address + (pages + 1) * page)
    if protect is None or any(protect(ctypes.c_void_p(a), ctypes.c_size_t(page), 0) for a in guards):
        raise RuntimeError("guard pages need mprotect, which failed here")
    if size == 0:
        return x.detach().clone()
    start = page + (pages * page - size if side == "after" else 0)
    return torch.frombuffer(buffer, dtype=x.dtype, count=x.numel(), offset=start).view(x.shape).copy_(x.detach())


@contextlib.contextmanager
def unmodified(*tensors: Any) -> Iterator[None]:
    """Hold tensors (others are passed over) to their bits over a `with` block.

    Raises:
        AssertionError: at the end of the block, naming the position of the tensor that changed.
    """
    before = [(i, t, t.detach().clone()) for i, t in enumerate(tensors) if isinstance(t, Tensor)]
    yield
    for index, tensor, copy in before:
        assert_bitwise(tensor, copy, f"input {index}, which must stay as it was,")


@contextlib.contextmanager
def num_threads(count: int) -> Iterator[None]:
    """`torch.set_num_threads(count)` for a `with` block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def no_gc() -> Iterator[None]:
    """Collect once, then keep the collector out of what is timed in a `with` block."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
