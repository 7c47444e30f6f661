"""The GCCS loss on GPUs: rows sorted by class, then one program per class and slab of columns.

Nothing waits for the device: which classes are present, the boundaries of the sorted labels say there. Labels are few
beside features: torch sorts them and finds the boundaries.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import (
    GRAD_EACH,
    GRAD_NONE,
    GRAD_STORED,
    MEAN,
    NONE,
    accumulator,
    finalise,
    number,
    on_device,
    outputs,
    scalar,
)

BLOCK_COLUMNS = 64  # columns of a slab
TILE = 2048  # elements of a tile
BLOCK_KEYS = 1024


@triton.jit
def _log1p_difference(f, r, ACC: tl.constexpr):
    """f - log r for r = 1 + f > 0: f^2 / 2 near 0, by the series of log r = 2 artanh(f / (2 + f))."""
    near = 0.1 if ACC == tl.float64 else 0.4  # noqa: SIM300
    s = f / (f + 2.0)
    q = s * s
    tail = q * 0.07692307692307693 + 0.09090909090909091
    tail = tail * q + 0.1111111111111111
    tail = tail * q + 0.14285714285714285
    tail = tail * q + 0.2
    tail = tail * q + 0.3333333333333333
    series = f * s - 2.0 * q * s * tail
    return tl.where(tl.abs(f) < near, series, f - tl.log(r))


@triton.jit(do_not_specialize=["n", "classes", "ignore_index"])
def _keys_kernel(
    y_ptr,  # [N] labels
    keys_ptr,  # [N] int32
    n,
    classes,
    ignore_index,
    BLOCK: tl.constexpr,
):
    # What rows are sorted by.
    #
    # Math      the label; -1 for a row that is left out, D for a label that is too large.
    # Traffic   read y, write the keys.
    # Grid      one program per BLOCK rows.
    # Requires  contiguous labels, int32 or int64; D < 2^31.
    # Result    exact.
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask_n = offs_n < n
    y = tl.load(y_ptr + offs_n, mask=mask_n, other=-1)
    key = tl.where((y < 0) | (y == ignore_index), -1, tl.minimum(y, classes))
    tl.store(keys_ptr + offs_n, key.to(tl.int32), mask=mask_n)


@triton.jit(do_not_specialize=["classes"])
def _present_kernel(
    bounds_ptr,  # [D + 1]
    divisor_ptr,  # []
    classes,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    # The divisor of a mean: the classes that have a row, at least 1.
    #
    # Math      max(1, sum_k [bounds_k < bounds_k+1]).
    # Traffic   read the boundaries, write one number.
    # Grid      one program.
    # Requires  nothing.
    # Result    exact.
    total = tl.zeros([BLOCK], tl.int32)
    for start in range(0, classes, BLOCK):
        k = start + tl.arange(0, BLOCK)
        begin = tl.load(bounds_ptr + k, mask=k < classes, other=0)
        end = tl.load(bounds_ptr + k + 1, mask=k < classes, other=0)
        total += (begin < end).to(tl.int32)
    tl.store(divisor_ptr, tl.maximum(tl.sum(total, 0), 1).to(ACC))


@triton.jit(do_not_specialize=["n", "d_vectors"])
def _clear_kernel(
    keys_ptr,  # [N]
    grad_ptr,  # [N, D]
    n,
    d_vectors,
    D_VECTOR: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # The gradient of rows that do not count.
    #
    # Math      0.
    # Traffic   read the keys, write those rows.
    # Grid      (tiles of rows, slabs).
    # Requires  contiguous grad; D = d_vectors * D_VECTOR.
    # Result    exact.
    classes = d_vectors * D_VECTOR
    n_rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    key = tl.load(keys_ptr + n_rows, mask=n_rows < n, other=0)
    mask = ((key < 0) | (key >= classes))[:, None] & (offs_d < classes)[None, :]
    offs = n_rows.to(tl.int64)[:, None] * classes + offs_d[None, :]
    tl.store(grad_ptr + offs, tl.zeros([BLOCK_N, BLOCK_D], grad_ptr.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=[
        "n", "d_vectors", "slabs", "stride_g", "target_mean", "variance", "precision", "eps", "kurtosis_weight"
    ]
)  # fmt: skip
def _gccs_loss_kernel(
    z_ptr,  # [N, D]
    order_ptr,  # [N] rows, sorted by key
    bounds_ptr,  # [D + 1] where the rows of a class begin
    g_ptr,  # [D], stride stride_g (GRAD_EACH)
    divisor_ptr,  # [] (FOLD)
    loss_ptr,  # [D, slabs] (LOSS)
    dz_ptr,  # [N, D]
    n,
    d_vectors,
    slabs,
    stride_g,
    target_mean,
    variance,
    precision,
    eps,
    kurtosis_weight,
    D_VECTOR: tl.constexpr,
    KURTOSIS: tl.constexpr,
    LOSS: tl.constexpr,
    GRAD: tl.constexpr,
    FOLD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    # Gaussian class-conditional simplex loss, forward and backward, of one class and one slab of columns.
    #
    # Math      mu, v, M3, M4 = moments of the class's rows;  t = mu - m;  u = v + eps;  K = M4 / u^2;
    #           L = 1/2 sum_d [log(s^2 / u) - 1 + v / s^2 + t^2 / s^2] + (w / D) sum_d |K - 3|;
    #           n dL/dz = t / s^2 + d (1 / s^2 - 1 / u) + (w / D) sign(K - 3) 4 [(d^3 - M3) / u^2 - M4 d / u^3].
    #           Rows are taken relative to the first of their class, so that a small spread keeps its digits.
    # Traffic   per element: read z three times (mean, moments, gradient), the last two from L2; write dz.
    # Grid      D * slabs programs, the slabs of a class side by side.
    # Requires  rows sorted by class; contiguous z, dz; D = d_vectors * D_VECTOR.
    # Result    bitwise reproducible: fixed reduction trees, no atomics. A label that is too large makes every loss NaN.
    pid = tl.program_id(0)
    label = pid // slabs
    classes = d_vectors * D_VECTOR
    offs_d = (pid % slabs) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < classes
    offs_n = tl.arange(0, BLOCK_N)
    begin = tl.load(bounds_ptr + label)
    end = tl.load(bounds_ptr + label + 1)
    total_loss = tl.zeros([], ACC)

    if begin < end:
        count = (end - begin).to(ACC)
        several = end - begin > 1
        first = tl.load(order_ptr + begin) * classes
        origin = tl.load(z_ptr + first + offs_d, mask=mask_d, other=0.0).to(ACC)
        sums = tl.zeros([BLOCK_N, BLOCK_D], ACC)
        for start in range(begin, end, BLOCK_N):
            row = tl.load(order_ptr + start + offs_n, mask=start + offs_n < end, other=0)
            mask = (start + offs_n < end)[:, None] & mask_d[None, :]
            z = tl.load(z_ptr + row[:, None] * classes + offs_d[None, :], mask=mask, other=0.0).to(ACC)
            sums += tl.where(mask, z - origin[None, :], 0.0)
        mean = tl.sum(sums, 0) / count

        s2 = tl.zeros([BLOCK_N, BLOCK_D], ACC)
        s3 = s2
        s4 = s2
        if several:
            for start in range(begin, end, BLOCK_N):
                row = tl.load(order_ptr + start + offs_n, mask=start + offs_n < end, other=0)
                mask = (start + offs_n < end)[:, None] & mask_d[None, :]
                z = tl.load(z_ptr + row[:, None] * classes + offs_d[None, :], mask=mask, other=0.0).to(ACC)
                d = tl.where(mask, (z - origin[None, :]) - mean[None, :], 0.0)
                s2 += d * d
                if KURTOSIS:
                    s3 += d * d * d
                    s4 += (d * d) * (d * d)

        target = scalar(precision, ACC)
        ridge = scalar(eps, ACC)
        own = offs_d == label
        t = tl.where(own, origin - scalar(target_mean, ACC), origin) + mean
        loss = t * t * target
        offset = t * target
        slope = tl.zeros([BLOCK_D], ACC)
        cubic = slope
        if several:
            v = tl.sum(s2, 0) / count
            u = tl.where(mask_d, v + ridge, 1.0)
            f = ((v - scalar(variance, ACC)) + ridge) * target
            loss += _log1p_difference(f, u * target, ACC) - ridge * target
            slope = f / u
            if KURTOSIS:
                m3 = tl.sum(s3, 0) / count
                m4 = tl.sum(s4, 0) / count
                weight = scalar(kurtosis_weight, ACC) / tl.cast(classes, ACC)
                k = m4 / u / u
                loss += 2.0 * weight * tl.abs(k - 3.0)
                sign = tl.where(k > 3.0, 1.0, tl.where(k < 3.0, -1.0, 0.0))
                cubic = 4.0 * weight * sign / u / u
                offset -= cubic * m3
                slope -= cubic * (m4 / u)
        total_loss = 0.5 * tl.sum(tl.where(mask_d, loss, 0.0), 0)

        if GRAD != GRAD_NONE:
            scale = 1.0 / count
            if GRAD == GRAD_EACH:
                scale *= tl.load(g_ptr + label * stride_g).to(ACC)
            if FOLD:
                scale /= tl.load(divisor_ptr).to(ACC)
            offset *= scale
            slope *= scale
            cubic *= scale
            for start in range(begin, end, BLOCK_N):
                row = tl.load(order_ptr + start + offs_n, mask=start + offs_n < end, other=0)
                mask = (start + offs_n < end)[:, None] & mask_d[None, :]
                offs = row[:, None] * classes + offs_d[None, :]
                z = tl.load(z_ptr + offs, mask=mask, other=0.0).to(ACC)
                d = (z - origin[None, :]) - mean[None, :]
                dz = offset[None, :] + d * slope[None, :]
                if KURTOSIS:
                    dz += (d * d) * (d * cubic[None, :])
                tl.store(dz_ptr + offs, dz.to(dz_ptr.dtype.element_ty), mask=mask)

    if LOSS:
        bad = tl.load(bounds_ptr + classes) < n
        tl.store(loss_ptr + pid, tl.where(bad, float("nan"), total_loss))


# Host -----------------------------------------------------------------------------------------------------------------


class Tiles(NamedTuple):
    block_n: int
    block_d: int
    slabs: int


def tiles(classes: int) -> Tiles:
    block_d = min(BLOCK_COLUMNS, triton.next_power_of_2(classes))
    return Tiles(max(1, min(128, TILE // block_d)), block_d, triton.cdiv(classes, block_d))


class Groups(NamedTuple):
    """Rows by class: their keys, their order, and where each class begins."""

    keys: Tensor
    order: Tensor
    bounds: Tensor


def group(labels: Tensor, classes: int, ignore_index: int) -> Groups:
    n = labels.numel()
    keys = torch.empty((n,), dtype=torch.int32, device=labels.device)
    _keys_kernel[(triton.cdiv(n, BLOCK_KEYS),)](
        labels.contiguous(), keys, n, classes, ignore_index, BLOCK=BLOCK_KEYS, num_warps=4
    )
    in_order, order = torch.sort(keys, stable=True)
    every = torch.arange(classes + 1, dtype=torch.int32, device=labels.device)
    # A label that is too large comes after the last class: bounds[D] < N.
    return Groups(keys, order, torch.searchsorted(in_order, every, out_int32=True))


def _launch(
    z: Tensor, groups: Groups, g: Tensor | None, divisor: Tensor | None, loss: Tensor | None, dz: Tensor | None,
    options: tuple[float, float, float, float],
) -> None:  # fmt: skip
    n, classes = z.shape
    target_mean, target_std, eps, kurtosis_weight = options
    variance = target_std * target_std
    vector, t = math.gcd(classes, 8), tiles(classes)
    grad: Any = GRAD_NONE if dz is None else GRAD_STORED if g is None else GRAD_EACH
    _gccs_loss_kernel[(classes * t.slabs,)](
        z, groups.order, groups.bounds, z if g is None else g, z if divisor is None else divisor,
        z if loss is None else loss, z if dz is None else dz, n, classes // vector, t.slabs,
        0 if g is None else g.stride(0), *(number(x, z.dtype) for x in (target_mean, variance, 1 / variance, eps)),
        number(kurtosis_weight, z.dtype), D_VECTOR=vector, KURTOSIS=kurtosis_weight > 0, LOSS=loss is not None,
        GRAD=grad.value, FOLD=divisor is not None, BLOCK_N=t.block_n, BLOCK_D=t.block_d, ACC=accumulator(z.dtype)[0],
        num_warps=4,
    )  # fmt: skip
    if dz is not None:
        _clear_kernel[(triton.cdiv(n, t.block_n), t.slabs)](
            groups.keys, dz, n, classes // vector, D_VECTOR=vector, BLOCK_N=t.block_n, BLOCK_D=t.block_d, num_warps=4
        )


def gccs_loss_fwd(
    features: Tensor, labels: Tensor, target_mean: float, target_std: float, eps: float, kurtosis_weight: float,
    ignore_index: int, reduction: int, need_grad: bool, higher_order: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss (D,) or (), gradient, divisor."""
    z = features.contiguous()
    classes, (acc, dtype) = z.shape[1], accumulator(z.dtype)
    loss, grad, divisor = outputs(z, (classes,), reduction, need_grad)
    if z.shape[0] == 0:
        return loss.zero_(), grad, divisor.fill_(1)
    slabs = tiles(classes).slabs
    with on_device(z):
        groups = group(labels, classes, ignore_index)
        if reduction == MEAN:
            block = min(1024, triton.next_power_of_2(classes))
            _present_kernel[(1,)](groups.bounds, divisor, classes, BLOCK=block, ACC=acc, num_warps=4)
        else:
            divisor.fill_(1)
        partial = loss if slabs == 1 and reduction == NONE else z.new_empty((classes, slabs), dtype=dtype)
        # float16 is stored undivided.
        fold = reduction == MEAN and z.dtype != torch.float16
        stored = grad if need_grad and reduction != NONE else None
        options = (target_mean, target_std, eps, kurtosis_weight)
        _launch(z, groups, None, divisor if fold else None, partial, stored, options)
        if reduction != NONE:
            finalise(partial, divisor if reduction == MEAN else None, loss, 1, acc)
        elif slabs > 1:
            torch.sum(partial, 1, out=loss)
    return loss, grad, divisor


def gccs_loss_bwd(
    grad_output: Tensor, features: Tensor, labels: Tensor, target_mean: float, target_std: float, eps: float,
    kurtosis_weight: float, ignore_index: int,
) -> Tensor:  # fmt: skip
    """The gradient (N, D) of the classes' losses, grad_output (D,)."""
    z = features.contiguous()
    dz = z.new_empty(z.shape)
    if z.shape[0] == 0:
        return dz
    with on_device(z):
        groups = group(labels, z.shape[1], ignore_index)
        _launch(z, groups, grad_output, None, None, dz, (target_mean, target_std, eps, kurtosis_weight))
    return dz
