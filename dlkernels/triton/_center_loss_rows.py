"""The rows of the center loss: loss and gradients from one read of the features, and how many rows count."""

from __future__ import annotations

import triton
import triton.language as tl

from ._activation import sigmoid_pair
from ._common import DIVISOR_HERE, GRAD_EACH, GRAD_NONE, GRAD_STORED, LOSS_EACH, LOSS_NONE, LOSS_TOTAL
from ._common import published_divisor as published

ATTENTION_NONE, ATTENTION_WEIGHTS, ATTENTION_LOGITS = (tl.constexpr(i) for i in range(3))
# What becomes of a class's sum: the gradient in its center, its move, or its step alone.
OUT_GRAD, OUT_MOVE, OUT_STEP = (tl.constexpr(i) for i in range(3))
COUNT_HERE = tl.constexpr(512)  # labels that every program counts for itself: 4 KB from the L2


@triton.jit
def counts(label, ignore_index):
    """The rows that count: labels below 0 and ignore_index leave theirs out."""
    return (label >= 0) & (label != ignore_index)


@triton.jit
def attention_pair(a, ATTENTION: tl.constexpr, CHECKED: tl.constexpr, ACC: tl.constexpr):
    """A, and its derivative in what was given. CHECKED: NaN where it should lie in [0, 1] and does not."""
    weight = a
    slope = 1.0
    if ATTENTION == ATTENTION_LOGITS:
        weight, rest = sigmoid_pair(a, ACC)
        slope = weight * rest
    elif CHECKED:
        weight = tl.where((a < 0) | (a > 1), float("nan"), a)
    return weight, slope


@triton.jit(do_not_specialize=["n", "ignore_index", "steps"])
def count_rows_kernel(
    in_ptr,  # [N] labels, or [N] partial counts when MERGE
    out_ptr,  # [programs] partial counts, or [] the divisor when FINAL
    n,
    ignore_index,
    steps,
    MERGE: tl.constexpr,
    FINAL: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    # The divisor of a mean: how many rows count, at least 1.
    #
    # Math      max(1, sum_i [y_i >= 0 and y_i != ignore_index]).
    # Traffic   read y once.
    # Grid      one program per BLOCK * steps labels; one program when FINAL.
    # Requires  contiguous labels.
    # Result    exact.
    first = tl.program_id(0).to(tl.int64) * steps * BLOCK
    offs_n = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.int64)
    for step in range(steps):
        i = first + step * BLOCK + offs_n
        if MERGE:
            total += tl.load(in_ptr + i, mask=i < n, other=0)
        else:
            total += counts(tl.load(in_ptr + i, mask=i < n, other=-1), ignore_index).to(tl.int64)
    value = tl.sum(total, 0)
    if FINAL:
        tl.store(out_ptr, tl.maximum(value, 1).to(ACC))
    else:
        tl.store(out_ptr + tl.program_id(0), value)


