"""The row engine: softmax focal loss and cross entropy over rows of logits (N, C) or (N, C, S)."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import (
    DIVISOR_HERE,
    GRAD_EACH,
    GRAD_NONE,
    GRAD_STORED,
    LOSS_EACH,
    LOSS_NONE,
    LOSS_TOTAL,
    accumulator,
    focus,
    gamma_kind,
    log1p,
    number,
    published_divisor,
    scalar,
)  # fmt: skip

# Elements of a tile that stay in registers without spilling, with up to 16 warps (tests/test_triton_aot.py).
MAX_RESIDENT = 16384
MAX_RESIDENT_DENSE = 8192  # two inputs per class: logits and probabilities
ROW_INDEX, ROW_SMOOTHED, ROW_PROBABILITIES = (tl.constexpr(i) for i in range(3))


@triton.jit
def _index_terms(x_y, m, s_other, gamma, GAMMA: tl.constexpr):
    """Of a row with label y: u^gamma ce, omega / S, omega u. S_other sums exp(x - m) without y: u does not cancel."""
    d = x_y - m
    e_y = tl.exp(d)
    s = s_other + e_y
    ce = tl.where(s_other < e_y, log1p(s_other / e_y), tl.log(s) - d)
    u = s_other / s
    f = focus(u, gamma, GAMMA)
    omega = f
    if GAMMA != 0:
        p = e_y / s
        pr = tl.where(u > 0, tl.where(p > 0, p * ce, 0.0) / u, p)  # p (-log p) / u, 1 in the limit u = 0
        omega = f * (1.0 + gamma * pr)
    return f * ce, omega / s, omega * u


@triton.jit
def _dense_terms(x, w, m, t, gamma, GAMMA: tl.constexpr):
    """Per class: weighted loss, h, p, 1 - p. t sums exp(x - m) without one of the maxima: 1 - p does not cancel."""
    d = x - m
    e = tl.exp(d)
    inverse = 1.0 / (1.0 + t)
    p = e * inverse
    u = tl.where(e == 1, t * inverse, 1.0 - p)
    ce = log1p(t) - d
    f = focus(u, gamma, GAMMA)
    omega = f
    if GAMMA != 0:
        pc = tl.where(p > 0, p * ce, 0.0)
        if GAMMA == 2:
            omega = u * (u + 2.0 * pc)
        else:
            omega = f * (1.0 + gamma * tl.where(u > 0, pc / u, p))
    nothing = w == 0
    return tl.where(nothing, 0.0, w * (f * ce)), tl.where(nothing, 0.0, w * omega), p, u


@triton.jit
def _class_weights(
    t_ptr, w_ptr, offs, offs_c, mask, y, c, eps, ROW: tl.constexpr, HAS_WEIGHT: tl.constexpr, ACC: tl.constexpr
):
    """q_c alpha_c of a tile, q = (1 - eps) target + eps / C; 0 outside of the mask."""
    if ROW == ROW_PROBABILITIES:
        q = tl.load(t_ptr + offs, mask=mask, other=0.0, eviction_policy="evict_first").to(ACC)
    else:
        q = (offs_c == y).to(ACC)
    q = tl.where(mask, (1.0 - eps) * q + eps / c, 0.0)
    if HAS_WEIGHT:
        q *= tl.load(w_ptr + offs_c, mask=offs_c < c, other=0.0).to(ACC)
    return q


@triton.jit(
    do_not_specialize=[
        "gamma", "label_smoothing", "ignore_index", "count", "n", "c_vectors", "s_vectors", "blocks_s",
        "stride_gn", "stride_gs",
    ]
)  # fmt: skip
def softmax_focal_kernel(
    x_ptr,  # [N, C, S] logits
    t_ptr,  # [N, S] labels or [N, C, S] probabilities
    w_ptr,  # [C]
    g_ptr,  # [N, S] gradient of the row losses, strides stride_gn, stride_gs (GRAD_EACH)
    loss_ptr,  # [N, S], [programs] or []
    dx_ptr,  # [N, C, S]
    normalizer_ptr,  # []
    divisor_ptr,  # []
    gamma,
    label_smoothing,
    ignore_index,
    count,
    n,
    c_vectors,
    s_vectors,
    blocks_s,
    stride_gn,
    stride_gs,
    C_VECTOR: tl.constexpr,
    S_VECTOR: tl.constexpr,
    ROW: tl.constexpr,
    GAMMA: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    MEAN_OF_WEIGHTS: tl.constexpr,
    LOSS: tl.constexpr,
    GRAD: tl.constexpr,
    DIVISOR: tl.constexpr,
    FOLD: tl.constexpr,
    STRIDED: tl.constexpr,
    LOOPED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ACC: tl.constexpr,
):
    # Softmax focal loss and cross entropy, forward and backward.
    #
    # Math      p = softmax(x), u = 1 - p, omega = u^g (1 + g p (-log p) / u):
    #           index targets   loss = -alpha_y u_y^g log p_y,           dx_k = alpha_y omega_y (p_k - [k = y]);
    #           probabilities   loss = -sum_c q_c alpha_c u_c^g log p_c,  dx_k = p_k sum_c h_c - h_k, h = q alpha omega.
    # Traffic   per element: read x (and q), write dx, while a row fits the tile; LOOPED reads x once more for dx, and
    #           with probabilities or smoothing once more for sum h.
    # Grid      one program per BLOCK_R rows: samples when S = 1, neighbouring positions of one sample when STRIDED.
    # Requires  contiguous x, t, dx; C = c_vectors C_VECTOR, S = s_vectors S_VECTOR; WIDE when C S >= 2^31.
    # Result    bitwise reproducible: a fixed tree per program, partial sums to finalise_kernel.
    gamma = scalar(gamma, ACC)
    eps = scalar(label_smoothing, ACC)
    c = c_vectors * C_VECTOR
    pid = tl.program_id(0).to(tl.int64)
    offs_c = tl.arange(0, BLOCK_C)
    offs_r = tl.arange(0, BLOCK_R)
    if STRIDED:
        AXIS: tl.constexpr = 0
        s = s_vectors * S_VECTOR
        offs_c = offs_c[:, None]
        offs_r = offs_r[None, :]
        pid_n = pid // blocks_s
        first_s = ((pid - pid_n * blocks_s) * BLOCK_R).to(tl.int32)
        mask_r = offs_r < s - first_s
        row = pid_n * s + first_s  # the first row of the tile, as an index into [N, S]
        base = pid_n * c * s + first_s
        base_g = pid_n * stride_gn + first_s.to(tl.int64) * stride_gs
        step_c = s.to(tl.int64) if WIDE else s
        step_r = 1
        step_g = stride_gs
    else:
        AXIS: tl.constexpr = 1
        offs_c = offs_c[None, :]
        offs_r = offs_r[:, None]
        row = pid * BLOCK_R
        mask_r = offs_r < n - row
        base = row * c
        base_g = row * stride_gn
        step_c = 1
        step_r = c
        step_g = stride_gn
    x_ptr += base
    dx_ptr += base
    if ROW == ROW_PROBABILITIES:
        t_ptr += base

    # Labels: which rows count, which are out of range, and what the loss is divided by.
    if ROW == ROW_PROBABILITIES:
        y = offs_r
        keep = mask_r
        bad = ~mask_r
    else:
        label = tl.load(t_ptr + row + offs_r, mask=mask_r, other=0)
        keep = mask_r & (label != ignore_index)
        bad = (label < 0) | (label >= c)
        y = tl.where(bad, -1, label).to(tl.int32)
    alpha = tl.full(mask_r.shape, 1.0, ACC)
    if HAS_WEIGHT and ROW != ROW_PROBABILITIES:
        alpha = tl.load(w_ptr + y, mask=keep & (y >= 0), other=0.0).to(ACC)
    here = 0.0
    if DIVISOR == DIVISOR_HERE:
        here = tl.sum(tl.sum(tl.where(keep, alpha if MEAN_OF_WEIGHTS else 1.0, 0.0), 1), 0)
    divisor = published_divisor(normalizer_ptr, divisor_ptr, count, here, DIVISOR, LOSS != LOSS_NONE, ACC)

    # The gradient's factor of a row.
    if GRAD == GRAD_EACH:
        scale = tl.load(g_ptr + base_g + offs_r * step_g, mask=keep, other=0.0).to(ACC)
    elif GRAD == GRAD_STORED and FOLD:
        scale = tl.full(mask_r.shape, 1.0, ACC) / divisor
    else:
        scale = tl.full(mask_r.shape, 1.0, ACC)
    scale = tl.where(bad, float("nan"), scale)
    reads = keep if BLOCK_R == 1 and BLOCK_C >= 4096 else mask_r  # a long row that is left out is not read

    if LOOPED:
        zeros = tl.zeros([BLOCK_C, BLOCK_R] if STRIDED else [BLOCK_R, BLOCK_C], ACC)
        highest = zeros - float("inf")
        sums = zeros if ROW == ROW_INDEX else zeros - 1.0
        for start in range(0, c, BLOCK_C):
            mask = (offs_c < c - start) & reads
            x = tl.load(x_ptr + (start + offs_c) * step_c + offs_r * step_r, mask=mask, other=-float("inf")).to(ACC)
            above = x > highest
            higher = tl.where(above, x, highest)
            e = tl.exp(tl.where(above, highest, x) - tl.where(higher == -float("inf"), 0.0, higher))
            if ROW == ROW_INDEX:
                sums = tl.where(above, sums * e, sums) + tl.where(start + offs_c == y, 0.0, tl.where(above, 1.0, e))
            else:
                sums = tl.where(above, (1.0 + sums) * e, sums + e)
            highest = higher
        m = tl.max(highest, AXIS, keep_dims=True)
        e = tl.exp(highest - tl.where(m == -float("inf"), 0.0, m))
        if ROW == ROW_INDEX:
            x_y = tl.load(x_ptr + y * step_c + offs_r * step_r, mask=keep & (y >= 0), other=0.0).to(ACC)
            s_other = tl.sum(sums * e, AXIS, keep_dims=True)
        else:
            top = highest == m
            t = tl.sum(tl.where(top, sums, (1.0 + sums) * e), AXIS, keep_dims=True)
            t += tl.sum(top.to(ACC), AXIS, keep_dims=True) - 1.0
            t = tl.where(tl.abs(m) == float("inf"), float("nan"), t)
    else:
        offs = offs_c * step_c + offs_r * step_r
        mask = (offs_c < c) & reads
        x = tl.load(x_ptr + offs, mask=mask, other=-float("inf"), eviction_policy="evict_first").to(ACC)
        m = tl.max(x, AXIS, keep_dims=True)
        e = tl.exp(x - m)
        if ROW == ROW_INDEX:
            x_y = tl.sum(tl.where(offs_c == y, x, 0.0), AXIS, keep_dims=True)
            s_other = tl.sum(tl.where(offs_c == y, 0.0, e), AXIS, keep_dims=True)
        else:
            top = e == 1
            t = tl.sum(tl.where(top, 0.0, e), AXIS, keep_dims=True)
            t += tl.sum(top.to(ACC), AXIS, keep_dims=True) - 1.0

    if ROW == ROW_INDEX:
        loss, per_class, at_y = _index_terms(x_y, m, s_other, gamma, GAMMA)
        loss *= alpha
        per_class *= alpha * scale
        at_y *= alpha * scale
    elif LOOPED:
        losses = zeros
        weights = zeros
        for start in range(0, c, BLOCK_C):
            offs = (start + offs_c) * step_c + offs_r * step_r
            mask = (offs_c < c - start) & reads
            x = tl.load(x_ptr + offs, mask=mask, other=-float("inf")).to(ACC)
            w = _class_weights(t_ptr, w_ptr, offs, start + offs_c, mask, y, c, eps, ROW, HAS_WEIGHT, ACC)
            part, h, _, _ = _dense_terms(x, w, m, t, gamma, GAMMA)
            losses += part
            weights += h
        loss = tl.sum(losses, AXIS, keep_dims=True)
        h_sum = tl.sum(weights, AXIS, keep_dims=True)
    else:
        w = _class_weights(t_ptr, w_ptr, offs, offs_c, mask, y, c, eps, ROW, HAS_WEIGHT, ACC)
        part, h, p, u = _dense_terms(x, w, m, t, gamma, GAMMA)
        loss = tl.sum(part, AXIS, keep_dims=True)
        h_sum = tl.sum(h, AXIS, keep_dims=True)

    if LOSS != LOSS_NONE:
        loss = tl.where(keep, tl.where(bad, float("nan"), loss), 0.0)
        if LOSS == LOSS_EACH:
            tl.store(loss_ptr + row + offs_r, loss, mask=mask_r)
        else:
            total = tl.sum(tl.sum(loss, 1), 0)
            tl.store(loss_ptr + pid, total / divisor if LOSS == LOSS_TOTAL else total)

    if GRAD != GRAD_NONE:
        if LOOPED:
            for start in range(0, c, BLOCK_C):
                offs = (start + offs_c) * step_c + offs_r * step_r
                mask = (offs_c < c - start) & reads
                x = tl.load(x_ptr + offs, mask=mask, other=-float("inf"), eviction_policy="evict_first").to(ACC)
                if ROW == ROW_INDEX:
                    dx = tl.where(start + offs_c == y, -at_y, tl.exp(x - m) * per_class)
                else:
                    w = _class_weights(t_ptr, w_ptr, offs, start + offs_c, mask, y, c, eps, ROW, HAS_WEIGHT, ACC)
                    _, h, p, u = _dense_terms(x, w, m, t, gamma, GAMMA)
                    dx = (p * (h_sum - h) - u * h) * scale
                dx = tl.where(keep, dx, 0.0).to(dx_ptr.dtype.element_ty)
                tl.store(dx_ptr + offs, dx, mask=(offs_c < c - start) & mask_r)
        else:
            if ROW == ROW_INDEX:
                dx = tl.where(offs_c == y, -at_y, e * per_class)
            else:
                dx = (p * (h_sum - h) - u * h) * scale  # p h_sum - h without cancellation at p = 1
            tl.store(dx_ptr + offs, tl.where(keep, dx, 0.0).to(dx_ptr.dtype.element_ty), mask=(offs_c < c) & mask_r)


class Tile(NamedTuple):
    """How one program covers rows of logits (N, C, S)."""

    block_c: int
    block_r: int  # rows: samples when S == 1, positions of one sample otherwise
    looped: bool  # the classes do not fit: a running maximum and sum, then a second pass
    num_warps: int
    programs: int
    blocks_s: int


@functools.lru_cache(maxsize=4096)
def plan(n: int, c: int, s: int, limit: int) -> Tile:
    """The tile for rows (n, c, s) when `limit` elements stay in registers. A function of the shape alone."""
    power_c, rows = triton.next_power_of_2(c), n if s == 1 else s
    wanted = 1 if s == 1 else min(16, triton.next_power_of_2(s))  # positions side by side fill a 32-byte sector
    looped = power_c * wanted > limit
    block_c = max(1, min(limit, 4096) // wanted) if looped else power_c
    block_r = wanted
    while not looped and block_c * block_r < min(limit, 2048 if s == 1 else 4096) and block_r < rows:
        block_r *= 2
    # Small batches: more programs rather than larger tiles.
    while s == 1 and block_r > 1 and triton.cdiv(rows, block_r) < 256 and block_c * block_r > 256:
        block_r //= 2
    size = block_c * block_r
    num_warps = min(16, max(2 if size <= 512 else 4, size // 512))
    blocks_s = triton.cdiv(s, block_r)
    programs = triton.cdiv(n, block_r) if s == 1 else n * blocks_s
    return Tile(block_c, block_r, looped, num_warps, programs, blocks_s)


def vector(length: int) -> int:
    """The power of two up to 8 that divides a length: what the compiler may assume of it."""
    return math.gcd(length, 8)


def launch(
    x: Tensor, t: Tensor, weight: Tensor | None, g: Tensor | None, loss: Tensor | None, dx: Tensor,
    normalizer: Tensor | None, divisor: Tensor | None, gamma: float, eps: float, ignore_index: int,
    mean_of_weights: bool, tile: Tile, modes: tuple[Any, Any, Any],
) -> None:  # fmt: skip
    n, c, s = (*x.shape, 1)[:3]
    stride_gn, stride_gs = (*g.stride(), 0)[:2] if g is not None else (0, 0)
    c_vector, s_vector = vector(c), vector(s)
    loss_mode, grad_mode, divisor_mode = modes
    row = ROW_PROBABILITIES if t.is_floating_point() else ROW_SMOOTHED if eps > 0 else ROW_INDEX
    dtype = x.dtype
    softmax_focal_kernel[(tile.programs,)](
        x, t, x if weight is None else weight, x if g is None else g, x if loss is None else loss, dx,
        x if normalizer is None else normalizer, x if divisor is None else divisor,
        number(gamma, dtype), number(eps, dtype), ignore_index, n * s, n, c // c_vector, s // s_vector, tile.blocks_s,
        stride_gn, stride_gs,
        C_VECTOR=c_vector, S_VECTOR=s_vector, ROW=row.value, GAMMA=gamma_kind(gamma), HAS_WEIGHT=weight is not None,
        MEAN_OF_WEIGHTS=mean_of_weights and weight is not None, LOSS=loss_mode.value, GRAD=grad_mode.value,
        DIVISOR=divisor_mode.value, FOLD=dtype != torch.float16, STRIDED=s > 1, LOOPED=tile.looped,
        WIDE=c * s >= 1 << 31, BLOCK_C=tile.block_c, BLOCK_R=tile.block_r, ACC=accumulator(dtype)[0],
        num_warps=tile.num_warps,
    )  # fmt: skip


def tile_for(x: Tensor, target: Tensor, eps: float) -> Tile:
    dense = eps > 0 or target.is_floating_point()
    n, c, s = (*x.shape, 1)[:3]
    return plan(n, c, s, MAX_RESIDENT_DENSE if dense else MAX_RESIDENT)
