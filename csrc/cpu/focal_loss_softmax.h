// Softmax focal loss and cross entropy: the row engine.
//
// Math      csrc/math/focal_loss.h, softmax_focal_row (index targets) and softmax_focal_class (dense targets:
// probabilities
//           or smoothed labels); cross entropy is gamma = 0.
// Traffic   per logit: read x, write dx = 2 elements (+ the probabilities); exponentials wait in a scratch row in
// cache. Grid      tiles, spread over threads by the caller: one contiguous row of many classes, or a strip of rows
// side by side
//           in vector lanes where rows are short or the class dimension is strided.
// Requires  checked labels; contiguous arrays.
// Result    bitwise reproducible for one instruction set: a row's sums have a fixed order, whatever thread has it.
#pragma once

#include "../common/simd.h"
#include "../math/focal_loss.h"
#include "focal_loss_kernel.h"

namespace dlkernels {
inline namespace CPU_CAPABILITY {

constexpr int64_t kShortRow = 32;  // rows up to this length go side by side

// What every row needs, in the arithmetic of T.
template <class T, class TT>
struct SoftmaxRows {
  using A = typename Lanes<T>::scalar;
  using V = typename Lanes<T>::vec;
  static constexpr int W = Lanes<T>::width;

  const SoftmaxArgs& args;
  const T* x = static_cast<const T*>(args.input);
  const A* weight = static_cast<const A*>(args.weight);
  T* grad = static_cast<T*>(args.grad);
  A* loss = static_cast<A*>(args.loss);
  const int64_t C = args.classes;

  bool probabilities() const { return args.target_kind == Target::kFloat || args.target_kind == Target::kFloat32; }
  bool dense() const { return probabilities() || args.label_smoothing > 0; }
  int64_t label(int64_t row) const {
    if (args.target_kind == Target::kInt32) return static_cast<const int32_t*>(args.target)[row];
    return static_cast<const int64_t*>(args.target)[row];
  }
  A weight_of(int64_t c) const { return weight ? weight[c] : A(1); }
  A row_scale(int64_t row) const {
    const A* g = static_cast<const A*>(args.grad_output);
    return static_cast<A>(args.grad_scale) * (g ? g[row * args.grad_output_step] : A(1));
  }
  // Target weight of a class under smoothing: t_c = w_c ((1 - eps) q_c + eps / C).
  template <class U>
  DL_INLINE U smoothed(U q, U w) const {
    return w * (q * splat<U>(1 - args.label_smoothing) + splat<U>(args.label_smoothing / static_cast<double>(C)));
  }
};

// ---- one contiguous row ---------------------------------------------------------------------------------------------

template <class T>
DL_INLINE typename Lanes<T>::scalar row_maximum(const T* x, int64_t n) {
  using A = typename Lanes<T>::scalar;
  using V = typename Lanes<T>::vec;
  constexpr int W = Lanes<T>::width;
  V m0 = splat<V>(-INFINITY), m1 = m0, m2 = m0, m3 = m0;
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    m0 = vmax(m0, load(x + i));
    m1 = vmax(m1, load(x + i + W));
    m2 = vmax(m2, load(x + i + 2 * W));
    m3 = vmax(m3, load(x + i + 3 * W));
  }
  for (; i + W <= n; i += W) m0 = vmax(m0, load(x + i));
  if (i < n) m1 = vmax(m1, load_part<T>(x + i, n - i, A(-INFINITY)));
  return maximum(vmax(vmax(m0, m1), vmax(m2, m3)));
}

// sum_k exp(x_k - m), vector by vector; every 4096 elements the lanes are added up and moved to double.
template <class T>
struct ExpSum {
  using A = typename Lanes<T>::scalar;
  using V = typename Lanes<T>::vec;
  static constexpr int W = Lanes<T>::width;
  V s0 = splat<V>(0), s1 = splat<V>(0);
  double moved = 0;
  int64_t ahead = 0;  // elements from a row to the one that will be read next

