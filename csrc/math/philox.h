// Philox4x32-10, a random number generator that computes its i-th block from i. Salmon et al., "Parallel Random
// Numbers: As Easy as 1, 2, 3".
#pragma once

#include <cstdint>

#include "../common/simd.h"

namespace dlkernels {
inline namespace CPU_CAPABILITY {

constexpr int64_t kPhiloxBlocks = 16;                  // that one call computes
constexpr int64_t kPhiloxRandoms = kPhiloxBlocks * 8;  // of 16 bits

// A word of several blocks: one in the low half of each 64-bit lane. What the high halves hold is never looked at.
#if defined(__AVX512F__) || defined(__AVX2__)
typedef uint64_t vwords __attribute__((vector_size(DL_VECTOR_BYTES)));
#else
typedef uint64_t vwords;
#endif
constexpr int kPhiloxLanes = sizeof(vwords) / 8;

// The product of the low halves.
DL_INLINE vwords multiply_words(vwords a, vwords b) {
#if defined(__AVX512F__)
  return reinterpret_cast<vwords>(_mm512_mul_epu32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<vwords>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

// Where the block of a lane lies among those of its vector: so that store_blocks() finds each beside its neighbours.
DL_INLINE vwords block_of_lane() {
#if defined(__AVX512F__)
  return vwords{0, 4, 1, 5, 2, 6, 3, 7};
#elif defined(__AVX2__)
  return vwords{0, 2, 1, 3};
#else
  return 0;
#endif
}

// The words of each block one after another, the low half of a word before its high half.
DL_INLINE void store_blocks(uint16_t* out, const vwords (&word)[4]) {
  const vwords a = (word[0] & 0xffffffffu) | (word[1] << 32), b = (word[2] & 0xffffffffu) | (word[3] << 32);
#if defined(__AVX512F__)
  const __m512i first = reinterpret_cast<__m512i>(a), second = reinterpret_cast<__m512i>(b);
  _mm512_storeu_si512(out, _mm512_unpacklo_epi64(first, second));
  _mm512_storeu_si512(out + 32, _mm512_unpackhi_epi64(first, second));
#elif defined(__AVX2__)
  const __m256i first = reinterpret_cast<__m256i>(a), second = reinterpret_cast<__m256i>(b);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_unpacklo_epi64(first, second));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 16), _mm256_unpackhi_epi64(first, second));
#else
  for (int i = 0; i < 4; ++i) {
    out[i] = static_cast<uint16_t>(a >> 16 * i);
    out[4 + i] = static_cast<uint16_t>(b >> 16 * i);
  }
#endif
}

// The blocks with counters (low and high word of `counter` + 0 ... 15, word2, word3), as 16-bit numbers.
__attribute__((noinline)) inline void philox(uint64_t key, uint64_t counter, uint32_t word2, uint32_t word3,
                                             uint16_t* out) {
  constexpr int kVectors = kPhiloxBlocks / kPhiloxLanes < 4 ? kPhiloxBlocks / kPhiloxLanes : 4;
  const vwords m0 = vwords{} + 0xd2511f53u, m1 = vwords{} + 0xcd9e8d57u;
  for (int64_t block = 0; block < kPhiloxBlocks; block += kVectors * kPhiloxLanes) {
    vwords c[kVectors][4];
    for (int v = 0; v < kVectors; ++v) {
      const vwords number = block_of_lane() + (counter + static_cast<uint64_t>(block + v * kPhiloxLanes));
      c[v][0] = number, c[v][1] = number >> 32, c[v][2] = vwords{} + word2, c[v][3] = vwords{} + word3;
    }
    vwords k0 = vwords{} + key, k1 = vwords{} + (key >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      for (int v = 0; v < kVectors; ++v) {
        const vwords p0 = multiply_words(c[v][0], m0), p1 = multiply_words(c[v][2], m1);
        c[v][0] = (p1 >> 32) ^ c[v][1] ^ k0;
        c[v][1] = p1;
        c[v][2] = (p0 >> 32) ^ c[v][3] ^ k1;
        c[v][3] = p0;
      }
      k0 += 0x9e3779b9u, k1 += 0xbb67ae85u;
    }
    for (int v = 0; v < kVectors; ++v) store_blocks(out + (block + v * kPhiloxLanes) * 8, c[v]);
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace dlkernels
