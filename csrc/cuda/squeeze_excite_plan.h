// How the squeeze-and-excitation kernels cover a problem on a device: plain integers, no torch.
#pragma once

#include <algorithm>
#include <numeric>

#include "squeeze_excite_kernel.h"

namespace dlkernels {

struct SqueezeExciteProblem {
  int64_t n, c, s, r;  // r = 0: one layer, C x C
  int64_t itemsize;
  bool last;        // channels innermost
  bool aligned;     // all pointers are multiples of 16 bytes
  int64_t tensors;  // that are summed: x; backward x, dy and, with an activation behind the residual, it
};

namespace squeeze_excite_planning {

using Plan = SqueezeExcitePlan;

constexpr int64_t kWorthABlock = 16 << 10;     // bytes: less than this is not split to fill the device
constexpr int64_t kTile = 32 << 10;            // bytes that a block of the sums reads
constexpr int64_t kLayers = 64 << 10;          // bytes of channels and hidden units of the sums' last block, at most
constexpr int64_t kBatch = int64_t{30} << 20;  // bytes that are read twice

inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
inline int64_t power_of_2(int64_t a) {
  int64_t p = 1;
  while (p < a) p *= 2;
  return p;
}

struct Sizes {
  int64_t inner, rows, pack, unit;  // unit: rows after which a pack begins
  bool packs, straddles;

