// Stochastic rounding to bfloat16 on GPUs, by the random numbers of csrc/math/philox.h: they depend on seed, step,
// parameter and element, not on who steps it where.
#pragma once

#include "../common/cuda_memory.h"
#include "../common/optimizer.h"

namespace dlkernels {

// The block of one counter: four words. Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3": Philox4x32-10.
DL_DEVICE void philox(uint64_t key, uint64_t counter, uint32_t word2, uint32_t word3, uint32_t (&c)[4]) {
  c[0] = static_cast<uint32_t>(counter), c[1] = static_cast<uint32_t>(counter >> 32), c[2] = word2, c[3] = word3;
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  DL_UNROLL
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = __umulhi(c[0], 0xd2511f53u), low0 = c[0] * 0xd2511f53u;
    const uint32_t high1 = __umulhi(c[2], 0xcd9e8d57u), low1 = c[2] * 0xcd9e8d57u;
    c[0] = high1 ^ c[1] ^ k0, c[1] = low1, c[2] = high0 ^ c[3] ^ k1, c[3] = low0;
    k0 += 0x9e3779b9u, k1 += 0xbb67ae85u;
  }
}

template <int N>
struct Bits {
  uint32_t word[(N + 1) / 2];
};

// What the elements of one item are rounded with, from element `begin` on.
struct Randoms {
  const StepTensor& t;
  uint64_t seed;
  int64_t begin;
  uint32_t step;
  bool on;

  // Whether the item is no shard, or the whole of one lies in one piece.
  DL_DEVICE bool whole() const { return t.numel <= t.period; }

  // Whether eight elements that begin at a multiple of eight share a block of random numbers.
  DL_DEVICE bool grouped() const { return ((whole() ? t.offset : t.offset | t.period | t.full_period) & 7) == 0; }

  // Element i of these, counted in the whole parameter.
  DL_DEVICE uint64_t element(int i) const {
    const int64_t own = begin + i;
    return static_cast<uint64_t>(t.offset + (whole() ? own : own / t.period * t.full_period + own % t.period));
  }

  // 16 bits for each of elements i .. i + N - 1, which share a block: two in a word, the first in its low half.
  template <int N>
  DL_DEVICE Bits<N> draw(int stream, int i) const {
    const uint64_t first = element(i);
    uint32_t word[4];
    philox(seed, (first >> 3) + (static_cast<uint64_t>(stream) << 56), static_cast<uint32_t>(t.index), step, word);
    const int skipped = static_cast<int>(first & 7);
    if constexpr (N < 8) {
      if (skipped >= 4) word[0] = word[2], word[1] = word[3];
      if constexpr (N < 4) {
        if ((skipped & 2) != 0) word[0] = word[1];
        if ((skipped & 1) != 0) word[0] >>= 16;
      }
    }
    Bits<N> bits;
    DL_UNROLL
    for (int k = 0; k < (N + 1) / 2; ++k) bits.word[k] = word[k];
    return bits;
  }
};

// Up with the probability of the bits that are cut off: elements from `first` on of those that the bits were drawn for.
template <int C, int N>
DL_DEVICE Floats<C> round_by(const Floats<C>& x, const Bits<N>& bits, int first) {
  Floats<C> y;
  DL_UNROLL
  for (int k = 0; k < C; ++k) {
    const uint32_t word = bits.word[(first + k) / 2], random = k % 2 == 0 ? word & 0xffffu : word >> 16;
    const uint32_t pattern = (bit_cast<uint32_t>(x[k]) + random) & 0xffff0000u;
    y[k] = x[k] != x[k] ? x[k] : bit_cast<float>(pattern);
  }
  return y;
}

}  // namespace dlkernels
