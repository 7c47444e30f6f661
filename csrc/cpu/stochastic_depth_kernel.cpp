// The stochastic-depth loops of one instruction set: compiled once for each, with CPU_CAPABILITY naming it.
#include "stochastic_depth_kernel.h"

#include "../common/loops.h"
#include "../math/stochastic_depth.h"

namespace dlkernels {
inline namespace CPU_CAPABILITY {

// What becomes of one element or vector of a row: nothing is read that does not count.
enum class Part { kZero, kResidual, kKept, kSum };

template <class T, Part P>
DL_INLINE typename Lanes<T>::vec value(typename Lanes<T>::vec x, typename Lanes<T>::vec r, typename Lanes<T>::vec f) {
  if constexpr (P == Part::kZero) return splat<typename Lanes<T>::vec>(0);
  if constexpr (P == Part::kResidual) return r;
  if constexpr (P == Part::kKept) return stochastic_depth_kept(x, f);
  return stochastic_depth_kept(x, f, r);
}

template <class T, Part P>
void run(const T* x, const T* r, T* y, int64_t n, double factor, bool past_caches) {
  using V = typename Lanes<T>::vec;
  constexpr int64_t kWidth = Lanes<T>::width;
  constexpr bool kReadsInput = P == Part::kKept || P == Part::kSum;
  constexpr bool kReadsResidual = P == Part::kResidual || P == Part::kSum;
  const V f = splat<V>(factor);
  const auto at = [&](int64_t i) {
    V vx{}, vr{};
    if constexpr (kReadsInput) vx = load(x + i);
    if constexpr (kReadsResidual) vr = load(r + i);
    return value<T, P>(vx, vr, f);
  };
  const auto part = [&](int64_t i, int64_t count) {
    V vx{}, vr{};
    if constexpr (kReadsInput) vx = load_part(x + i, count, 0);
    if constexpr (kReadsResidual) vr = load_part(r + i, count, 0);
    store_part(y + i, value<T, P>(vx, vr, f), count);
  };
  int64_t i = 0;
  if (past_caches) {
    constexpr int64_t kBytes = kWidth * static_cast<int64_t>(sizeof(T));
    const int64_t off = static_cast<int64_t>(reinterpret_cast<uintptr_t>(y) % kBytes);
    const int64_t head = off == 0 ? 0 : (kBytes - off) / static_cast<int64_t>(sizeof(T));
    if (head > 0 && head < n) part(0, head), i = head;
    if (head < n)
      for (; i + kWidth <= n; i += kWidth) stream(y + i, at(i));
  }
  for (; i + 4 * kWidth <= n; i += 4 * kWidth)
    for (int64_t j = 0; j < 4 * kWidth; j += kWidth) store(y + i + j, at(i + j));
  for (; i + kWidth <= n; i += kWidth) store(y + i, at(i));
  if (i < n) part(i, n - i);
}

template <class T>
void forward_typed(const StochasticDepthArgs& a, int64_t begin, int64_t end) {
  const T *x = static_cast<const T*>(a.input), *r = static_cast<const T*>(a.residual);
  T* y = static_cast<T*>(a.out);
  while (begin < end) {
    const int64_t row = begin / a.count, stop = (row + 1) * a.count < end ? (row + 1) * a.count : end;
    const double f = with_float(
        a.noise_dtype, [&](auto t) -> double { return to_float(static_cast<const decltype(t)*>(a.noise)[row]); });
    const int64_t n = stop - begin;
    if (f == 0)
      r ? run<T, Part::kResidual>(x + begin, r + begin, y + begin, n, f, a.stream)
        : run<T, Part::kZero>(x + begin, r, y + begin, n, f, a.stream);
    else
      r ? run<T, Part::kSum>(x + begin, r + begin, y + begin, n, f, a.stream)
        : run<T, Part::kKept>(x + begin, r, y + begin, n, f, a.stream);
    begin = stop;
  }
  if (a.stream) store_fence();
}

static void forward(const StochasticDepthArgs& a, int64_t begin, int64_t end) {
  with_float(a.dtype, [&](auto t) { forward_typed<decltype(t)>(a, begin, end); });
}

}  // namespace CPU_CAPABILITY

StochasticDepthKernels DL_CONCAT(stochastic_depth_kernels_, CPU_CAPABILITY)() { return {forward}; }

}  // namespace dlkernels
