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
  // Rows between a prefetch and its use in a class of many rows; in one of few, the next task's rows are fetched.
  static constexpr int64_t kAhead = 8, kFew = 64;

  const GccsArgs& args;
  const int32_t* rows;
  int64_t n, label, first, width;
  const T* x;  // column `first` of row 0
  const int32_t* next_rows;
  const T* next_x;  // of the task after this one
  int64_t next_n;   // 0 where there is none

  // Read by whole vectors from any column on: one more than a slab has.
  static constexpr int64_t kPadded = kGccsSlab + kFloatLanes;
  alignas(64) A origin[kPadded], mean[kPadded];  // z_0, and the mean relative to it
  double total[kMoments][kGccsSlab];
  alignas(64) A moments[kMoments][kGccsSlab];
  // Scaled for the gradient: offset + d (slope + cubic d^2).
  alignas(64) A offset[kPadded], slope[kPadded], cubic[kPadded];

  GccsSlab(const GccsArgs& a, const Segment& s, int64_t slab)
      : args(a),
        rows(a.order + s.begin),
        n(s.end - s.begin),
        label(s.label),
        first(slab * kGccsSlab),
        width(a.classes - first < kGccsSlab ? a.classes - first : kGccsSlab),
        x(static_cast<const T*>(a.features) + first),
        next_rows(rows),
        next_x(x + kGccsSlab),
        next_n(n) {
    if (slab + 1 < a.slabs()) return;
    const bool last = &s + 1 == a.segments + a.present;
    next_rows += n;
    next_x = static_cast<const T*>(a.features);
    next_n = last ? 0 : (&s)[1].end - (&s)[1].begin;
  }

  DL_INLINE const T* row(int64_t i) const { return x + rows[i] * args.classes; }

  // z of a row relative to the class's mean (to its first row, as long as `mean` is 0).
  DL_INLINE V centred(V z, int64_t c) const { return (z - load(origin + c)) - load(mean + c); }

  // A slab comes from memory once: whole rows, ahead of their use.
  DL_INLINE void fetch(int64_t i) const {
    if (n <= kFew && i < next_n) prefetch(next_x + next_rows[i] * args.classes, width);
    if (n > kFew && i + kAhead < n) prefetch(row(i + kAhead), width);
  }

  // total += the sums of rows [begin, end) over kVectors vectors of columns from c on; one vector may be partial.
  template <bool kMean, int kVectors>
  DL_INLINE void block_of_rows(int64_t begin, int64_t end, int64_t c) {
    constexpr int kWidth = Lanes<T>::width, kCount = kMean ? 1 : kMoments;
    V sums[kCount][kVectors];
    for (int m = 0; m < kCount; ++m)
      for (int v = 0; v < kVectors; ++v) sums[m][v] = splat<V>(0);
    for (int64_t i = begin; i < end; ++i) {
      if (kMean && c == 0) fetch(i);
      const T* p = row(i) + c;
      for (int v = 0; v < kVectors; ++v) {
        const int64_t at = c + v * kWidth;
        const V d = centred(kVectors > 1 ? load(p + v * kWidth) : load_some(p, width - c), at), d2 = d * d;
        if constexpr (kMean) {
          sums[0][v] += d;
        } else {
          sums[0][v] += d2;
          if constexpr (kKurtosis) {
            sums[1][v] += d2 * d;
            sums[2][v] += d2 * d2;
          }
        }
      }
    }
    alignas(64) A values[kWidth];
    for (int m = 0; m < kCount; ++m)
      for (int v = 0; v < kVectors; ++v) {
        store(values, sums[m][v]);
        for (int k = 0; k < kWidth; ++k) total[m][c + v * kWidth + k] += static_cast<double>(values[k]);
      }
  }

  // total = the sums over all rows: of d, or of d^2 (and d^3, d^4).
  template <bool kMean>
  void sweep() {
    constexpr int64_t kWidth = Lanes<T>::width;
    std::memset(total, 0, sizeof(total));
    for (int64_t begin = 0; begin < n; begin += kRows) {
      const int64_t end = n - begin < kRows ? n : begin + kRows;
      int64_t c = 0;
      for (; c + 4 * kWidth <= width; c += 4 * kWidth) block_of_rows<kMean, 4>(begin, end, c);
      for (; c < width; c += kWidth) block_of_rows<kMean, 1>(begin, end, c);
    }
  }

  // Whole vectors are read and written: what lies behind the last column is 0, and its sums do not matter.
  void statistics() {
    std::memset(origin, 0, sizeof(origin));
    std::memset(mean, 0, sizeof(mean));
    for (int64_t c = 0; c < width; ++c) origin[c] = to_float(row(0)[c]);
    if (n == 1) return;
    sweep<true>();
    for (int64_t c = 0; c < width; ++c) mean[c] = static_cast<A>(total[0][c] / static_cast<double>(n));
    sweep<false>();
  }

  // The loss of the slab, and the coefficients of its gradient.
  double columns(double scale) {
    const double s2 = args.target_std * args.target_std, inverse = 1 / static_cast<double>(n);
    const GccsTarget<V> to{splat<V>(s2), splat<V>(1 / s2), splat<V>(args.eps),
                           splat<V>(args.kurtosis_weight / static_cast<double>(args.classes))};
    const V by = splat<V>(scale * inverse);
    // Until it is overwritten, `offset` holds the mean's distance from the vertex.
    for (int m = 0; m < kMoments && n > 1; ++m)
      for (int64_t c = 0; c < kGccsSlab; ++c) moments[m][c] = static_cast<A>(total[m][c] * inverse);
    for (int64_t c = 0; c < kGccsSlab; ++c) offset[c] = origin[c] + mean[c];
    const int64_t own = label - first;
    if (own >= 0 && own < width) offset[own] = (origin[own] - static_cast<A>(args.target_mean)) + mean[own];
    double loss = 0;
    for (int64_t c = 0; c < width; c += Lanes<T>::width) {
      const GccsColumn<V> column =
          gccs_column<kKurtosis>(to, n > 1, load(offset + c), load(moments[0] + c), load(moments[kMoments / 2] + c),
                                 load(moments[kMoments - 1] + c));
      loss += static_cast<double>(sum(first_lanes<T>(column.loss, width - c)));
      store(offset + c, column.offset * by);
      store(slope + c, column.slope * by);
      store(cubic + c, column.cubic * by);
    }
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