  // Adds [begin, end); keeps the exponentials in e when it is given.
  DL_INLINE void add(const T* x, A* e, int64_t begin, int64_t end, V shift) {
    int64_t i = begin;
    while (i < end) {
      const int64_t stop = end - i <= 4096 ? end : i + 4096;
      for (; i + 2 * W <= stop; i += 2 * W) {
        // The next row comes from memory while this one is computed.
        if (ahead) prefetch(x + i + ahead, 2 * W);
        const V e0 = vexp(load(x + i) - shift), e1 = vexp(load(x + i + W) - shift);
        if (e) store(e + i, e0), store(e + i + W, e1);
        s0 += e0;
        s1 += e1;
      }
      if (i + W <= stop) {
        const V e0 = vexp(load(x + i) - shift);
        if (e) store(e + i, e0);
        s0 += e0;
        i += W;
      }
      if (i < stop) {
        const V e0 = vexp(load_part<T>(x + i, stop - i, A(-INFINITY)) - shift);
        if (e) store(e + i, e0);  // the scratch row is padded
        s1 += e0;
        i = stop;
      }
      if (i < end) total();
    }
  }
  DL_INLINE double total() {
    moved += static_cast<double>(sum(s0 + s1));
    s0 = s1 = splat<V>(0);
    return moved;
  }
};

// out = f(i) for i in [0, n), past the caches from the first aligned vector on when `past_caches`.
template <class T, class F>
DL_INLINE void write_row(T* out, int64_t n, bool past_caches, F f) {
  constexpr int W = Lanes<T>::width;
  int64_t i = 0;
  if (past_caches) {
    const int64_t bytes = W * sizeof(T);
    const int64_t ahead = (bytes - static_cast<int64_t>(reinterpret_cast<uintptr_t>(out) % bytes)) % bytes;
    const int64_t head = ahead / static_cast<int64_t>(sizeof(T)) < n ? ahead / static_cast<int64_t>(sizeof(T)) : n;
    if (head > 0) store_part<T>(out, f(0, head), head);
    for (i = head; i + W <= n; i += W) stream<T>(out + i, f(i, W));
  } else {
    for (; i + W <= n; i += W) store(out + i, f(i, W));
  }
  if (i < n) store_part<T>(out + i, f(i, n - i), n - i);
}

template <class T>
DL_INLINE void zero_row(T* out, int64_t n) {
  std::memset(out, 0, n * sizeof(T));
}

template <class T>
DL_INLINE typename Lanes<T>::vec load_up_to(const T* p, int64_t n) {
  return n >= Lanes<T>::width ? load(p) : load_part<T>(p, n, typename Lanes<T>::scalar(0));
}

// Index target. scratch: C exponentials.
template <class T, class TT, Gamma G>
void index_row(const SoftmaxRows<T, TT>& r, int64_t row, typename Lanes<T>::scalar* scratch) {
  using A = typename Lanes<T>::scalar;
  using V = typename Lanes<T>::vec;
  constexpr int W = Lanes<T>::width;
  const int64_t C = r.C, y = r.label(row);
  if (y == r.args.ignore_index) {
    if (r.loss) r.loss[row] = 0;
    if (r.grad) zero_row(r.grad + row * C, C);
    return;
  }
  const T* x = r.x + row * C;
  A* e = r.grad ? scratch : nullptr;
  const A m = row_maximum(x, C);
  // sum over k != y: the vector that holds y is taken apart, so that 1 - p_y is a sum and not a difference.
  const int64_t before = y / W * W, after = before + W < C ? before + W : C;
  const V shift = splat<V>(m);
  ExpSum<T> rest;
  rest.ahead = C;
  rest.add(x, e, 0, before, shift);
  const int64_t held = after - before;
  const V exps = vexp((held == W ? load(x + before) : load_part<T>(x + before, held, A(-INFINITY))) - shift);
  rest.s0 += without_lane(exps, y - before);
  rest.add(x, e, after, C, shift);
  const A other = static_cast<A>(rest.total()), d_y = to_float(x[y]) - m, e_y = lane(exps, y - before);

  const SoftmaxRow<A> out = softmax_focal_row<G, A>(e_y, other, d_y, r.args.gamma);
  const A w = r.weight_of(y);
  if (r.loss) r.loss[row] = w * out.loss;
  if (!r.grad) return;
  store(e + before, exps);
  e[y] = -other;  // p_y - 1 = -other / total
  const V scale = splat<V>(r.row_scale(row) * w * out.omega * out.inverse_sum);
  write_row(r.grad + row * C, C, r.args.stream, [&](int64_t i, int64_t n) { return load_up_to(e + i, n) * scale; });
}

// Dense target: probabilities, or a smoothed label. scratch: 3 C values (exponentials, target weights, h).
template <class T, class TT, Gamma G>
void dense_row(const SoftmaxRows<T, TT>& r, int64_t row, typename Lanes<T>::scalar* scratch) {
  using A = typename Lanes<T>::scalar;
  using V = typename Lanes<T>::vec;
  constexpr int W = Lanes<T>::width;
  const int64_t C = r.C;
  const T* x = r.x + row * C;
  A *e = scratch, *t = scratch + C, *h = scratch + 2 * C;
  if (r.probabilities()) {
    const TT* q = static_cast<const TT*>(r.args.target) + row * C;
    for (int64_t i = 0; i < C; i += W) {
      const V w = r.weight ? load_up_to(r.weight + i, C - i) : splat<V>(1);
      const V tv = r.smoothed(load_up_to(q + i, C - i), w);
      if (C - i >= W) store(t + i, tv);
      else store_part<A>(t + i, tv, C - i);
    }
  } else {
    const int64_t y = r.label(row);
    if (y == r.args.ignore_index) {
      if (r.loss) r.loss[row] = 0;
      if (r.grad) zero_row(r.grad + row * C, C);
      return;
    }
    for (int64_t c = 0; c < C; ++c) t[c] = r.smoothed(A(0), r.weight_of(c));
    t[y] = r.smoothed(A(1), r.weight_of(y));
  }

  // One pass: exponentials, their sum without the largest, and the sums of t and t d.
  const A m = row_maximum(x, C);
  const V shift = splat<V>(m), zero = splat<V>(0), one = splat<V>(1);
  double rest = -1, weights = 0, dots = 0;
  for (int64_t begin = 0; begin < C; begin += 4096) {
    const int64_t end = C - begin < 4096 ? C : begin + 4096;
    V rests = zero, largest = zero, sum_t = zero, sum_td = zero;
    for (int64_t i = begin; i < end; i += W) {
      const int64_t n = end - i;
      const V d = (n >= W ? load(x + i) : load_part<T>(x + i, n, A(-INFINITY))) - shift;
      const V tv = load_up_to(t + i, n), ev = vexp(d);
      rests += select(d == 0.0f, zero, ev);
      largest += select(d == 0.0f, one, zero);
      sum_t += tv;
      sum_td += select(tv == 0.0f, zero, tv * d);
      if (n >= W) store(e + i, ev);
      else store_part<A>(e + i, ev, n);
    }
    rest += static_cast<double>(sum(rests)) + static_cast<double>(sum(largest));
    weights += static_cast<double>(sum(sum_t));
    dots += static_cast<double>(sum(sum_td));
  }
  const A log_sum = rest < 1 ? vlog1p_unit(static_cast<A>(rest)) : vlog(static_cast<A>(rest + 1));
  const A inverse = static_cast<A>(1 / (rest + 1));
  double row_loss = weights * log_sum - dots;
  if constexpr (G != Gamma::kZero) {
    row_loss = weights = 0;
    const V ls = splat<V>(log_sum), rv = splat<V>(rest), iv = splat<V>(inverse);
    V sum_loss = zero, sum_h = zero;
    for (int64_t i = 0; i < C; i += W) {
      const int64_t n = C - i;
      const V d = (n >= W ? load(x + i) : load_part<T>(x + i, n, A(-INFINITY))) - shift;
      const V tv = load_up_to(t + i, n);
      const LossAndGrad<V> c = softmax_focal_class<G>(load_up_to(e + i, n), d, ls, rv, iv, r.args.gamma);
      const V hv = select(tv == 0.0f, zero, tv * c.grad);
      sum_loss += select(tv == 0.0f, zero, tv * c.loss);
      sum_h += hv;
      if (n >= W) store(h + i, hv);
      else store_part<A>(h + i, hv, n);
    }
    row_loss = static_cast<double>(sum(sum_loss));
    weights = static_cast<double>(sum(sum_h));
  } else {
    h = t;
  }
  // A row of NaN or -inf has no softmax: the loss is NaN even where every target weight is 0.
  if (rest != rest) row_loss = rest;
  if (r.loss) r.loss[row] = static_cast<A>(row_loss);
  if (!r.grad) return;
  const A g = r.row_scale(row);
  const V p_scale = splat<V>(static_cast<double>(inverse) * weights), scale = splat<V>(g);
  write_row(r.grad + row * C, C, r.args.stream,
            [&](int64_t i, int64_t n) { return (load_up_to(e + i, n) * p_scale - load_up_to(h + i, n)) * scale; });
}

}  // namespace CPU_CAPABILITY
}  // namespace dlkernels
