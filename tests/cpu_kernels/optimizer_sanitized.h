// What the drivers of the optimizers share: Philox and stochastic rounding as plain scalar code, shards, the check of
// what is stored, the sums of squares.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "../../csrc/common/optimizer.h"
#include "../../csrc/math/philox.h"
#include "sanitized.h"

namespace dlkernels {

struct Block {
  uint32_t word[4];
};

inline Block plain_philox(Block c, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = 0xd2511f53ull * c.word[0], p1 = 0xcd9e8d57ull * c.word[2];
    c = {{static_cast<uint32_t>(p1 >> 32) ^ c.word[1] ^ key0, static_cast<uint32_t>(p1),
          static_cast<uint32_t>(p0 >> 32) ^ c.word[3] ^ key1, static_cast<uint32_t>(p0)}};
    key0 += 0x9e3779b9u, key1 += 0xbb67ae85u;
  }
  return c;
}

// The published known answers, for the code above and for the loops' own; and both against each other.
inline void check_philox() {
  struct Known {
    uint32_t in;
    Block out;
  };
  const Known known[] = {{0, {{0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u}}},
                         {0xffffffffu, {{0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu}}}};
  uint16_t out[kPhiloxRandoms];
  for (const Known& k : known) {
    const uint64_t both = static_cast<uint64_t>(k.in) << 32 | k.in;
    const Block plain = plain_philox({{k.in, k.in, k.in, k.in}}, k.in, k.in);
    philox(both, both, k.in, k.in, out);
    for (int i = 0; i < 4; ++i) {
      const uint32_t word = static_cast<uint32_t>(out[2 * i + 1]) << 16 | out[2 * i];
      check(plain.word[i] == k.out.word[i], "known answer, plain", plain.word[i], k.out.word[i]);
      check(word == k.out.word[i], "known answer", word, k.out.word[i]);
    }
  }
  for (const uint64_t first : {0ull, 5ull, 0xfffffffbull, 0x01000000fffffff8ull}) {
    philox(0x0123456789abcdefull, first, 7, 11, out);
    for (int64_t i = 0; i < kPhiloxRandoms; ++i) {
      const uint64_t n = first + i / 8;
      const Block b =
          plain_philox({{static_cast<uint32_t>(n), static_cast<uint32_t>(n >> 32), 7, 11}}, 0x89abcdefu, 0x01234567u);
      const uint32_t want = b.word[i % 8 / 2] >> (i % 2 * 16) & 0xffffu;
      check(out[i] == want, "philox", out[i], want);
    }
  }
}

// The random bits that element i is rounded with in a stream.
inline uint32_t random_bits(const StepTensor& t, const Rounding& r, int stream, int64_t i) {
  const uint64_t e = i / t.period * t.full_period + t.offset + i % t.period, n = e / 8;
  const Block b =
      plain_philox({{static_cast<uint32_t>(n), static_cast<uint32_t>(n >> 32) + (static_cast<uint32_t>(stream) << 24),
                     static_cast<uint32_t>(t.index), static_cast<uint32_t>(r.step)}},
                   static_cast<uint32_t>(r.seed), static_cast<uint32_t>(r.seed >> 32));
  return b.word[e % 8 / 2] >> (e % 2 * 16) & 0xffffu;
}

inline double bfloat16_of(float x, uint32_t random) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bits = x != x ? 0x7fc00000u : (bits + random) & 0xffff0000u;
  std::memcpy(&x, &bits, 4);
  return x;
}

// x as it is stored, to nearest or (bfloat16 only) with random bits.
inline double stored(Float type, double x, bool stochastic, uint32_t random) {
  if (type == Float::kFloat64) return x;
  const float f = static_cast<float>(x);
  if (type == Float::kFloat32) return f;
  if (type == Float::kFloat16) return static_cast<double>(static_cast<_Float16>(f));
  if (stochastic) return bfloat16_of(f, random);
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return bfloat16_of(f, 0x7fffu + (bits >> 16 & 1u));
}

// Element i must be `want`, of which arithmetic may lose a part of `size`, rounded: rounding is monotonic.
inline void check_stored(const Array& got, int64_t i, double want, double size, bool stochastic, uint32_t random,
                         const char* what) {
  const double error = arithmetic_error(got.type) * (size + std::fabs(want)), g = got.get(i);
  const double at_most = stored(got.type, want + (want < 0 ? -error : error), stochastic, random);
  const double at_least = stored(got.type, want - (want < 0 ? -error : error), stochastic, random);
  const double low = std::fmin(at_most, at_least), high = std::fmax(at_most, at_least);
  check(std::isnan(want) ? std::isnan(g) : g >= low && g <= high, what, g, want);
}

