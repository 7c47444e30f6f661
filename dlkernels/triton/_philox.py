"""Random bits by counter on GPUs, and stochastic rounding to bfloat16 by them.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011: Philox4x32-10.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _product(x, FACTOR: tl.constexpr):
    """High and low word of a 32 x 32 bit product: one multiplication in machine code."""
    product = x.to(tl.uint64) * FACTOR
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def philox(c0, c1, c2, c3, seed):
    """Four words of 32 bits for each counter; counters of uint32, the key is the int64 `seed`."""
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        high0, low0 = _product(c0, 0xD2511F53)
        high1, low1 = _product(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def element_numbers(
    start, offset, period, full_period, BLOCK: tl.constexpr, GROUPED: tl.constexpr, WHOLE: tl.constexpr
):
    """Numbers in the whole parameter of elements start .. start + BLOCK of a shard; GROUPED: of every eighth, over 8.

    WHOLE: the shard ends before the first period does, so that nothing is divided.
    """
    if GROUPED:
        i = (start // 8) + tl.arange(0, BLOCK // 8)
        period, full_period, offset = period // 8, full_period // 8, offset // 8
    else:
        i = start + tl.arange(0, BLOCK)
    e = i + offset
    if not WHOLE:
        e += i // period * (full_period - period)
    return e


@triton.jit
def random_bits(e, number, step, seed, STREAM: tl.constexpr, BLOCK: tl.constexpr, GROUPED: tl.constexpr):
    """[BLOCK] random numbers of 16 bits in uint32, for element numbers made by `element_numbers`.

    Eight consecutive elements share a counter. GROUPED: they are side by side in the block, so that one Philox serves
    all eight; else each element computes the whole of it.
    """
    group = e if GROUPED else e // 8
    low = group.to(tl.uint32)
    high = (group >> 32).to(tl.uint32) + (STREAM << 24)
    n = tl.zeros_like(low) + number.to(tl.uint32)
    t = tl.zeros_like(low) + step.to(tl.uint32)
    w0, w1, w2, w3 = philox(low, high, n, t, seed)
    if GROUPED:
        # The bits of e % 8 from the highest: word // 2, word % 2, half.
        even = tl.join(tl.join(w0 & 0xFFFF, w2 & 0xFFFF), tl.join(w1 & 0xFFFF, w3 & 0xFFFF))
        odd = tl.join(tl.join(w0 >> 16, w2 >> 16), tl.join(w1 >> 16, w3 >> 16))
        bits = tl.reshape(tl.join(even, odd), [BLOCK])
    else:
        k = (e % 8).to(tl.uint32)
        word = tl.where(k < 4, tl.where(k < 2, w0, w1), tl.where(k < 6, w2, w3))
        bits = (word >> (k % 2 * 16)) & 0xFFFF
    return bits


@triton.jit
def round_by(x, bits):
    """float32 (float64 by way of it) to bfloat16, up with the probability of how far x is from the lower neighbour."""
    x = x.to(tl.float32)
    pattern = (x.to(tl.uint32, bitcast=True) + bits) >> 16
    return tl.where(x != x, 0x7FC0, pattern).to(tl.uint16).to(tl.bfloat16, bitcast=True)
