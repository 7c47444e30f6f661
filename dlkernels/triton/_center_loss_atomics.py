"""Sums over the rows of a class by atomic additions: opt-in, without a sort, and not the same from run to run.

`DLKERNELS_ATOMICS=1` in the environment asks for them, torch.use_deterministic_algorithms(True) forbids them. They
serve batches with at least as many rows as classes, so that the sums of all classes take no more memory than a batch.
"""

from __future__ import annotations

import math
import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._center_loss_rows import ATTENTION_NONE, OUT_GRAD, OUT_MOVE, attention_pair, counts
from ._common import accumulator, number, scalar

TILE = 2048


def allowed(n: int, k: int) -> bool:
    asked = os.environ.get("DLKERNELS_ATOMICS", "0") not in ("", "0")
    return asked and k <= n and not torch.are_deterministic_algorithms_enabled()


@triton.jit(do_not_specialize=["n", "num_classes", "ignore_index", "d_vectors", "stride_g"])
def atomic_rows_kernel(
    x_ptr,  # [N, D] features
    t_ptr,  # [N] labels
    c_ptr,  # [K, D] centers
    a_ptr,  # [N, D] attention or its logits
    g_ptr,  # [N] gradient of the row losses, stride stride_g (OUT_GRAD)
    sum_ptr,  # [K, D] zeros
    count_ptr,  # [K] zeros
    n,
    num_classes,
    ignore_index,
    d_vectors,
    stride_g,
    D_VECTOR: tl.constexpr,
    ATTENTION: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    # Sums and counts of the classes.
    #
    # Math      s_j = sum_{y_i = j} w_i A_i (x_i - c_j), w = g (OUT_GRAD) or 1;  n_j.
    # Traffic   per element: read x (and A); c_j and the additions to s_j in the L2 while K D fits there.
    # Grid      (N / BLOCK_R, D / BLOCK_D).
    # Requires  contiguous tensors but for g; D = d_vectors * D_VECTOR.
    # Result    not reproducible: atomic additions in any order. Labels of K or more: nothing.
    d = d_vectors * D_VECTOR
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    label = tl.load(t_ptr + row, mask=row < n, other=-1)
    keep = counts(label, ignore_index) & (label < num_classes)
    label = tl.where(keep, label, 0).to(tl.int64)
    mask = keep[:, None] & (offs_d < d)[None, :]
    offs = row[:, None] * d + offs_d[None, :]
    at = label[:, None] * d + offs_d[None, :]
    pull = tl.load(x_ptr + offs, mask=mask, other=0.0).to(ACC) - tl.load(c_ptr + at, mask=mask, other=0.0).to(ACC)
    if ATTENTION != ATTENTION_NONE:
        a = tl.load(a_ptr + offs, mask=mask, other=0.0).to(ACC)
        pull *= attention_pair(a, ATTENTION, False, ACC)[0]
    if OUT == OUT_GRAD:
        pull *= tl.load(g_ptr + row * stride_g, mask=keep, other=0.0).to(ACC)[:, None]
    tl.atomic_add(sum_ptr + at, pull, mask=mask, sem="relaxed")
    if tl.program_id(1) == 0:
        tl.atomic_add(count_ptr + label, 1, mask=keep, sem="relaxed")


@triton.jit(do_not_specialize=["num_classes", "d_vectors", "alpha"])
def atomic_apply_kernel(
    c_ptr,  # [K, D] centers
    sum_ptr,  # [K, D]
    count_ptr,  # [K]
    out_ptr,  # [K, D]: dcenters (OUT_GRAD), centers (OUT_MOVE), steps
    slot_ptr,  # [K] row of a class's step
    num_classes,
    d_vectors,
    alpha,
    D_VECTOR: tl.constexpr,
    OUT: tl.constexpr,
    EMA: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    # What becomes of the sums of the classes with rows.
    #
    # Math      dc_j = -s_j;  c_j <- c_j + alpha s_j / (1 + n_j) (EMA: / n_j), or that step alone.
    # Traffic   per class with rows: read s_j (and c_j), write the result.
    # Grid      (K / BLOCK_R, D / BLOCK_D).
    # Requires  contiguous tensors; D = d_vectors * D_VECTOR; out is c in OUT_MOVE.
    # Result    that of the sums.
    alpha = scalar(alpha, ACC)
    d = d_vectors * D_VECTOR
    k = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    count = tl.load(count_ptr + k, mask=k < num_classes, other=0)
    present = count > 0
    mask = present[:, None] & (offs_d < d)[None, :]
    at = k[:, None] * d + offs_d[None, :]
    total = tl.load(sum_ptr + at, mask=mask, other=0.0)
    if OUT == OUT_GRAD:
        value = -total
    else:
        rows = tl.maximum(count, 1).to(ACC)
        value = alpha * (total / (rows if EMA else rows + 1.0)[:, None])
        if OUT == OUT_MOVE:
            value += tl.load(c_ptr + at, mask=mask, other=0.0).to(ACC)
        elif tl.program_id(1) == 0:
            tl.store(slot_ptr + k, k, mask=present)
    tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=mask)


def atomic_class_sums(
    x: Tensor, labels: Tensor, centers: Tensor, attention: Tensor | None, kind: Any, g: Tensor | None, out: Tensor,
    slot: Tensor | None, out_kind: Any, alpha: float, ema: bool, ignore_index: int,
) -> None:  # fmt: skip
    """As `_center_loss_segments.class_sums`, for K <= N."""
    (n, d), k = x.shape, centers.shape[0]
    acc, dtype = accumulator(x.dtype)
    sums = x.new_zeros((k, d), dtype=dtype)
    count = labels.new_zeros((k,), dtype=torch.int32)
    vector = math.gcd(d, 8)
    block_d = min(128, max(16, triton.next_power_of_2(d)))
    shared = {
        "D_VECTOR": vector, "OUT": out_kind.value, "BLOCK_R": TILE // block_d, "BLOCK_D": block_d, "ACC": acc,
        "num_warps": 4,
    }  # fmt: skip
    slabs, rows = triton.cdiv(d, block_d), TILE // block_d
    atomic_rows_kernel[(triton.cdiv(n, rows), slabs)](
        x, labels, centers, x if attention is None else attention, x if g is None else g, sums, count, n, k,
        ignore_index, d // vector, 0 if g is None else g.stride(0), ATTENTION=kind.value, **shared,
    )  # fmt: skip
    atomic_apply_kernel[(triton.cdiv(k, rows), slabs)](
        centers, sums, count, out, labels if slot is None else slot, k, d // vector, number(alpha, x.dtype),
        EMA=ema, **shared,
    )  # fmt: skip
