// The region-biased-loss loops of one instruction set: compiled once for each, with CPU_CAPABILITY naming it.
//
// Math      csrc/math/region_biased_loss.h; what does not take part reads as -inf.
// Traffic   per element: read the attention (and the mask), write the gradient = 2 elements; a tile waits in cache.
// Grid      tiles, spread over threads by the caller: one row per vector lane, as rows are short (6 regions of a face),
//           or one row of many regions.
// Requires  contiguous arrays; regions <= 2^24, which a float counts.
// Result    bitwise reproducible for one instruction set: a row's sums have a fixed order, whatever thread has it.
#include "region_biased_loss_kernel.h"

#include "../common/loops.h"
#include "../math/region_biased_loss.h"
#include "region_biased_loss_rows.h"

namespace dlkernels {
inline namespace CPU_CAPABILITY {

// One tile: rows [first, first + n), their attention as z[r * W + lane]; lanes from n on repeat the first row.
template <class T>
struct Tile {
  using A = typename Lanes<T>::scalar;
  using V = typename Lanes<T>::vec;
  static constexpr int W = Lanes<T>::width;

  const RegionBiasedArgs& a;
  int64_t first, n;
  A* z;

  bool part(int64_t row, int64_t r) const { return !a.mask || r == a.origin || a.mask[row * a.regions + r]; }

  // Returns the first crop of each row, -1 where there is none; where all of them are -inf it is the largest.
  DL_INLINE V load_rows() {
    const T* x = static_cast<const T*>(a.attention) + first * a.regions;
    const uint8_t* mask = a.mask ? a.mask + first * a.regions : nullptr;
    const int64_t R = a.regions;
    V some = splat<V>(mask || R == 1 ? -1 : a.origin == 0 ? 1 : 0);
    for (int64_t r = R; r-- > 0;) {
      A v[W];
      if (n == W) {
        for (int64_t l = 0; l < W; ++l) v[l] = to_float(x[l * R + r]);
      } else {
        for (int64_t l = 0; l < W; ++l) v[l] = to_float(x[(l < n ? l : 0) * R + r]);
      }
      V value = load(v);
      if (mask && r != a.origin) {
        A kept[W];
        for (int64_t l = 0; l < W; ++l) kept[l] = static_cast<A>(mask[(l < n ? l : 0) * R + r]);
        const auto out = load(kept) == 0.0f;
        value = select(out, splat<V>(-INFINITY), value);
        some = select(out, some, splat<V>(static_cast<double>(r)));
      }
      store(z + r * W, value);
    }
    return some;
  }

  // The gradient waits as t[r * W + lane] where z was: a T is no larger than an A.
  DL_INLINE T* waiting() const { return reinterpret_cast<T*>(z); }
  DL_INLINE void store_rows(bool finite) const {
    T* p = static_cast<T*>(a.grad) + first * a.regions;
    const T* t = waiting();
    const int64_t R = a.regions;
    for (int64_t l = 0; l < n; ++l, p += R)
      for (int64_t r = 0; r < R; ++r) p[r] = t[r * W + l];
    if (!a.mask || finite) return;  // exponentials of -inf are 0, and so is their gradient
    p -= n * R;
    for (int64_t l = 0; l < n; ++l)
      for (int64_t r = 0; r < R; ++r)
        if (!part(first + l, r)) p[l * R + r] = T{};
  }

  DL_INLINE V scales() const {
    const A* g = static_cast<const A*>(a.grad_output);
    A scale[W];
    for (int64_t l = 0; l < W; ++l) {
      const int64_t row = first + (l < n ? l : 0);
      scale[l] = static_cast<A>(a.grad_scale) * (g ? g[row * a.grad_output_step] : A(1));
    }
    return load(scale);
  }

  DL_INLINE void run() {
    const V has_crop = load_rows();
    const int64_t R = a.regions, o = a.origin;
    const V zero = splat<V>(0), z_0 = load(z + o * W);
    V best = splat<V>(-INFINITY), index = has_crop, undefined = select(z_0 == z_0, zero, z_0);  // a part's NaN, or 0
    for (int64_t r = 0; r < R; ++r) {
      if (r == o) continue;
      const V v = load(z + r * W);
      const auto above = v > best;
      best = select(above, v, best);
      index = select(above, splat<V>(static_cast<double>(r)), index);
      undefined = select(v == v, undefined, v);
    }

    V gap = best - z_0, total = zero;
    if (a.softmax) {
      const V m = vmax(z_0, best);
      for (int64_t r = 0; r < R; ++r) {
        const V e = vexp(load(z + r * W) - m);
        total += e;
        store(z + r * W, e);
      }
      gap = (vexp(best - m) - vexp(z_0 - m)) / total;  // one of the two is 1: nothing is rounded before the difference
    }
    RegionBiasedTerms<V> row = region_biased(gap, splat<V>(a.margin));
    undefined = select(row.loss == row.loss, undefined, row.loss);
    const auto none = has_crop < 0.0f;
    row.loss = select(none, zero, row.loss + undefined);
    row.active = select(none, zero, row.active + undefined);

    if (a.loss) {
      store_some(static_cast<A*>(a.loss) + first, row.loss, n);
    }
    if (!a.grad) return;
    if (a.softmax) {
      const V g = scales(), inverse = splat<V>(1) / total;
      for (int64_t r = 0; r < R; ++r) {
        const V here = r == o ? row.active : select(index == splat<V>(static_cast<double>(r)), -row.active, zero);
        const V dz = region_biased_softmax_grad(load(z + r * W) * inverse, here, gap, row.active);
        store(waiting() + r * W, select(row.active == 0.0f, zero, dz * g));
      }
      const V factor = row.active * g;
      store_rows(all(factor - factor == 0.0f));
    } else {
      two_numbers(row.active, index);
    }
  }

  // Without a softmax a row's gradient is 0 but for two numbers, or NaN wherever the row has a part.
  DL_INLINE void two_numbers(V active, V index) const {
    T* p = static_cast<T*>(a.grad) + first * a.regions;
    const int64_t R = a.regions;
    A actives[W], indices[W], gs[W];
    store(actives, active);
    store(indices, index);
    store(gs, scales());
    std::memset(static_cast<void*>(p), 0, static_cast<size_t>(n * R) * sizeof(T));
    for (int64_t l = 0; l < n; ++l, p += R) {
      if (actives[l] == A(0)) continue;
      const A g = actives[l] * gs[l];
      if (actives[l] == actives[l]) {
        p[a.origin] = from_float<T>(g);
        p[static_cast<int64_t>(indices[l])] = from_float<T>(-g);
      } else {
        for (int64_t r = 0; r < R; ++r)
          if (part(first + l, r)) p[r] = from_float<T>(g);
      }
    }
  }
};

// Rows are cheaper side by side until each of them fills several vectors.
template <class T>
bool long_rows(const RegionBiasedArgs& a) {
  return a.regions > 8 * Lanes<T>::width;
}

template <class T>
void run_tiles(const RegionBiasedArgs& a, int64_t begin, int64_t end, void* scratch) {
  constexpr int64_t W = Lanes<T>::width;
  auto* z = static_cast<typename Lanes<T>::scalar*>(scratch);
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t first = tile * W, n = a.rows - first < W ? a.rows - first : W;
    if (long_rows<T>(a)) {
      LongRow<T>{a, tile, z}.run();
    } else {
      Tile<T>{a, first, n, z}.run();
    }
  }
}

static int64_t tiles(const RegionBiasedArgs& a) {
  return with_float(a.dtype, [&](auto t) -> int64_t {
    using T = decltype(t);
    constexpr int64_t W = Lanes<T>::width;
    return long_rows<T>(a) ? a.rows : (a.rows + W - 1) / W;
  });
}

static int64_t scratch_bytes(const RegionBiasedArgs& a) {
  return with_float(a.dtype, [&](auto t) -> int64_t {
    using T = decltype(t);
    const int64_t count = long_rows<T>(a) ? LongRow<T>::padded(a.regions) : a.regions * Lanes<T>::width;
    return count * static_cast<int64_t>(sizeof(typename Lanes<T>::scalar));
  });
}

static void run(const RegionBiasedArgs& a, int64_t begin, int64_t end, void* scratch) {
  with_float(a.dtype, [&](auto t) { run_tiles<decltype(t)>(a, begin, end, scratch); });
}

}  // namespace CPU_CAPABILITY

RegionBiasedLossKernels DL_CONCAT(region_biased_loss_kernels_, CPU_CAPABILITY)() { return {tiles, scratch_bytes, run}; }

}  // namespace dlkernels
