// GroupNorm forward, one item at a time: statistics, then y while the item is still in the cache.
#pragma once

#include "group_norm_common.h"

namespace dlkernels {
inline namespace CPU_CAPABILITY {

// y of n values under one map; the residual is added before the activation. What lies `ahead` is asked for meanwhile.
template <class T, Activation K>
DL_INLINE void forward_run(const T* x, const T* residual, T* y, int64_t n,
                           const ChannelMap<typename Lanes<T>::vec>& map, bool past_caches, int64_t ahead) {
  using V = typename Lanes<T>::vec;
  constexpr int64_t w = Lanes<T>::width;
  int64_t i = 0;
  for (; i + w <= n; i += w) {
    prefetch(x + ahead + i, w);
    V z = group_norm_before_activation(load(x + i), map);
    if (residual) z += load(residual + i);
    if (past_caches) {
      stream(y + i, activate<K>(z));
    } else {
      store(y + i, activate<K>(z));
    }
  }
  if (i < n) {
    V z = group_norm_before_activation(load_part(x + i, n - i, 0), map);
    if (residual) z += load_part(residual + i, n - i, 0);
    store_part(y + i, activate<K>(z), n - i);
  }
}

template <class T, Activation K>
void forward_contiguous(const GroupNormArgs& a, const Item& item) {
  using A = typename Lanes<T>::scalar;
  using V = typename Lanes<T>::vec;
  const int64_t at = (item.n * a.c + item.c_begin) * a.s, d = item.c_end - item.c_begin;
  const T* x = static_cast<const T*>(a.x) + at;
  const T* residual = a.residual ? static_cast<const T*>(a.residual) + at : nullptr;
  T* y = static_cast<T*>(a.y) + at;
  const Moments m = contiguous_moments(x, d * a.s);
  const double rstd = reciprocal_std(m, a.eps);
  const int64_t group = item.n * a.groups + item.c_begin / d;
  static_cast<A*>(a.mean)[group] = static_cast<A>(m.mean);
  static_cast<A*>(a.rstd)[group] = static_cast<A>(rstd);
  const bool past_caches = a.stream && may_stream(y, a.s);
  for (int64_t c = d; c-- > 0;) {  // backwards: what was read last is still near
    const Affine<A> affine = affine_of<A>(a, item.n, item.c_begin + c);
    const ChannelMap<V> map{splat<V>(m.mean), splat<V>(static_cast<A>(rstd) * affine.slope), splat<V>(affine.offset)};
    forward_run<T, K>(x + c * a.s, residual ? residual + c * a.s : nullptr, y + c * a.s, a.s, map, past_caches,
                      d * a.s);
  }
}

template <class T, Activation K>
void forward_channels_last(const GroupNormArgs& a, const Item& item,
                           const GroupNormScratch<typename Lanes<T>::scalar>& s) {
  using A = typename Lanes<T>::scalar;
  using V = typename Lanes<T>::vec;
  const int64_t width = item.c_end - item.c_begin, d = a.c / a.groups, at = item.n * a.s * a.c + item.c_begin;
  const int64_t stride = a.c;
  const T* x = static_cast<const T*>(a.x) + at;
  const T* residual = a.residual ? static_cast<const T*>(a.residual) + at : nullptr;
  T* y = static_cast<T*>(a.y) + at;
  channel_moments(x, a.s, stride, width, s);
  fill_affine(a, item.n, item.c_begin, width, s.slope, s.offset);
  for (int64_t g = 0; g < width / d; ++g) {
    const Moments m = group_moments(s.first + g * d, s.second + g * d, d, a.s);
    const double rstd = reciprocal_std(m, a.eps);
    const int64_t group = item.n * a.groups + item.c_begin / d + g;
    static_cast<A*>(a.mean)[group] = static_cast<A>(m.mean);
    static_cast<A*>(a.rstd)[group] = static_cast<A>(rstd);
    for (int64_t c = g * d; c < (g + 1) * d; ++c) {
      s.mean[c] = static_cast<A>(m.mean);
      s.slope[c] *= static_cast<A>(rstd);
    }
  }
  const bool past_caches = a.stream && may_stream(y, a.c) && width * static_cast<int64_t>(sizeof(T)) % 64 == 0;
  for_row_groups_backwards(0, a.s, [&](int64_t row, auto group) DL_BODY {
    constexpr int R = decltype(group)::size;
    for_vectors<T>(width, [&](int64_t c, int64_t left, auto whole) DL_BODY {
      const ChannelMap<V> map{load(s.mean + c), load(s.slope + c), load(s.offset + c)};
      for (int r = 0; r < R; ++r) {
        const int64_t i = (row + r) * stride + c;
        V z = group_norm_before_activation(load_as(whole, x + i, left), map);
        if (residual) z += load_as(whole, residual + i, left);
        if (past_caches) {
          stream(y + i, activate<K>(z));
        } else {
          store_as(whole, y + i, activate<K>(z), left);
        }
      }
    });
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace dlkernels
