// The GCCS loops of one instruction set: compiled once for each, with CPU_CAPABILITY naming it.
//
// Math      csrc/math/gccs_loss.h. Rows are taken relative to the first one of their class, d = (z - z_0) - mean(z -
// z_0):
//           a spread far below the mean keeps its digits.
// Traffic   per element: read z, write dz = 2 elements. Mean, moments and gradient are three sweeps over a slab of up
// to
//           256 columns of one class, the last two from the second-level cache (up to about 1000 rows).
// Requires  rows grouped by class; contiguous features.
// Result    bitwise reproducible for one instruction set: sums over blocks of 64 rows in float, over blocks in double.
#include "gccs_loss_kernel.h"

#include "../common/loops.h"
#include "../math/gccs_loss.h"

namespace dlkernels {
inline namespace CPU_CAPABILITY {

// One class, one slab of columns.
template <class T, bool kKurtosis>
struct GccsSlab {
  using A = typename Lanes<T>::scalar;
  using V = typename Lanes<T>::vec;
  static constexpr int kMoments = kKurtosis ? 3 : 1;

  const GccsArgs& args;
  const int32_t* rows;
  int64_t n, label, first, width;
  const T* x;  // column `first` of row 0

  // Read by whole vectors from any column on: one more than a slab has.
  static constexpr int64_t kPadded = kGccsSlab + kFloatLanes;
  alignas(64) A origin[kPadded], mean[kPadded];  // z_0, and the mean relative to it
  alignas(64) A block[kMoments][kGccsSlab];      // sums over a block of rows
  double total[kMoments][kGccsSlab];
  // Scaled for the gradient: offset + d (slope + cubic d^2).
  alignas(64) A offset[kPadded], slope[kPadded], cubic[kPadded];

  GccsSlab(const GccsArgs& a, const Segment& s, int64_t slab)
      : args(a),
        rows(a.order + s.begin),
        n(s.end - s.begin),
        label(s.label),
        first(slab * kGccsSlab),
        width(a.classes - first < kGccsSlab ? a.classes - first : kGccsSlab),
        x(static_cast<const T*>(a.features) + first) {}

  DL_INLINE const T* row(int64_t i) const { return x + rows[i] * args.classes; }

  // total[m] = sum over the rows of term(c, left, whole, row pointers...)[m].
  template <int kCount, class F>
  DL_INLINE void sweep(bool from_memory, F term) {
    for (int m = 0; m < kCount; ++m)
      for (int64_t c = 0; c < width; ++c) total[m][c] = 0;
    for (int64_t begin = 0; begin < n; begin += kRows) {
      const int64_t end = n - begin < kRows ? n : begin + kRows;
      for (int m = 0; m < kCount; ++m) std::memset(block[m], 0, sizeof(block[m]));
      for_row_groups(begin, end, [&](int64_t i, auto group) DL_BODY {
        constexpr int R = decltype(group)::size;
        const T* p[R];
        for (int r = 0; r < R; ++r) {
          p[r] = row(i + r);
          if (from_memory && i + r + R < n) prefetch(row(i + r + R), width);
        }
        for_vectors<T>(width, [&](int64_t c, int64_t left, auto whole) DL_BODY {
          V sums[kCount];
          for (int m = 0; m < kCount; ++m) sums[m] = load(block[m] + c);
          for (int r = 0; r < R; ++r) term(load_as(whole, p[r] + c, left), c, sums);
          for (int m = 0; m < kCount; ++m) store(block[m] + c, sums[m]);
        });
      });
      for (int m = 0; m < kCount; ++m)
        for (int64_t c = 0; c < width; ++c) total[m][c] += static_cast<double>(block[m][c]);
    }
  }

  DL_INLINE V centred(V z, int64_t c) const { return (z - load(origin + c)) - load(mean + c); }

  DL_INLINE void statistics() {
    // Whole vectors are read and written below: what lies behind the last column is 0.
    std::memset(origin, 0, sizeof(origin));
    for_vectors<T>(width, [&](int64_t c, int64_t left, auto whole)
                              DL_BODY { store_as(whole, origin + c, load_as(whole, row(0) + c, left), left); });
    std::memset(total, 0, sizeof(total));
    sweep<1>(true, [&](V z, int64_t c, V* sums) DL_BODY { sums[0] += z - load(origin + c); });
    for (int64_t c = 0; c < kGccsSlab; ++c) mean[c] = c < width ? static_cast<A>(total[0][c] / n) : A(0);
    if (n == 1) return;
    sweep<kMoments>(false, [&](V z, int64_t c, V* sums) DL_BODY {
      const V d = centred(z, c), d2 = d * d;
      sums[0] += d2;
      if constexpr (kKurtosis) {
        sums[1] += d2 * d;
        sums[2] += d2 * d2;
      }
    });
  }

  // The loss of the slab, and the coefficients of its gradient.
  double columns(double scale) {
    const double s2 = args.target_std * args.target_std, inverse = 1 / static_cast<double>(n);
    const GccsTarget<V> to{splat<V>(s2), splat<V>(1 / s2), splat<V>(args.eps),
                           splat<V>(args.kurtosis_weight / static_cast<double>(args.classes))};
    const V by = splat<V>(scale * inverse);
    // From here on `block` holds the moments, and `offset` the mean's distance from the vertex.
    for (int m = 0; m < kMoments; ++m)
      for (int64_t c = 0; c < kGccsSlab; ++c) block[m][c] = static_cast<A>(total[m][c] * inverse);
    for (int64_t c = 0; c < kGccsSlab; ++c) offset[c] = origin[c] + mean[c];
    const int64_t own = label - first;
    if (own >= 0 && own < width) offset[own] = (origin[own] - static_cast<A>(args.target_mean)) + mean[own];
    double loss = 0;
    for_vectors<T>(width, [&](int64_t c, int64_t left, auto) DL_BODY {
      const GccsColumn<V> column = gccs_column<kKurtosis>(to, n > 1, load(offset + c), load(block[0] + c),
                                                          load(block[kMoments / 2] + c), load(block[kMoments - 1] + c));
      loss += static_cast<double>(sum(first_lanes<T>(column.loss, left)));
      store(offset + c, column.offset * by);
      store(slope + c, column.slope * by);
      store(cubic + c, column.cubic * by);
    });
    return loss;
  }

  DL_INLINE V gradient_of(V z, int64_t c) const {
    const V d = centred(z, c);
    V g = load(slope + c);
    if constexpr (kKurtosis) g += load(cubic + c) * d * d;
    return g * d + load(offset + c);
  }

  template <bool kStream>
  void gradient() const {
    constexpr int64_t kBytes = Lanes<T>::width * sizeof(T);
    for (int64_t i = 0; i < n; ++i) {
      const T* p = row(i);
      T* to = static_cast<T*>(args.grad) + first + rows[i] * args.classes;
      // Past the caches from the first aligned vector on.
      int64_t c = 0;
      if constexpr (kStream) {
        const int64_t head = (kBytes - reinterpret_cast<uintptr_t>(to) % kBytes) % kBytes / sizeof(T);
        c = head < width ? head : width;
        if (c > 0) store_part(to, gradient_of(load_part(p, c, 0), 0), c);
      }
      for (; c + Lanes<T>::width <= width; c += Lanes<T>::width) {
        const V g = gradient_of(load(p + c), c);
        if constexpr (kStream) stream(to + c, g);
        else store(to + c, g);
      }
      if (c < width) store_part(to + c, gradient_of(load_part(p + c, width - c, 0), c), width - c);
    }
  }

  double run() {
    const A* g = static_cast<const A*>(args.grad_output);
    const double scale = args.grad_scale * (g ? static_cast<double>(g[label * args.grad_output_step]) : 1.0);
    statistics();
    const double loss = columns(scale);
    if (args.grad == nullptr) return loss;
    if (args.stream) gradient<true>();
    else gradient<false>();
    return loss;
  }
};

template <class T, bool kKurtosis>
void gccs_tasks(const GccsArgs& a, int64_t begin, int64_t end) {
  const int64_t slabs = a.slabs();
  for (int64_t task = begin; task < end; ++task) {
    GccsSlab<T, kKurtosis> slab(a, a.segments[task / slabs], task % slabs);
    const double loss = slab.run();
    if (a.partial) a.partial[task] = loss;
  }
  if (a.stream) store_fence();
}

static void run(const GccsArgs& a, int64_t begin, int64_t end) {
  with_float(a.dtype, [&](auto t) {
    using T = decltype(t);
    a.kurtosis_weight > 0 ? gccs_tasks<T, true>(a, begin, end) : gccs_tasks<T, false>(a, begin, end);
  });
}

}  // namespace CPU_CAPABILITY

GccsLossKernels DL_CONCAT(gccs_loss_kernels_, CPU_CAPABILITY)() { return {run}; }

}  // namespace dlkernels
