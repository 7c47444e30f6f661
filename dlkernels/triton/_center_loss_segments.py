"""Sums over the rows of a class, in a fixed order: the gradient in the centers, and their update.

Rows sorted by class are cut where a class ends and at every multiple of `piece` positions. A class of one piece is done
by the program that sums it; the pieces of a longer class leave partial sums, and a second launch adds them. A block of
`piece` positions holds at most one class that goes on behind it and was not there before, so that two slots per
block are enough: 2 b for the piece at the start of block b, 2 b + 1 for one that starts later and goes on.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _center_loss_atomics as atomics
from ._center_loss_rows import ATTENTION_NONE, OUT_GRAD, OUT_MOVE, OUT_STEP, attention_pair, counts
from ._common import accumulator, number, scalar

MERGE_BLOCK = 32  # slots that the merge reads at once
POSITIONS = 1 << 16  # programs before each takes more than one position


# Kernels --------------------------------------------------------------------------------------------------------------


@triton.jit
def _write_class(
    total, count, label, position, offs, mask_d, d, out_ptr, c_ptr, slot_ptr, alpha,
    OUT: tl.constexpr, EMA: tl.constexpr, BY_CLASS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A class's sum of A (x - c) as its gradient, its new center, or its step; `position` is in the class."""
    row = label
    if OUT == OUT_GRAD:
        value = -total
    else:
        n = count.to(ACC)
        value = alpha * (total / (n if EMA else n + 1.0))
        if OUT == OUT_MOVE:
            value += tl.load(c_ptr + label * d + offs, mask=mask_d, other=0.0).to(ACC)
        else:
            row = label if BY_CLASS else position
            if tl.program_id(1) == 0:
                tl.store(slot_ptr + label, row)
    tl.store(out_ptr + row * d + offs, value.to(out_ptr.dtype.element_ty), mask=mask_d)


