// Weight normalisation on GPUs where a unit is too long for a block: shared by a cluster, or in two launches.
#include "../common/cuda_dtype.h"
#include "weight_norm_device.h"

namespace dlkernels {
namespace {

using namespace weight_norm;

struct PartOfUnit {
  unsigned unit, part;
};
DL_DEVICE PartOfUnit part_of_unit(unsigned parts) { return {blockIdx.x / parts, blockIdx.x % parts}; }

template <class T, int N, bool kColumns, bool kBackward>
DL_DEVICE Share<T, N, kColumns, kBackward> share_of(const WeightNormLayer& a, const Place& p, unsigned part,
                                                    unsigned part_length) {
  const unsigned length = kColumns ? a.outer : a.outer * (a.inner / N);
  const unsigned begin = part * part_length;
  const unsigned end = begin < length && length - begin > part_length ? begin + part_length : length;
  return {a, p.base, begin + p.y, p.down, p.there ? end : 0};
}

// f(pack size, whether columns) as compile-time constants.
template <class T, class F>
DL_DEVICE void with_form(const WeightNormLayer& a, F f) {
  constexpr std::integral_constant<int, kPack<T>> pack{};
  constexpr std::integral_constant<int, 1> one{};
  if (a.columns) a.packs ? f(pack, std::true_type{}) : f(one, std::true_type{});
  else a.packs ? f(pack, std::false_type{}) : f(one, std::false_type{});
}

// In a cluster --------------------------------------------------------------------------------------------------------

// Math      as weight_norm_kernel.
// Traffic   per element: read v (and dw), write the result.
// Grid      a cluster per unit: a row, or a tile of columns. Each block holds its part in registers; sums of all parts
//           are read from the blocks' shared memory.
// Requires  as weight_norm_kernel; sm_90.
// Result    bitwise reproducible: the parts' sums are added in their order, in double.
template <class T, bool kBackward>
DL_KERNEL(kThreads, kBackward ? 2 : 3)
weight_norm_cluster_kernel(const WeightNormLayer a, const WeightNormParts parts) {
#if DL_HAS_CLUSTERS
  TileShared<T>& shared = *shared_memory<TileShared<T>>();
  const auto [unit, part] = part_of_unit(cluster_size());
  const unsigned of_unit = unit, of_part = part;
  with_form<T>(a, [&](auto n, auto columns) {
    constexpr int N = decltype(n)::value;
    constexpr bool kColumns = decltype(columns)::value;
    const Place p = place_of<N, kColumns>(a, of_unit);
    auto share = share_of<T, N, kColumns, kBackward>(a, p, of_part, parts.part);
    share.load_held();
    sum_part<T, N, kColumns, kBackward>(a, p, share, shared);
    cluster_barrier();
    for (unsigned k = threadIdx.x; k < p.ks; k += kThreads) {
      const bool exact = kBackward && out_of_range(load_one(a.norm + p.k0 + k));
      const double squares = !kBackward || exact ? sum_over_cluster(&shared.squares[k]) : 0.0;
      const double dot = kBackward ? sum_over_cluster(&shared.dots[k]) : 0.0;
      factors_of<T, kBackward>(a, p, k, squares, dot, of_part == 0, shared.row[k]);
    }
    cluster_barrier();  // no block leaves while others read its sums
    apply_part<T, N, kColumns, kBackward>(a, p, share, shared.row);
  });
#endif
}

// In two launches -----------------------------------------------------------------------------------------------------

// Math      the sums of each part; the last block of a unit adds them up: norm or dg, and the factors of its rows.
// Traffic   per element: read v (and dw), for L2 to keep what fits.
// Grid      `parts` blocks per unit.
// Requires  as weight_norm_kernel; counters of 0.
// Result    bitwise reproducible: the parts' sums are added by a fixed tree, in double.
template <class T, bool kBackward>
DL_KERNEL(kThreads, kBackward ? 2 : 3)
weight_norm_sum_kernel(const WeightNormLayer a, const WeightNormParts parts) {
  TileShared<T>& shared = *shared_memory<TileShared<T>>();
  const PartOfUnit of = part_of_unit(parts.parts);
  if (threadIdx.x == 0) shared.last = false;
  allow_next_kernel();
  with_form<T>(a, [&](auto n, auto columns) {
    constexpr int N = decltype(n)::value;
    constexpr bool kColumns = decltype(columns)::value;
    const Place p = place_of<N, kColumns>(a, of.unit);
    auto share = share_of<T, N, kColumns, kBackward>(a, p, of.part, parts.part);
    share.template load_held<Use::kAgain>();
    sum_part<T, N, kColumns, kBackward>(a, p, share, shared);
  });
  const Place p = a.columns ? place_of<1, true>(a, of.unit) : place_of<1, false>(a, of.unit);
  const unsigned tile = a.columns ? a.tile : 1;
  double* const partial = parts.partial + static_cast<int64_t>(of.unit) * parts.parts * 2 * tile;
  const bool with_squares = !kBackward || shared.exact;  // alike in all blocks of the unit in the backward pass
  for (unsigned k = threadIdx.x; k < p.ks; k += kThreads) {
    double* const own = partial + static_cast<int64_t>(of.part) * 2 * tile + k;
    if (with_squares) store_pack<1, Use::kAgain>(own, Pack<double, 1>{{shared.squares[k]}});
    if constexpr (kBackward) store_pack<1, Use::kAgain>(own + tile, Pack<double, 1>{{shared.dots[k]}});
  }
  if (!last_block(parts.counters + of.unit, parts.parts, shared.last)) return;

  // Of this block's k's, spread over the threads.
  Place q = p;
  q.inner = 1, q.x = threadIdx.x % tile, q.y = threadIdx.x / tile, q.down = kThreads / tile;
  const auto add_up = [&](const double* sums, double* to) {
    double total = 0;
    if (q.x < p.ks && q.y < q.down) {
      for (unsigned part = q.y; part < parts.parts; part += q.down)
        total += load_pack<1, Use::kAgain>(sums + static_cast<int64_t>(part) * 2 * tile + q.x).v[0];
    }
    sum_columns<double, 1>(&total, shared.grid, tile, q, [&](unsigned k, double s) { to[k] = s; });
    __syncthreads();
  };
  if (with_squares) add_up(partial, shared.squares);
  if constexpr (kBackward) add_up(partial + tile, shared.dots);
  for (unsigned k = threadIdx.x; k < p.ks; k += kThreads) {
    Row<double> row;
    factors_of<T, kBackward>(a, p, k, shared.squares[k], shared.dots[k], true, row);
    const double planes[3] = {row.a, row.b, static_cast<double>(row.kind)};
    DL_UNROLL
    for (int i = 0; i < 3; ++i)
      store_pack<1, Use::kAgain>(parts.factors + static_cast<int64_t>(i) * a.rows + p.k0 + k,
                                 Pack<double, 1>{{planes[i]}});
  }
}

// Math      the result from the rows' factors.
// Traffic   per element: read v (and dw), from L2 as far as it was kept, write the result.
// Grid      `parts` blocks per unit, as weight_norm_sum_kernel, which it waits for.
// Requires  as weight_norm_kernel.
// Result    bitwise reproducible.
template <class T, bool kBackward>
DL_KERNEL(kThreads, kBackward ? 2 : 3)
weight_norm_apply_kernel(const WeightNormLayer a, const WeightNormParts parts) {
  Row<double>* const rows = shared_memory<Row<double>>();
  const PartOfUnit of = part_of_unit(parts.parts);
  with_form<T>(a, [&](auto n, auto columns) {
    constexpr int N = decltype(n)::value;
    constexpr bool kColumns = decltype(columns)::value;
    const Place p = place_of<N, kColumns>(a, of.unit);
    auto share = share_of<T, N, kColumns, kBackward>(a, p, of.part, parts.part);
    share.load_held();
    wait_for_previous_kernel();
    for (unsigned k = threadIdx.x; k < p.ks; k += kThreads) {
      double planes[3];
      DL_UNROLL
      for (int i = 0; i < 3; ++i)
        planes[i] = load_pack<1, Use::kAgain>(parts.factors + static_cast<int64_t>(i) * a.rows + p.k0 + k).v[0];
      rows[k] = {planes[0], planes[1], static_cast<int>(planes[2])};
    }
    __syncthreads();
    apply_part<T, N, kColumns, kBackward>(a, p, share, rows);
  });
}

template <class F>
void with_kernel(Float dtype, bool backward, F f) {
  with_dtype(dtype, [&](auto t) { with_bool(backward, [&](auto b) { f(t, b); }); });
}

}  // namespace

void launch_weight_norm_clusters(const Queue& queue, Float dtype, bool backward, const WeightNormLayer& layer,
                                 const WeightNormParts& parts, unsigned units) {
  with_kernel(dtype, backward, [&](auto t, auto b) {
    using T = decltype(t);
    launch(queue, {units * parts.parts, kThreads, sizeof(TileShared<T>), parts.parts},
           weight_norm_cluster_kernel<T, decltype(b)::value>, layer, parts);
  });
}

void launch_weight_norm_split(const Queue& queue, Float dtype, bool backward, const WeightNormLayer& layer,
                              const WeightNormParts& parts, unsigned units) {
  with_kernel(dtype, backward, [&](auto t, auto b) {
    using T = decltype(t);
    constexpr bool kBackward = decltype(b)::value;
    const unsigned grid = units * parts.parts;
    launch(queue, {grid, kThreads, sizeof(TileShared<T>)}, weight_norm_sum_kernel<T, kBackward>, layer, parts);
    LaunchShape shape{grid, kThreads, static_cast<unsigned>(sizeof(Row<double>)) * (layer.columns ? layer.tile : 1u)};
    shape.overlap = true;
    launch(queue, shape, weight_norm_apply_kernel<T, kBackward>, layer, parts);
  });
}

unsigned weight_norm_max_cluster(const Queue& queue, Float dtype, bool backward) {
  if (!queue.machine->clusters()) return 1;
  unsigned largest = 8;
  with_kernel(dtype, backward, [&](auto t, auto b) {
    using T = decltype(t);
    LaunchShape shape{kMaxCluster, kThreads, sizeof(TileShared<T>), kMaxCluster};
    if (active_clusters(queue, shape, weight_norm_cluster_kernel<T, decltype(b)::value>) > 0) largest = kMaxCluster;
  });
  return largest;
}

}  // namespace dlkernels
