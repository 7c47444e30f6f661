"""What the loss kernels share: accurate scalar functions, the divisor of a mean, sums in a fixed order."""

from __future__ import annotations

import contextlib
import struct
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _backend

COUNT_BLOCK, COUNT_STEPS = 4096, 4
NONE, MEAN = 0, 1

# What a kernel writes and reads, as compile-time numbers (Triton kernels take globals only as tl.constexpr).
LOSS_NONE, LOSS_EACH, LOSS_PARTIAL, LOSS_TOTAL = (tl.constexpr(i) for i in range(4))
GRAD_NONE, GRAD_STORED, GRAD_EACH, GRAD_ONE = (tl.constexpr(i) for i in range(4))
DIVISOR_ONE, DIVISOR_GIVEN, DIVISOR_COUNT, DIVISOR_COUNTED, DIVISOR_HERE = (tl.constexpr(i) for i in range(5))


def _loop_bounds_in_the_interpreter() -> None:
    """Triton 3.6 reads a loop bound as int() of a one-element array, which NumPy 2.4 refuses; 3.7 squeezes it."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched


if _backend.interpreting() and triton.__version__.startswith("3.6."):
    _loop_bounds_in_the_interpreter()


# Device functions -----------------------------------------------------------------------------------------------------


@triton.jit
def exp_neg(a, CORRECT: tl.constexpr, ACC: tl.constexpr):
    """exp(-a) for a >= 0. CORRECT puts the rounding error of a log2(e) back: 2 ulp for any a, not about a / 2."""
    if ACC == tl.float64:  # noqa: SIM300
        e = tl.exp(-a)
    else:
        high = a * -1.4426950216293335
        e = tl.exp2(high)
        if CORRECT:
            low = tl.fma(a, -1.4426950216293335, -high) - a * 1.9259629911266175e-8
            e = tl.where(e == 0, 0.0, e + e * (low * 0.6931471805599453))  # a = inf: low is NaN
    return e


@triton.jit
def log1p_unit(e, ACC: tl.constexpr):
    """log(1 + e) for e in [0, 1], relative error below 2e-7: a polynomial, no special function unit."""
    if ACC == tl.float64:  # noqa: SIM300
        total = log1p(e)
    else:
        p = e * -0.0032563784685382346 + 0.019907160906681445
        p = p * e - 0.057064200725614994
        p = p * e + 0.10614264683477254
        p = p * e - 0.15311863100131068
        p = p * e + 0.19678117255651126
        p = p * e - 0.24954558870954296
        p = p * e + 0.333300040352106
        p = p * e - 0.4999990399276364
        total = (p * e + 0.9999999953848531) * e
    return total


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0: the digits that 1 + x rounds away are put back to first order."""
    total = 1.0 + x
    return tl.where(x < 1e30, tl.log(total) + (x - (total - 1.0)) / total, tl.log(x))


@triton.jit
def focus(u, gamma, GAMMA: tl.constexpr):
    """u^gamma for u >= 0. GAMMA: 0 and 2 are those exponents, -1 any positive one."""
    if GAMMA == 0:
        f = tl.full(u.shape, 1.0, u.dtype)
    elif GAMMA == 2:
        f = u * u
    else:
        f = tl.exp2(gamma * tl.log2(u))
    return f


@triton.jit
def scalar(value, ACC: tl.constexpr):
    """A launcher argument made by `number`: a float, or the bits of a double."""
    if ACC == tl.float64:  # noqa: SIM300
        out = tl.cast(tl.cast(value, tl.int64), tl.float64, bitcast=True)
    else:
        out = tl.cast(value, ACC)
    return out


@triton.jit
def load_block(ptr, offs, mask, full, other):
    """A streamed block. The unmasked branch keeps 16-byte loads when the length is not a multiple of them."""
    if full:
        x = tl.load(ptr + offs, eviction_policy="evict_first")
    else:
        x = tl.load(ptr + offs, mask=mask, other=other, eviction_policy="evict_first")
    return x


@triton.jit
def store_block(ptr, offs, value, mask, full):
    if full:
        tl.store(ptr + offs, value)
    else:
        tl.store(ptr + offs, value, mask=mask)


@triton.jit
def published_divisor(
    normalizer_ptr, divisor_ptr, count, here, DIVISOR: tl.constexpr, WRITE: tl.constexpr, ACC: tl.constexpr
):
    """The number that a reduced loss is divided by; the first program publishes it."""
    if DIVISOR == DIVISOR_ONE:
        divisor = tl.full([], 1.0, ACC)
    elif DIVISOR == DIVISOR_COUNT:
        divisor = tl.cast(count, ACC)
    elif DIVISOR == DIVISOR_HERE:
        divisor = here.to(ACC)
    else:
        divisor = tl.load(normalizer_ptr).to(ACC)
    if WRITE and DIVISOR != DIVISOR_COUNTED:  # noqa: SIM102
        if tl.program_id(0) == 0:
            tl.store(divisor_ptr, divisor)
    return divisor


