// How GroupNorm is spread over a GPU: a plain function of sizes and of the machine.
//
// A tile is what shares statistics: one group, or with channels_last as many groups side by side as make whole sectors.
// Tiles are read once where they fit on chip:
//
//   teams    small tiles: several to a block, each with a team of 1 to 128 threads
//   block    a tile to a block, two blocks to a multiprocessor where they fit
//   cluster  a tile cut into parts, one to each block of a cluster; also for so few tiles that they leave the machine
//            idle (sm_90 on)
//   split    otherwise the parts are blocks of two launches: sums, then the rest. Tiles are taken in batches that stay
//            in L2 between the two, so that DRAM sees one read here too
#pragma once

#include <algorithm>
#include <cstdint>

#include "../common/cuda_launch.h"
#include "../common/float_kind.h"

namespace dlkernels {

constexpr unsigned kGroupNormThreads = 512;         // of a block at most
constexpr unsigned kGroupNormFewThreads = 256;      // the same, backward or with channels_last: more registers each
constexpr unsigned kGroupNormTeams = 256;           // threads of a block of several teams
constexpr int64_t kGroupNormPacksOfThread = 4;      // where there is work for every thread of the machine
constexpr int64_t kGroupNormLeastPart = 16 << 10;   // bytes of a part that is worth a barrier of its cluster
constexpr int64_t kGroupNormSplitPart = 32 << 10;   // bytes of a part of a split tile
constexpr int64_t kGroupNormLeastSplit = 8 << 10;   // the same, where parts are few
constexpr int64_t kGroupNormMostParts = 512;        // beyond it parts grow, while two fit on a multiprocessor
constexpr int64_t kGroupNormLargeTensor = 4 << 20;  // bytes from which two reads by all beat one by few
constexpr int64_t kGroupNormLeastRun = 256;         // bytes side by side in memory that a part of [N, C, S] has
constexpr int64_t kGroupNormReserved = 1 << 10;     // bytes of shared memory that the system takes of each block

// x / d for x < 2^31 (Granlund and Montgomery 1994).
struct GroupNormDivisor {
  unsigned d = 1, multiplier = 1, shift = 0;
  GroupNormDivisor() = default;
  explicit GroupNormDivisor(unsigned divisor) : d(divisor) {
    while ((uint64_t{1} << shift) < d) ++shift;
    multiplier = static_cast<unsigned>((uint64_t{1} << 32) * ((uint64_t{1} << shift) - d) / d + 1);
  }
};

// Shared memory that all teams of a block have in common; the rooms of the teams follow.
struct alignas(128) GroupNormShared {
  float sums[3][2][32];
  float slots[3][2];
  bool last;
};

struct GroupNormShape {
  int64_t n, c, s, groups;
  int itemsize;
  int arrays;  // tensors like x that a tile keeps: x; backward x, dy, and the residual where an activation needs it
  bool backward, channels_last;
  bool packs;  // rows of whole packs of 16 bytes, aligned
};

struct GroupNormPlan {
  bool served = false;
  bool packs = false;  // rows of whole packs of 16 bytes, aligned
  bool split = false;
  unsigned cluster = 1;
  unsigned team = 32, teams = 1;  // threads of a team, a power of two; teams of a block
  unsigned tile_groups = 1, tiles_of_sample = 1, tiles = 0;
  unsigned channel_parts = 1, position_parts = 1, parts = 1;  // parts = channel_parts * position_parts
  unsigned channels = 0, positions = 0;                       // of a part, at most
  unsigned batch = 0;                                         // tiles of a pair of launches
  // [N, C, S], backward: `lanes` threads sum a chunk of `chunk` packs of a channel that has `chunks` of them.
  unsigned lanes = 1, chunks = 1, chunk = 1;
  unsigned rows = 1;  // channels_last: positions that a team works on at a time
  // Bytes in the room of a team: the arrays, then tables.
  unsigned array = 0, table = 0, partial = 0, columns = 0, values = 0, room = 0;
  unsigned shared = 0;  // of a block
  GroupNormDivisor
      by_run[2];  // packs of a run (the positions of a channel, or the channels of a position); of the last
  GroupNormDivisor by_chunks, by_d, by_groups, by_tiles;
  unsigned block() const { return team * teams; }
};

namespace group_norm_planning {

inline int64_t power_of_two(int64_t x) {
  int64_t p = 1;
  while (p < x) p *= 2;
  return p;
}
inline int64_t power_below(int64_t x) {
  int64_t p = 1;
  while (2 * p <= x) p *= 2;
  return p;
}
inline int64_t round_up(int64_t x, int64_t to) { return ceil_div(x, to) * to; }

inline int64_t elements_of_pack(const GroupNormShape& q) { return q.packs ? 16 / q.itemsize : 1; }
inline int64_t d_of(const GroupNormShape& q) { return q.c / q.groups; }

// Groups side by side whose channels make whole packs, 64 bytes at least, and whole sectors of 32 bytes where that
// leaves enough tiles for the machine.
inline unsigned groups_of_tile(const Machine& m, const GroupNormShape& q) {
  const int64_t d = d_of(q), pack = elements_of_pack(q);
  int64_t found = 0;
  for (int64_t g = 1; g <= std::min<int64_t>(q.groups, 64); ++g) {
    if (g * d % pack != 0 || g * d * q.itemsize < 64) continue;
    const bool sectors = g * d * q.itemsize % 32 == 0, enough = q.n * ceil_div(q.groups, g) * 8 >= m.multiprocessors;
    if (found == 0 || (sectors && enough)) found = g;
    if (sectors) break;
  }
  return static_cast<unsigned>(found != 0 ? found : q.groups);
}

inline void cut(GroupNormPlan& p, const GroupNormShape& q, int64_t parts) {
  const int64_t d = d_of(q), pack = elements_of_pack(q);
  int64_t along_c = 1, along_s = parts;
  if (!q.channels_last && parts > 1) {
    along_s = 1;
    const int64_t runs = std::max<int64_t>(1, q.s * q.itemsize / kGroupNormLeastRun);
    if (d % parts != 0 && (q.packs || d < parts)) along_s = std::min(parts, power_below(runs));
    along_c = ceil_div(parts, along_s);
  }
  p.channels = static_cast<unsigned>(q.channels_last ? p.tile_groups * d : ceil_div(d, along_c));
  p.positions = static_cast<unsigned>(ceil_div(q.s, along_s));
  if (!q.channels_last) p.positions = static_cast<unsigned>(std::min(q.s, round_up(p.positions, pack)));
  if (p.cluster == 1) {  // no part is empty
    if (!q.channels_last) along_c = ceil_div<int64_t>(d, p.channels);
    along_s = ceil_div<int64_t>(q.s, p.positions);
  }
  p.channel_parts = static_cast<unsigned>(along_c);
  p.position_parts = static_cast<unsigned>(along_s);
  p.parts = static_cast<unsigned>(along_c * along_s);
}

// Bytes of one team's room, given its threads.
inline void lay_out(GroupNormPlan& p, const GroupNormShape& q) {
  const int64_t pack = elements_of_pack(q), elements = int64_t{p.channels} * p.positions;
  const int64_t array = round_up(elements * q.itemsize + (q.packs ? 0 : 16), 16);
  p.array = static_cast<unsigned>(array);
  p.table = static_cast<unsigned>(array * q.arrays);
  p.partial = p.table + p.channels * 8;
  int64_t end = p.partial;
  if (q.channels_last) {
    const int64_t vectors = ceil_div<int64_t>(p.channels, pack);
    p.rows = static_cast<unsigned>(std::max<int64_t>(1, std::min<int64_t>(p.positions, p.team / vectors)));
    p.columns = p.partial + 2 * p.rows * p.channels * 4;
    p.values = p.columns + 2 * p.channels * 4;
    end = int64_t{p.values} + 8 * p.tile_groups * 4;
  } else if (q.backward) {
    const int64_t run = ceil_div<int64_t>(p.positions, pack);
    p.lanes = static_cast<unsigned>(power_of_two(std::min<int64_t>({ceil_div<int64_t>(run, 2), 32, p.team})));
    const int64_t workers = p.team / p.lanes;
    const int64_t wanted = std::min(ceil_div<int64_t>(workers, p.channels), ceil_div<int64_t>(run, p.lanes));
    p.chunk = static_cast<unsigned>(round_up(ceil_div(run, wanted), p.lanes));
    p.chunks = static_cast<unsigned>(ceil_div<int64_t>(run, p.chunk));
    end += int64_t{p.channels} * p.chunks * 8;
  }
  p.room = static_cast<unsigned>(round_up(end, 16));
  // Larger than any block may ask for, but no number that wraps around.
  const int64_t shared = static_cast<int64_t>(sizeof(GroupNormShared)) + round_up(end, 16) * p.teams;
  p.shared = static_cast<unsigned>(std::min<int64_t>(shared, int64_t{1} << 30));
}

inline GroupNormPlan in_parts(const Machine& m, const GroupNormShape& q, int64_t parts, bool cluster) {
  GroupNormPlan p;
  p.tile_groups = q.channels_last ? groups_of_tile(m, q) : 1;
  p.tiles_of_sample = static_cast<unsigned>(ceil_div<int64_t>(q.groups, p.tile_groups));
  p.tiles = static_cast<unsigned>(q.n * p.tiles_of_sample);
  p.batch = p.tiles;
  p.cluster = cluster ? static_cast<unsigned>(parts) : 1;
  p.served = true;
  p.packs = q.packs;
  cut(p, q, parts);
  if (int64_t{p.channels} * p.positions * q.itemsize * q.arrays > m.shared_per_block) {
    p.shared = 1u << 30;
    return p;
  }
  const int64_t packs = ceil_div<int64_t>(int64_t{p.channels} * p.positions, elements_of_pack(q));
  const bool all_threads_busy =
      p.tiles * packs * p.parts >= int64_t{m.multiprocessors} * 1024 * kGroupNormPacksOfThread;
  const int64_t most = q.backward || q.channels_last ? kGroupNormFewThreads : kGroupNormThreads;
  const int64_t team = power_of_two(ceil_div(packs, all_threads_busy ? kGroupNormPacksOfThread : int64_t{1}));
  p.team = static_cast<unsigned>(std::min(team, most));
  if (parts > 1) p.team = std::max(p.team, 32u);
  p.teams = std::max(1u, kGroupNormTeams / p.team);
  if (parts > 1) p.teams = 1;
  const unsigned least = std::max(1u, 32 / p.team);
  const auto too_many = [&] {
    lay_out(p, q);
    return p.shared > static_cast<unsigned>(m.shared_per_multiprocessor / 4) ||
           p.tiles < int64_t{2} * m.multiprocessors * p.teams;
  };
  while (too_many() && p.teams > least) p.teams /= 2;
  const auto run = q.channels_last ? p.channels : p.positions;
  const auto all = static_cast<unsigned>(q.channels_last ? q.c : q.s);
  const auto pack = static_cast<unsigned>(elements_of_pack(q));
  p.by_run[0] = GroupNormDivisor(ceil_div(run, pack));
  p.by_run[1] = GroupNormDivisor(ceil_div(all - (all - 1) / run * run, pack));
  p.by_chunks = GroupNormDivisor(p.chunks);
  p.by_d = GroupNormDivisor(static_cast<unsigned>(d_of(q)));
  p.by_groups = GroupNormDivisor(static_cast<unsigned>(q.groups));
  p.by_tiles = GroupNormDivisor(p.tiles_of_sample);
  return p;
}

inline GroupNormPlan in_two_launches(const Machine& m, const GroupNormShape& q, int64_t room_of_two) {
  const int64_t whole = in_parts(m, q, 1, false).tiles;
  const int64_t d = q.channels_last ? groups_of_tile(m, q) * d_of(q) : d_of(q), bytes = d * q.s * q.itemsize * q.arrays;
  const int64_t for_all = std::min(ceil_div(int64_t{2} * m.multiprocessors, whole), bytes / kGroupNormLeastSplit);
  const int64_t each = std::max(kGroupNormSplitPart, std::min(bytes / kGroupNormMostParts, room_of_two / 2));
  int64_t parts = std::max<int64_t>({1, ceil_div(bytes, each), for_all});
  GroupNormPlan p = in_parts(m, q, parts, false);
  for (unsigned before = 0; p.shared > room_of_two && p.parts != before; p = in_parts(m, q, parts *= 2, false))
    before = p.parts;
  if (p.shared > static_cast<unsigned>(m.shared_per_block)) return {};
  const int64_t batches = ceil_div(whole, std::max<int64_t>(1, m.l2 * 6 / 10 / bytes));
  p.batch = static_cast<unsigned>(ceil_div(whole, batches));
  p.split = true;
  return p;
}

}  // namespace group_norm_planning

// Not served: rows of channels_last too long for any block.
inline GroupNormPlan plan_group_norm(const Machine& m, const GroupNormShape& q, int max_cluster = 16) {
  using namespace group_norm_planning;
  const int64_t of_two = m.shared_per_multiprocessor / 2 - kGroupNormReserved, of_one = m.shared_per_block;
  const bool clusters = m.clusters() && max_cluster > 1;
  const auto fits = [&](const GroupNormPlan& p, int64_t bytes) { return p.shared <= bytes; };
  const int64_t most_parts = q.channels_last ? q.s : d_of(q) * q.s;
  GroupNormPlan p = in_parts(m, q, 1, false);
  if (!fits(p, of_two) && clusters) {
    for (int64_t k = 2; k <= std::min(8, max_cluster) && k <= most_parts && !fits(p, of_two); k *= 2)
      p = in_parts(m, q, k, true);
    if (!fits(p, of_one) && max_cluster >= 16 && most_parts >= 16) p = in_parts(m, q, 16, true);
  }
  const bool one_read = fits(p, of_one);
  const int64_t bytes = int64_t{p.channels} * p.positions * p.parts * q.itemsize * q.arrays;
  const int64_t tiles = p.tiles, sms = m.multiprocessors;
  if (one_read && clusters)  // so few tiles that more blocks are faster
    for (int64_t k = 2 * p.cluster; k <= std::min(8, max_cluster) && k <= most_parts; k *= 2)
      if (tiles * p.cluster * 4 < sms * 3 && bytes / k >= kGroupNormLeastPart) p = in_parts(m, q, k, true);
  const bool idle = tiles * p.parts * 2 < sms;
  const int64_t large = clusters ? kGroupNormLargeTensor / tiles : 4 * kGroupNormLeastPart;
  if (one_read && !(idle && bytes >= large)) return p;
  const GroupNormPlan split = in_two_launches(m, q, of_two);
  return split.served || !one_read ? split : p;
}

}  // namespace dlkernels
