"""Tiles of GroupNorm: which groups, channels and positions a program covers, and how they lie in memory.

A tile has three dimensions in memory order, [G, D, S] or with channels last [S, G, D] (D = C / G channels of a group, S
positions), so that neighbouring lanes read neighbouring addresses and per-channel numbers broadcast.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import triton
import triton.language as tl

from ._activation import activate_grad

# Elements of a tile that stay in registers without spilling, with up to 16 warps (tests/test_triton_aot.py): half of
# that where they cannot be read in vectors, since every element has an address of its own, or with a residual.
MAX_RESIDENT, WARP = 16384, 512
MAX_RESIDENT_BACKWARD, WARP_BACKWARD = 8192, 256  # x and dy
TILE, TILE_BACKWARD = 8192, 4096  # where a group is split
SMALL = 2048  # smaller groups share a program
MAX_CHUNKS = 128  # pieces of a group whose statistics are merged
PROGRAMS = 1024  # enough for every multiprocessor
MAX_ROWS = 4096  # partial sums of the parameters' gradients
SUM_ROWS, SUM_EACH = 512, 128  # as many are added by one program; more are added in pieces first
WIDE = 1 << 31  # elements of a sample that need 64-bit offsets
BATCH_BYTES = 32 << 20  # what is read twice, in groups that the L2 of a large GPU holds from one kernel to the next


# Device functions -----------------------------------------------------------------------------------------------------


@triton.jit
def tile_axes(BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, LAST: tl.constexpr):
    """Group, channel and position of the tile's elements; scalars where a tile has one group or one channel.

    A scalar has no layout among threads. A tensor of one element has one, and to bring it into that of the tile the
    compiler may spread the whole tile over shared memory.
    """
    offs_g = tl.full([], 0, tl.int32)
    offs_d = tl.full([], 0, tl.int32)
    offs_s = tl.arange(0, BLOCK_S)
    if LAST:
        offs_s = offs_s[:, None, None]
        if BLOCK_G > 1:
            offs_g = tl.arange(0, BLOCK_G)[None, :, None]
        if BLOCK_D > 1:
            offs_d = tl.arange(0, BLOCK_D)[None, None, :]
    else:
        offs_s = offs_s[None, None, :]
        if BLOCK_G > 1:
            offs_g = tl.arange(0, BLOCK_G)[:, None, None]
        if BLOCK_D > 1:
            offs_d = tl.arange(0, BLOCK_D)[None, :, None]
    return offs_g, offs_d, offs_s


@triton.jit
def tile_strides(groups, d, s, LAST: tl.constexpr, WIDE: tl.constexpr):
    """Elements from a group, channel and position to the next; 64 bits when a sample has 2^31 elements or more."""
    if WIDE:
        d = d.to(tl.int64)
        s = s.to(tl.int64)
    if LAST:
        step_g = d
        step_d = 1
        step_s = groups * d
    else:
        step_g = d * s
        step_d = s
        step_s = 1
    return step_g, step_d, step_s


@triton.jit
def over_positions(t, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, LAST: tl.constexpr):
    """Of a tile: the sum over positions, one number per channel."""
    AXIS: tl.constexpr = 0 if LAST else 2
    if BLOCK_G * BLOCK_D == 1:
        total = tl.sum(tl.reshape(t, [t.numel]), 0)
    else:
        total = tl.sum(t, AXIS, keep_dims=True)
    return total


@triton.jit
def over_channels(t, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, LAST: tl.constexpr):
    """Of one number per channel: the sum over the channels of a group."""
    AXIS: tl.constexpr = 2 if LAST else 1
    if BLOCK_D == 1:
        total = t
    elif BLOCK_G == 1:
        total = tl.sum(tl.reshape(t, [BLOCK_D]), 0)
    else:
        total = tl.sum(t, AXIS, keep_dims=True)
    return total


@triton.jit
def over_group(t, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, LAST: tl.constexpr):
    """Of a tile: one number per group."""
    if BLOCK_G == 1:
        total = tl.sum(tl.reshape(t, [t.numel]), 0)
    else:
        total = over_channels(over_positions(t, BLOCK_G, BLOCK_D, LAST), BLOCK_G, BLOCK_D, LAST)
    return total


@triton.jit
def channel_terms(
    w_ptr, b_ptr, scale_ptr, c, nc, mask, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Weight, bias, 1 + scale of channels c."""
    w = tl.full(mask.shape, 1.0, ACC)
    b = tl.zeros(mask.shape, ACC)
    k = tl.full(mask.shape, 1.0, ACC)
    if HAS_WEIGHT:
        w = tl.load(w_ptr + c, mask=mask, other=0.0).to(ACC)
    if HAS_BIAS:
        b = tl.load(b_ptr + c, mask=mask, other=0.0).to(ACC)
    if HAS_SCALE:
        k = 1.0 + tl.load(scale_ptr + nc, mask=mask, other=0.0).to(ACC)
    return w, b, k


