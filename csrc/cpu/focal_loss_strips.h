// Softmax focal loss over strips: rows side by side in vector lanes, for short rows and for a strided class dimension.
// Math, Traffic, Requires and Result are those of focal_loss_softmax.h; the tile [C][lanes] waits in cache.
#pragma once

#include "focal_loss_softmax.h"

namespace dlkernels {
inline namespace CPU_CAPABILITY {

// A strip: `n` rows; row l starts at offset[l] and its classes are args.inner apart.
template <class T>
struct Strip {
  static constexpr int kMaxLanes = 4 * Lanes<T>::width;
  int64_t first, n, lanes;
  int64_t offset[kMaxLanes];
  bool adjacent;  // offset[l] = offset[0] + l
};

template <class T>
int64_t strip_lanes(const SoftmaxArgs& a) {
  return a.classes > 1024 ? Lanes<T>::width : Strip<T>::kMaxLanes;
}

// Strips do not cross an outer index where the inner extent fills them; short inner extents are packed across it.
template <class T>
int64_t strips_per_outer(const SoftmaxArgs& a) {
  const int64_t lanes = strip_lanes<T>(a);
  return a.inner >= lanes ? (a.inner + lanes - 1) / lanes : 0;
}

template <class T>
Strip<T> strip_at(const SoftmaxArgs& a, int64_t tile) {
  Strip<T> s;
  s.lanes = strip_lanes<T>(a);
  const int64_t per_outer = strips_per_outer<T>(a), rows = a.outer * a.inner;
  s.adjacent = per_outer > 0;
  if (s.adjacent) {
    const int64_t n = tile / per_outer, at = (tile - n * per_outer) * s.lanes;
    s.first = n * a.inner + at;
    s.n = a.inner - at < s.lanes ? a.inner - at : s.lanes;
  } else {
    s.first = tile * s.lanes;
    s.n = rows - s.first < s.lanes ? rows - s.first : s.lanes;
  }
  for (int64_t l = 0; l < s.lanes; ++l) {
    const int64_t row = s.first + (l < s.n ? l : 0), n = row / a.inner;
    s.offset[l] = n * a.classes * a.inner + (row - n * a.inner);
  }
  return s;
}

// The strip's elements of p, as tile[c * lanes + l]; lanes beyond n repeat the first row.
template <class S, class P, class A>
DL_INLINE void load_tile(const S& s, const SoftmaxArgs& a, const P* p, A* tile) {
  constexpr int W = Lanes<P>::width;
  if (s.adjacent && s.n == s.lanes) {
    for (int64_t c = 0; c < a.classes; ++c)
      for (int64_t l = 0; l < s.lanes; l += W) store(tile + c * s.lanes + l, load(p + s.offset[0] + c * a.inner + l));
    return;
  }
  for (int64_t l = 0; l < s.lanes; ++l) {
    const P* row = p + s.offset[l];
    for (int64_t c = 0; c < a.classes; ++c) tile[c * s.lanes + l] = to_float(row[c * a.inner]);
  }
}

template <class S, class T, class A>
DL_INLINE void store_tile(const S& s, const SoftmaxArgs& a, const A* tile, T* p) {
  constexpr int W = Lanes<T>::width;
  if (s.adjacent && s.n == s.lanes) {
    for (int64_t c = 0; c < a.classes; ++c)
      for (int64_t l = 0; l < s.lanes; l += W) store(p + s.offset[0] + c * a.inner + l, load(tile + c * s.lanes + l));
    return;
  }
  for (int64_t l = 0; l < s.n; ++l) {
    T* row = p + s.offset[l];
    for (int64_t c = 0; c < a.classes; ++c) row[c * a.inner] = from_float<T>(tile[c * s.lanes + l]);
  }
}

// scratch: the tile of logits (overwritten by the gradient), and for dense targets the tiles of t and of exponentials.
template <class T, class TT, Gamma G>
void strip(const SoftmaxRows<T, TT>& r, int64_t tile_index, typename Lanes<T>::scalar* scratch) {
  using A = typename Lanes<T>::scalar;
  using V = typename Lanes<T>::vec;
  constexpr int W = Lanes<T>::width;
  const SoftmaxArgs& a = r.args;
  const Strip<T> s = strip_at<T>(a, tile_index);
  const int64_t C = r.C, L = s.lanes;
  const bool dense = r.dense(), probabilities = r.probabilities();
  A *z = scratch, *t = scratch + C * L, *e = scratch + 2 * C * L;
  load_tile(s, a, r.x, z);

  // Per row: label (as a number; -1 = left out), weight of the target, scale of the gradient, loss.
  A label[Strip<T>::kMaxLanes], weight[Strip<T>::kMaxLanes], scale[Strip<T>::kMaxLanes], loss[Strip<T>::kMaxLanes];
  A z_y[Strip<T>::kMaxLanes];
  int64_t index[Strip<T>::kMaxLanes];
  const bool direct = s.adjacent && s.n == s.lanes && !dense;  // the gradient goes from registers to memory
  for (int64_t l = 0; l < L; ++l) {
    const int64_t row = s.first + (l < s.n ? l : 0);
    const int64_t y = probabilities ? 0 : r.label(row);
    const bool counts = probabilities || y != a.ignore_index;
    index[l] = y;
    label[l] = counts ? static_cast<A>(y) : A(-1);
    weight[l] = counts ? r.weight_of(y) : A(0);
    z_y[l] = counts ? z[y * L + l] : A(0);
    scale[l] = r.grad ? r.row_scale(row) : A(0);
  }
  if (probabilities) load_tile(s, a, static_cast<const TT*>(a.target), t);

  for (int64_t v = 0; v < L && v < s.n; v += W) {
    const V zero = splat<V>(0), one = splat<V>(1), y = load(label + v);
    V m = load(z + v);
    for (int64_t c = 1; c < C; ++c) m = vmax(m, load(z + c * L + v));
    const V g = load(scale + v);
    V row_loss;
    if (!dense) {
      // The target's logit leaves the tile, so that the sum is that of the others and p_y - 1 = -other / total.
      for (int64_t l = v; l < v + W; ++l)
        if (label[l] >= 0) z[index[l] * L + l] = A(-INFINITY);
      V other = zero;
      for (int64_t c = 0; c < C; ++c) {
        const V ev = vexp(load(z + c * L + v) - m);
        other += ev;
        if (r.grad) store(z + c * L + v, ev);
      }
      const V d_y = load(z_y + v) - m;
      const SoftmaxRow<V> out = softmax_focal_row<G>(vexp(d_y), other, d_y, a.gamma);
      const V w = load(weight + v);
      row_loss = w * out.loss;
      if (r.grad) {
        A others[W];
        store(others, other);
        for (int64_t l = v; l < v + W; ++l)
          if (label[l] >= 0) z[index[l] * L + l] = -others[l - v];
        const V p_scale = g * w * out.omega * out.inverse_sum;
        const bool some_left_out = !all(y >= 0.0f);
        for (int64_t c = 0; c < C; ++c) {
          V dz = load(z + c * L + v) * p_scale;
          if (some_left_out) dz = select(y < 0.0f, zero, dz);
          if (direct) {
            store(r.grad + s.offset[0] + c * a.inner + v, dz);
          } else {
            store(z + c * L + v, dz);
          }
        }
      }
    } else {
      V rest = splat<V>(-1), weights = zero, dots = zero;
      for (int64_t c = 0; c < C; ++c) {
        const int64_t at = c * L + v;
        const V d = load(z + at) - m, ev = vexp(d), w = splat<V>(static_cast<double>(r.weight_of(c)));
        const V q = probabilities ? load(t + at) : select(y == splat<V>(static_cast<double>(c)), one, zero);
        const V tv = r.smoothed(q, w);
        store(t + at, tv);
        store(e + at, ev);
        store(z + at, d);
        // Begin at -1 and meet the largest first as a whole 1: the rest adds up without it.
        weights += tv;
        dots += select(tv == 0.0f, zero, tv * d);
      }
      V others = zero;
      for (int64_t c = 0; c < C; ++c) {
        const auto largest = load(z + c * L + v) == 0.0f;
        rest += select(largest, one, zero);
        others += select(largest, zero, load(e + c * L + v));
      }
      rest += others;
      const V log_sum = vlog1p(rest), inverse = one / (rest + 1.0f);
      row_loss = weights * log_sum - dots;
      if constexpr (G != Gamma::kZero) {
        row_loss = weights = zero;
        for (int64_t c = 0; c < C; ++c) {
          const int64_t at = c * L + v;
          const V tv = load(t + at);
          const LossAndGrad<V> k = softmax_focal_class<G>(load(e + at), load(z + at), log_sum, rest, inverse, a.gamma);
          const V h = select(tv == 0.0f, zero, tv * k.grad);
          row_loss += select(tv == 0.0f, zero, tv * k.loss);
          weights += h;
          store(t + at, h);
        }
      }
      row_loss = select(rest == rest, row_loss, rest);
      const V p_scale = inverse * weights;
      for (int64_t c = 0; r.grad && c < C; ++c) {
        const int64_t at = c * L + v;
        store(z + at, select(y < 0.0f, zero, (load(e + at) * p_scale - load(t + at)) * g));
      }
    }
    store(loss + v, select(y < 0.0f, zero, row_loss));
  }
  if (r.loss)
    for (int64_t l = 0; l < s.n; ++l) r.loss[s.first + l] = loss[l];
  if (r.grad && !direct) store_tile(s, a, z, r.grad);
}

}  // namespace CPU_CAPABILITY
}  // namespace dlkernels
