"""Stochastic rounding to bfloat16 by counted random numbers: the same on every device, launch and sharding.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011: Philox4x32-10.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def _product(multiplier: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of a 32 x 32 bit product, in int64 arithmetic that does not overflow."""
    low = multiplier * (x & 0xFFFF)
    high = multiplier * (x >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random words of 32 bits per counter. Counters and words are int64 tensors with values below 2^32."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        high0, low0 = _product(_MULTIPLIERS[0], c0)
        high1, low1 = _product(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def random_bits(element: Tensor, number: int, step: int, stream: int, seed: int) -> Tensor:
    """16 random bits for each element (int64 indices) of parameter `number` at a step."""
    block, slot = element // 8, element % 8
    counter = (
        block & _WORD,
        (block >> 32) + (stream << 24),
        torch.full_like(block, number),
        torch.full_like(block, step),
    )
    words = torch.stack(philox(counter, seed)).gather(0, (slot // 2).unsqueeze(0)).squeeze(0)
    return torch.where(slot % 2 == 0, words & 0xFFFF, words >> 16)


def stochastic_round(x: Tensor, bits: Tensor) -> Tensor:
    """float32 to bfloat16: up with the probability of how far x is from the lower neighbour. NaN stays NaN."""
    pattern = (x.contiguous().view(torch.int32).long() & _WORD) + bits
    pattern = torch.where(x.isnan(), 0x7FC00000, pattern & 0xFFFF0000)
    return torch.where(pattern >= 1 << 31, pattern - (1 << 32), pattern).to(torch.int32).view(torch.float32).bfloat16()
