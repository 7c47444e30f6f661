// Small pieces that the loops of several families share, on top of simd.h: torch-free, once per instruction set.
#pragma once

#include <cstdint>

#include "float_kind.h"
#include "simd.h"

namespace dlkernels {
inline namespace CPU_CAPABILITY {

constexpr int64_t kChunk = 4096;  // contiguous values whose second pass is read from the first-level cache
constexpr int64_t kRows = 64;     // rows of channels_last summed in float before double takes over

template <class F>
auto with_float(Float dtype, F f) {
  switch (dtype) {
    case Float::kFloat16: return f(float16{});
    case Float::kBFloat16: return f(bfloat16{});
    case Float::kFloat64: return f(double{});
    default: return f(float{});
  }
}

// Element i of a parameter whose dtype is known at run time; `missing` where there is none.
template <class A>
DL_INLINE A parameter(const void* p, Float dtype, int64_t i, A missing) {
  if (p == nullptr) return missing;
  switch (dtype) {
    case Float::kFloat16: return static_cast<A>(to_float(static_cast<const float16*>(p)[i]));
    case Float::kBFloat16: return static_cast<A>(to_float(static_cast<const bfloat16*>(p)[i]));
    case Float::kFloat64: return static_cast<A>(static_cast<const double*>(p)[i]);
    default: return static_cast<A>(static_cast<const float*>(p)[i]);
  }
}

// The vector of it at element i, of which `left` elements exist.
template <class A>
DL_INLINE typename Lanes<A>::vec parameters(const void* p, Float dtype, int64_t i, int64_t left, double missing);

// The way back, rounded to the parameter's dtype.
DL_INLINE void set_parameter(void* p, Float dtype, int64_t i, double value) {
  switch (dtype) {
    case Float::kFloat16: static_cast<float16*>(p)[i] = from_float<float16>(static_cast<float>(value)); break;
    case Float::kBFloat16: static_cast<bfloat16*>(p)[i] = from_float<bfloat16>(static_cast<float>(value)); break;
    case Float::kFloat64: static_cast<double*>(p)[i] = value; break;
    default: static_cast<float*>(p)[i] = static_cast<float>(value);
  }
}

// load and store of n <= width elements: whole vectors take the short way.
template <class T>
DL_INLINE typename Lanes<T>::vec load_some(const T* p, int64_t n) {
  return n >= Lanes<T>::width ? load(p) : load_part(p, n, 0);
}
template <class T>
DL_INLINE void store_some(T* p, typename Lanes<T>::vec v, int64_t n) {
  if (n >= Lanes<T>::width) {
    store(p, v);
  } else {
    store_part(p, v, n);
  }
}

template <>
DL_INLINE double parameters<double>(const void* p, Float dtype, int64_t i, int64_t, double missing) {
  return parameter<double>(p, dtype, i, missing);
}
template <>
DL_INLINE vfloat parameters<float>(const void* p, Float dtype, int64_t i, int64_t left, double missing) {
  if (p == nullptr) return splat<vfloat>(missing);
  if (dtype == Float::kFloat16) return load_some(static_cast<const float16*>(p) + i, left);
  if (dtype == Float::kBFloat16) return load_some(static_cast<const bfloat16*>(p) + i, left);
  return load_some(static_cast<const float*>(p) + i, left);
}

// v with the lanes from n on set to 0: a partial vector's share of a sum.
template <class T>
DL_INLINE typename Lanes<T>::vec first_lanes(typename Lanes<T>::vec v, int64_t n) {
  if constexpr (Lanes<T>::width == 1) {
    return v;
  } else {
    vint index;
    for (int i = 0; i < kFloatLanes; ++i) index[i] = i;
    return index < static_cast<int32_t>(n) ? v : vfloat{};
  }
}

// f(c, left, whole) for every vector of channels: `whole` is a compile-time constant, and false for the last, partial
// one.
struct Whole {
  static constexpr bool value = true;
};
struct Partial {
  static constexpr bool value = false;
};
template <class T, class F>
DL_INLINE void for_vectors(int64_t width, F f) {
  constexpr int64_t w = Lanes<T>::width;
  int64_t c = 0;
  for (; c + w <= width; c += w) f(c, w, Whole{});
  if (c < width) f(c, width - c, Partial{});
}
template <class T, class W>
DL_INLINE typename Lanes<T>::vec load_as(W, const T* p, int64_t left) {
  if constexpr (W::value) return load(p);
  return load_part(p, left, 0);
}
template <class T, class W>
DL_INLINE void store_as(W, T* p, typename Lanes<T>::vec v, int64_t left) {
  if constexpr (W::value) return store(p, v);
  store_part(p, v, left);
}

// f(row, R) for groups of four rows, then single ones: what belongs to a channel is loaded once for four rows.
template <int R>
struct RowGroup {
  static constexpr int size = R;
};
template <class F>
DL_INLINE void for_row_groups(int64_t begin, int64_t end, F f) {
  int64_t row = begin;
  for (; row + 4 <= end; row += 4) f(row, RowGroup<4>{});
  for (; row < end; ++row) f(row, RowGroup<1>{});
}
// From the end to the beginning: a second sweep finds what the first one read last still in the cache.
template <class F>
DL_INLINE void for_row_groups_backwards(int64_t begin, int64_t end, F f) {
  int64_t row = end;
  for (; (row - begin) % 4 != 0; --row) f(row - 1, RowGroup<1>{});
  for (; row > begin; row -= 4) f(row - 4, RowGroup<4>{});
}

// Whether rows of n elements from p on may be written past the caches: whole vectors at aligned addresses.
template <class T>
DL_INLINE bool may_stream(const T* p, int64_t row) {
  return reinterpret_cast<uintptr_t>(p) % DL_VECTOR_BYTES == 0 && row * static_cast<int64_t>(sizeof(T)) % 64 == 0;
}

}  // namespace CPU_CAPABILITY
}  // namespace dlkernels
