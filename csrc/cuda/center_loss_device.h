// What the kernels of the center-loss family share: labels, elements of two widths, the attention.
#pragma once

#include "../common/cuda_dtype.h"
#include "../common/cuda_reduce.h"
#include "../math/center_loss.h"
#include "center_loss_kernel.h"

namespace dlkernels {

// Whether a row counts: labels below 0 and ignore_index leave theirs out.
DL_DEVICE bool counts(int64_t label, int64_t ignore_index) { return label >= 0 && label != ignore_index; }

DL_DEVICE int64_t load_label(const void* labels, bool narrow, int64_t row) {
  if (narrow) return load_integer(static_cast<const int32_t*>(labels) + row);
  return load_integer(static_cast<const int64_t*>(labels) + row);
}

// N elements as they lie in memory, of T or (`wide`) of float: told apart at run time, so that no kernel is compiled
// for each pair of dtypes. Loaded in a batch, converted later.
template <class T, int N, bool kPacked = sizeof(T) == 2 && N % 4 == 0>
struct Mixed {  // one width, or one element
  Floats<N> values;
  template <Use U>
  DL_DEVICE void load(const void* p, int64_t at, bool wide) {
    if (sizeof(T) == 2 && wide) values = dlkernels::load<N, U>(static_cast<const float*>(p) + at);
    else values = dlkernels::load<N, U>(static_cast<const T*>(p) + at);
  }
  DL_DEVICE Floats<N> floats(bool) const { return values; }
};
template <class T, int N>
struct Mixed<T, N, true> {
  static constexpr int kHalf = N / 2;
  Pack<uint32_t, kHalf> low, high;  // all N elements of T, or N / 2 floats each
  template <Use U>
  DL_DEVICE void load(const void* p, int64_t at, bool wide) {
    const auto* words = reinterpret_cast<const uint32_t*>(static_cast<const char*>(p) + (wide ? 4 : 2) * at);
    low = load_pack<kHalf, U>(words);
    if (wide) high = load_pack<kHalf, U>(words + kHalf);
  }
  DL_DEVICE Floats<N> floats(bool wide) const {
    if (!wide) return to_floats(bit_cast<Pack<T, N>>(low));
    Floats<N> x;
    DL_UNROLL
    for (int i = 0; i < kHalf; ++i) x[i] = bit_cast<float>(low.v[i]), x[kHalf + i] = bit_cast<float>(high.v[i]);
    return x;
  }
};

template <class T, int N, Use U = Use::kOnce>
DL_DEVICE void store_mixed(void* p, int64_t at, const Floats<N>& x, bool wide) {
  if (sizeof(T) == 2 && wide) store<N, U>(static_cast<float*>(p) + at, x);
  else store<N, U>(static_cast<T*>(p) + at, x);
}

// A, and its derivative in what was given. NaN stays NaN.
struct Weight {
  float value, slope;
};
DL_DEVICE Weight attention_weight(float a, bool logits) {
  if (!logits) return {a, 1.0f};
  const float e = vexp(-vabs(a)), r = vreciprocal(1.0f + e), rest = e * r;  // neither is a difference from 1
  return {a < 0.0f ? rest : r, r * rest};
}
// Weights outside of [0, 1] are an error, which a GPU is not waited for to report.
DL_DEVICE float checked_weight(float a) { return a < 0.0f || a > 1.0f ? NAN : a; }

}  // namespace dlkernels