# Kernels --------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["numel", "ignore_index", "num_classes", "per_label"])
def count_kernel(
    t_ptr,  # [numel] labels
    w_ptr,  # [num_classes] weights
    out_ptr,  # [programs] partial sums, or the divisor itself when FINAL
    numel,
    ignore_index,
    num_classes,
    per_label,
    HAS_WEIGHT: tl.constexpr,
    FINAL: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
    ACC: tl.constexpr,
):
    # The divisor of a mean: labels that are not left out.
    #
    # Math      sum_i [t_i != ignore_index] * per_label,  with weights sum_i [t_i != ignore_index] w[t_i].
    # Traffic   read t once.
    # Grid      one program per BLOCK * STEPS labels; with one program (FINAL) no finalise_kernel follows.
    # Requires  contiguous integer labels.
    # Result    exact for counts (int64 partials); bitwise reproducible for weights.
    pid_n = tl.program_id(0).to(tl.int64)
    offs_n = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], ACC if HAS_WEIGHT else tl.int64)
    for step in tl.static_range(STEPS):
        n = (pid_n * STEPS + step) * BLOCK + offs_n
        mask_n = n < numel
        t = tl.load(t_ptr + n, mask=mask_n, other=0)
        t = t.to(tl.int32) if t.dtype == tl.uint8 else t
        keep = mask_n & (t != ignore_index)
        if HAS_WEIGHT:
            inside = keep & (t >= 0) & (t < num_classes)
            total += tl.load(w_ptr + t, mask=inside, other=0.0).to(ACC)
        else:
            total += keep.to(tl.int64)
    value = tl.sum(total, 0)
    if FINAL:
        tl.store(out_ptr, (value * per_label).to(ACC))
    else:
        tl.store(out_ptr + pid_n, value)


@triton.jit(do_not_specialize=["num_partials", "per_label"])
def finalise_kernel(
    partial_ptr,  # [num_partials]
    divisor_ptr,  # []
    out_ptr,  # []
    num_partials,
    per_label,
    DIVIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    # The second half of a reduction to a scalar.
    #
    # Math      out = sum(partial) * per_label, then / divisor.
    # Traffic   read the partial sums, write one number.
    # Grid      one program.
    # Requires  nothing.
    # Result    bitwise reproducible: partial sums are added in the order of their index, no atomics.
    offs_n = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], partial_ptr.dtype.element_ty)
    for start in range(0, num_partials, BLOCK):
        total += tl.load(partial_ptr + start + offs_n, mask=start + offs_n < num_partials, other=0)
    value = (tl.sum(total, 0) * per_label).to(ACC)
    if DIVIDE:
        value = value / tl.load(divisor_ptr).to(ACC)
    tl.store(out_ptr, value)


# Host -----------------------------------------------------------------------------------------------------------------


def number(value: float, dtype: torch.dtype) -> float | int:
    """A float argument of a kernel. Triton passes floats as float32; for float64 tensors the bits go as an integer."""
    return struct.unpack("q", struct.pack("d", value))[0] if dtype == torch.float64 else float(value)


def accumulator(dtype: torch.dtype) -> tuple[Any, torch.dtype]:
    """The dtype of sums and losses, for Triton and for torch."""
    return (tl.float64, torch.float64) if dtype == torch.float64 else (tl.float32, torch.float32)


def on_device(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """Triton launches on the current device: make it the one of x."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)


def gamma_kind(gamma: float) -> int:
    return {0.0: 0, 2.0: 2}.get(gamma, -1)


def finalise(partial: Tensor, divisor: Tensor | None, out: Tensor, per_label: int, acc: Any) -> None:
    """out = sum(partial) * per_label [/ divisor], in a fixed order."""
    block = min(4096, max(32, triton.next_power_of_2(partial.numel())))
    given = out if divisor is None else divisor
    finalise_kernel[(1,)](
        partial, given, out, partial.numel(), per_label, DIVIDE=divisor is not None, BLOCK=block, ACC=acc, num_warps=8
    )


def count_labels(
    labels: Tensor, weight: Tensor | None, out: Tensor, ignore_index: int, num_classes: int, per_label: int, acc: Any
) -> None:
    """out = number of labels that are not left out, times per_label; or the sum of their weights."""
    numel = labels.numel()
    block = min(COUNT_BLOCK, max(128, triton.next_power_of_2(numel)))
    steps = min(COUNT_STEPS, triton.cdiv(numel, block))
    programs = triton.cdiv(numel, block * steps)
    partial = out
    if programs > 1:
        partial = out.new_empty((programs,), dtype=torch.int64 if weight is None else out.dtype)
    count_kernel[(programs,)](
        labels, labels if weight is None else weight, partial, numel, ignore_index, num_classes, per_label,
        HAS_WEIGHT=weight is not None, FINAL=programs == 1, BLOCK=block, STEPS=steps, ACC=acc, num_warps=8,
    )  # fmt: skip
    if programs > 1:
        finalise(partial, None, out, per_label, acc)


def outputs(x: Tensor, rows: Any, reduction: int, need_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, gradient and divisor, unwritten."""
    acc = accumulator(x.dtype)[1]
    loss = x.new_empty(rows if reduction == NONE else (), dtype=acc)
    grad = x.new_empty(x.shape if need_grad and reduction != NONE else (0,))
    return loss, grad, x.new_empty((), dtype=acc)


def loss_mode(loss: Tensor, reduction: int, programs: int) -> tuple[Any, Tensor]:
    """How the loss leaves the kernel, and where to."""
    if reduction == NONE:
        return LOSS_EACH, loss
    if programs == 1:
        return LOSS_TOTAL, loss
    return LOSS_PARTIAL, loss.new_empty((programs,))


def nothing(
    loss: Tensor, grad: Tensor, divisor: Tensor, normalizer: Tensor | None, reduction: int
) -> tuple[Tensor, Tensor, Tensor]:
    """No rows: empty losses, a sum of 0, a mean of 0 / 0."""
    if normalizer is not None:
        divisor.copy_(normalizer)
    else:
        divisor.fill_(0.0 if reduction == MEAN else 1.0)
    if reduction != NONE:
        loss.zero_().div_(divisor)
    return loss, grad, divisor
