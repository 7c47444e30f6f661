// What the GroupNorm loops of both directions share: blocking, statistics, the parameters of a channel.
#pragma once

#include <algorithm>

#include "../common/loops.h"
#include "../math/group_norm.h"
#include "group_norm_kernel.h"

namespace dlkernels {
inline namespace CPU_CAPABILITY {

// Up to this many values of dz are kept between the passes: in dx where it has their precision and is not written past
// the caches, else in scratch.
constexpr int64_t kStashInPlace = 1 << 21, kStashInScratch = 1 << 17;

inline bool stashes_in_scratch(const GroupNormArgs& a) {
  return a.dx && a.activation && a.dtype != Float::kFloat64 && (a.dtype != Float::kFloat32 || a.stream);
}

// [begin, end) of the channels of an item, in one sample.
struct Item {
  int64_t n, c_begin, c_end;
};

// Groups per item: one for [N, C, S]; for [N, S, C] all of them, or fewer to give every thread an item, but at least a
// cache line of channels, or so few that dz fits the scratch. What a channel's sums are made of does not depend on it.
inline int64_t groups_per_item(const GroupNormArgs& a) {
  if (!a.channels_last) return 1;
  const int64_t bytes = a.c / a.groups * size_of(a.dtype), line = (64 + bytes - 1) / bytes;
  const int64_t for_threads = a.wanted_items / std::max<int64_t>(1, a.n);
  const int64_t for_scratch = stashes_in_scratch(a) ? (a.c * a.s + kStashInScratch - 1) / kStashInScratch : 1;
  const int64_t items = std::max<int64_t>(1, std::min(a.groups / line, std::max(for_threads, for_scratch)));
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

// GroupNormScratch of one item: arrays of a value per channel, as long as whole vectors.
template <class A>
struct GroupNormScratch {
  int64_t padded;
  double *first, *second;
  A *mean, *slope, *offset, *q, *rest;
  A* stash;  // [values of an item], where stashes_in_scratch

  static int64_t pad(int64_t width) { return (width + kFloatLanes - 1) / kFloatLanes * kFloatLanes; }
  GroupNormScratch(void* memory, int64_t width) : padded(pad(width)) {
    first = static_cast<double*>(memory);
    second = first + padded;
    mean = reinterpret_cast<A*>(second + padded);
    slope = mean + padded;
    offset = slope + padded;
    q = offset + padded;
    rest = q + padded;
    stash = rest + padded;
  }
  static int64_t bytes(int64_t width, int64_t stashed) {
    return pad(width) * (2 * sizeof(double) + 5 * sizeof(A)) + stashed * static_cast<int64_t>(sizeof(A));
  }
};

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

// The same for `width` channels from c on, in arrays as long as whole vectors.
template <class A>
void fill_affine(const GroupNormArgs& a, int64_t n, int64_t c, int64_t width, A* slope, A* offset) {
  using V = typename Lanes<A>::vec;
  for (int64_t i = 0; i < width; i += Lanes<A>::width) {
    const int64_t left = width - i, nc = n * a.c + c + i;
    const V factor = parameters<A>(a.scale.data, a.scale.dtype, nc, left, 0) + splat<V>(1);
    const V shift = parameters<A>(a.shift.data, a.shift.dtype, nc, left, 0);
    store(slope + i, parameters<A>(a.weight.data, a.weight.dtype, c + i, left, 1) * factor);
    store(offset + i, parameters<A>(a.bias.data, a.bias.dtype, c + i, left, 0) * factor + shift);
  }
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
    const Moments part{c, mean + off / c, std::max(rest - off * off / c, rest * 0)};
    if (count == n) return part;
    merge(all, part);
  }
  return all;
}

// Moments per channel of rows [rows][stride], channels [0, width). A chunk of rows is summed, and its deviations from
// the chunk's own means while it is in the second-level cache. s.offset, s.q and s.rest are used on the way.
template <class T>
void channel_moments(const T* x, int64_t rows, int64_t stride, int64_t width,
                     const GroupNormScratch<typename Lanes<T>::scalar>& s) {
  using A = typename Lanes<T>::scalar;
  using V = typename Lanes<T>::vec;
  A *centre = s.offset, *off = s.q, *square = s.rest;
  double *mean = s.first, *m2 = s.second;
  const int64_t padded = s.padded, chunk = std::max<int64_t>(16, std::min<int64_t>(1024, 32768 / width));
  for (int64_t c = 0; c < width; ++c) mean[c] = m2[c] = 0;
  for (int64_t begin = 0; begin < rows; begin += chunk) {
    const int64_t end = std::min(rows, begin + chunk);
    const double count = static_cast<double>(end - begin), before = static_cast<double>(begin), inverse = 1 / count;
    for (int64_t c = 0; c < padded; ++c) centre[c] = off[c] = square[c] = 0;
    for_row_groups(begin, end, [&](int64_t row, auto group) DL_BODY {
      constexpr int R = decltype(group)::size;
      const T* p = x + row * stride;
      for_vectors<T>(width, [&](int64_t c, int64_t left, auto whole) DL_BODY {
        V sum = load(centre + c);
        for (int r = 0; r < R; ++r) sum += load_as(whole, p + r * stride + c, left);
        store(centre + c, sum);
      });
    });
    for (int64_t c = 0; c < padded; ++c) centre[c] *= static_cast<A>(inverse);
    for_row_groups(begin, end, [&](int64_t row, auto group) DL_BODY {
      constexpr int R = decltype(group)::size;
      const T* p = x + row * stride;
      for_vectors<T>(width, [&](int64_t c, int64_t left, auto whole) DL_BODY {
        const V m = load(centre + c);
        V d = load(off + c), q = load(square + c);
        for (int r = 0; r < R; ++r) {
          const V e = load_as(whole, p + r * stride + c, left) - m;
          d += e;
          q += e * e;
        }
        store(off + c, d);
        store(square + c, q);
      });
    });
    const double share = count / (before + count), cross = before * share;
    for (int64_t c = 0; c < width; ++c) {
      const double o = off[c], here = centre[c] + o * inverse, rest = square[c] - o * o * inverse;
      const double delta = here - mean[c];
      mean[c] += delta * share;
      m2[c] += (rest < 0 ? 0 : rest) + delta * delta * cross;
    }
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

}  // namespace CPU_CAPABILITY
}  // namespace dlkernels
