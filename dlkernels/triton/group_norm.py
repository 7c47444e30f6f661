"""GroupNorm on GPUs: launchers of `group_norm_fwd` and `group_norm_bwd`.

Groups that fit a tile are read once (`_group_norm_resident`); larger ones are split into tiles and read twice, from L2
the second time (`_group_norm_split`). `_group_norm_tiles.plan` decides, from the shape alone.
"""

from __future__ import annotations

import math
from typing import Any

import triton
from torch import Tensor

from . import _group_norm_tiles as tiles
from ._common import accumulator, number, on_device
from ._group_norm_resident import group_norm_bwd_kernel, group_norm_fwd_kernel
from ._group_norm_split import grad_kernel, normalise_kernel, stats_kernel, terms_kernel


def group_norm_fwd(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    num_groups: int,
    eps: float,
    activation: int,
    channels_last: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    x, residual, weight, bias, scale, shift = map(_dense, (input, residual, weight, bias, scale, shift))
    acc, acc_dtype = accumulator(x.dtype)
    y = x.new_empty(x.shape)
    mean, rstd = (x.new_empty((x.shape[0], num_groups), dtype=acc_dtype) for _ in range(2))
    if x.numel() == 0:
        return y, mean, rstd
    n, c, s = _sizes(x, channels_last)
    plan = forward_plan(n, c, num_groups, s, x.element_size(), channels_last)
    eps = number(eps, x.dtype)
    sizes, geometry = _geometry(plan, c, num_groups, s, acc)
    tensors = (x, *(x if t is None else t for t in (weight, bias, residual, scale, shift)))
    given = _given(weight, bias, scale, shift) | {"HAS_RESIDUAL": residual is not None, "ACT": activation}
    with on_device(x):
        if plan.resident:
            group_norm_fwd_kernel[(plan.units,)](*tensors, y, mean, rstd, eps, *sizes, **given, **geometry)
            return y, mean, rstd
        chunks, steps = tiles.split(plan.d_blocks * plan.s_blocks, plan.batch)
        partial = mean.new_empty((3, n, chunks, num_groups))
        for first, units in _batches(plan.units, plan.batch):
            order = (*sizes, plan.d_blocks, plan.s_blocks, chunks, steps, first)
            grid = (units * chunks,)
            stats_kernel[grid](x, partial, partial.stride(0), *order, **geometry)
            normalise_kernel[grid](
                *tensors, partial, y, mean, rstd, partial.stride(0), eps, *order, **given, **geometry
            )  # fmt: skip
    return y, mean, rstd


def group_norm_bwd(
    grad_output: Tensor,
    input: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    num_groups: int,
    eps: float,
    activation: int,
    channels_last: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, dy, residual, mean, rstd = map(_dense, (input, grad_output, residual, mean, rstd))
    weight, bias, scale, shift = map(_dense, (weight, bias, scale, shift))
    acc = accumulator(x.dtype)[0]
    dx = x.new_empty(x.shape)
    dw, db, dr, dscale, dshift = (
        x.new_empty((0,)) if t is None else t.new_empty(t.shape) for t in (weight, bias, residual, scale, shift)
    )
    grads = (dx, dw, db, dr, dscale, dshift)
    if x.numel() == 0:
        dw.zero_(), db.zero_()
        return grads
    n, c, s = _sizes(x, channels_last)
    plan = backward_plan(n, c, num_groups, s, x.element_size(), channels_last, residual is not None)
    sizes, geometry = _geometry(plan, c, num_groups, s, acc)
    tensors = (dy, x, mean, rstd, *(x if t is None else t for t in (weight, bias, residual, scale, shift)))
    given = _given(weight, bias, scale, shift)
    full = given | {"HAS_RESIDUAL": residual is not None, "ACT": activation}
    samples = triton.cdiv(n, tiles.MAX_ROWS) if plan.resident else 1
    rows = triton.cdiv(n, samples)
    # Partial sums of dw and db over samples: [rows, C]; one row is the result.
    a, b = (out if rows == 1 or t is None else mean.new_empty((rows, c)) for t, out in ((weight, dw), (bias, db)))
    with on_device(x):
        if plan.resident:
            group_norm_bwd_kernel[(rows * plan.g_blocks,)](
                *tensors, dx, dr, dscale, dshift, a, b, n, *sizes, samples, **full, **geometry
            )  # fmt: skip
        else:
            chunks, steps = tiles.split(plan.s_blocks, plan.batch * plan.d_blocks)
            partial, terms = mean.new_empty((2, n, chunks, c)), mean.new_empty((2, n, num_groups))
            block_d = min(64, tiles.power(c // num_groups))
            block_k = 1 if plan.s_blocks == 1 else 16
            for first, units in _batches(plan.units, plan.batch):
                order = (*sizes, plan.d_blocks, plan.s_blocks, chunks, steps, first)
                grid = (units * plan.d_blocks * chunks,)
                out = (partial, terms, dx, dr)
                grad_kernel[grid](*tensors, *out, partial.stride(0), *order, SUMS=True, **full, **geometry)
                first_row, last_row = (_row(u, plan, num_groups) for u in (first, first + units))
                terms_kernel[(last_row - first_row,)](
                    partial, *tensors[4:6], tensors[7], terms, dscale, dshift, a, b, n, num_groups, c // num_groups, s,
                    chunks, first_row, **given, BLOCK_K=block_k, BLOCK_D=block_d, ACC=acc, num_warps=4,
                )  # fmt: skip
                grad_kernel[grid](*tensors, *out, terms.stride(0), *order, SUMS=False, **full, **geometry)
        if rows > 1 and (weight is not None or bias is not None):
            _sum_rows(a, b, dw, db, rows, c, weight is not None, bias is not None, acc)
    return grads


def forward_plan(n: int, c: int, groups: int, s: int, itemsize: int, channels_last: bool) -> tiles.Plan:
    return tiles.plan(n, c, groups, s, itemsize, channels_last, tiles.MAX_RESIDENT, tiles.TILE, tiles.WARP)


def backward_plan(
    n: int, c: int, groups: int, s: int, itemsize: int, channels_last: bool, has_residual: bool
) -> tiles.Plan:
    reads, limit = (3, tiles.MAX_RESIDENT_BACKWARD // 2) if has_residual else (2, tiles.MAX_RESIDENT_BACKWARD)
    # With a residual as well, 16 warps would leave a thread 64 registers on Turing, which is too few.
    warp = tiles.WARP_BACKWARD * (2 if has_residual else 1)
    return tiles.plan(n, c, groups, s, reads * itemsize, channels_last, limit, tiles.TILE_BACKWARD, warp)


def _dense(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _sizes(x: Tensor, channels_last: bool) -> tuple[int, int, int]:
    n, c, s = x.shape
    return (n, s, c) if channels_last else (n, c, s)


def _given(weight: Any, bias: Any, scale: Any, shift: Any) -> dict[str, bool]:
    return {
        "HAS_WEIGHT": weight is not None,
        "HAS_BIAS": bias is not None,
        "HAS_SCALE": scale is not None,
        "HAS_SHIFT": shift is not None,
    }


def _geometry(plan: tiles.Plan, c: int, groups: int, s: int, acc: Any) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Sizes, as the compiler may assume them to be multiples of up to 8; and how the tile lies."""
    d_vector, s_vector = math.gcd(c // groups, 8), math.gcd(s, 8)
    geometry = {
        "D_VECTOR": d_vector, "S_VECTOR": s_vector, "LAST": plan.last, "WIDE": c * s >= tiles.WIDE,
        "BLOCK_G": plan.block_g, "BLOCK_D": plan.block_d, "BLOCK_S": plan.block_s, "ACC": acc,
        "num_warps": plan.num_warps,
    }  # fmt: skip
    return (groups, c // groups // d_vector, s // s_vector, plan.g_blocks), geometry


def _batches(units: int, batch: int) -> list[tuple[int, int]]:
    return [(first, min(batch, units - first)) for first in range(0, units, batch)]


def _row(unit: int, plan: tiles.Plan, groups: int) -> int:
    """The first group, counted over all samples, of a unit."""
    n, block = divmod(unit, plan.g_blocks)
    return n * groups + block * plan.block_g


def _sum_rows(
    a: Tensor, b: Tensor, dw: Tensor, db: Tensor, rows: int, c: int, has_a: bool, has_b: bool, acc: Any
) -> None:
    """dw = a.sum(0), db = b.sum(0): in two steps when there are many rows."""
    while True:
        each = rows if rows <= tiles.SUM_ROWS else tiles.SUM_EACH
        programs = triton.cdiv(rows, each)
        sum_a, sum_b = (
            (dw, db)
            if programs == 1
            else tuple(t.new_empty((programs, c)) if has else t for t, has in ((a, has_a), (b, has_b)))
        )
        tiles.sum_rows_kernel[(triton.cdiv(c, 16), programs)](
            a, b, sum_a, sum_b, rows, c, each,
            HAS_A=has_a, HAS_B=has_b, BLOCK_R=128, BLOCK_C=16, ACC=acc, num_warps=4,
        )  # fmt: skip
        if programs == 1:
            return
        a, b, rows = sum_a, sum_b, programs
