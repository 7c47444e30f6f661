// Region biased loss over rows of many regions: one row at a time, its regions across vector lanes.
// Math, Traffic, Requires and Result are those of region_biased_loss_kernel.cpp.
#pragma once

#include "../common/loops.h"
#include "../math/region_biased_loss.h"
#include "region_biased_loss_kernel.h"

namespace dlkernels {
inline namespace CPU_CAPABILITY {

template <class T>
struct LongRow {
  using A = typename Lanes<T>::scalar;
  using V = typename Lanes<T>::vec;
  static constexpr int64_t W = Lanes<T>::width;

  const RegionBiasedArgs& a;
  int64_t row;
  A* z;  // [padded(regions)]: the row, -inf where nothing takes part and behind its end
  const uint8_t* mask = a.mask ? a.mask + row * a.regions : nullptr;

  static int64_t padded(int64_t n) { return (n + W - 1) / W * W; }
  bool part(int64_t r) const { return !mask || r == a.origin || mask[r]; }

  void load_row() {
    const T* x = static_cast<const T*>(a.attention) + row * a.regions;
    const int64_t R = a.regions;
    for_vectors<T>(R, [&](int64_t r, int64_t left, auto whole) DL_BODY {
      store(z + r, whole.value ? load(x + r) : load_part(x + r, left, -static_cast<A>(INFINITY)));
    });
    const A z_0 = z[a.origin];
    if (mask)
      for (int64_t r = 0; r < R; ++r) z[r] = mask[r] ? z[r] : -static_cast<A>(INFINITY);
    z[a.origin] = z_0;
  }

  // The largest crop's place, the first of several, while z[origin] is -inf.
  int64_t place_of(A best) const {
    int64_t r = 0;
    while (r + W <= a.regions && all(load(z + r) != splat<V>(static_cast<double>(best)))) r += W;
    for (; r < a.regions; ++r)
      if (z[r] == best && r != a.origin && part(r)) return r;
    return -1;
  }

  void run() {
    load_row();
    const int64_t R = a.regions, end = padded(R);
    const A z_0 = z[a.origin];
    z[a.origin] = -static_cast<A>(INFINITY);
    V highest = splat<V>(-INFINITY), nan = splat<V>(0);
    for (int64_t r = 0; r < end; r += W) {
      const V v = load(z + r);
      highest = vmax(highest, v);
      nan = select(v == v, nan, v);
    }
    const A best = maximum(highest);
    const int64_t top = a.grad ? place_of(best) : -1;
    const bool undefined = z_0 != z_0 || !all(nan == nan);
    z[a.origin] = z_0;

    A gap = best - z_0, total = 1;
    if (a.softmax) {
      const A m = vmax(z_0, best);
      V sums = splat<V>(0);
      for (int64_t r = 0; r < end; r += W) {
        const V e = vexp(load(z + r) - splat<V>(static_cast<double>(m)));
        sums += e;
        if (a.grad) store(z + r, e);
      }
      total = sum(sums);
      gap = (vexp(best - m) - vexp(z_0 - m)) / total;
    }
    RegionBiasedTerms<A> terms = region_biased(gap, static_cast<A>(a.margin));
    if (undefined || gap != gap) terms = {static_cast<A>(NAN), static_cast<A>(NAN)};
    // Crops of -inf, or of NaN alone, are crops too.
    if (!(best > -INFINITY) && !some_crop()) terms = {A(0), A(0)};
    if (a.loss) static_cast<A*>(a.loss)[row] = terms.loss;
    if (a.grad) write_grad(terms.active, gap, top, total);
  }

  bool some_crop() const {
    for (int64_t r = 0; r < a.regions; ++r)
      if (r != a.origin && part(r)) return true;
    return false;
  }

  // z: the row, or its exponentials with a softmax.
  void write_grad(A active, A gap, int64_t top, A total) const {
    T* p = static_cast<T*>(a.grad) + row * a.regions;
    const int64_t R = a.regions;
    const A* g = static_cast<const A*>(a.grad_output);
    const A scale = static_cast<A>(a.grad_scale) * (g ? g[row * a.grad_output_step] : A(1));
    if (active != 1 || !a.softmax) std::memset(static_cast<void*>(p), 0, static_cast<size_t>(R) * sizeof(T));
    if (active == 0) return;
    if (active != active) {
      for (int64_t r = 0; r < R; ++r)
        if (part(r)) p[r] = from_float<T>(active);
      return;
    }
    if (!a.softmax) {
      p[a.origin] = from_float<T>(scale);
      p[top] = from_float<T>(-scale);
      return;
    }
    const A inverse = A(1) / total;
    const V every = splat<V>(static_cast<double>(gap)), by = splat<V>(static_cast<double>(inverse)),
            times = splat<V>(static_cast<double>(scale));
    for_vectors<T>(R, [&](int64_t r, int64_t left, auto whole)
                          DL_BODY { store_as(whole, p + r, load(z + r) * by * every * times, left); });
    p[a.origin] = from_float<T>(region_biased_softmax_grad(z[a.origin] * inverse, A(1), gap, A(1)) * scale);
    p[top] = from_float<T>(region_biased_softmax_grad(z[top] * inverse, A(-1), gap, A(1)) * scale);
  }
};

}  // namespace CPU_CAPABILITY
}  // namespace dlkernels