@triton.jit(do_not_specialize=["n", "num_classes", "ignore_index", "d_vectors", "stride_g", "alpha"])
def segments_kernel(
    x_ptr,  # [N, D] features
    c_ptr,  # [K, D] centers
    a_ptr,  # [N, D] attention or its logits
    g_ptr,  # [N] gradient of the row losses, stride stride_g (OUT_GRAD)
    sorted_ptr,  # [N] labels, ascending
    order_ptr,  # [N] their rows
    out_ptr,  # [K, D] dcenters (OUT_GRAD), centers (OUT_MOVE); [min(N, K), D] steps (OUT_STEP)
    slot_ptr,  # [K] row of a class's step (OUT_STEP)
    partial_ptr,  # [2 blocks, D]
    count_ptr,  # [2 blocks]
    n,
    num_classes,
    ignore_index,
    d_vectors,
    stride_g,
    alpha,
    D_VECTOR: tl.constexpr,
    ATTENTION: tl.constexpr,
    OUT: tl.constexpr,
    EMA: tl.constexpr,
    BY_CLASS: tl.constexpr,
    PIECE: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    # Sums over a class.
    #
    # Math      s_j = sum_{y_i = j} w_i A_i (x_i - c_j), w = g (OUT_GRAD) or 1:  dc_j = -s_j,
    #           c_j <- c_j + alpha s_j / (1 + n_j) (EMA: / n_j), or that step alone, for the island update.
    # Traffic   per element of x: read x (and A); per class: read c_j, write the result; labels from the caches.
    # Grid      (N / STEPS, D / BLOCK_D): a program does the pieces that start at its positions.
    # Requires  contiguous tensors but for g; a stable sort; D = d_vectors * D_VECTOR; out is c in OUT_MOVE.
    # Result    bitwise reproducible: rows in sorted order in a fixed tree, no atomics. Labels of K or more: nothing.
    alpha = scalar(alpha, ACC)
    d = d_vectors * D_VECTOR
    first = tl.program_id(0).to(tl.int64) * STEPS
    offs_d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < d
    offs_r = tl.arange(0, BLOCK_R)
    offs_p = tl.arange(0, PIECE)

    # The first piece that starts here; the others follow each other.
    place = first + tl.arange(0, STEPS)
    here = tl.load(sorted_ptr + place, mask=place < n, other=0)
    before = tl.load(sorted_ptr + place - 1, mask=(place > 0) & (place < n), other=0)
    starts = (here != before) | (place % PIECE == 0)
    stop = tl.minimum(first + STEPS, n)
    position = tl.min(tl.where(starts, place, stop), 0)
    while position < stop:
        label = tl.load(sorted_ptr + position).to(tl.int64)
        window = position + offs_p
        inside = (window < n) & (window // PIECE == position // PIECE)
        same = inside & (tl.load(sorted_ptr + window, mask=inside, other=-1) == label)
        count = tl.sum(same.to(tl.int32), 0)
        if counts(label, ignore_index) & (label < num_classes):
            c = tl.load(c_ptr + label * d + offs_d, mask=mask_d, other=0.0).to(ACC)[None, :]
            sums = tl.zeros([BLOCK_R, BLOCK_D], ACC)
            for start in range(0, count, BLOCK_R):
                mask_r = start + offs_r < count
                row = tl.load(order_ptr + position + start + offs_r, mask=mask_r, other=0)
                offs = row[:, None] * d + offs_d[None, :]
                mask = mask_r[:, None] & mask_d[None, :]
                x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(ACC)
                pull = tl.where(mask, x - c, 0.0)
                if ATTENTION != ATTENTION_NONE:
                    a = tl.load(a_ptr + offs, mask=mask, other=0.0).to(ACC)
                    pull *= attention_pair(a, ATTENTION, False, ACC)[0]
                if OUT == OUT_GRAD:
                    g = tl.load(g_ptr + row * stride_g, mask=mask_r, other=0.0).to(ACC)
                    pull *= g[:, None]
                sums += pull
            total = tl.sum(sums, 0)
            end = position + count
            goes_on = tl.load(sorted_ptr + end, mask=end < n, other=-1) == label
            came = tl.load(sorted_ptr + position - 1, mask=position > 0, other=-1) == label
            if came | goes_on:
                slot = 2 * (position // PIECE) + (position % PIECE != 0).to(tl.int64)
                tl.store(partial_ptr + slot * d + offs_d, total, mask=mask_d)
                if tl.program_id(1) == 0:
                    tl.store(count_ptr + slot, count)
            else:
                _write_class(
                    total, count, label, position, offs_d, mask_d, d, out_ptr, c_ptr, slot_ptr, alpha,
                    OUT, EMA, BY_CLASS, ACC,
                )  # fmt: skip
        position += count


@triton.jit(do_not_specialize=["n", "num_classes", "ignore_index", "d_vectors", "blocks", "alpha"])
def merge_kernel(
    c_ptr,  # [K, D] centers
    sorted_ptr,  # [N] labels, ascending
    out_ptr,  # as in segments_kernel
    slot_ptr,  # [K]
    partial_ptr,  # [2 blocks, D]
    count_ptr,  # [2 blocks]
    n,
    num_classes,
    ignore_index,
    d_vectors,
    blocks,
    alpha,
    D_VECTOR: tl.constexpr,
    OUT: tl.constexpr,
    EMA: tl.constexpr,
    BY_CLASS: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    # The classes of several pieces.
    #
    # Math      as segments_kernel, s_j and n_j summed over the pieces of j.
    # Traffic   read the partial sums once; per class: read c_j, write the result.
    # Grid      (blocks - 1, D / BLOCK_D): a program does the class that starts in its block and goes on, if any.
    # Requires  more than one block; partial sums of all pieces.
    # Result    bitwise reproducible: slots in their order in a fixed tree, no atomics.
    alpha = scalar(alpha, ACC)
    d = d_vectors * D_VECTOR
    block = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < d
    offs_s = tl.arange(0, BLOCK_S)
    last = (block + 1) * PIECE - 1
    label = tl.load(sorted_ptr + last).to(tl.int64)
    goes_on = tl.load(sorted_ptr + last + 1) == label
    came = tl.load(sorted_ptr + block * PIECE - 1, mask=block > 0, other=-1) == label
    if goes_on & (came == 0) & counts(label, ignore_index) & (label < num_classes):
        whole = tl.load(sorted_ptr + block * PIECE) == label
        head = 2 * block + (whole == 0).to(tl.int64)
        total = tl.load(partial_ptr + head * d + offs_d, mask=mask_d, other=0.0)
        count = tl.load(count_ptr + head).to(tl.int64)
        sums = tl.zeros([BLOCK_S, BLOCK_D], ACC)
        rows = tl.zeros([BLOCK_S], tl.int64)
        start = block + 1
        while start < blocks:
            s = start + offs_s
            mine = tl.load(sorted_ptr + s * PIECE, mask=s < blocks, other=-1) == label
            slot = 2 * tl.where(mine, s, 0)
            mask = mine[:, None] & mask_d[None, :]
            sums += tl.load(partial_ptr + slot[:, None] * d + offs_d[None, :], mask=mask, other=0.0)
            rows += tl.load(count_ptr + slot, mask=mine, other=0)
            all_mine = tl.min(mine.to(tl.int32), 0) == 1
            start = tl.where(all_mine, start + BLOCK_S, blocks)
        total += tl.sum(sums, 0)
        count += tl.sum(rows, 0)
        _write_class(
            total, count, label, last, offs_d, mask_d, d, out_ptr, c_ptr, slot_ptr, alpha, OUT, EMA, BY_CLASS, ACC
        )  # fmt: skip


# Host -----------------------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """How programs cover the sorted rows. A function of the shapes alone, so that the order of sums is."""

    piece: int  # rows of a piece at most
    steps: int  # positions of a program
    block_r: int
    block_d: int
    num_warps: int


def plan(n: int, k: int, d: int) -> Plan:
    """Few rows per class: wide tiles of few rows. Longer pieces where there are many rows: the merge stays short."""
    piece = 64 if n <= 1 << 14 else 256 if n <= 1 << 18 else 1024
    block_r, block_d = (4, 512) if n < 8 * k else (16, 128)
    block_d = min(block_d, max(16, triton.next_power_of_2(d)))
    steps = 1 if n * triton.cdiv(d, block_d) <= POSITIONS else 16
    return Plan(piece, steps, block_r, block_d, max(1, block_r * block_d // 512))


def class_sums(
    x: Tensor,
    labels: Tensor,
    centers: Tensor,
    attention: Tensor | None,
    kind: Any,
    g: Tensor | None,
    out: Tensor,
    slot: Tensor | None,
    out_kind: Any,
    alpha: float,
    ema: bool,
    ignore_index: int,
) -> None:
    """Write what out_kind says of every class that has rows; the others' rows of `out` stay as they are."""
    (n, d), k = x.shape, centers.shape[0]
    if n == 0 or k == 0 or d == 0:
        return
    if atomics.allowed(n, k):
        atomics.atomic_class_sums(
            x, labels, centers, attention, kind, g, out, slot, out_kind, alpha, ema, ignore_index
        )  # fmt: skip
        return
    p = plan(n, k, d)
    ordered, order = torch.sort(labels, stable=True)
    acc, dtype = accumulator(x.dtype)
    blocks = triton.cdiv(n, p.piece)
    several = blocks > 1
    partial = x.new_empty((2 * blocks, d), dtype=dtype) if several else out
    count = order.new_empty((2 * blocks,), dtype=torch.int32) if several else order
    vector = math.gcd(d, 8)
    slabs = triton.cdiv(d, p.block_d)
    sizes = (n, k, ignore_index, d // vector)
    shared = {
        "D_VECTOR": vector, "OUT": out_kind.value, "EMA": ema, "BY_CLASS": out_kind is OUT_STEP and k <= n,
        "PIECE": p.piece, "BLOCK_D": p.block_d, "ACC": acc,
    }  # fmt: skip
    rows = order if slot is None else slot
    alpha_bits = number(alpha, x.dtype)
    segments_kernel[(triton.cdiv(n, p.steps), slabs)](
        x, centers, x if attention is None else attention, x if g is None else g, ordered, order, out, rows, partial,
        count, *sizes, 0 if g is None else g.stride(0), alpha_bits,
        ATTENTION=kind.value, STEPS=p.steps, BLOCK_R=p.block_r, num_warps=p.num_warps, **shared,
    )  # fmt: skip
    if several:
        merge_kernel[(blocks - 1, slabs)](
            centers, ordered, out, rows, partial, count, *sizes, blocks, alpha_bits,
            BLOCK_S=MERGE_BLOCK, num_warps=8, **shared,
        )  # fmt: skip
