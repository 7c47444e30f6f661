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
    stash = nullptr;
    if (stashes_in_scratch(a)) {
      stash = elements <= kStashInScratch ? scratch : nullptr;
    } else if constexpr (sizeof(T) == sizeof(A)) {
      if (kind != Activation::kNone && elements <= kStashInPlace) stash = dx;
    }
  }
};

// dz = dy act'(z), z formed again from t = x - mean.
template <class T, Activation K, class W, class V>
DL_INLINE V upstream(W whole, const BackwardItem<T>& p, int64_t i, int64_t left, V t, V gain, V offset) {
  const V dy = load_as(whole, p.dy + i, left);
  if constexpr (K == Activation::kNone) return dy;
  V z = t * gain + offset;
  if (p.residual) z += load_as(whole, p.residual + i, left);
  return dy * slope<K>(z);
}

// Keep dz for the second pass, and for the residual.
template <class T, Activation K, class W, class V>
DL_INLINE void keep(W whole, const BackwardItem<T>& p, int64_t i, int64_t stash_at, int64_t left, V dz) {
  if constexpr (K != Activation::kNone) {
    if (p.dresidual) store_as(whole, p.dresidual + i, dz, left);
    if (p.stash) store_as(whole, p.stash + stash_at, dz, left);
  }
}

// dz and dz (x - mean) summed over n values of one channel; `ahead` of them lies what is asked for meanwhile.
template <class T, Activation K>
DL_INLINE void channel_sums(const BackwardItem<T>& p, int64_t begin, int64_t end,
                            const ChannelMap<typename Lanes<T>::vec>& m, double* da, double* db) {
  using V = typename Lanes<T>::vec;
  constexpr int64_t w = Lanes<T>::width;
  for (int64_t first = begin; first < end; first += kChunk) {
    const int64_t last = std::min(end, first + kChunk);
    V sa[2] = {splat<V>(0), splat<V>(0)}, sb[2] = {splat<V>(0), splat<V>(0)};
    int64_t i = first;
    const auto add = [&](auto whole, int k, int64_t left) DL_BODY {
      const V t = load_as(whole, p.x + i, left) - m.mean;
      V dz = upstream<T, K>(whole, p, i, left, t, m.slope, m.offset);
      keep<T, K>(whole, p, i, i, left, dz);
      if constexpr (!decltype(whole)::value) dz = first_lanes<T>(dz, left);
      sa[k] += dz * (decltype(whole)::value ? t : first_lanes<T>(t, left));
      sb[k] += dz;
      i += w;
    };
    while (i + 2 * w <= last) {
      add(Whole{}, 0, w);
      add(Whole{}, 1, w);
    }
    if (i + w <= last) add(Whole{}, 0, w);
    if (i < last) add(Partial{}, 1, last - i);
    *da += sum(sa[0] + sa[1]);
    *db += sum(sb[0] + sb[1]);
  }
}

template <class T, Activation K>
void backward_contiguous(const GroupNormArgs& a, const Item& item,
                         const GroupNormScratch<typename Lanes<T>::scalar>& s) {
  using A = typename Lanes<T>::scalar;
  using V = typename Lanes<T>::vec;
  constexpr int64_t w = Lanes<T>::width;
  const int64_t at = (item.n * a.c + item.c_begin) * a.s, d = item.c_end - item.c_begin, m = d * a.s;
  const BackwardItem<T> p(a, at, m, K, s.stash);
  const int64_t group = item.n * a.groups + item.c_begin / d;
  const A mean = static_cast<const A*>(a.mean)[group], rstd = static_cast<const A*>(a.rstd)[group];
  double g_da = 0, g_db = 0;  // sums over the group of a dz x_hat and a dz
  for (int64_t c = 0; c < d; ++c) {
    const Affine<A> affine = affine_of<A>(a, item.n, item.c_begin + c);
    const ChannelMap<V> map{splat<V>(mean), splat<V>(rstd * affine.slope), splat<V>(affine.offset)};
    double da = 0, db = 0;
    channel_sums<T, K>(p, c * a.s, (c + 1) * a.s, map, &da, &db);
    da *= rstd;
    const int64_t nc = item.n * a.c + item.c_begin + c;
    static_cast<A*>(a.da)[nc] = static_cast<A>(da);
    static_cast<A*>(a.db)[nc] = static_cast<A>(db);
    g_da += affine.slope * da;
    g_db += affine.slope * db;
  }
  const double r = rstd, count = static_cast<double>(m);
  const V q = splat<V>(-r * r * g_da / count), rest = splat<V>(-r * g_db / count);
  const bool past_caches = a.stream && may_stream(p.dx, a.s);
  for (int64_t c = d; c-- > 0;) {  // backwards: what was read last is still near
    const Affine<A> affine = affine_of<A>(a, item.n, item.c_begin + c);
    const V gain = splat<V>(rstd * affine.slope), offset = splat<V>(affine.offset);
    const GradientMap<V> map{splat<V>(mean), gain, q, rest};
    int64_t i = c * a.s;
    const auto write = [&](auto whole, int64_t left) DL_BODY {
      const V x = load_as(whole, p.x + i, left);
      const V dz =
          p.stash ? load_as(whole, p.stash + i, left) : upstream<T, K>(whole, p, i, left, x - map.mean, gain, offset);
      const V dx = group_norm_input_gradient(x, dz, map);
      if (past_caches) {
        stream(p.dx + i, dx);
      } else {
        store_as(whole, p.dx + i, dx, left);
      }
    };
    for (; i + w <= (c + 1) * a.s; i += w) {
      prefetch(p.x + m + i, w);
      prefetch(p.dy + m + i, w);
      write(Whole{}, w);
    }
    if (i < (c + 1) * a.s) write(Partial{}, (c + 1) * a.s - i);
  }
}

