// Weight normalisation on GPUs: what the host side hands to the kernels, how a weight is cut up, and the launchers.
// Torch-free.
//
// v is [A, K, B], one norm per k, over A and B. A unit is one block's work: several rows side by side, a row, or a tile
// of neighbouring k's whose elements lie scattered (columns). Units too long for one block are shared by several.
#pragma once

#include <algorithm>
#include <numeric>

#include "../common/cuda_launch.h"
#include "../common/float_kind.h"

namespace dlkernels {

constexpr int kWeightNormThreads = 256;
constexpr int kWeightNormTile = 256;  // k's of a tile at most

// Packs (or elements, where 16 bytes do not fit) of a thread that stay in registers between the two steps.
constexpr int weight_norm_held(bool packs) { return packs ? 7 : 14; }

enum class WeightNormSharing : uint8_t {
  kWhole,    // a block per unit
  kCluster,  // a cluster per unit
  kSplit     // blocks that meet in memory: sums, then the result in a second launch
};

// How [A, K, B] is cut up: by its shape and the device, whatever else is in the launch.
struct WeightNormTiling {
  bool columns = false;  // tiles of several k's; else rows
  bool packs = false;    // 16 bytes at a time
  unsigned lanes = 1;    // rows: threads of one; at most a warp, or the whole block
  unsigned across = 1;   // columns: packs side by side
  unsigned tile = 1;     // k's of a unit
  unsigned units = 0;
  WeightNormSharing sharing = WeightNormSharing::kWhole;
  unsigned parts = 1;  // blocks of a unit
  unsigned part = 0;   // packs of a row, or chunks of a tile, in each of them
};

// One weight, as kernels take it.
struct WeightNormLayer {
  const void* v;                // [A, K, B]
  const void* x;                // [A, K, B] the gradient of w, or v: forward
  const void* g;                // [K]
  float* norm;                  // [K] written forward, read backward
  void* out;                    // [A, K, B] w, or dv
  void* dg;                     // [K] in the dtype of g
  unsigned outer, rows, inner;  // A, K, B
  unsigned first_unit;          // of the launch
  uint16_t lanes, across, tile;
  bool columns, packs, g_is_float;
};

// Layers that a launch takes as its argument: 32764 bytes of them from CUDA 12.1 on, else 4096.
#if defined(CUDART_VERSION) && CUDART_VERSION < 12010
constexpr int kWeightNormLayers = 4000 / sizeof(WeightNormLayer);
#else
constexpr int kWeightNormLayers = 32700 / sizeof(WeightNormLayer);
#endif

// The argument of a launch: of one layer, or of kWeightNormLayers.
template <int kMany>
struct WeightNormTable {
  unsigned layers;
  WeightNormLayer layer[kMany];
};

// A unit's share of a block, and where the blocks of kSplit meet.
struct WeightNormParts {
  unsigned parts, part;  // see WeightNormTiling
  double* partial;       // [units, parts, 2, tile]
  double* factors;       // [3, K] a, b and the kind of the row
  unsigned* counters;    // [units]
};

inline WeightNormTiling weight_norm_tiling(const Machine& machine, int64_t outer, int64_t rows, int64_t inner,
                                           int element_bytes, bool aligned, unsigned max_cluster) {
  constexpr int64_t kThreads = kWeightNormThreads;
  constexpr int64_t kShortChunk = 64;  // elements: chunks shorter than this go by columns
  constexpr int64_t kReread = 4;       // times what a block holds: it reads the rest twice, from L2 the second time
  constexpr int64_t kWorthABlock = 64, kWorthACluster = 512;  // packs of a row, of a block's share of it
  constexpr int64_t kSegment = 64;                            // bytes side by side in a tile at least
  constexpr int64_t kMaxAcross = 64;
  const int64_t sm = machine.multiprocessors;
  WeightNormTiling t;
  t.columns = outer > 1 && inner < kShortChunk;
  const int64_t pack = 16 / element_bytes;
  t.packs = aligned && (t.columns ? rows * inner : inner) % pack == 0;
  const int64_t n = t.packs ? pack : 1, held = weight_norm_held(t.packs);
  int64_t length = 0, block_holds = 0;  // of a unit, in packs or chunks
  if (t.columns) {
    // Whole k's in whole packs: multiples of a least tile.
    const int64_t least = n / std::gcd(n, inner), least_packs = least * inner / n;
    const int64_t most =
        std::min({kMaxAcross / std::min(kMaxAcross, least_packs), kWeightNormTile / least, ceil_div(rows, least)});
    const int64_t fewest = std::min(most, ceil_div(kSegment, least_packs * n * element_bytes));
    const auto holds = [&](int64_t m) { return kThreads / (m * least_packs) * held; };
    int64_t m = std::max<int64_t>(1, most);
    while (m > std::max<int64_t>(1, fewest) && (holds(m) < outer || ceil_div(rows, m * least) < 2 * sm))
      m = (m + 1) / 2;
    t.across = static_cast<unsigned>(m * least_packs);
    t.tile = static_cast<unsigned>(m * least);
    t.lanes = static_cast<unsigned>(kThreads);
    length = outer, block_holds = holds(m);
  } else {
    length = outer * (inner / n), block_holds = kThreads * held;
    const int64_t wanted = ceil_div<int64_t>(length, 4);
    while (t.lanes < kWarp && t.lanes < wanted) t.lanes *= 2;
    const bool few = rows * t.lanes < sm * kThreads && length > kWorthABlock;
    if (length > kWarp * held || few) t.lanes = static_cast<unsigned>(kThreads);
    t.tile = static_cast<unsigned>(kThreads / t.lanes);
  }
  t.units = static_cast<unsigned>(ceil_div<int64_t>(rows, t.tile));
  t.part = static_cast<unsigned>(length);
  const bool spread = max_cluster > 1 && t.units < sm;  // a cluster costs no second launch
  if (length <= (spread ? 1 : kReread) * block_holds) return t;
  int64_t parts = ceil_div(length, block_holds);
  if (parts <= max_cluster) {
    t.sharing = WeightNormSharing::kCluster;
    t.parts = 2;
    while (t.parts < parts) t.parts *= 2;
    while (t.parts < 8 && t.parts < max_cluster && t.units * t.parts < sm && length / (2 * t.parts) >= kWorthACluster)
      t.parts *= 2;
  } else {
    t.sharing = WeightNormSharing::kSplit;
    t.parts = static_cast<unsigned>(parts);
  }
  t.part = static_cast<unsigned>(ceil_div<int64_t>(length, t.parts));
  if (t.sharing == WeightNormSharing::kSplit) t.part = static_cast<unsigned>(block_holds);
  return t;
}

// Layers of one dtype, each kWhole and of so many units, in as few launches as their table needs: one for up to
// kWeightNormLayers. Sets first_unit.
void launch_weight_norm(const Queue& queue, Float dtype, bool backward, WeightNormLayer* layers, const unsigned* units,
                        int64_t count);
// One layer whose units are shared by the blocks of a cluster; or split, in two launches.
void launch_weight_norm_clusters(const Queue& queue, Float dtype, bool backward, const WeightNormLayer& layer,
                                 const WeightNormParts& parts, unsigned units);
void launch_weight_norm_split(const Queue& queue, Float dtype, bool backward, const WeightNormLayer& layer,
                              const WeightNormParts& parts, unsigned units);
// The largest cluster that the device runs.
unsigned weight_norm_max_cluster(const Queue& queue, Float dtype, bool backward);

}  // namespace dlkernels
