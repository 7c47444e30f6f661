"""AdamW on GPUs: all parameters of one kind in one launch."""

from __future__ import annotations

import triton
import triton.language as tl

from ._philox import element_numbers, random_bits, round_by
from ._tables import accumulated, cast, locate, place, pointer, streamed_load, streamed_store


@triton.jit
def _adamw_block(
    addresses,  # param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, master, average: int64
    scalars,  # as adamw_kernel loads them
    where,  # offset, period, full_period, number, seed, step: int64
    start,
    numel,
    FULL: tl.constexpr,
    PARAM: tl.constexpr,
    SLOT: tl.constexpr,
    AMSGRAD: tl.constexpr,
    MASTER: tl.constexpr,
    AVERAGE: tl.constexpr,
    ROUND_PARAM: tl.constexpr,
    ROUND_SLOTS: tl.constexpr,
    GROUPED: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    p_address, g_address, m_address, v_address, vmax_address, master_address, average_address = addresses
    multiplier, keep, average_weight, step_size, beta1, rest1, beta2, rest2, eps, inv_sqrt_correction2 = scalars
    offset, period, full_period, number, seed, step = where
    offs = tl.arange(0, BLOCK)
    mask = offs < numel - start
    p_ptr = pointer(p_address, start, PARAM, FULL) + offs
    m_ptr = pointer(m_address, start, SLOT, FULL) + offs
    v_ptr = pointer(v_address, start, SLOT, FULL) + offs
    g = streamed_load(pointer(g_address, start, PARAM, FULL) + offs, mask, FULL, ACC)
    m = streamed_load(m_ptr, mask, FULL, ACC)
    v = streamed_load(v_ptr, mask, FULL, ACC)
    if AMSGRAD:
        vmax_ptr = pointer(vmax_address, start, SLOT, FULL) + offs
        vmax = streamed_load(vmax_ptr, mask, FULL, ACC)
    if MASTER:
        master_ptr = pointer(master_address, start, ACC, FULL) + offs
        theta = streamed_load(master_ptr, mask, FULL, ACC)
    else:
        theta = streamed_load(p_ptr, mask, FULL, ACC)
    if AVERAGE:
        average_ptr = pointer(average_address, start, ACC, FULL) + offs
        average = streamed_load(average_ptr, mask, FULL, ACC)

    g *= multiplier
    m = beta1 * m + rest1 * g
    v = beta2 * v + rest2 * g * g
    vh = v
    if AMSGRAD:
        if ROUND_SLOTS:  # the largest of those stored is stored exactly
            e = element_numbers(start, offset, period, full_period, BLOCK, GROUPED, WHOLE)
            v_out = round_by(v, random_bits(e, number, step, seed, 2, BLOCK, GROUPED))
            vh = cast(v_out, ACC)
        vh = tl.where((vh <= vmax) | (vmax != vmax), vmax, vh)  # NaN in either stays
    denom = tl.sqrt(vh) * inv_sqrt_correction2 + eps
    theta = theta * keep - step_size * m / denom

    m_out = cast(m, SLOT)
    if not (AMSGRAD and ROUND_SLOTS):
        v_out = cast(v, SLOT)
    p_out = cast(theta, PARAM)
    if ROUND_PARAM or ROUND_SLOTS:
        e = element_numbers(start, offset, period, full_period, BLOCK, GROUPED, WHOLE)
    if ROUND_SLOTS:
        m_out = round_by(m, random_bits(e, number, step, seed, 1, BLOCK, GROUPED))
        if not AMSGRAD:
            v_out = round_by(v, random_bits(e, number, step, seed, 2, BLOCK, GROUPED))
    if ROUND_PARAM:
        p_out = round_by(theta, random_bits(e, number, step, seed, 0, BLOCK, GROUPED))
    streamed_store(m_ptr, m_out, mask, FULL)
    streamed_store(v_ptr, v_out, mask, FULL)
    if AMSGRAD:
        streamed_store(vmax_ptr, cast(vh, SLOT), mask, FULL)
    streamed_store(p_ptr, p_out, mask, FULL)
    if MASTER:
        streamed_store(master_ptr, theta, mask, FULL)
    if AVERAGE:
        value = theta if MASTER else cast(p_out, ACC)
        streamed_store(average_ptr, average + average_weight * (value - average), mask, FULL)


@triton.jit(do_not_specialize=["steps"])
def adamw_kernel(
    items_ptr,  # [items, 16] int64: sizes, pointers, places
    grads_ptr,  # [items] int64: pointers
    pieces_ptr,  # [programs, 2] int32: item, which piece of it
    rows_ptr,  # [rows, 16] float64: scalars, made by prepare_kernel
    steps,  # blocks of a piece
    PARAM: tl.constexpr,
    SLOT: tl.constexpr,
    AMSGRAD: tl.constexpr,
    MASTER: tl.constexpr,
    AVERAGE: tl.constexpr,
    ROUND_PARAM: tl.constexpr,
    ROUND_SLOTS: tl.constexpr,
    GROUPED: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
    ACC: tl.constexpr,
):
    # AdamW for all parameters that have these dtypes and this state.
    #
    # Math      g = multiplier grad;  m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2;
    #           vh = v, with AMSGRAD vmax = max(vmax, v);  theta = keep theta - step_size m / (sqrt(vh) c + eps);
    #           average += (1 - decay) (theta - average).
    # Traffic   per element: read and write theta, m and v, read grad: 28 bytes in float32. vmax, master and average are
    #           read and written too; with a master the parameter is only written. Nothing of a step that is skipped.
    # Grid      one program per piece of `steps` blocks of BLOCK elements of one parameter.
    # Requires  tables as _multi_tensor.py writes them; the tensors of an item dense, in one layout.
    # Result    bitwise reproducible; stochastic rounding depends on seed, step, parameter and element only.
    item_ptr, row_ptr, addresses, first, last, tail, end = locate(
        items_ptr, grads_ptr, pieces_ptr, rows_ptr, steps, BLOCK, TAIL
    )
    numel = tl.load(item_ptr)
    scalars = (
        accumulated(row_ptr + 2, ACC), accumulated(row_ptr + 3, ACC), accumulated(row_ptr + 4, ACC),
        accumulated(row_ptr + 5, ACC), accumulated(row_ptr + 6, ACC), accumulated(row_ptr + 7, ACC),
        accumulated(row_ptr + 8, ACC), accumulated(row_ptr + 9, ACC), accumulated(row_ptr + 10, ACC),
        accumulated(row_ptr + 11, ACC),
    )  # fmt: skip
    where = place(item_ptr, row_ptr)
    if tl.load(row_ptr) == 0:
        for block in range(first, last):
            _adamw_block(
                addresses, scalars, where, block * BLOCK, numel, True, PARAM, SLOT, AMSGRAD, MASTER, AVERAGE,
                ROUND_PARAM, ROUND_SLOTS, GROUPED, WHOLE, BLOCK, ACC,
            )  # fmt: skip
        for block in range(tail, end):
            _adamw_block(
                addresses, scalars, where, block * TAIL, numel, False, PARAM, SLOT, AMSGRAD, MASTER, AVERAGE,
                ROUND_PARAM, ROUND_SLOTS, GROUPED, WHOLE, TAIL, ACC,
            )  # fmt: skip
