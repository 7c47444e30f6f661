// GroupNorm of inputs with one position, [N, C]: a group is a run of contiguous channels, with a map for each channel.
#pragma once

#include "group_norm_backward.h"

namespace dlkernels {
inline namespace CPU_CAPABILITY {

template <class T, Activation K>
void forward_vectors(const GroupNormArgs& a, const Item& item, const GroupNormScratch<typename Lanes<T>::scalar>& s) {
  using A = typename Lanes<T>::scalar;
  using V = typename Lanes<T>::vec;
  const int64_t width = item.c_end - item.c_begin, d = a.c / a.groups, at = item.n * a.c + item.c_begin;
  const T* x = static_cast<const T*>(a.x) + at;
  const T* residual = a.residual ? static_cast<const T*>(a.residual) + at : nullptr;
  T* y = static_cast<T*>(a.y) + at;
  fill_affine(a, item.n, item.c_begin, width, s.slope, s.offset);
  for (int64_t first = 0; first < width; first += d) {
    const Moments m = contiguous_moments(x + first, d);
    const double r = reciprocal_std(m, a.eps);
    const int64_t group = item.n * a.groups + (item.c_begin + first) / d;
    static_cast<A*>(a.mean)[group] = static_cast<A>(m.mean);
    static_cast<A*>(a.rstd)[group] = static_cast<A>(r);
    const V mean = splat<V>(m.mean), rstd = splat<V>(r);
    for_vectors<T>(d, [&](int64_t i, int64_t left, auto whole) DL_BODY {
      const int64_t c = first + i;
      const ChannelMap<V> map{mean, load_as(whole, s.slope + c, left) * rstd, load_as(whole, s.offset + c, left)};
      V z = group_norm_before_activation(load_as(whole, x + c, left), map);
      if (residual) z += load_as(whole, residual + c, left);
      store_as(whole, y + c, activate<K>(z), left);
    });
  }
}

// da and db are what they sum: dz x_hat and dz; the second pass reads them again.
template <class T, Activation K>
void backward_vectors(const GroupNormArgs& a, const Item& item, const GroupNormScratch<typename Lanes<T>::scalar>& s) {
  using A = typename Lanes<T>::scalar;
  using V = typename Lanes<T>::vec;
  const int64_t width = item.c_end - item.c_begin, d = a.c / a.groups, at = item.n * a.c + item.c_begin;
  BackwardItem<T> p(a, at, width, K, s.stash);
  p.stash = nullptr;
  A *da = static_cast<A*>(a.da) + at, *db = static_cast<A*>(a.db) + at;
  fill_affine(a, item.n, item.c_begin, width, s.slope, s.offset);
  for (int64_t first = 0; first < width; first += d) {
    const int64_t group = item.n * a.groups + (item.c_begin + first) / d;
    const A r = static_cast<const A*>(a.rstd)[group];
    const V mean = splat<V>(static_cast<const A*>(a.mean)[group]), rstd = splat<V>(r);
    V g_da = splat<V>(0), g_db = splat<V>(0);
    for_vectors<T>(d, [&](int64_t i, int64_t left, auto whole) DL_BODY {
      const int64_t c = first + i;
      const V slope = load_as(whole, s.slope + c, left), offset = load_as(whole, s.offset + c, left);
      const V t = load_as(whole, p.x + c, left) - mean;
      const V dz = upstream<T, K>(whole, p, c, left, t, slope * rstd, offset);
      keep<T, K>(whole, p, c, c, left, dz);
      const V product = dz * t * rstd;
      store_as(whole, da + c, product, left);
      store_as(whole, db + c, dz, left);
      g_da += decltype(whole)::value ? slope * product : first_lanes<T>(slope * product, left);
      g_db += decltype(whole)::value ? slope * dz : first_lanes<T>(slope * dz, left);
    });
    const A share = A(-1) / static_cast<A>(d);
    const V q = splat<V>(sum(g_da) * share * r * r), rest = splat<V>(sum(g_db) * share * r);
    for_vectors<T>(d, [&](int64_t i, int64_t left, auto whole) DL_BODY {
      const int64_t c = first + i;
      const GradientMap<V> map{mean, load_as(whole, s.slope + c, left) * rstd, q, rest};
      const V dz = load_as(whole, db + c, left);
      store_as(whole, p.dx + c, group_norm_input_gradient(load_as(whole, p.x + c, left), dz, map), left);
    });
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace dlkernels
