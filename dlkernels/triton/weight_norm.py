"""Weight normalisation on GPUs. One tile form serves rows, columns and what lies between: v is [A, K, B], one norm per
k, and a tile takes BLOCK_K of them.

A tile that holds all of A and B is read once. Longer rows are cut into segments: their sums first, then the result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ._common import accumulator, on_device

# Elements of a tile that stay in registers without spilling (tests/test_triton_aot.py).
MAX_RESIDENT = 16384
MAX_RESIDENT_BACKWARD = 8192  # two inputs
TILE = 4096  # of segments, and what short rows are gathered to
MAX_SEGMENTS = 1024  # per row
WHOLE, SUM, APPLY = (tl.constexpr(i) for i in range(3))


@triton.jit
def _quotient(x, y, ACC: tl.constexpr):
    if ACC == tl.float64:  # noqa: SIM300
        q = x / y
    else:
        q = tl.div_rn(x, y)
    return q


@triton.jit
def _root(x, ACC: tl.constexpr):
    if ACC == tl.float64:  # noqa: SIM300
        r = tl.sqrt(x)
    else:
        r = tl.sqrt_rn(x)
    return r


@triton.jit(do_not_specialize=["outer", "k_vectors", "b_vectors", "tiles_b", "steps", "segments"])
def _weight_norm_kernel(
    v_ptr,  # [A, K, B]
    dw_ptr,  # [A, K, B] (BACKWARD)
    g_ptr,  # [K]
    norm_ptr,  # [K], written forward, read backward
    out_ptr,  # [A, K, B]: w, or dv
    dg_ptr,  # [K] (BACKWARD)
    partial_ptr,  # [segments, K] (SUM writes, APPLY reads)
    outer,
    k_vectors,
    b_vectors,
    tiles_b,
    steps,
    segments,
    K_VECTOR: tl.constexpr,
    B_VECTOR: tl.constexpr,
    COLUMNS: tl.constexpr,
    BACKWARD: tl.constexpr,
    STAGE: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_S: tl.constexpr,
    ACC: tl.constexpr,
):
    # Weight normalisation, forward and backward.
    #
    # Math      n = ||v||;  w = (g / n) v;  dg = <dw, v> / n;  dv = (g / n) (dw - (dg / n) v);  all 0 where n is 0.
    # Traffic   WHOLE: read v (and dw), write the result. SUM, then APPLY: read v (and dw) twice, write once.
    # Grid      (K / BLOCK_K, segments); a segment is `steps` tiles of BLOCK_A x BLOCK_K x BLOCK_B, over A and B.
    # Requires  contiguous tensors; K = k_vectors * K_VECTOR, B = b_vectors * B_VECTOR; COLUMNS: B is 1;
    #           WHOLE: one segment of one tile.
    # Result    bitwise reproducible: fixed reduction trees, segments added in order, no atomics.
    columns = k_vectors * K_VECTOR
    inner = 1 if COLUMNS else b_vectors * B_VECTOR
    plane = tl.cast(columns, tl.int64) * inner
    segment = tl.program_id(1)
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = k < columns
    offs_a = tl.arange(0, BLOCK_A)
    offs_b = tl.arange(0, BLOCK_B)
    offs_k = k.to(tl.int64)[None, :, None] * inner

    total = tl.zeros([BLOCK_K], ACC)
    if STAGE == WHOLE:
        a = offs_a[:, None, None]
        b = offs_b[None, None, :]
        mask = (a < outer) & mask_k[None, :, None] & (b < inner)
        offs = a * plane + offs_k + b
        v = tl.load(v_ptr + offs, mask=mask, other=0.0).to(ACC)
        x = v
        if BACKWARD:
            x = tl.load(dw_ptr + offs, mask=mask, other=0.0).to(ACC)
        total = tl.sum(tl.sum(v * x, 2), 0)
    elif STAGE == SUM:
        sums = tl.zeros([BLOCK_A, BLOCK_K, BLOCK_B], ACC)
        for step in range(steps):
            tile = segment * steps + step
            a = (tile // tiles_b) * BLOCK_A + offs_a[:, None, None]
            b = (tile % tiles_b) * BLOCK_B + offs_b[None, None, :]
            mask = (a < outer) & mask_k[None, :, None] & (b < inner)
            offs = a * plane + offs_k + b
            v = tl.load(v_ptr + offs, mask=mask, other=0.0).to(ACC)
            x = v
            if BACKWARD:
                x = tl.load(dw_ptr + offs, mask=mask, other=0.0).to(ACC)
            sums += v * x
        total = tl.sum(tl.sum(sums, 2), 0)
        tl.store(partial_ptr + tl.cast(segment, tl.int64) * columns + k, total, mask=mask_k)
    else:
        for start in range(0, segments, BLOCK_S):
            s = start + tl.arange(0, BLOCK_S)[:, None]
            partial = tl.load(
                partial_ptr + s.to(tl.int64) * columns + k[None, :],
                mask=(s < segments) & mask_k[None, :],
                other=0.0,
            )
            total += tl.sum(partial, 0)

    if STAGE != SUM:
        g = tl.load(g_ptr + k, mask=mask_k, other=0.0).to(ACC)
        if BACKWARD:
            n = tl.load(norm_ptr + k, mask=mask_k, other=0.0)
        else:
            n = _root(total, ACC)
            if segment == 0:
                tl.store(norm_ptr + k, n, mask=mask_k)
        zero = n == 0
        length = tl.where(zero, 1.0, n)
        factor_a = _quotient(g, length, ACC)
        factor_b = factor_a
        if BACKWARD:
            dg = tl.where(zero, 0.0, _quotient(total, length, ACC))
            factor_b = factor_a * _quotient(dg, length, ACC)
            if segment == 0:
                tl.store(dg_ptr + k, dg.to(dg_ptr.dtype.element_ty), mask=mask_k)
        zero = zero[None, :, None]
        factor_a = factor_a[None, :, None]
        factor_b = factor_b[None, :, None]

        if STAGE == WHOLE:
            y = x * factor_a
            if BACKWARD:
                y -= v * factor_b
            tl.store(out_ptr + offs, tl.where(zero, 0.0, y).to(out_ptr.dtype.element_ty), mask=mask)
        else:
            for step in range(steps):
                tile = segment * steps + step
                a = (tile // tiles_b) * BLOCK_A + offs_a[:, None, None]
                b = (tile % tiles_b) * BLOCK_B + offs_b[None, None, :]
                mask = (a < outer) & mask_k[None, :, None] & (b < inner)
                offs = a * plane + offs_k + b
                v = tl.load(v_ptr + offs, mask=mask, other=0.0).to(ACC)
                y = v * factor_a
                if BACKWARD:
                    y = tl.load(dw_ptr + offs, mask=mask, other=0.0).to(ACC) * factor_a - v * factor_b
                tl.store(out_ptr + offs, tl.where(zero, 0.0, y).to(out_ptr.dtype.element_ty), mask=mask)


# Host -----------------------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """How [A, K, B] is cut up."""

    block_a: int
    block_k: int
    block_b: int
    tiles_b: int
    steps: int  # tiles per segment
    segments: int
    num_warps: int


def plan(outer: int, columns: int, inner: int, resident: int) -> Plan:
    """Tiles of whole rows where they fit, else segments; a tile reads at least 16 neighbours in memory where it can."""
    power = triton.next_power_of_2
    a, b = power(outer), power(inner)
    neighbours = min(power(columns), max(1, 16 // b)) if outer > 1 else 1
    few = resident if columns >= 128 * neighbours else min(resident, TILE)  # few rows: more programs than rows
    if a * b * neighbours <= few:
        k = neighbours
        while k < power(columns) and a * b * k * 2 <= TILE // 2 and triton.cdiv(columns, 2 * k) >= 128:
            k *= 2
        return Plan(a, k, b, 1, 1, 1, _warps(a * b * k))
    tile = min(TILE, resident)
    b = min(b, max(1, tile // neighbours))
    a = min(a, max(1, tile // (b * neighbours)))
    tiles_b = triton.cdiv(inner, b)
    tiles = triton.cdiv(outer, a) * tiles_b
    steps = triton.cdiv(tiles, MAX_SEGMENTS)
    return Plan(a, neighbours, b, tiles_b, steps, triton.cdiv(tiles, steps), _warps(a * b * neighbours))


def _warps(elements: int) -> int:
    return max(1, min(16, elements // 512))


def _launch(
    v: Tensor, dw: Tensor | None, g: Tensor, norm: Tensor, out: Tensor, dg: Tensor | None, resident: int
) -> None:
    outer, columns, inner = v.shape
    p = plan(outer, columns, inner, resident)
    k_vector, b_vector = math.gcd(columns, 8), math.gcd(inner, 8)
    whole = p.segments == p.steps == 1
    partial = norm if whole else norm.new_empty((p.segments, columns))
    grid = (triton.cdiv(columns, p.block_k), p.segments)
    stages: tuple[Any, ...] = (WHOLE,) if whole else (SUM, APPLY)
    with on_device(v):
        for stage in stages:
            _weight_norm_kernel[grid](
                v, v if dw is None else dw, g, norm, out, g if dg is None else dg, partial,
                outer, columns // k_vector, inner // b_vector, p.tiles_b, p.steps, p.segments,
                K_VECTOR=k_vector, B_VECTOR=b_vector, COLUMNS=inner == 1, BACKWARD=dw is not None, STAGE=stage,
                BLOCK_A=p.block_a, BLOCK_K=p.block_k, BLOCK_B=p.block_b,
                BLOCK_S=max(2, 256 // p.block_k), ACC=accumulator(v.dtype)[0], num_warps=p.num_warps,
            )  # fmt: skip


def weight_norm_fwd(v: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """(w, norm) of v (A, K, B) and g (K,)."""
    v, g = v.contiguous(), g.contiguous()
    w, norm = v.new_empty(v.shape), v.new_empty((v.shape[1],), dtype=accumulator(v.dtype)[1])
    if v.numel() == 0:
        return w, norm.zero_()
    _launch(v, None, g, norm, w, None, MAX_RESIDENT)
    return w, norm


def weight_norm_bwd(grad_output: Tensor, v: Tensor, g: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    """(dv, dg)."""
    v, g = v.contiguous(), g.contiguous()
    dv, dg = v.new_empty(v.shape), g.new_empty(g.shape)
    if v.numel() == 0:
        return dv, dg.zero_()
    _launch(v, grad_output.contiguous(), g, norm.contiguous(), dv, dg, MAX_RESIDENT_BACKWARD)
    return dv, dg


def weight_norm_multi_fwd(v: Sequence[Tensor], g: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """([w], [norm]) of many weights, one after another."""
    pairs = [weight_norm_fwd(*one) for one in zip(v, g, strict=True)]
    return [w for w, _ in pairs], [norm for _, norm in pairs]


def weight_norm_multi_bwd(
    grad_output: Sequence[Tensor], v: Sequence[Tensor], g: Sequence[Tensor], norm: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """([dv], [dg])."""
    pairs = [weight_norm_bwd(*one) for one in zip(grad_output, v, g, norm, strict=True)]
    return [dv for dv, _ in pairs], [dg for _, dg in pairs]
