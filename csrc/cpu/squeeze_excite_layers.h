// The two small layers of squeeze-and-excitation, for a few samples at a time: a row of weights is read once for all.
#pragma once

#include <algorithm>

#include "../common/loops.h"
#include "squeeze_excite_kernel.h"

namespace dlkernels {
inline namespace CPU_CAPABILITY {

constexpr int kSamples = 8;  // at most, per item

// The vector that goes with the arithmetic type A.
template <class A>
using Vector = typename Lanes<A>::vec;

// out[b][o] = sum_i w[o][i] v[b][i] (+ bias[o]) for B samples.
template <int B, class A>
void dot_rows(const A* w, const A* bias, const A* v, A* out, int64_t outputs, int64_t inputs) {
  using V = Vector<A>;
  for (int64_t o = 0; o < outputs; ++o) {
    const A* row = w + o * inputs;
    V acc[B];
    for (int b = 0; b < B; ++b) acc[b] = splat<V>(0);
    for_vectors<A>(inputs, [&](int64_t i, int64_t left, auto whole) DL_BODY {
      const V x = load_as(whole, row + i, left);
      for (int b = 0; b < B; ++b) acc[b] += x * load_as(whole, v + b * inputs + i, left);
    });
    for (int b = 0; b < B; ++b) out[b * outputs + o] = static_cast<A>(sum(acc[b])) + (bias ? bias[o] : A(0));
  }
}

// out[b][i] = sum_o u[b][o] w[o][i] for B samples, four rows at a time.
template <int B, class A>
void add_rows(const A* w, const A* u, A* out, int64_t outputs, int64_t inputs) {
  using V = Vector<A>;
  for (int64_t i = 0; i < B * inputs; ++i) out[i] = 0;
  for_row_groups(0, outputs, [&](int64_t o, auto group) DL_BODY {
    constexpr int R = decltype(group)::size;
    for_vectors<A>(inputs, [&](int64_t i, int64_t left, auto whole) DL_BODY {
      V x[R];
      for (int r = 0; r < R; ++r) x[r] = load_as(whole, w + (o + r) * inputs + i, left);
      for (int b = 0; b < B; ++b) {
        V acc = load_as(whole, out + b * inputs + i, left);
        for (int r = 0; r < R; ++r) acc += x[r] * splat<V>(u[b * outputs + o + r]);
        store_as(whole, out + b * inputs + i, acc, left);
      }
    });
  });
}

// f(tag) with the number of samples, 1 to kSamples, as a constant: what is not a power of two goes in parts.
template <class F>
void for_samples(int64_t count, F f) {
  int64_t done = 0;
  for (; done + 8 <= count; done += 8) f(done, RowGroup<8>{});
  for (; done + 4 <= count; done += 4) f(done, RowGroup<4>{});
  for (; done < count; ++done) f(done, RowGroup<1>{});
}

template <class A>
struct Layers {
  const SqueezeExciteArgs& a;
  const A *w1, *b1, *w2, *b2;
  A *mean, *hidden, *gate_value, *dz2, *dz1, *activated;

  explicit Layers(const SqueezeExciteArgs& args) : a(args) {
    w1 = static_cast<const A*>(a.w1), b1 = static_cast<const A*>(a.b1);
    w2 = static_cast<const A*>(a.w2), b2 = static_cast<const A*>(a.b2);
    mean = static_cast<A*>(a.mean), hidden = static_cast<A*>(a.hidden), gate_value = static_cast<A*>(a.gate_value);
    dz2 = static_cast<A*>(a.dz2), dz1 = static_cast<A*>(a.dz1), activated = static_cast<A*>(a.activated);
  }

  void activate_hidden(int64_t begin, int64_t end, A* out) const {
    with_activation(static_cast<Activation>(a.activation), [&](auto kind) {
      for (int64_t i = begin * a.r; i < end * a.r; ++i)
        out[i - begin * a.r] = activate<decltype(kind)::value>(hidden[i]);
    });
  }

  // Gates of samples [begin, end) from their means. scratch [kSamples * R].
  void forward(int64_t begin, int64_t end, A* scratch) const {
    for_samples(end - begin, [&](int64_t done, auto group) {
      constexpr int B = decltype(group)::size;
      const int64_t n = begin + done;
      if (a.r > 0) {
        dot_rows<B>(w1, b1, mean + n * a.c, hidden + n * a.r, a.r, a.c);
        activate_hidden(n, n + B, scratch);
        dot_rows<B>(w2, b2, scratch, gate_value + n * a.c, a.c, a.r);
      } else {
        dot_rows<B>(w2, b2, mean + n * a.c, gate_value + n * a.c, a.c, a.c);
      }
    });
    for (int64_t i = begin * a.c; i < end * a.c; ++i) gate_value[i] = gate(static_cast<Gate>(a.gate), gate_value[i]);
  }

  // ds of samples [begin, end), already divided by S; dz2 holds de on entry. ds [(end - begin) * C].
  void backward(int64_t begin, int64_t end, A* ds) const {
    for (int64_t i = begin * a.c; i < end * a.c; ++i) dz2[i] *= gate_slope(static_cast<Gate>(a.gate), gate_value[i]);
    for_samples(end - begin, [&](int64_t done, auto group) {
      constexpr int B = decltype(group)::size;
      const int64_t n = begin + done;
      A* out = ds + done * a.c;
      if (a.r > 0) {
        add_rows<B>(w2, dz2 + n * a.c, dz1 + n * a.r, a.c, a.r);
        with_activation(static_cast<Activation>(a.activation), [&](auto kind) {
          for (int64_t i = n * a.r; i < (n + B) * a.r; ++i) dz1[i] *= slope<decltype(kind)::value>(hidden[i]);
        });
        add_rows<B>(w1, dz1 + n * a.r, out, a.r, a.c);
      } else {
        add_rows<B>(w2, dz2 + n * a.c, out, a.c, a.c);
      }
    });
    if (a.r > 0) activate_hidden(begin, end, activated + begin * a.r);
    const A share = A(1) / static_cast<A>(a.s);
    for (int64_t i = 0; i < (end - begin) * a.c; ++i) ds[i] *= share;
  }
};

// Rows [begin, end) of the sum of outer products; the samples in blocks, so that long sums keep their digits.
template <class A>
void outer_sum(const OuterSum& p, int64_t begin, int64_t end) {
  using V = Vector<A>;
  const A *u = static_cast<const A*>(p.u), *v = static_cast<const A*>(p.v);
  constexpr int64_t kBlock = 256;
  if (v == nullptr) {
    for (int64_t o = begin; o < end; ++o) {
      double total = 0;
      for (int64_t n = 0; n < p.n; ++n) total += u[n * p.outputs + o];
      set_parameter(p.out, p.dtype, o, total);
    }
    return;
  }
  for_row_groups(begin, end, [&](int64_t o, auto group) DL_BODY {
    constexpr int R = decltype(group)::size;
    for_vectors<A>(p.inputs, [&](int64_t i, int64_t left, auto whole) DL_BODY {
      V total[R];
      for (int r = 0; r < R; ++r) total[r] = splat<V>(0);
      for (int64_t first = 0; first < p.n; first += kBlock) {
        V acc[R];
        for (int r = 0; r < R; ++r) acc[r] = splat<V>(0);
        for (int64_t n = first; n < std::min(p.n, first + kBlock); ++n) {
          const V x = load_as(whole, v + n * p.inputs + i, left);
          for (int r = 0; r < R; ++r) acc[r] += x * splat<V>(u[n * p.outputs + o + r]);
        }
        for (int r = 0; r < R; ++r) total[r] += acc[r];
      }
      for (int r = 0; r < R; ++r) {
        const int64_t at = (o + r) * p.inputs + i;
        if (p.dtype == Float::kFloat32 && sizeof(A) == 4) {
          store_as(whole, static_cast<A*>(p.out) + at, total[r], left);
        } else {
          for (int64_t k = 0; k < left; ++k) set_parameter(p.out, p.dtype, at + k, lane(total[r], k));
        }
      }
    });
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace dlkernels
