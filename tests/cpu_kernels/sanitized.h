// What the sanitizer drivers share: random numbers, arrays of exactly the right size, comparisons with numbers worked
// out in double, the activations of the layers.
#pragma once

#include <sanitizer/asan_interface.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>

#include "../../csrc/common/float_kind.h"

namespace dlkernels {

inline std::mt19937 rng(0);
inline double uniform(double a, double b) { return std::uniform_real_distribution<double>(a, b)(rng); }
inline int64_t integer(int64_t a, int64_t b) { return std::uniform_int_distribution<int64_t>(a, b)(rng); }

inline int failures = 0;
inline char where[256] = "";  // the case at hand, for the message
inline void check(bool ok, const char* what, double got, double want) {
  if (ok) return;
  if (++failures <= 10) std::printf("FAILED %s: got %.9g, expected %.9g %s\n", what, got, want, where);
}

// The exit code of the program, after its last line.
inline int finish() {
  if (failures) return std::printf("%d failures\n", failures), 1;
  std::puts("ok");
  return 0;
}

inline double by_type(Float t, double f64, double f32, double f16, double bf16) {
  return t == Float::kFloat64 ? f64 : t == Float::kFloat32 ? f32 : t == Float::kFloat16 ? f16 : bf16;
}
inline Float accumulate(Float t) { return t == Float::kFloat64 ? Float::kFloat64 : Float::kFloat32; }

// Where an array begins: wherever the heap has room, on a cache line, or eight bytes behind one.
enum class Place { kHeap, kLine, kBesideLine };

// An array of exactly n elements of a storage type; values are rounded to it when they are set (bfloat16: cut off).
class Array {
 public:
  Float type;
  size_t n;

  Array(Float t, size_t count, Place place = Place::kHeap) : type(t), n(count), memory_(nullptr, std::free) {
    const size_t bytes = n * static_cast<size_t>(size_of(t)), front = place == Place::kBesideLine ? 8 : 0;
    void* p = nullptr;
    if (place == Place::kHeap) p = std::malloc(bytes);
    if (place != Place::kHeap && posix_memalign(&p, 64, front + bytes) != 0) std::abort();
    memory_.reset(static_cast<char*>(p));
    data_ = memory_.get() + front;
    std::memset(data_, 0xff, bytes);  // NaN in every type: an unwritten output shows
    ASAN_POISON_MEMORY_REGION(memory_.get(), front);
  }
  void* data() const { return data_; }
  void set(size_t i, double v) {
    if (type == Float::kFloat64) static_cast<double*>(data())[i] = v;
    if (type == Float::kFloat32) static_cast<float*>(data())[i] = static_cast<float>(v);
    if (type == Float::kFloat16) static_cast<_Float16*>(data())[i] = static_cast<_Float16>(v);
    if (type == Float::kBFloat16) {
      const float f = static_cast<float>(v);
      uint32_t bits;
      std::memcpy(&bits, &f, 4);
      static_cast<uint16_t*>(data())[i] = static_cast<uint16_t>(bits >> 16);
    }
  }
  double get(size_t i) const {
    if (type == Float::kFloat64) return static_cast<const double*>(data())[i];
    if (type == Float::kFloat32) return static_cast<const float*>(data())[i];
    if (type == Float::kFloat16) return static_cast<double>(static_cast<const _Float16*>(data())[i]);
    const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(data())[i]) << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
  }
  void fill(double a, double b) {
    for (size_t i = 0; i < n; ++i) set(i, uniform(a, b));
  }

 private:
  std::unique_ptr<char, void (*)(void*)> memory_;
  char* data_;
};

// loop(begin, end, scratch) over [0, count) in two parts, as two threads would: each with exactly `bytes` of scratch.
template <class Loop>
void in_parts(int64_t count, int64_t bytes, Loop loop) {
  const int64_t ends[] = {0, count / 2, count};
  for (int i = 0; i < 2; ++i) {
    std::unique_ptr<char[]> scratch(new char[bytes]);
    std::memset(scratch.get(), 0xff, bytes);
    loop(ends[i], ends[i + 1], scratch.get());
  }
}

// What arithmetic on a storage type may lose of the sizes of its terms, and what storing may lose of the result.
inline double arithmetic_error(Float t) { return accumulate(t) == Float::kFloat64 ? 1e-14 : 1e-6; }
inline void close(const Array& got, size_t i, double want, double size, const char* what) {
  const double rounding = by_type(got.type, 0x1p-53, 0x1p-24, 0x1p-11, 0x1p-8);
  const double smallest = got.type == Float::kFloat16 ? 0x1p-24 : 0;  // the distance of its smallest numbers
  const double g = got.get(i), allowed = arithmetic_error(got.type) * (size + std::fabs(want));
  check(std::fabs(g - want) <= allowed + rounding * std::fabs(want) + smallest, what, g, want);
}

// Activations of the layers by the codes of dlkernels/reference/_activation.py, and their slopes.
constexpr int kActivations = 6;
inline double activated(int kind, double z) {
  const double u = std::sqrt(2 / M_PI) * (z + 0.044715 * z * z * z);
  switch (kind) {
    case 1: return z > 0 ? z : 0;
    case 2: return z > 0 ? z : 0.01 * z;
    case 3: return z / (1 + std::exp(-z));
    case 4: return 0.5 * z * std::erfc(-z / std::sqrt(2.0));
    case 5: return 0.5 * z * (1 + std::tanh(u));
    default: return z;
  }
}
inline double activation_slope(int kind, double z) {
  const double p = 1 / (1 + std::exp(-z)), c = std::sqrt(2 / M_PI), t = std::tanh(c * (z + 0.044715 * z * z * z));
  switch (kind) {
    case 1: return z > 0 ? 1 : 0;
    case 2: return z > 0 ? 1 : 0.01;
    case 3: return p + z * p * (1 - p);
    case 4: return 0.5 * std::erfc(-z / std::sqrt(2.0)) + z * std::exp(-0.5 * z * z) / std::sqrt(2 * M_PI);
    case 5: return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * c * (1 + 3 * 0.044715 * z * z);
    default: return 1;
  }
}
// Whether rounding decides on which side of a kink z lies; `size` is that of the terms of z.
inline bool at_kink(int kind, double z, double size, Float type) {
  return (kind == 1 || kind == 2) && std::fabs(z) <= 4 * arithmetic_error(type) * (size + 1);
}

}  // namespace dlkernels
