// The sum of squares of a gradient, for its norm: torch-free, once per instruction set.
#pragma once

#include <cstdint>
#include <type_traits>

#include "loops.h"
#include "prefetch.h"

namespace dlkernels {
inline namespace CPU_CAPABILITY {

// f(s, x) for every vector x of n elements, s one of four accumulators; zeros behind the last element.
template <class T, class S, class F>
DL_INLINE void accumulate_vectors(const T* p, int64_t n, S (&s)[4], F f) {
  constexpr int64_t w = Lanes<T>::width;
  int64_t i = 0;
  for (; i + 4 * w <= n; i += 4 * w)
    for (int64_t j = 0; j < 4; ++j) {
      prefetch_page_ahead(p + i + j * w);
      f(s[j], load(p + i + j * w));
    }
  for (; i + w <= n; i += w) f(s[0], load(p + i));
  if (i < n) f(s[1], load_part(p + i, n - i, 0));
}

template <class T>
DL_INLINE double sum_of_squares(const T* p, int64_t n) {
  using V = typename Lanes<T>::vec;
  V s[4] = {V{}, V{}, V{}, V{}};
  accumulate_vectors(p, n, s, [](V& a, V x) DL_BODY { a += x * x; });
  return sum((s[0] + s[1]) + (s[2] + s[3]));
}

// The same in double, for values whose squares leave float's range.
template <class T>
__attribute__((noinline)) double sum_of_squares_exact(const T* p, int64_t n) {
  typedef double vdouble __attribute__((vector_size(8 * kFloatLanes)));
  vdouble s[4] = {vdouble{}, vdouble{}, vdouble{}, vdouble{}};
  accumulate_vectors(p, n, s, [](vdouble& a, vfloat x) DL_BODY {
    const vdouble y = __builtin_convertvector(x, vdouble);
    a += y * y;
  });
  double total = 0;
  for (int i = 0; i < kFloatLanes; ++i) total += (s[0][i] + s[1][i]) + (s[2][i] + s[3][i]);
  return total;
}

template <class T>
double squares_typed(const T* p, int64_t n) {
  // No float16 has a square beyond float: where their sum is not finite, one of them is not.
  constexpr bool kInRange = std::is_same<T, double>::value || std::is_same<T, float16>::value;
  double total = 0;
  for (int64_t at = 0; at < n; at += kChunk) {
    const int64_t count = n - at < kChunk ? n - at : kChunk;
    double s = sum_of_squares(p + at, count);
    if constexpr (!kInRange)
      if (!(s >= 1e-25 && s < INFINITY)) s = sum_of_squares_exact(p + at, count);
    total += s;
  }
  return total;
}

inline double squares(const void* grad, Float dtype, int64_t begin, int64_t end) {
  return with_float(dtype, [&](auto t) -> double {
    using T = decltype(t);
    return squares_typed(static_cast<const T*>(grad) + begin, end - begin);
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace dlkernels
