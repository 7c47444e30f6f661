"""What kernels over tables of tensors share: finding a piece, pointers from a table, streamed blocks.

Items, [items, 16] int64: 0 numel, 1 to 6 pointers (param, three slots, master, average; 0 where there is none), 7 row,
8 number of the parameter, 9 offset, 10 period, 11 full_period, 12 seed.
Rows, [rows, 16] float64: 0 skip, 1 step, 2 multiplier, 3 keep, 4 weight of the average, then the family's.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def locate(items_ptr, grads_ptr, pieces_ptr, rows_ptr, steps, BLOCK: tl.constexpr, TAIL: tl.constexpr):
    """The item and row of this program, the addresses, where it begins and ends.

    Blocks [first, last) are full and aligned to 16 bytes; what is left of the piece are blocks [tail, end) of TAIL.
    """
    pid = tl.program_id(0).to(tl.int64)
    item = tl.load(pieces_ptr + 2 * pid).to(tl.int64)
    first = tl.load(pieces_ptr + 2 * pid + 1).to(tl.int64) * steps
    item_ptr = items_ptr + item * 16
    row_ptr = rows_ptr + tl.load(item_ptr + 7) * 16
    stop = tl.minimum(tl.load(item_ptr), (first + steps) * BLOCK)
    p, s0, s1, s2 = tl.load(item_ptr + 1), tl.load(item_ptr + 2), tl.load(item_ptr + 3), tl.load(item_ptr + 4)
    master, average, g = tl.load(item_ptr + 5), tl.load(item_ptr + 6), tl.load(grads_ptr + item)
    aligned = ((p | g | s0 | s1 | s2 | master | average) & 15) == 0
    last = tl.where(aligned, stop // BLOCK, first)
    return (
        item_ptr,
        row_ptr,
        (p, g, s0, s1, s2, master, average),
        first,
        last,
        last * (BLOCK // TAIL),
        tl.cdiv(stop, TAIL),
    )


@triton.jit
def place(item_ptr, row_ptr):
    """What stochastic rounding draws by: offset, period, full_period, number, seed, step."""
    return (
        tl.load(item_ptr + 9),
        tl.load(item_ptr + 10),
        tl.load(item_ptr + 11),
        tl.load(item_ptr + 8),
        tl.load(item_ptr + 12),
        tl.load(row_ptr + 1).to(tl.int64),
    )


@triton.jit
def accumulated(ptr, ACC: tl.constexpr):
    return tl.load(ptr).to(ACC)


@triton.jit
def pointer(address, start, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Element `start` at an address. ALIGNED tells the compiler of 16 bytes, on a value that no other path shares."""
    if ALIGNED:
        base = tl.multiple_of(((address >> 4) << 4).to(tl.pointer_type(DTYPE)), 16)
    else:
        base = address.to(tl.pointer_type(DTYPE))
    return base + start


@triton.jit
def cast(x, DTYPE: tl.constexpr):
    """To another dtype, between float64 and 16 bits by way of float32, as everywhere in PyTorch."""
    if x.dtype.primitive_bitwidth + DTYPE.primitive_bitwidth == 80:
        x = x.to(tl.float32)
    return x.to(DTYPE)


@triton.jit
def streamed_load(ptr, mask, FULL: tl.constexpr, ACC: tl.constexpr):
    if FULL:
        x = tl.load(ptr, eviction_policy="evict_first")
    else:
        x = tl.load(ptr, mask=mask, other=0.0, eviction_policy="evict_first")
    return cast(x, ACC)


@triton.jit
def streamed_store(ptr, value, mask, FULL: tl.constexpr):
    if FULL:
        tl.store(ptr, value, eviction_policy="evict_first")
    else:
        tl.store(ptr, value, mask=mask, eviction_policy="evict_first")