template <class T, Activation K>
void backward_channels_last(const GroupNormArgs& a, const Item& item,
                            const GroupNormScratch<typename Lanes<T>::scalar>& s) {
  using A = typename Lanes<T>::scalar;
  using V = typename Lanes<T>::vec;
  const int64_t width = item.c_end - item.c_begin, d = a.c / a.groups, at = item.n * a.s * a.c + item.c_begin;
  const int64_t stride = a.c;
  const BackwardItem<T> p(a, at, a.s * width, K, s.stash);
  const int64_t stash_stride = p.stash == s.stash ? width : stride;
  const A* means = static_cast<const A*>(a.mean) + item.n * a.groups + item.c_begin / d;
  const A* rstds = static_cast<const A*>(a.rstd) + item.n * a.groups + item.c_begin / d;
  fill_affine(a, item.n, item.c_begin, width, s.slope, s.offset);
  for (int64_t c = 0; c < width; ++c) {
    s.mean[c] = means[c / d];
    s.slope[c] *= rstds[c / d];
    s.first[c] = s.second[c] = 0;
  }
  for (int64_t c = 0; c < s.padded; ++c) s.q[c] = s.rest[c] = 0;
  for (int64_t begin = 0; begin < a.s; begin += kRows) {
    for_row_groups(begin, std::min(a.s, begin + kRows), [&](int64_t row, auto group) DL_BODY {
      constexpr int R = decltype(group)::size;
      for_vectors<T>(width, [&](int64_t c, int64_t left, auto whole) DL_BODY {
        const V mean = load(s.mean + c), gain = load(s.slope + c), offset = load(s.offset + c);
        V sa = load(s.q + c), sb = load(s.rest + c);
        for (int r = 0; r < R; ++r) {
          const int64_t i = (row + r) * stride + c;
          const V t = load_as(whole, p.x + i, left) - mean;
          const V dz = upstream<T, K>(whole, p, i, left, t, gain, offset);
          keep<T, K>(whole, p, i, (row + r) * stash_stride + c, left, dz);
          sa += dz * t;
          sb += dz;
        }
        store(s.q + c, sa);
        store(s.rest + c, sb);
      });
    });
    for (int64_t c = 0; c < width; ++c) {
      s.first[c] += s.q[c];
      s.second[c] += s.rest[c];
      s.q[c] = s.rest[c] = 0;
    }
  }
  for (int64_t g = 0; g < width / d; ++g) {
    const double r = rstds[g], count = static_cast<double>(d * a.s);
    double g_da = 0, g_db = 0;
    for (int64_t c = g * d; c < (g + 1) * d; ++c) {
      const int64_t nc = item.n * a.c + item.c_begin + c;
      const double da = s.first[c] * r, slope = affine_of<A>(a, item.n, item.c_begin + c).slope;
      static_cast<A*>(a.da)[nc] = static_cast<A>(da);
      static_cast<A*>(a.db)[nc] = static_cast<A>(s.second[c]);
      g_da += slope * da;
      g_db += slope * s.second[c];
    }
    for (int64_t c = g * d; c < (g + 1) * d; ++c) {
      s.q[c] = static_cast<A>(-r * r * g_da / count);
      s.rest[c] = static_cast<A>(-r * g_db / count);
    }
  }
  const bool past_caches = a.stream && may_stream(p.dx, a.c) && width * static_cast<int64_t>(sizeof(T)) % 64 == 0;
  for_row_groups_backwards(0, a.s, [&](int64_t row, auto group) DL_BODY {
    constexpr int R = decltype(group)::size;
    for_vectors<T>(width, [&](int64_t c, int64_t left, auto whole) DL_BODY {
      const GradientMap<V> map{load(s.mean + c), load(s.slope + c), load(s.q + c), load(s.rest + c)};
      const V offset = load(s.offset + c);
      for (int r = 0; r < R; ++r) {
        const int64_t i = (row + r) * stride + c;
        const V x = load_as(whole, p.x + i, left);
        const V dz = p.stash ? load_as(whole, p.stash + (row + r) * stash_stride + c, left)
                             : upstream<T, K>(whole, p, i, left, x - map.mean, map.p, offset);
        const V dx = group_norm_input_gradient(x, dz, map);
        if (past_caches) {
          stream(p.dx + i, dx);
        } else {
          store_as(whole, p.dx + i, dx, left);
        }
      }
    });
  });
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