// Where the elements of a tensor lie in its parameter.
struct Shard {
  int64_t offset, period, full_period;  // period 0: all elements
};
constexpr Shard kShards[] = {{0, 0, 0}, {131, 0, 0}, {15, 5, 20}, {(int64_t{1} << 36) - 77, 0, 0}, {100, 300, 1001}};

inline void place(StepTensor& t, const Shard& s) {
  t.offset = s.offset, t.period = s.period ? s.period : t.numel;
  t.full_period = s.period ? s.full_period : t.numel;
}

struct Types {
  Float param, slot;
};
constexpr Types kTypes[] = {{Float::kFloat32, Float::kFloat32},   {Float::kFloat32, Float::kBFloat16},
                            {Float::kBFloat16, Float::kBFloat16}, {Float::kBFloat16, Float::kFloat32},
                            {Float::kFloat16, Float::kFloat16},   {Float::kFloat16, Float::kFloat32},
                            {Float::kFloat16, Float::kBFloat16},  {Float::kFloat64, Float::kFloat64}};
constexpr int64_t kSizes[] = {1, 7, 16, 33, 129, 1000, 4099};

// loop(begin, end) over [0, n), cut at odd places.
template <class Loop>
void in_pieces(int64_t n, Loop loop) {
  const int64_t ends[] = {0, n / 3, n / 2 + n / 7, n - n / 5, n};
  for (int i = 0; i < 4; ++i) loop(ends[i], ends[i + 1]);
}

inline bool same_bytes(const Array& a, const Array& b) {
  return a.n == 0 || std::memcmp(a.data(), b.data(), a.n * static_cast<size_t>(size_of(a.type))) == 0;
}
inline Array copy_of(const Array& a) {
  Array b(a.type, a.n);
  if (a.n) std::memcpy(b.data(), a.data(), a.n * static_cast<size_t>(size_of(a.type)));
  return b;
}

// The NaN with all bits set: random bits added to it would make it a number.
inline void set_nan(Array& a, int64_t i) {
  const size_t size = static_cast<size_t>(size_of(a.type));
  std::memset(static_cast<char*>(a.data()) + static_cast<size_t>(i) * size, 0xff, size);
}
inline void check_nan(const Array& a, int64_t i, bool stochastic) {
  check(std::isnan(a.get(i)), "NaN", a.get(i), NAN);
  if (!stochastic || a.type != Float::kBFloat16) return;
  const uint16_t bits = static_cast<const uint16_t*>(a.data())[i];
  check(bits == 0x7fc0, "bits of NaN", bits, 0x7fc0);
}

// squares(grad, dtype, begin, end): values that float can square, some that it cannot, infinities and NaN.
template <class Squares>
void check_squares(Squares squares) {
  for (const Float type : {Float::kFloat32, Float::kFloat16, Float::kBFloat16, Float::kFloat64})
    for (const int64_t n : {1, 7, 16, 33, 129, 1000, 4096, 4099, 12301})
      for (const double scale : {1.0, 0.0, 1e25, 1e-25, 1e-38}) {
        const bool fits = type == Float::kFloat32 || type == Float::kBFloat16 || type == Float::kFloat64;
        if (!fits && scale != 1 && scale != 0) continue;
        Array x(type, n);
        for (int64_t i = 0; i < n; ++i) x.set(i, uniform(0.5, 1.5) * (i % 2 ? scale : -scale));
        if (scale != 0) x.set(n / 2, 2 * scale);
        double want = 0, part = 0;
        for (int64_t i = 0; i < n; ++i) (i < n / 3 ? part : want) += x.get(i) * x.get(i);
        std::snprintf(where, sizeof where, "type %d n %d scale %g", static_cast<int>(type), static_cast<int>(n), scale);
        const double allowed = type == Float::kFloat64 ? 1e-13 : 1e-6;
        const double head = squares(x.data(), type, 0, n / 3), tail = squares(x.data(), type, n / 3, n);
        check(std::fabs(head - part) <= allowed * part, "squares, head", head, part);
        check(std::fabs(tail - want) <= allowed * want, "squares, tail", tail, want);
        for (const double odd : {double{INFINITY}, double{NAN}}) {
          x.set(n - 1, odd);
          const double got = squares(x.data(), type, 0, n);
          check(std::isnan(odd) ? std::isnan(got) : got == odd, "squares, not finite", got, odd);
        }
      }
}

}  // namespace dlkernels