  Sizes(const SqueezeExciteProblem& p, bool want_packs) {
    inner = p.last ? p.c : p.s, rows = p.last ? p.s : p.c;
    packs = want_packs && p.aligned && p.c * p.s % (16 / p.itemsize) == 0;
    pack = packs ? 16 / p.itemsize : 1;
    straddles = inner % pack != 0;
    unit = pack / std::gcd(inner, pack);
  }
  // Elements at a time, for the sums.
  int64_t width() const { return straddles ? 1 : pack; }
};

// Threads of a row and pieces of it, for `rows` rows of `items` packs.
inline void split_rows(Plan& plan, int64_t rows, int64_t items) {
  plan.row_lanes = 1;
  while (plan.row_lanes < 32 && plan.row_lanes * 4 < items) plan.row_lanes *= 2;
  const int64_t groups = plan.threads / plan.row_lanes;
  plan.pieces = static_cast<int>(
      std::clamp<int64_t>(groups / std::max<int64_t>(1, rows), 1, std::max<int64_t>(1, items / (4 * plan.row_lanes))));
}

inline unsigned threads_for(int64_t packs, int64_t most) {
  return static_cast<unsigned>(std::clamp<int64_t>(power_of_2(ceil_div<int64_t>(packs, 4)), 64, most));
}

// A sample in k blocks.
inline Plan cluster_of(const SqueezeExciteProblem& p, int64_t k) {
  const Sizes z(p, true);
  Plan plan;
  plan.regime = Plan::Regime::kCluster;
  plan.packs = z.packs, plan.straddles = z.straddles;
  plan.cluster = static_cast<unsigned>(k);
  const int64_t slab = std::min(z.rows, round_up(ceil_div(z.rows, k), z.unit));
  const int64_t own = p.last ? ceil_div(p.c, k) : slab;
  plan.slab = static_cast<int>(slab), plan.own = static_cast<int>(own);
  plan.threads = threads_for(ceil_div(slab * z.inner, z.pack), 512);
  split_rows(plan, slab, z.inner / z.width());
  plan.shared.slab = static_cast<unsigned>(round_up(slab * z.inner * p.itemsize, 16));
  plan.shared.slabs = z.straddles ? static_cast<unsigned>(p.tensors) : 1;
  plan.shared.visible = static_cast<unsigned>(round_up(p.last ? p.c : own, 4));
  plan.shared.gates = p.tensors > 1 ? plan.shared.visible : 0;
  plan.shared.wide = static_cast<unsigned>(p.r > 0 ? p.r : p.c), plan.shared.hidden = static_cast<unsigned>(p.r);
  plan.shared.scratch = plan.threads * static_cast<unsigned>(p.last ? z.width() : 1);
  return plan;
}

// Whether the numbers above fit in 32 bits.
inline bool small(const SqueezeExciteProblem& p) { return (p.c + p.r) * 16 + p.c * p.s * p.itemsize < (1 << 26); }

// The smallest cluster whose blocks fit twice into a multiprocessor, or once; larger for few samples. 0: none.
inline Plan smallest_cluster(const SqueezeExciteProblem& p, const Machine& m, int64_t weights) {
  Plan none;
  none.cluster = 0;
  if (!small(p)) return none;
  const Sizes z(p, true);
  const int64_t most = m.clusters() ? std::min<int64_t>(16, power_of_2(z.rows / z.unit)) : 1;
  const int64_t twice = m.shared_per_multiprocessor / 2 - 1024;
  int64_t k = 0;
  for (const int64_t room : {std::min<int64_t>(twice, m.shared_per_block), int64_t{m.shared_per_block}})
    for (int64_t size = 1; k == 0 && size <= std::min<int64_t>(most, 8); size *= 2)
      if (cluster_of(p, size).shared.bytes() <= room) k = size;
  if (k == 0 && most == 16 && cluster_of(p, 16).shared.bytes() <= static_cast<unsigned>(m.shared_per_block)) k = 16;
  if (k == 0) return none;
  while (2 * k <= std::min<int64_t>(most, 8) && 2 * k * p.n <= m.multiprocessors &&
         p.c * p.s * p.itemsize + 4 * weights >= 2 * k * kWorthABlock)
    k *= 2;
  return cluster_of(p, k);
}

// Tiles of the sums.
inline Plan tiles_of(const SqueezeExciteProblem& p, const Machine& m, bool layers) {
  Plan plan;
  plan.packs = Sizes(p, true).packs;
  Sizes z(p, true);
  int64_t tile = std::min<int64_t>(kTile, m.shared_per_block / 2) / p.itemsize / (z.straddles ? p.tensors : 1);
  if (z.straddles &&
      round_up(z.unit * z.inner, 8) * p.itemsize * p.tensors > std::min<int64_t>(m.shared_per_block, 4 * kTile) / 2)
    z = Sizes(p, false);
  while (tile > 256 * z.pack && p.n * ceil_div(p.c * p.s, tile) < 2 * m.multiprocessors) tile /= 2;
  plan.sum_packs = z.packs, plan.straddles = z.straddles;
  int64_t channels = p.c, positions = p.s;
  if (z.straddles) {
    const int64_t rows = std::min(z.rows, std::max(z.unit, tile / z.inner / z.unit * z.unit));
    (p.last ? positions : channels) = rows;
    plan.shared.slab = static_cast<unsigned>(round_up(rows * z.inner * p.itemsize, 16));
    plan.shared.slabs = static_cast<unsigned>(p.tensors);
  } else if (p.last) {
    channels = std::min(p.c, 256 * z.pack);
    positions = ceil_div(p.s, ceil_div(p.s, std::max<int64_t>(8, tile / channels)));
  } else if (p.s > tile) {
    channels = 1;
    positions = round_up(ceil_div(p.s, ceil_div(p.s, tile)), z.pack);
  } else {
    channels = std::clamp<int64_t>(tile / std::max<int64_t>(1, p.s), 1, p.c);
  }
  plan.tile_channels = static_cast<int>(channels), plan.tile_positions = positions;
  plan.channel_tiles = static_cast<int>(ceil_div(p.c, channels)), plan.chunks = ceil_div(p.s, positions);
  plan.threads = threads_for(ceil_div(channels * positions, z.pack), 256);
  if (!p.last) split_rows(plan, channels, positions / z.width());
  if (layers) {
    plan.shared.visible = static_cast<unsigned>(round_up(p.c, 4));
    plan.shared.wide = static_cast<unsigned>(p.r > 0 ? p.r : p.c), plan.shared.hidden = static_cast<unsigned>(p.r);
  }
  plan.shared.scratch = plan.threads * static_cast<unsigned>(p.last ? z.width() : 1);
  return plan;
}

}  // namespace squeeze_excite_planning

// How the sums and the scale cover the problem, where a sample does not stay in shared memory.
inline SqueezeExcitePlan squeeze_excite_sweeps(const SqueezeExciteProblem& p, const Machine& m, bool layers) {
  using namespace squeeze_excite_planning;
  layers = layers && 4 * (2 * p.c + 2 * p.r) <= std::min<int64_t>(kLayers, m.shared_per_block / 2);
  Plan plan = tiles_of(p, m, layers);
  plan.regime = layers ? Plan::Regime::kWalk : Plan::Regime::kMatmul;
  const int64_t bytes = p.c * p.s * p.itemsize * std::min<int64_t>(p.tensors, 2);
  plan.batch = layers ? std::clamp<int64_t>(std::min(kBatch, m.l2 / 2) / bytes, 1, p.n) : p.n;
  return plan;
}

// Of a problem that is not empty. Samples read all weights each: they do so inside of a kernel where the weights are
// small beside a sample, or their reads are small beside what L2 gives while a kernel starts.
inline SqueezeExcitePlan squeeze_excite_plan(const SqueezeExciteProblem& p, const Machine& m) {
  using namespace squeeze_excite_planning;
  const int64_t weights = p.r > 0 ? 2 * p.c * p.r : p.c * p.c;
  const bool layers = p.c * p.s >= 2 * weights || 4 * weights * p.n <= m.l2 / 8;
  if (layers) {
    const Plan plan = smallest_cluster(p, m, weights);
    if (plan.cluster > 0) return plan;
  }
  return squeeze_excite_sweeps(p, m, layers);
}

}  // namespace dlkernels
