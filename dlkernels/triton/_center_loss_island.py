"""The island of centers: sums of normalised centers, the value of the pairs, and the direction that parts them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import accumulator, number, scalar
from ._group_norm_tiles import sum_rows_kernel

TILE = 4096  # elements
PROGRAMS = 256  # partial sums at most
SUM_WHOLE, SUM_NORMS, SUM_COLUMNS = (tl.constexpr(i) for i in range(3))


# Kernels --------------------------------------------------------------------------------------------------------------


@triton.jit
def _inverse_root(squares, ACC: tl.constexpr):
    """1 / sqrt, 0 for 0. Approximate roots take float32 numbers below 2^-126 for 0: their inverse would be infinite."""
    some = squares > 0
    safe = tl.where(some, squares, 1.0)
    if ACC == tl.float64:  # noqa: SIM300
        root = tl.sqrt(safe)
    else:
        root = tl.sqrt_rn(safe)
    return tl.where(some, 1.0 / root, 0.0)


@triton.jit(do_not_specialize=["k", "d_vectors", "steps"])
def island_sums_kernel(
    c_ptr,  # [K, D] centers
    inverse_ptr,  # [K] 1 / ||c_j||, written, or read by SUM_COLUMNS
    partial_ptr,  # [programs, D] (not SUM_NORMS)
    nonzero_ptr,  # [programs] how many norms are above 0 (not SUM_COLUMNS)
    k,
    d_vectors,
    steps,
    D_VECTOR: tl.constexpr,
    STAGE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    # Norms of the centers, and the sum of the normalised ones.
    #
    # Math      r_j = 1 / ||c_j|| (0 for a norm of 0),  S = sum_j r_j c_j, in one partial sum per program.
    # Traffic   SUM_WHOLE: read c once. SUM_NORMS, then SUM_COLUMNS: read c twice.
    # Grid      axis 0: pieces of `steps` blocks of BLOCK_K classes; axis 1: blocks of D in SUM_COLUMNS.
    # Requires  contiguous c; D = d_vectors * D_VECTOR; SUM_WHOLE: D <= BLOCK_D.
    # Result    bitwise reproducible: a fixed tree per program, partial sums to sum_rows_kernel.
    d = d_vectors * D_VECTOR
    pid = tl.program_id(0).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K)
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    if STAGE == SUM_COLUMNS:
        offs_d += tl.program_id(1) * BLOCK_D
    sums = tl.zeros([BLOCK_K, BLOCK_D], ACC)
    nonzero = tl.zeros([BLOCK_K], tl.int32)
    for step in range(steps):
        j = (pid * steps + step) * BLOCK_K + offs_k
        mask_k = j < k
        base = c_ptr + j[:, None] * d
        if STAGE == SUM_NORMS:
            squares = tl.zeros([BLOCK_K, BLOCK_D], ACC)
            for start in range(0, d, BLOCK_D):
                mask = mask_k[:, None] & (offs_d < d - start)
                c = tl.load(base + start + offs_d, mask=mask, other=0.0).to(ACC)
                squares += c * c
            inverse = _inverse_root(tl.sum(squares, 1), ACC)
        else:
            c = tl.load(base + offs_d, mask=mask_k[:, None] & (offs_d < d), other=0.0).to(ACC)
            if STAGE == SUM_WHOLE:
                inverse = _inverse_root(tl.sum(c * c, 1), ACC)
            else:
                inverse = tl.load(inverse_ptr + j, mask=mask_k, other=0.0)
            sums += c * inverse[:, None]
        if STAGE != SUM_COLUMNS:
            tl.store(inverse_ptr + j, inverse, mask=mask_k)
            nonzero += (inverse > 0).to(tl.int32)
    if STAGE != SUM_NORMS:
        tl.store(partial_ptr + pid * d + offs_d, tl.sum(sums, 0, keep_dims=True), mask=offs_d < d)
    if STAGE != SUM_COLUMNS:
        tl.store(nonzero_ptr + pid, tl.sum(nonzero, 0))


@triton.jit(do_not_specialize=["k", "d", "programs"])
def island_value_kernel(
    total_ptr,  # [D] S
    nonzero_ptr,  # [programs]
    value_ptr,  # []
    k,
    d,
    programs,
    BLOCK: tl.constexpr,
):
    # The value of the pairs.
    #
    # Math      sum_{j != k} (cos + 1) = ||S||^2 - K' + K (K - 1), in float64; K = 1: 0 (NaN where S is).
    # Traffic   read S and the counts.
    # Grid      one program.
    # Requires  nothing.
    # Result    bitwise reproducible; K' and K (K - 1) exact.
    offs = tl.arange(0, BLOCK)
    squares = tl.zeros([BLOCK], tl.float64)
    for start in range(0, d, BLOCK):
        s = tl.load(total_ptr + start + offs, mask=offs < d - start, other=0.0).to(tl.float64)
        squares += s * s
    nonzero = tl.zeros([BLOCK], tl.int64)
    for start in range(0, programs, BLOCK):
        nonzero += tl.load(nonzero_ptr + start + offs, mask=offs < programs - start, other=0).to(tl.int64)
    square = tl.sum(squares, 0)
    k = tl.cast(k, tl.int64)
    rest = k * (k - 1) - tl.sum(nonzero, 0)
    value = tl.where(k > 1, square + rest.to(tl.float64), square * 0.0)
    tl.store(value_ptr, value.to(value_ptr.dtype.element_ty))


@triton.jit
def _parted(c, s, inverse, dot, scale, step_ptr, slot, d, offs, mask, MOVE: tl.constexpr):
    """scale (S - (n . S) n) / ||c||; MOVE: the center with it, and with its step where it has one."""
    value = (scale * inverse) * (s - dot * (c * inverse))
    if MOVE:
        some = slot >= 0
        value += c + tl.load(step_ptr + tl.where(some, slot, 0) * d + offs, mask=mask & some, other=0.0)
    return value


@triton.jit(do_not_specialize=["k", "d_vectors", "factor"])
def island_rows_kernel(
    c_ptr,  # [K, D] centers
    total_ptr,  # [D] S
    inverse_ptr,  # [K] 1 / ||c_j||
    g_ptr,  # [] (without MOVE)
    step_ptr,  # [min(N, K), D] steps of the classes with rows (MOVE)
    slot_ptr,  # [K] a class's row in it, or -1 (MOVE)
    out_ptr,  # [K, D] dc, or the centers (MOVE)
    k,
    d_vectors,
    factor,
    D_VECTOR: tl.constexpr,
    WHOLE: tl.constexpr,
    MOVE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    # The direction that parts the centers: the gradient of the pairs, or their part of the centers' update.
    #
    # Math      u_j = factor r_j (S - (n_j . S) n_j), n_j = r_j c_j:  dc_j = g u_j;  MOVE: c_j <- c_j + step_j + u_j.
    # Traffic   read c (twice without WHOLE) and the steps of classes that have one, write the result.
    # Grid      one program per BLOCK_K classes.
    # Requires  contiguous tensors; D = d_vectors * D_VECTOR; WHOLE: D <= BLOCK_D; out may be c.
    # Result    bitwise reproducible.
    factor = scalar(factor, ACC)
    d = d_vectors * D_VECTOR
    j = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = j < k
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    base = j[:, None] * d
    inverse = tl.load(inverse_ptr + j, mask=mask_k, other=0.0)[:, None]
    scale = factor
    if not MOVE:
        scale *= tl.load(g_ptr).to(ACC)
    if MOVE:
        slot = tl.load(slot_ptr + j, mask=mask_k, other=-1)[:, None]
    else:
        slot = inverse
    if WHOLE:
        mask = mask_k[:, None] & (offs_d < d)
        c = tl.load(c_ptr + base + offs_d, mask=mask, other=0.0).to(ACC)
        s = tl.load(total_ptr + offs_d, mask=offs_d < d, other=0.0)
        dot = tl.sum((c * inverse) * s, 1, keep_dims=True)
        value = _parted(c, s, inverse, dot, scale, step_ptr, slot, d, offs_d, mask, MOVE)
        tl.store(out_ptr + base + offs_d, value.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        dots = tl.zeros([BLOCK_K, BLOCK_D], ACC)
        for start in range(0, d, BLOCK_D):
            offs = start + offs_d
            c = tl.load(c_ptr + base + offs, mask=mask_k[:, None] & (offs < d), other=0.0).to(ACC)
            dots += (c * inverse) * tl.load(total_ptr + offs, mask=offs < d, other=0.0)
        dot = tl.sum(dots, 1, keep_dims=True)
        for start in range(0, d, BLOCK_D):
            offs = start + offs_d
            mask = mask_k[:, None] & (offs < d)
            c = tl.load(c_ptr + base + offs, mask=mask, other=0.0).to(ACC)
            s = tl.load(total_ptr + offs, mask=offs < d, other=0.0)
            value = _parted(c, s, inverse, dot, scale, step_ptr, slot, d, offs, mask, MOVE)
            tl.store(out_ptr + base + offs, value.to(out_ptr.dtype.element_ty), mask=mask)


# Host -----------------------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """How programs cover the centers (K, D). A function of the shape alone."""

    whole: bool  # a row fits the tile
    block_k: int
    block_d: int
    steps: int  # blocks of classes of one partial sum
    programs: int
    num_warps: int


def plan(k: int, d: int) -> Plan:
    power = max(1, triton.next_power_of_2(d))
    block_d = min(power, TILE)
    block_k = min(max(1, TILE // block_d), max(1, triton.next_power_of_2(k)))
    while block_k > 1 and block_k * block_d > 512 and triton.cdiv(k, block_k) < PROGRAMS:
        block_k //= 2
    blocks = triton.cdiv(k, block_k)
    steps = triton.cdiv(blocks, PROGRAMS)
    num_warps = max(1, min(16, block_k * block_d // 512))
    return Plan(power <= TILE, block_k, block_d, steps, triton.cdiv(blocks, steps), num_warps)


def _tile(p: Plan, d: int, acc: Any) -> dict[str, Any]:
    return {
        "D_VECTOR": math.gcd(d, 8), "BLOCK_K": p.block_k, "BLOCK_D": p.block_d, "ACC": acc, "num_warps": p.num_warps,
    }  # fmt: skip


def totals(centers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """S (D,), 1 / ||c_j|| (K,), and partial counts of the norms above 0. For K > 0 and D > 0."""
    k, d = centers.shape
    acc, dtype = accumulator(centers.dtype)
    p = plan(k, d)
    total, inverse = centers.new_empty((d,), dtype=dtype), centers.new_empty((k,), dtype=dtype)
    partial = total if p.programs == 1 else centers.new_empty((p.programs, d), dtype=dtype)
    nonzero = centers.new_empty((p.programs,), dtype=torch.int32)
    stages: tuple[Any, ...] = (SUM_WHOLE,) if p.whole else (SUM_NORMS, SUM_COLUMNS)
    for stage in stages:
        slabs = triton.cdiv(d, p.block_d) if stage is SUM_COLUMNS else 1
        island_sums_kernel[(p.programs, slabs)](
            centers, inverse, partial, nonzero, k, d // math.gcd(d, 8), p.steps, STAGE=stage.value, **_tile(p, d, acc)
        )
    if p.programs > 1:
        sum_rows_kernel[(triton.cdiv(d, 16), 1)](
            partial, partial, total, total, p.programs, d, p.programs,
            HAS_A=True, HAS_B=False, BLOCK_R=128, BLOCK_C=16, ACC=acc, num_warps=4,
        )  # fmt: skip
    return total, inverse, nonzero


def value(total: Tensor, nonzero: Tensor, k: int, out: Tensor) -> None:
    island_value_kernel[(1,)](total, nonzero, out, k, total.numel(), nonzero.numel(), BLOCK=256, num_warps=4)


def rows(
    centers: Tensor, total: Tensor, inverse: Tensor, g: Tensor | None, step: Tensor | None, slot: Tensor | None,
    out: Tensor, factor: float,
) -> None:  # fmt: skip
    """dc = g factor u, or with `step` the centers moved by their steps and by factor u."""
    k, d = centers.shape
    p = plan(k, d)
    island_rows_kernel[(triton.cdiv(k, p.block_k),)](
        centers, total, inverse, total if g is None else g, total if step is None else step,
        inverse if slot is None else slot, out, k, d // math.gcd(d, 8), number(factor, centers.dtype),
        WHOLE=p.whole, MOVE=step is not None, **_tile(p, d, accumulator(centers.dtype)[0]),
    )  # fmt: skip
