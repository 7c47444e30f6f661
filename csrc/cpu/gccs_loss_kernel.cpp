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

  alignas(64) A origin[kGccsSlab], mean[kGccsSlab];  // z_0, and the mean relative to it
  alignas(64) A block[kMoments][kGccsSlab];          // sums over a block of rows
  double total[kMoments][kGccsSlab];
  // Scaled for the gradient: offset + d (slope + cubic d^2).
  alignas(64) A offset[kGccsSlab], slope[kGccsSlab], cubic[kGccsSlab];

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

  // A moment of vector c as the arithmetic type.
  DL_INLINE V moment(int m, int64_t c) const {
    alignas(64) A values[Lanes<T>::width];
    for (int k = 0; k < Lanes<T>::width; ++k) values[k] = static_cast<A>(total[m][c + k] / static_cast<double>(n));
    return load(values);
  }

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
    const double s2 = args.target_std * args.target_std;
    const GccsTarget<V> to{splat<V>(s2), splat<V>(1 / s2), splat<V>(args.eps),
                           splat<V>(args.kurtosis_weight / static_cast<double>(args.classes))};
    const V by = splat<V>(scale / static_cast<double>(n));
    double loss = 0;
    for_vectors<T>(width, [&](int64_t c, int64_t left, auto) DL_BODY {
      A vertex[Lanes<T>::width];
      for (int k = 0; k < Lanes<T>::width; ++k)
        vertex[k] = first + c + k == label ? static_cast<A>(args.target_mean) : A(0);
      const V t = (load(origin + c) - load(vertex)) + load(mean + c), v = moment(0, c);
      const GccsColumn<V> column = gccs_column<kKurtosis>(to, n > 1, t, v, kKurtosis ? moment(kMoments - 2, c) : v,
                                                          kKurtosis ? moment(kMoments - 1, c) : v);
      loss += static_cast<double>(sum(first_lanes<T>(column.loss, left)));
      store(offset + c, column.offset * by);
      store(slope + c, column.slope * by);
      store(cubic + c, column.cubic * by);
    });
    return loss;
  }

  template <bool kStream>
  DL_INLINE void gradient() const {
    T* out = static_cast<T*>(args.grad) + first;
    for_row_groups(0, n, [&](int64_t i, auto group) DL_BODY {
      for (int r = 0; r < decltype(group)::size; ++r) {
        const T* p = row(i + r);
        T* to = out + rows[i + r] * args.classes;
        for_vectors<T>(width, [&](int64_t c, int64_t left, auto whole) DL_BODY {
          const V d = centred(load_as(whole, p + c, left), c);
          V g = load(slope + c);
          if constexpr (kKurtosis) g += load(cubic + c) * d * d;
          g = g * d + load(offset + c);
          if constexpr (kStream && decltype(whole)::value) stream(to + c, g);
          else store_as(whole, to + c, g, left);
        });
      }
    });
  }

  double run() {
    const A* g = static_cast<const A*>(args.grad_output);
    const double scale = args.grad_scale * (g ? static_cast<double>(g[label * args.grad_output_step]) : 1.0);
    statistics();
    const double loss = columns(scale);
    if (args.grad == nullptr) return loss;
    // Vectors are aligned in every row or in none.
    if (args.stream && may_stream(static_cast<T*>(args.grad), args.classes)) gradient<true>();
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