@triton.jit
def affine_terms(
    w_ptr, b_ptr, scale_ptr, shift_ptr, c, nc, mask, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A and B of z = A x_hat + B."""
    w, b, k = channel_terms(w_ptr, b_ptr, scale_ptr, c, nc, mask, HAS_WEIGHT, HAS_BIAS, HAS_SCALE, ACC)
    add = b * k
    if HAS_SHIFT:
        add += tl.load(shift_ptr + nc, mask=mask, other=0.0).to(ACC)
    return w * k, add


@triton.jit
def before_activation(
    dy, x_hat, mul, add, r_ptrs, mask, ACT: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACC: tl.constexpr
):
    """dz = dy act'(z), 0 outside of the mask."""
    if ACT != 0:
        z = x_hat * mul + add
        if HAS_RESIDUAL:
            z += tl.load(r_ptrs, mask=mask, other=0.0, eviction_policy="evict_first").to(ACC)
        dy = tl.where(mask, dy * activate_grad(z, ACT, ACC), 0.0)
    return dy


# Kernel ---------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows", "c", "rows_per_program"])
def sum_rows_kernel(
    a_ptr,  # [rows, c]
    b_ptr,  # [rows, c]
    sum_a_ptr,  # [programs, c]
    sum_b_ptr,  # [programs, c]
    rows,
    c,
    rows_per_program,
    HAS_A: tl.constexpr,
    HAS_B: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    # The gradients of weight and bias: sums over samples.
    #
    # Math      sum_a[c] = sum_r a[r, c], the same for b.
    # Traffic   read a and b once.
    # Grid      axis 0: blocks of channels; axis 1: pieces of rows_per_program rows.
    # Requires  contiguous a and b.
    # Result    bitwise reproducible: rows are added in the order of their index, no atomics.
    pid_c = tl.program_id(0)
    pid_r = tl.program_id(1).to(tl.int64)
    offs_c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    offs_r = tl.arange(0, BLOCK_R)[:, None]
    first = pid_r * rows_per_program
    here = tl.minimum(rows - first, rows_per_program).to(tl.int32)
    a_total = tl.zeros([BLOCK_R, BLOCK_C], ACC)
    b_total = tl.zeros([BLOCK_R, BLOCK_C], ACC)
    for start in range(0, here, BLOCK_R):
        offs = (first + start + offs_r) * c + offs_c
        mask = (offs_r < here - start) & (offs_c < c)
        if HAS_A:
            a_total += tl.load(a_ptr + offs, mask=mask, other=0.0)
        if HAS_B:
            b_total += tl.load(b_ptr + offs, mask=mask, other=0.0)
    out = pid_r * c + offs_c
    if HAS_A:
        total = tl.sum(a_total, 0, keep_dims=True)
        tl.store(sum_a_ptr + out, total.to(sum_a_ptr.dtype.element_ty), mask=offs_c < c)
    if HAS_B:
        total = tl.sum(b_total, 0, keep_dims=True)
        tl.store(sum_b_ptr + out, total.to(sum_b_ptr.dtype.element_ty), mask=offs_c < c)


# Plan -----------------------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """How programs cover (N, C, S) in G groups. Blocks depend on the shape of a sample alone: N compiles nothing."""

    resident: bool  # whole groups stay in registers; else they are split into tiles of [block_d, block_s]
    last: bool  # channels innermost
    block_g: int
    block_d: int
    block_s: int
    num_warps: int
    g_blocks: int
    units: int  # blocks of groups in the whole batch: N * g_blocks
    d_blocks: int  # tiles of a unit: d_blocks * s_blocks
    s_blocks: int
    batch: int  # units from one launch of two-launch regimes to the next


def power(value: int) -> int:
    return triton.next_power_of_2(value)


def doubled(block_g: int, groups: int, enough: Any) -> int:
    """Twice as many groups until there are enough, or all."""
    while block_g < groups and not enough(block_g):
        block_g *= 2
    return block_g


@functools.lru_cache(maxsize=4096)
def plan(
    n: int, c: int, groups: int, s: int, itemsize: int, channels_last: bool, limit: int, tile: int, warp: int
) -> Plan:
    """Resident when a padded group has at most `limit` elements, else tiles of `tile`.

    A resident group is never split for want of programs: 16384 elements take one multiprocessor a microsecond or two,
    less than a second launch. Channels last reads at least 32 bytes (split: 128) of neighbouring groups together.
    `itemsize` counts all that is read twice; `warp` is the number of elements of a warp when resident.
    """
    d = c // groups
    last = channels_last or s == 1  # (N, C, 1) is (N, 1, C)
    block_d, block_s = power(d), power(s)
    if math.gcd(d if last else s, 8) < 4:
        limit, warp = limit // 2, warp // 2
    block_g = doubled(1, groups, lambda b: b * d * itemsize >= 32) if last and s > 1 else 1
    resident = block_g * block_d * block_s <= limit
    if resident:
        block_g = doubled(block_g, groups, lambda b: 2 * b * block_d * block_s > SMALL)
    elif last:
        block_d = min(block_d, 256, tile)
        block_g = 1 if block_d < d else doubled(1, groups, lambda b: b * d * itemsize >= 128 or 2 * b * block_d > tile)
        block_s = min(block_s, tile // (block_g * block_d))
    else:
        block_g, block_s = 1, min(block_s, tile)
        block_d = min(block_d, tile // block_s)
    num_warps = max(1, min(16, block_g * block_d * block_s // (warp if resident else 512)))
    g_blocks = triton.cdiv(groups, block_g)
    units = n * g_blocks
    return Plan(
        resident, last, block_g, block_d, block_s, num_warps, g_blocks, units, triton.cdiv(d, block_d),
        triton.cdiv(s, block_s),
        max(1, min(units, BATCH_BYTES // (block_g * d * s * itemsize))),
    )  # fmt: skip


def split(tiles: int, units: int) -> tuple[int, int]:
    """Pieces of a unit and tiles of a piece: enough programs, few pieces to merge."""
    steps = triton.cdiv(tiles, min(MAX_CHUNKS, triton.cdiv(PROGRAMS, units)))
    return triton.cdiv(tiles, steps), steps
