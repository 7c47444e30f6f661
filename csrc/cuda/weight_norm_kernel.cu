// Weight normalisation on GPUs: any number of weights in one launch, each unit in one block.
#include "../common/cuda_dtype.h"
#include "weight_norm_device.h"

namespace dlkernels {
namespace {

using namespace weight_norm;

// Rows of a warp or less: several of them side by side, in registers.
template <class T, int N, bool kBackward>
DL_DEVICE void rows_unit(const WeightNormLayer& a, unsigned unit) {
  const unsigned lanes = a.lanes, k = unit * a.tile + threadIdx.x / lanes;
  const bool there = k < a.rows, writes = there && threadIdx.x % lanes == 0;
  const unsigned row = there ? k : a.rows - 1;
  Share<T, N, false, kBackward> share(a, static_cast<int64_t>(row) * a.inner, threadIdx.x % lanes, lanes,
                                      there ? a.outer * (a.inner / N) : 0);
  share.load_held();
  const float total = warp_sum(total_of(share.sums()), static_cast<int>(lanes));
  const float n = kBackward ? load_one(a.norm + row) : sqrtf(total);
  const bool exact = there && (kBackward ? out_of_range(n) : !weight_norm_in_range(n));
  if (ballot(exact) == 0) {
    const Row<float> r = row_factors<T, kBackward>(a, row, n, total, writes);
    share.apply([&](int) { return r; });
    return;
  }
  double sums[1];
  share.template exact_sums<false>(sums);
  const double squares = warp_sum(sums[0], static_cast<int>(lanes));
  if constexpr (kBackward) share.template exact_sums<true>(sums);
  const double dot = warp_sum(sums[0], static_cast<int>(lanes));
  const Row<double> r = row_factors<T, kBackward>(a, row, sqrt(squares), dot, writes);
  share.apply_exactly([&](int) { return r; });
}

// A row, or a tile of columns, of a block.
template <class T, int N, bool kColumns, bool kBackward>
DL_DEVICE void tile_unit(const WeightNormLayer& a, unsigned unit, TileShared<T>& shared) {
  const Place p = place_of<N, kColumns>(a, unit);
  const unsigned length = kColumns ? a.outer : a.outer * (a.inner / N);
  Share<T, N, kColumns, kBackward> share(a, p.base, p.y, p.down, p.there ? length : 0);
  share.load_held();
  sum_part<T, N, kColumns, kBackward>(a, p, share, shared);
  for (unsigned k = threadIdx.x; k < p.ks; k += kThreads)
    factors_of<T, kBackward>(a, p, k, shared.squares[k], shared.dots[k], true, shared.row[k]);
  __syncthreads();
  apply_part<T, N, kColumns, kBackward>(a, p, share, shared.row);
}

template <class T, int N, bool kBackward>
DL_DEVICE void any_unit(const WeightNormLayer& a, unsigned unit) {
  if (a.columns) tile_unit<T, N, true, kBackward>(a, unit, *shared_memory<TileShared<T>>());
  else if (a.lanes > kWarp) tile_unit<T, N, false, kBackward>(a, unit, *shared_memory<TileShared<T>>());
  else rows_unit<T, N, kBackward>(a, unit);
}

// Math      n = ||v||;  w = (g / n) v;  dg = <dw, v> / n;  dv = (g / n) (dw - (dg / n) v);  all 0 where n is 0.
// Traffic   per element: read v (and dw), write the result. What a block does not hold is read a second time, from L2:
//           the excess over weight_norm_held() packs of each of its threads.
// Grid      one block per unit: rows of up to a warp's length side by side, one longer row, or a tile of columns. The
//           layer is found by its first unit.
// Requires  outer, rows, inner below 2^31; packs: 16-byte aligned tensors, whole packs in a row (in rows * inner:
//           columns).
// Result    bitwise reproducible: fixed trees, no atomics. The same for a layer alone and among others.
template <class T, int kMany, bool kBackward>
DL_KERNEL(kThreads, kBackward ? 2 : 3)
weight_norm_kernel(DL_CONSTANT WeightNormTable<kMany> table) {
  unsigned at = 0;
  if constexpr (kMany > 1) {
    unsigned behind = table.layers;
    while (behind - at > 1) {
      const unsigned middle = (at + behind) / 2;
      if (table.layer[middle].first_unit <= blockIdx.x) at = middle;
      else behind = middle;
    }
  }
  const WeightNormLayer& a = table.layer[at];
  const unsigned unit = blockIdx.x - a.first_unit;
  if (a.packs) any_unit<T, kPack<T>, kBackward>(a, unit);
  else any_unit<T, 1, kBackward>(a, unit);
}

template <int kMany>
void launch_table(const Queue& queue, Float dtype, bool backward, const WeightNormLayer* layers, unsigned count,
                  unsigned units) {
  WeightNormTable<kMany> table;
  table.layers = count;
  bool tiles = false;
  for (unsigned i = 0; i < count; ++i) {
    table.layer[i] = layers[i];
    tiles = tiles || layers[i].columns || layers[i].lanes > kWarp;
  }
  with_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    const unsigned shared = tiles ? sizeof(TileShared<T>) : 0;
    with_bool(backward, [&](auto b) {
      launch(queue, {units, kThreads, shared}, weight_norm_kernel<T, kMany, decltype(b)::value>, table);
    });
  });
}

}  // namespace

void launch_weight_norm(const Queue& queue, Float dtype, bool backward, WeightNormLayer* layers, const unsigned* units,
                        int64_t count) {
  while (count > 0) {
    unsigned taken = 0;
    int64_t first = 0;
    while (taken < count && taken < kWeightNormLayers && first + units[taken] < int64_t{1} << 31) {
      layers[taken].first_unit = static_cast<unsigned>(first);
      first += units[taken++];
    }
    if (taken == 1) launch_table<1>(queue, dtype, backward, layers, taken, static_cast<unsigned>(first));
    else launch_table<kWeightNormLayers>(queue, dtype, backward, layers, taken, static_cast<unsigned>(first));
    layers += taken, units += taken, count -= taken;
  }
}

}  // namespace dlkernels
