// GroupNorm backward, one item at a time: sums per channel, then dx while the item is still in the cache.
#pragma once

#include "group_norm_common.h"

namespace dlkernels {
inline namespace CPU_CAPABILITY {

// The addresses of one item; `stash` keeps dz between the passes, so that an activation is evaluated once.
template <class T>
struct BackwardItem {
  using A = typename Lanes<T>::scalar;
  const T *x, *dy, *residual;
  T *dx, *dresidual;
  A* stash;

  BackwardItem(const GroupNormArgs& a, int64_t at, int64_t elements, Activation kind, A* scratch) {
    x = static_cast<const T*>(a.x) + at;
    dy = static_cast<const T*>(a.dy) + at;
    residual = a.residual ? static_cast<const T*>(a.residual) + at : nullptr;
    dx = static_cast<T*>(a.dx) + at;
    dresidual = a.dresidual ? static_cast<T*>(a.dresidual) + at : nullptr;
    stash = kind == Activation::kNone || elements > kStashElements ? nullptr : scratch;
    if constexpr (sizeof(T) == sizeof(A)) stash = stash ? reinterpret_cast<A*>(dresidual ? dresidual : dx) : nullptr;
  }
};

// dz = dy act'(z): z is formed again from x_hat.
template <class T, Activation K, class V>
DL_INLINE V upstream(const BackwardItem<T>& p, int64_t i, int64_t left, V x_hat, V slope, V offset) {
  const V dy = load_some(p.dy + i, left);
  if constexpr (K == Activation::kNone) return dy;
  V z = x_hat * slope + offset;
  if (p.residual) z += load_some(p.residual + i, left);
  return dy * dlkernels::slope<K>(z);
}

// Keep dz for the second pass, and for the residual.
template <class T, Activation K, class V>
DL_INLINE void keep(const BackwardItem<T>& p, int64_t i, int64_t stash_at, int64_t left, V dz) {
  if constexpr (K != Activation::kNone) {
    if (p.dresidual) store_some(p.dresidual + i, dz, left);
    if (p.stash && reinterpret_cast<const void*>(p.stash) != reinterpret_cast<const void*>(p.dresidual))
      store_some(p.stash + stash_at, dz, left);
  }
}

template <class T, Activation K>
void backward_contiguous(const GroupNormArgs& a, const Item& item, Scratch<typename Lanes<T>::scalar> s) {
  using A = typename Lanes<T>::scalar;
  using V = typename Lanes<T>::vec;
  constexpr int64_t w = Lanes<T>::width;
  const int64_t at = (item.n * a.c + item.c_begin) * a.s, d = item.c_end - item.c_begin, m = d * a.s;
  const BackwardItem<T> p(a, at, m, K, s.stash);
  const int64_t group = item.n * a.groups + item.c_begin / d;
  const A mean = static_cast<const A*>(a.mean)[group], rstd = static_cast<const A*>(a.rstd)[group];
  const V v_mean = splat<V>(mean), v_rstd = splat<V>(rstd);
  double g_da = 0, g_db = 0;  // sums over the group of a dz x_hat and a dz
  for (int64_t c = 0; c < d; ++c) {
    const Affine<A> affine = affine_of<A>(a, item.n, item.c_begin + c);
    const V slope = splat<V>(affine.slope), offset = splat<V>(affine.offset);
    double da = 0, db = 0;
    for (int64_t begin = c * a.s; begin < (c + 1) * a.s; begin += kChunk) {
      const int64_t end = std::min((c + 1) * a.s, begin + kChunk);
      V sa[2] = {splat<V>(0), splat<V>(0)}, sb[2] = {splat<V>(0), splat<V>(0)};
      int64_t i = begin;
      for (; i + 2 * w <= end; i += 2 * w)
        for (int k = 0; k < 2; ++k) {
          const int64_t j = i + k * w;
          const V x_hat = (load(p.x + j) - v_mean) * v_rstd;
          const V dz = upstream<T, K>(p, j, w, x_hat, slope, offset);
          keep<T, K>(p, j, j, w, dz);
          sa[k] += dz * x_hat;
          sb[k] += dz;
        }
      for (; i < end; i += w) {
        const int64_t left = std::min(w, end - i);
        const V x_hat = (load_some(p.x + i, left) - v_mean) * v_rstd;
        const V dz = first_lanes<T>(upstream<T, K>(p, i, left, x_hat, slope, offset), left);
        keep<T, K>(p, i, i, left, dz);
        sa[0] += first_lanes<T>(dz * x_hat, left);
        sb[0] += dz;
      }
      da += sum(sa[0] + sa[1]);
      db += sum(sb[0] + sb[1]);
    }
    const int64_t nc = item.n * a.c + item.c_begin + c;
    static_cast<A*>(a.da)[nc] = static_cast<A>(da);
    static_cast<A*>(a.db)[nc] = static_cast<A>(db);
    g_da += affine.slope * da;
    g_db += affine.slope * db;
  }
  const double r = rstd, count = static_cast<double>(m);
  const V q = splat<V>(-r * r * g_da / count), rest = splat<V>(-r * g_db / count);
  const bool past_caches = a.stream && may_stream(p.dx, a.s);
  for (int64_t c = 0; c < d; ++c) {
    const Affine<A> affine = affine_of<A>(a, item.n, item.c_begin + c);
    const V slope = splat<V>(affine.slope), offset = splat<V>(affine.offset);
    const GradientMap<V> map{v_mean, splat<V>(rstd * affine.slope), q, rest};
    for (int64_t i = c * a.s; i < (c + 1) * a.s; i += w) {
      const int64_t left = std::min(w, (c + 1) * a.s - i);
      const V x = load_some(p.x + i, left);
      const V dz =
          p.stash ? load_some(p.stash + i, left) : upstream<T, K>(p, i, left, (x - v_mean) * v_rstd, slope, offset);
      const V dx = group_norm_input_gradient(x, dz, map);
      if (past_caches) {
        stream(p.dx + i, dx);
      } else {
        store_some(p.dx + i, dx, left);
      }
    }
  }
}

// Sums per channel over `rows` rows of NV vectors, accumulators in registers, added to s.first (da) and s.second (db).
template <class T, Activation K, int NV>
DL_INLINE void backward_sums_block(const BackwardItem<T>& p, const Scratch<typename Lanes<T>::scalar>& s, int64_t c,
                                   int64_t row_begin, int64_t row_end, int64_t stride, int64_t stash_stride,
                                   int64_t left) {
  using A = typename Lanes<T>::scalar;
  using V = typename Lanes<T>::vec;
  constexpr int64_t w = Lanes<T>::width;
  V mean[NV], rstd[NV], slope[NV], offset[NV], sa[NV], sb[NV];
  for (int k = 0; k < NV; ++k) {
    const int64_t some = left - k * w;
    mean[k] = load_some(s.mean + c + k * w, some);
    rstd[k] = load_some(s.rstd + c + k * w, some);
    slope[k] = load_some(s.slope + c + k * w, some);
    offset[k] = load_some(s.offset + c + k * w, some);
    sa[k] = sb[k] = splat<V>(0);
  }
  for (int64_t row = row_begin; row < row_end; ++row)
    for (int k = 0; k < NV; ++k) {
      const int64_t i = row * stride + c + k * w, some = left - k * w;
      const V x_hat = (load_some(p.x + i, some) - mean[k]) * rstd[k];
      const V dz = upstream<T, K>(p, i, some, x_hat, slope[k], offset[k]);
      keep<T, K>(p, i, row * stash_stride + c + k * w, some, dz);
      sa[k] += dz * x_hat;
      sb[k] += dz;
    }
  A ra[NV * w], rb[NV * w];
  for (int k = 0; k < NV; ++k) {
    store(ra + k * w, sa[k]);
    store(rb + k * w, sb[k]);
  }
  const int64_t channels = std::min<int64_t>(NV * w, left);
  for (int64_t i = 0; i < channels; ++i) {
    s.first[c + i] += ra[i];
    s.second[c + i] += rb[i];
  }
}

template <class T, Activation K>
void backward_channels_last(const GroupNormArgs& a, const Item& item, Scratch<typename Lanes<T>::scalar> s) {
  using A = typename Lanes<T>::scalar;
  using V = typename Lanes<T>::vec;
  constexpr int64_t w = Lanes<T>::width;
  const int64_t width = item.c_end - item.c_begin, d = a.c / a.groups, at = item.n * a.s * a.c + item.c_begin;
  const BackwardItem<T> p(a, at, a.s * width, K, s.stash);
  const int64_t stash_stride = p.stash == s.stash ? width : a.c;
  for (int64_t c = 0; c < width; ++c) {
    const int64_t group = item.n * a.groups + (item.c_begin + c) / d;
    const Affine<A> affine = affine_of<A>(a, item.n, item.c_begin + c);
    s.mean[c] = static_cast<const A*>(a.mean)[group];
    s.rstd[c] = static_cast<const A*>(a.rstd)[group];
    s.slope[c] = affine.slope;
    s.offset[c] = affine.offset;
    s.first[c] = s.second[c] = 0;
  }
  for (int64_t row = 0; row < a.s; row += kRows) {
    const int64_t end = std::min(a.s, row + kRows);
    int64_t c = 0;
    for (; c + 2 * w <= width; c += 2 * w) backward_sums_block<T, K, 2>(p, s, c, row, end, a.c, stash_stride, 2 * w);
    for (; c < width; c += w) backward_sums_block<T, K, 1>(p, s, c, row, end, a.c, stash_stride, width - c);
  }
  for (int64_t g = 0; g < width / d; ++g) {
    double g_da = 0, g_db = 0;
    for (int64_t c = g * d; c < (g + 1) * d; ++c) {
      const int64_t nc = item.n * a.c + item.c_begin + c;
      static_cast<A*>(a.da)[nc] = static_cast<A>(s.first[c]);
      static_cast<A*>(a.db)[nc] = static_cast<A>(s.second[c]);
      g_da += s.slope[c] * s.first[c];
      g_db += s.slope[c] * s.second[c];
    }
    const double r = s.rstd[g * d], count = static_cast<double>(d * a.s);
    for (int64_t c = g * d; c < (g + 1) * d; ++c) {
      s.q[c] = static_cast<A>(-r * r * g_da / count);
      s.rest[c] = static_cast<A>(-r * g_db / count);
    }
  }
  const bool past_caches = a.stream && may_stream(p.dx, a.c) && width * static_cast<int64_t>(sizeof(T)) % 64 == 0;
  for (int64_t row = 0; row < a.s; ++row)
    for (int64_t c = 0; c < width; c += w) {
      const int64_t i = row * a.c + c, left = width - c;
      const V x = load_some(p.x + i, left), mean = load_some(s.mean + c, left), rstd = load_some(s.rstd + c, left);
      const V slope = load_some(s.slope + c, left);
      const V dz = p.stash ? load_some(p.stash + row * stash_stride + c, left)
                           : upstream<T, K>(p, i, left, (x - mean) * rstd, slope, load_some(s.offset + c, left));
      const GradientMap<V> map{mean, rstd * slope, load_some(s.q + c, left), load_some(s.rest + c, left)};
      const V dx = group_norm_input_gradient(x, dz, map);
      if (past_caches) {
        stream(p.dx + i, dx);
      } else {
        store_some(p.dx + i, dx, left);
      }
    }
}

// dweight, dbias (sums over the samples, in order), dscale and dshift of channels [begin, end).
template <class A>
void parameter_grads(const GroupNormArgs& a, const GroupNormParameterGrads& to, int64_t begin, int64_t end) {
  const A *da = static_cast<const A*>(a.da), *db = static_cast<const A*>(a.db);
  constexpr int64_t kBlock = 64;
  for (int64_t first = begin; first < end; first += kBlock) {
    const int64_t width = std::min(kBlock, end - first);
    double dw[kBlock] = {}, dbias[kBlock] = {};
    for (int64_t n = 0; n < a.n; ++n)
      for (int64_t i = 0; i < width; ++i) {
        const int64_t nc = n * a.c + first + i;
        const double factor = 1.0 + parameter<double>(a.scale.data, a.scale.dtype, nc, 0);
        dw[i] += factor * da[nc];
        dbias[i] += factor * db[nc];
        if (to.scale) {
          const double weight = parameter<double>(a.weight.data, a.weight.dtype, first + i, 1);
          const double bias = parameter<double>(a.bias.data, a.bias.dtype, first + i, 0);
          set_parameter(to.scale, a.scale.dtype, nc, weight * da[nc] + bias * db[nc]);
        }
        if (to.shift) set_parameter(to.shift, a.shift.dtype, nc, db[nc]);
      }
    for (int64_t i = 0; i < width; ++i) {
      if (to.weight) set_parameter(to.weight, a.weight.dtype, first + i, dw[i]);
      if (to.bias) set_parameter(to.bias, a.bias.dtype, first + i, dbias[i]);
    }
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace dlkernels
