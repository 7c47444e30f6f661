"""Before a fused step: the sum of the squares of many gradients, then counters, scalars and whether to step at all."""

from __future__ import annotations

import triton
import triton.language as tl

from ._tables import pointer, streamed_load


@triton.jit
def _scaled_squares(
    address, first, last, tail, end, stop, scale, DTYPE: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """The sum of (scale g)^2 in float64, and the largest |g| (NaN left out)."""
    offs = tl.arange(0, BLOCK)
    squares, largest = tl.zeros([BLOCK], ACC), tl.zeros([BLOCK], ACC)
    for block in range(first, last):
        ptr = pointer(address, block * BLOCK, DTYPE, True) + offs
        g = streamed_load(ptr, offs >= 0, True, ACC)
        largest = tl.maximum(largest, tl.abs(g))
        g *= scale
        squares += g * g
    offs_t = tl.arange(0, TAIL)
    squares_t, largest_t = tl.zeros([TAIL], ACC), tl.zeros([TAIL], ACC)
    for block in range(tail, end):
        ptr = pointer(address, block * TAIL, DTYPE, False) + offs_t
        g = streamed_load(ptr, offs_t < stop - block * TAIL, False, ACC)
        largest_t = tl.maximum(largest_t, tl.abs(g))
        g *= scale
        squares_t += g * g
    total = tl.sum(squares.to(tl.float64), 0) + tl.sum(squares_t.to(tl.float64), 0)
    return total, tl.maximum(tl.max(largest, 0), tl.max(largest_t, 0))


@triton.jit(do_not_specialize=["steps"])
def squares_kernel(
    numels_ptr,  # [items] int64: sizes
    grads_ptr,  # [items] int64: pointers
    pieces_ptr,  # [programs, 4] int32: item, which piece of it, where its sum goes, -
    partial_ptr,  # [pieces of all dtypes] float64
    steps,  # blocks of a piece
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
    ACC: tl.constexpr,
):
    # The sums of squares of pieces of gradients, any float32 magnitude.
    #
    # Math      sum_i g_i^2. Lanes add `steps` squares in float32 and the program adds the lanes in float64. Where the
    #           largest |g| of a piece is outside of [2^-40, 2^40), squares may have left the range of float32: the
    #           piece is read again and scaled by 2^96 or 2^-80. float64 gradients: in float64, not scaled.
    # Traffic   read g once; twice in a piece of such magnitudes. Per element one product more than a plain sum: |g|.
    # Grid      one program per piece of `steps` blocks of BLOCK elements of one gradient.
    # Requires  dense gradients.
    # Result    bitwise reproducible: a fixed tree, no atomics. Not finite where a g is not finite (and for float64
    #           where the sum is not).
    pid = tl.program_id(0).to(tl.int64)
    item = tl.load(pieces_ptr + 4 * pid).to(tl.int64)
    first = tl.load(pieces_ptr + 4 * pid + 1).to(tl.int64) * steps
    stop = tl.minimum(tl.load(numels_ptr + item), (first + steps) * BLOCK)
    address = tl.load(grads_ptr + item)
    last = tl.where((address & 15) == 0, stop // BLOCK, first)
    tail, end = last * (BLOCK // TAIL), tl.cdiv(stop, TAIL)
    total, largest = _scaled_squares(address, first, last, tail, end, stop, 1.0, DTYPE, BLOCK, TAIL, ACC)
    if ACC != tl.float64:  # noqa: SIM300
        outside = (largest >= 1099511627776.0) | ((largest < 9.094947017729282e-13) & (largest > 0))
        if outside:
            big = largest >= 1.0
            scale = tl.where(big, 8.271806125530277e-25, 7.922816251426434e28)
            total, _ = _scaled_squares(address, first, last, tail, end, stop, scale, DTYPE, BLOCK, TAIL, ACC)
            total *= tl.where(big, 1.461501637330903e48, 1.5930919111324523e-58).to(tl.float64)
    tl.store(partial_ptr + tl.load(pieces_ptr + 4 * pid + 2), total)


@triton.jit
def sum_sets_kernel(
    partial_ptr,  # [pieces] float64, the pieces of a set side by side
    bounds_ptr,  # [sets + 1] int64
    out_ptr,  # [sets] float64
    BLOCK: tl.constexpr,
):
    # The second stage of the sums of squares.
    #
    # Math      out[s] = sum of partial[bounds[s] .. bounds[s + 1]].
    # Traffic   read the partial sums.
    # Grid      one program per set.
    # Requires  nothing.
    # Result    bitwise reproducible.
    pid = tl.program_id(0)
    begin, end = tl.load(bounds_ptr + pid), tl.load(bounds_ptr + pid + 1)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(begin, end, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        total += tl.load(partial_ptr + offs, mask=offs < end, other=0.0)
    tl.store(out_ptr + pid, tl.sum(total, 0))


@triton.jit
def _number(table_ptr, mask):
    """A float64 that lies in an int64 table."""
    return tl.load(table_ptr, mask=mask, other=0).to(tl.float64, bitcast=True)


@triton.jit
def _number_at(address, kind, KIND: tl.constexpr, DTYPE: tl.constexpr):
    here = kind == KIND
    return tl.load(address.to(tl.pointer_type(DTYPE)), mask=here, other=0.0).to(tl.float64)


@triton.jit
def _one_minus_power(log_beta, t):
    """1 - beta^t to the last digits: 1 - e^x with its rounding error divided out (Kahan)."""
    x = t * log_beta
    e = tl.exp(x)
    rest = 1.0 - e
    safe = tl.where((e == 0) | (rest == 0), 0.5, e)
    return tl.where(e == 0, 1.0, tl.where(rest == 0, -x, rest * (x / tl.log(safe))))


@triton.jit(
    do_not_specialize=["rows"],
    do_not_specialize_on_alignment=["inv_scale_ptr", "found_inf_ptr", "norm_squares_ptr", "norm_ptr"],
)
def prepare_kernel(
    table_ptr,  # [rows, 16] int64: 0 counter, 1 lr tensor, 2 its dtype; float64: 4 decay of the
    #             average, 5 max_norm, 6 lr, 7 decay_rate, 8 sign, 9 to 11 beta1, beta2, eps (SGDW: momentum, paper,
    #             nesterov), 12 and 13 logarithms of the betas
    inv_scale_ptr,  # []
    found_inf_ptr,  # []
    norm_squares_ptr,  # [] float64
    rows_ptr,  # [rows, 16] float64
    norm_ptr,  # [] float32
    rows,
    ADAMW: tl.constexpr,
    INV_SCALE: tl.constexpr,
    FOUND_INF: tl.constexpr,
    NORM: tl.constexpr,
    CLIP: tl.constexpr,
    SKIP_NONFINITE: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    # The scalars of a step, for each group of parameters with one counter.
    #
    # Math      norm = sqrt(norm_squares) inv_scale;  multiplier = sign inv_scale min(1, max_norm / (norm + 1e-6));
    #           t += 1 unless skipped;  keep = 1 - lr decay_rate;  AdamW: step_size = lr / (1 - beta1^t), 1 - beta1,
    #           1 - beta2, 1 / sqrt(1 - beta2^t);  SGDW: gain, rate = lr, 1 (paper) or 1, lr. All in float64.
    # Traffic   256 bytes per row.
    # Grid      one program.
    # Requires  rows <= BLOCK_R. Rows may share a counter: all read it, then all write the same.
    # Result    bitwise reproducible.
    offs = tl.arange(0, BLOCK_R)
    mask = offs < rows
    table = table_ptr + offs * 16
    inv = tl.full([], 1.0, tl.float64)
    if INV_SCALE:
        inv = tl.load(inv_scale_ptr).to(tl.float64)
    skip = tl.full([], 0, tl.int1)
    if FOUND_INF:
        skip = tl.load(found_inf_ptr) != 0
    factor = inv
    if NORM:
        squares = tl.load(norm_squares_ptr)
        norm = tl.sqrt(squares) * inv
        tl.store(norm_ptr, norm.to(tl.float32))
        if SKIP_NONFINITE:
            skip = skip | (squares - squares != 0)
        if CLIP:
            clip = _number(table_ptr + 5, True) / (norm + 1e-6)
            factor = inv * tl.where(clip > 1.0, 1.0, clip)  # NaN stays

    counter = tl.load(table, mask=mask, other=0)
    counter_ptr = counter.to(tl.pointer_type(tl.float32))
    counted = counter != 0
    t = tl.load(counter_ptr, mask=counted, other=0.0)
    t = tl.where(skip, t, t + 1.0)
    tl.debug_barrier()
    tl.store(counter_ptr, t, mask=counted & (skip == 0))
    t = t.to(tl.float64)

    address, kind = tl.load(table + 1, mask=mask, other=0), tl.load(table + 2, mask=mask, other=0)
    lr = _number(table + 6, mask) + _number_at(address, kind, 1, tl.float32) + _number_at(address, kind, 2, tl.float64)
    lr += _number_at(address, kind, 3, tl.float16) + _number_at(address, kind, 4, tl.bfloat16)

    out = rows_ptr + offs * 16
    tl.store(out, tl.zeros([BLOCK_R], tl.float64) + skip.to(tl.float64), mask=mask)
    tl.store(out + 1, t, mask=mask)
    tl.store(out + 2, _number(table + 8, mask) * factor, mask=mask)
    tl.store(out + 3, 1.0 - lr * _number(table + 7, mask), mask=mask)
    tl.store(out + 4, 1.0 - _number(table + 4, mask), mask=mask)
    a, b, c = _number(table + 9, mask), _number(table + 10, mask), _number(table + 11, mask)
    if ADAMW:
        correction1 = _one_minus_power(_number(table + 12, mask), t)
        correction2 = _one_minus_power(_number(table + 13, mask), t)
        tl.store(out + 5, lr / correction1, mask=mask)
        tl.store(out + 6, a, mask=mask)
        tl.store(out + 7, 1.0 - a, mask=mask)
        tl.store(out + 8, b, mask=mask)
        tl.store(out + 9, 1.0 - b, mask=mask)
        tl.store(out + 10, c, mask=mask)
        tl.store(out + 11, 1.0 / tl.sqrt(correction2), mask=mask)
    else:
        paper = b != 0
        tl.store(out + 5, a, mask=mask)
        tl.store(out + 6, tl.where(paper, lr, 1.0), mask=mask)
        tl.store(out + 7, tl.where(paper, 1.0, lr), mask=mask)
        tl.store(out + 8, c, mask=mask)