@triton.jit(do_not_specialize=["n", "num_classes", "ignore_index", "d_vectors", "stride_g", "steps"])
def center_rows_kernel(
    x_ptr,  # [N, D] features
    t_ptr,  # [N] labels
    c_ptr,  # [K, D] centers
    a_ptr,  # [N, D] attention or its logits
    g_ptr,  # [N] gradient of the row losses, stride stride_g (GRAD_EACH)
    loss_ptr,  # [N], [programs] or []
    dx_ptr,  # [N, D]
    da_ptr,  # [N, D]
    divisor_ptr,  # []
    n,
    num_classes,
    ignore_index,
    d_vectors,
    stride_g,
    steps,
    D_VECTOR: tl.constexpr,
    ATTENTION: tl.constexpr,
    LOSS: tl.constexpr,
    GRAD: tl.constexpr,
    DIVISOR: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    # (Sparse) center loss, forward, and the rows of its backward.
    #
    # Math      loss_i = 1/2 sum_d A_id (x_id - c_yd)^2,  dx = A (x - c_y),  dA = 1/2 (x - c_y)^2 (logits: A (1 - A)).
    # Traffic   per element: read x (and A), write dx (and dA); c_y mostly from the L2. Rows left out are not read.
    # Grid      one program per `steps` blocks of BLOCK_R rows.
    # Requires  contiguous tensors but for g; D = d_vectors * D_VECTOR; at most COUNT_HERE rows for DIVISOR_HERE.
    # Result    bitwise reproducible: a fixed tree per program, partial sums to finalise_kernel. What is stored for the
    #           backward pass is divided by the divisor but for float16, each tensor by its own dtype. A label of K or
    #           more reads nothing: its row is NaN. So is what an attention outside of [0, 1] takes part in.
    pid = tl.program_id(0).to(tl.int64)
    d = d_vectors * D_VECTOR
    offs_r = tl.arange(0, BLOCK_R)
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    here = 1
    if DIVISOR == DIVISOR_HERE:
        i = tl.arange(0, COUNT_HERE)
        every = counts(tl.load(t_ptr + i, mask=i < n, other=-1), ignore_index)
        here = tl.maximum(tl.sum(every.to(tl.int32), 0), 1)
    divisor = published(divisor_ptr, divisor_ptr, n, here, DIVISOR, LOSS != LOSS_NONE, ACC)

    total = tl.zeros([BLOCK_R], ACC)
    for step in range(steps):
        row = (pid * steps + step) * BLOCK_R + offs_r
        mask_r = row < n
        label = tl.load(t_ptr + row, mask=mask_r, other=-1).to(tl.int64)
        keep = counts(label, ignore_index)
        bad = keep & (label >= num_classes)
        reads = keep & (label < num_classes)
        scale = tl.full([BLOCK_R], 1.0, ACC)
        if GRAD == GRAD_EACH:
            scale = tl.load(g_ptr + row * stride_g, mask=reads, other=0.0).to(ACC)
        scale = tl.where(bad, float("nan"), scale)[:, None]
        scale_x = scale
        scale_a = scale
        if GRAD == GRAD_STORED:
            if dx_ptr.dtype.element_ty != tl.float16:
                scale_x = scale / divisor
            if da_ptr.dtype.element_ty != tl.float16:
                scale_a = scale / divisor
        base = row[:, None] * d
        base_c = tl.where(reads, label, 0)[:, None] * d

        losses = tl.zeros([BLOCK_R, BLOCK_D], ACC)
        for start in range(0, d, BLOCK_D):
            offs = start + offs_d
            mask = reads[:, None] & (offs < d)
            # What is not read is 0 - 0: no loss and no gradient, whatever its attention.
            x = tl.load(x_ptr + base + offs, mask=mask, other=0.0).to(ACC)
            diff = x - tl.load(c_ptr + base_c + offs, mask=mask, other=0.0).to(ACC)
            pull = diff
            if ATTENTION != ATTENTION_NONE:
                a = tl.load(a_ptr + base + offs, mask=mask, other=0.0).to(ACC)
                weight, slope = attention_pair(a, ATTENTION, True, ACC)
                pull = weight * diff
            if LOSS != LOSS_NONE:
                losses += pull * diff
            if GRAD != GRAD_NONE:
                mask = mask_r[:, None] & (offs < d)
                tl.store(dx_ptr + base + offs, (scale_x * pull).to(dx_ptr.dtype.element_ty), mask=mask)
                if ATTENTION != ATTENTION_NONE:
                    da = (0.5 * scale_a) * (slope * (diff * diff))
                    tl.store(da_ptr + base + offs, da.to(da_ptr.dtype.element_ty), mask=mask)
        if LOSS != LOSS_NONE:
            loss = tl.where(bad, float("nan"), 0.5 * tl.sum(losses, 1))
            if LOSS == LOSS_EACH:
                tl.store(loss_ptr + row, loss, mask=mask_r)
            total += loss

    if LOSS != LOSS_NONE and LOSS != LOSS_EACH:
        value = tl.sum(total, 0)
        tl.store(loss_ptr + pid, value / divisor if LOSS == LOSS_TOTAL else value)
