// What the GroupNorm loops of both directions share: blocking, statistics, the parameters of a channel.
#pragma once

#include <algorithm>

#include "../common/loops.h"
#include "../math/group_norm.h"
#include "group_norm_kernel.h"

namespace dlkernels {
inline namespace CPU_CAPABILITY {

constexpr int64_t kChunk = 4096;             // values whose second pass is read from the first-level cache
constexpr int64_t kRows = 64;                // rows of channels_last of which the same holds
constexpr int64_t kItemBytes = 768 << 10;    // of x, dy and dx together: what an item of channels_last may take
constexpr int64_t kStashElements = 1 << 17;  // up to this many values of dz are kept between the passes

// [begin, end) of the channels of an item, in one sample.
struct Item {
  int64_t n, c_begin, c_end;
};

// Groups per item: one for [N, C, S]; for [N, S, C] as many as the cache holds, a cache line of channels at least.
inline int64_t groups_per_item(const GroupNormArgs& a) {
  if (!a.channels_last) return 1;
  const int64_t d = a.c / a.groups, size = size_of(a.dtype);
  const int64_t bytes = d * a.s * (2 * size + 4);
  const int64_t line = (64 + d * size - 1) / (d * size);
  const int64_t fitting = std::min(a.groups, std::max(line, kItemBytes / bytes));
  const int64_t items = (a.groups + fitting - 1) / fitting;
  return (a.groups + items - 1) / items;
}

inline int64_t items_per_sample(const GroupNormArgs& a) {
  const int64_t per = groups_per_item(a);
  return (a.groups + per - 1) / per;
}

inline Item item_of(const GroupNormArgs& a, int64_t index) {
  const int64_t per = groups_per_item(a), items = items_per_sample(a), d = a.c / a.groups;
  const int64_t n = index / items, g = index % items * per;
  return {n, g * d, std::min(a.groups, g + per) * d};
}

// slope = weight (1 + scale) and offset = bias (1 + scale) + shift of channel c in sample n.
template <class A>
struct Affine {
  A slope, offset;
};
template <class A>
DL_INLINE Affine<A> affine_of(const GroupNormArgs& a, int64_t n, int64_t c) {
  const int64_t nc = n * a.c + c;
  const A factor = A(1) + parameter<A>(a.scale.data, a.scale.dtype, nc, 0);
  const A slope = parameter<A>(a.weight.data, a.weight.dtype, c, 1) * factor;
  const A offset = parameter<A>(a.bias.data, a.bias.dtype, c, 0) * factor;
  return {slope, offset + parameter<A>(a.shift.data, a.shift.dtype, nc, 0)};
}

// Moments of n contiguous values: per chunk a mean, then deviations from it, corrected for the mean's own rounding.
template <class T>
Moments contiguous_moments(const T* x, int64_t n) {
  using A = typename Lanes<T>::scalar;
  using V = typename Lanes<T>::vec;
  constexpr int64_t w = Lanes<T>::width;
  Moments all;
  for (int64_t begin = 0; begin < n; begin += kChunk) {
    const T* p = x + begin;
    const int64_t count = std::min(kChunk, n - begin);
    V s[4] = {splat<V>(0), splat<V>(0), splat<V>(0), splat<V>(0)};
    int64_t i = 0;
    for (; i + 4 * w <= count; i += 4 * w)
      for (int k = 0; k < 4; ++k) s[k] += load(p + i + k * w);
    for (; i < count; i += w) s[0] += load_some(p + i, count - i);
    const A mean = static_cast<A>(sum((s[0] + s[1]) + (s[2] + s[3])) / static_cast<A>(count));
    const V centre = splat<V>(mean);
    V d[4] = {splat<V>(0), splat<V>(0), splat<V>(0), splat<V>(0)};
    V q[4] = {splat<V>(0), splat<V>(0), splat<V>(0), splat<V>(0)};
    for (i = 0; i + 4 * w <= count; i += 4 * w)
      for (int k = 0; k < 4; ++k) {
        const V e = load(p + i + k * w) - centre;
        d[k] += e;
        q[k] += e * e;
      }
    for (; i < count; i += w) {
      const V e = count - i >= w ? load(p + i) - centre : load_part(p + i, count - i, mean) - centre;
      d[0] += e;
      q[0] += e * e;
    }
    const double off = sum((d[0] + d[1]) + (d[2] + d[3])), rest = sum((q[0] + q[1]) + (q[2] + q[3]));
    const double c = static_cast<double>(count);
    merge(all, {c, mean + off / c, std::max(rest - off * off / c, rest * 0)});
  }
  return all;
}

// Moments per channel of rows [rows][stride], channels [0, width): accumulators in registers over kRows rows.
template <class T, int NV>
DL_INLINE void channel_moments_block(const T* x, int64_t rows, int64_t stride, int64_t left, double before,
                                     double* mean, double* m2) {
  using A = typename Lanes<T>::scalar;
  using V = typename Lanes<T>::vec;
  constexpr int64_t w = Lanes<T>::width;
  V s[NV], d[NV], q[NV];
  for (int k = 0; k < NV; ++k) s[k] = d[k] = q[k] = splat<V>(0);
  for (int64_t r = 0; r < rows; ++r)
    for (int k = 0; k < NV; ++k) s[k] += load_some(x + r * stride + k * w, left - k * w);
  for (int k = 0; k < NV; ++k) s[k] = s[k] * splat<V>(1.0 / static_cast<double>(rows));
  for (int64_t r = 0; r < rows; ++r)
    for (int k = 0; k < NV; ++k) {
      const V e = load_some(x + r * stride + k * w, left - k * w) - s[k];
      d[k] += e;
      q[k] += e * e;
    }
  A sums[NV * w], offs[NV * w], squares[NV * w];
  for (int k = 0; k < NV; ++k) {
    store(sums + k * w, s[k]);
    store(offs + k * w, d[k]);
    store(squares + k * w, q[k]);
  }
  const double count = static_cast<double>(rows), total = before + count;
  const double share = count / total, cross = before * count / total, inverse = 1 / count;
  const int64_t channels = std::min<int64_t>(NV * w, left);
  for (int64_t c = 0; c < channels; ++c) {
    const double off = offs[c], here = sums[c] + off * inverse, rest = squares[c] - off * off * inverse;
    const double delta = here - mean[c];
    mean[c] += delta * share;
    m2[c] += (rest < 0 ? 0 : rest) + delta * delta * cross;
  }
}

template <class T>
void channel_moments(const T* x, int64_t rows, int64_t stride, int64_t width, double* mean, double* m2) {
  constexpr int64_t w = Lanes<T>::width;
  std::fill(mean, mean + width, 0.0);
  std::fill(m2, m2 + width, 0.0);
  for (int64_t begin = 0; begin < rows; begin += kRows) {
    const int64_t count = std::min(kRows, rows - begin);
    const T* p = x + begin * stride;
    int64_t c = 0;
    for (; c + 4 * w <= width; c += 4 * w)
      channel_moments_block<T, 4>(p + c, count, stride, 4 * w, static_cast<double>(begin), mean + c, m2 + c);
    for (; c < width; c += w)
      channel_moments_block<T, 1>(p + c, count, stride, width - c, static_cast<double>(begin), mean + c, m2 + c);
  }
}

// Moments of a group from those of its channels, each of `count` values.
inline Moments group_moments(const double* mean, const double* m2, int64_t channels, int64_t count) {
  double sum = 0, rest = 0, between = 0;
  for (int64_t c = 0; c < channels; ++c) sum += mean[c];
  const double centre = sum / static_cast<double>(channels);
  for (int64_t c = 0; c < channels; ++c) {
    rest += m2[c];
    between += (mean[c] - centre) * (mean[c] - centre);
  }
  return {static_cast<double>(channels * count), centre, rest + static_cast<double>(count) * between};
}

// Scratch of one item: doubles first, then A values. What is not needed is not touched.
template <class A>
struct Scratch {
  double *first, *second;  // [width] each
  A *mean, *rstd, *slope, *offset, *q, *rest;
  A* stash;  // [values of an item], for half precision

  Scratch(void* memory, int64_t width) {
    first = static_cast<double*>(memory);
    second = first + width;
    mean = reinterpret_cast<A*>(second + width);
    rstd = mean + width;
    slope = rstd + width;
    offset = slope + width;
    q = offset + width;
    rest = q + width;
    stash = rest + width;
  }
  static int64_t bytes(int64_t width, int64_t stashed) {
    return width * (2 * sizeof(double) + 6 * sizeof(A)) + stashed * static_cast<int64_t>(sizeof(A));
  }
};

}  // namespace CPU_CAPABILITY
}  // namespace dlkernels
