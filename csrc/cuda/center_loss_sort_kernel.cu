// Rows sorted by class, on GPUs: a stable radix sort of row numbers, lowest digit first. In one launch where the rows
// fit in the shared memory of a block, else in two launches per digit.
#include <algorithm>

#include "center_loss_device.h"

namespace dlkernels {
namespace {

constexpr int kThreads = 1024, kWarps = kThreads / kWarp;
constexpr int kMaxBits = 8, kMaxDigits = 1 << kMaxBits;
constexpr int64_t kSortHere = 1 << 14;  // rows that one block sorts at most
constexpr int64_t kTile = 1 << 12;      // rows of a block where there are several
constexpr int64_t kMaxTiles = 512;      // before a block takes more

struct SortShared {
  int counts[kWarps][kMaxDigits + 1];  // of a warp's rows by digit; then where the first of them goes
  int first[kMaxDigits];               // rows of lower digits
  int warp_sums[kWarps];
  bool last;
};
// Behind it where one block sorts: int keys[n], uint16_t order[2][n].

// Where a row sorts: by class, then rows left out, then rows whose label is out of range.
DL_DEVICE int sort_key(const CenterSortArgs& a, int row) {
  const int64_t label = load_label(a.labels, a.narrow, row);
  if (!counts(label, a.ignore_index)) return a.k;
  return label < a.k ? static_cast<int>(label) : a.k + 1;
}

DL_DEVICE void put(const CenterSortArgs& a, int place, int row, int key) {
  store_integer(a.order + place, row);
  store_integer(a.sorted + place, key < a.k ? key : key == a.k ? kLeftOut : kOutOfRange);
}

// Sums over the lanes up to each.
DL_DEVICE int inclusive_scan(int value) {
  DL_UNROLL
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const int below = shuffle_up(value, distance);
    if (lane() >= distance) value += below;
  }
  return value;
}

// Rows [begin, end) of a warp, of `count` of a block.
struct Range {
  int begin, end;
};
DL_DEVICE Range range_of_warp(int count) {
  const int each = ceil_div(ceil_div(count, warps()), kWarp) * kWarp, begin = warp() * each;
  return {begin < count ? begin : count, begin + each < count ? begin + each : count};
}

// shared.counts[w][d] becomes how many of the block's rows with digit d lie in warps before w. digit(i): of row i.
// each(d, rows): one thread's call for each digit, with all the block's rows of it.
template <class Digit, class Each>
DL_DEVICE void count_digits(SortShared& shared, int count, int digits, Digit digit, Each each) {
  int* own = shared.counts[warp()];
  for (int d = lane(); d < digits; d += kWarp) own[d] = 0;
  warp_barrier();
  const Range range = range_of_warp(count);
  for (int i = range.begin + lane(); i < range.end; i += kWarp) atomic_add_shared(&own[digit(i)], 1);
  __syncthreads();
  for (int d = warp(); d < digits; d += warps()) {
    const int rows = lane() < warps() ? shared.counts[lane()][d] : 0, through = inclusive_scan(rows);
    if (lane() < warps()) shared.counts[lane()][d] = through - rows;
    if (lane() == kWarp - 1) each(d, through);
  }
}

// to(place, i): where row i goes, stable, with shared.first and shared.counts in force.
template <class Digit, class To>
DL_DEVICE void place_rows(SortShared& shared, int count, int bits, Digit digit, To to) {
  int* own = shared.counts[warp()];
  const Range range = range_of_warp(count);
  for (int first = range.begin; first < range.end; first += kWarp) {
    const int i = first + lane();
    const bool active = i < range.end;
    const int d = active ? digit(i) : 0;
    unsigned peers = ballot(active);  // lanes of the same digit
    for (int b = 0; b < bits; ++b) {
      const unsigned ones = ballot((d >> b & 1) != 0);
      peers &= (d >> b & 1) != 0 ? ones : ~ones;
    }
    const int before = __popc(peers & ((1u << lane()) - 1)), base = active ? own[d] : 0;
    warp_barrier();
    if (active && peers >> lane() == 1u) own[d] = base + before + 1;  // the last of them, for the next 32 rows
    warp_barrier();
    if (active) to(shared.first[d] + base + before, i);
  }
}

// All rows in one block.
//
// Math      order: the rows by (class, row);  sorted: their classes, kLeftOut and kOutOfRange behind all classes.
// Traffic   read y once, write order and sorted.
// Grid      one block.
// Requires  n <= kSortHere, and shared memory for 8 bytes per row.
// Result    exact: the sort is stable.
DL_KERNEL(kThreads, 1)
center_sort_kernel(const CenterSortArgs a, const CenterSortPlan plan) {
  SortShared& shared = *shared_memory<SortShared>();
  int* keys = reinterpret_cast<int*>(&shared + 1);
  uint16_t* orders[2] = {reinterpret_cast<uint16_t*>(keys + a.n), reinterpret_cast<uint16_t*>(keys + a.n) + a.n};
  allow_next_kernel();
  const int digits = 1 << plan.bits;
  for (int i = static_cast<int>(threadIdx.x); i < a.n; i += kThreads) {
    keys[i] = sort_key(a, i);
    orders[0][i] = static_cast<uint16_t>(i);
  }
  __syncthreads();
  for (int pass = 0; pass < plan.passes; ++pass) {
    const uint16_t* from = pass % 2 == 0 ? orders[0] : orders[1];
    uint16_t* into = pass % 2 == 0 ? orders[1] : orders[0];
    const auto digit = [&](int i) { return keys[from[i]] >> (pass * plan.bits) & (digits - 1); };
    count_digits(shared, a.n, digits, digit, [&](int d, int rows) { shared.first[d] = rows; });
    __syncthreads();
    if (warp() == 0) {  // each lane a stretch of digits
      const int each = ceil_div(digits, kWarp);
      int rows = 0;
      for (int d = lane() * each; d < (lane() + 1) * each && d < digits; ++d) rows += shared.first[d];
      int before = inclusive_scan(rows) - rows;
      for (int d = lane() * each; d < (lane() + 1) * each && d < digits; ++d) {
        const int own = shared.first[d];
        shared.first[d] = before;
        before += own;
      }
    }
    __syncthreads();
    const bool last = pass + 1 == plan.passes;
    place_rows(shared, a.n, plan.bits, digit, [&](int place, int i) {
      if (last) put(a, place, from[i], keys[from[i]]);
      else into[place] = from[i];
    });
    __syncthreads();
  }
}

// The rows of a tile, in the order of the digits before this one.
struct Tile {
  const CenterSortArgs& a;
  int begin, count, shift, mask;
  const int* from;  // nullptr: the rows' own order

  DL_DEVICE Tile(const CenterSortArgs& args, const CenterSortPlan& plan, int pass)
      : a(args), begin(static_cast<int>(blockIdx.x) * plan.tile), shift(pass * plan.bits), mask((1 << plan.bits) - 1) {
    count = a.n - begin < plan.tile ? a.n - begin : plan.tile;
    from = pass == 0 ? nullptr : (plan.passes - pass) % 2 == 0 ? a.order : a.other_order;
  }
  DL_DEVICE int row(int i) const { return from == nullptr ? begin + i : load_integer<Use::kAgain>(from + begin + i); }
  DL_DEVICE int digit(int i) const { return sort_key(a, row(i)) >> shift & mask; }
};

// Counts of one digit, of all blocks.
//
// Math      offsets[d, b] = rows of digits below d, and of digit d in tiles before b.
// Traffic   per row: read its number (behind the first digit) and its label.
// Grid      a block per tile; the last one makes offsets of the counts.
// Requires  offsets of 2^bits * blocks numbers.
// Result    exact.
DL_KERNEL(kThreads, 1)
center_sort_count_kernel(const CenterSortArgs a, const CenterSortPlan plan, const int pass) {
  SortShared& shared = *shared_memory<SortShared>();
  wait_for_previous_kernel();
  allow_next_kernel();
  const Tile tile(a, plan, pass);
  const int digits = 1 << plan.bits;
  count_digits(
      shared, tile.count, digits, [&](int i) { return tile.digit(i); },
      [&](int d, int rows) { store_integer(a.offsets + d * gridDim.x + blockIdx.x, rows); });
  if (!last_block(a.counter, gridDim.x, shared.last)) return;
  const int total = digits * static_cast<int>(gridDim.x), each = ceil_div(total, kThreads);
  const int begin = static_cast<int>(threadIdx.x) * each, end = begin + each < total ? begin + each : total;
  int rows = 0;
  for (int i = begin; i < end; ++i) rows += load_integer<Use::kAgain>(a.offsets + i);
  const int through = inclusive_scan(rows);
  if (lane() == kWarp - 1) shared.warp_sums[warp()] = through;
  __syncthreads();
  int before = through - rows;
  for (int w = 0; w < warp(); ++w) before += shared.warp_sums[w];
  for (int i = begin; i < end; ++i) {
    const int own = load_integer<Use::kAgain>(a.offsets + i);
    store_integer(a.offsets + i, before);
    before += own;
  }
}

// Rows to the places of one digit.
//
// Math      order' = order, stably by this digit.
// Traffic   per row: read its number (behind the first digit) and its label twice, write its number.
// Grid      a block per tile.
// Requires  offsets of center_sort_count_kernel.
// Result    exact: the sort is stable.
DL_KERNEL(kThreads, 1)
center_sort_place_kernel(const CenterSortArgs a, const CenterSortPlan plan, const int pass) {
  SortShared& shared = *shared_memory<SortShared>();
  wait_for_previous_kernel();
  allow_next_kernel();
  const Tile tile(a, plan, pass);
  const int digits = 1 << plan.bits;
  for (int d = static_cast<int>(threadIdx.x); d < digits; d += kThreads)
    shared.first[d] = load_integer<Use::kAgain>(a.offsets + d * gridDim.x + blockIdx.x);
  const auto digit = [&](int i) { return tile.digit(i); };
  count_digits(shared, tile.count, digits, digit, [](int, int) {});
  __syncthreads();
  const bool last = pass + 1 == plan.passes;
  int* into = (plan.passes - pass) % 2 == 0 ? a.other_order : a.order;
  place_rows(shared, tile.count, plan.bits, digit, [&](int place, int i) {
    const int row = tile.row(i);
    if (last) put(a, place, row, sort_key(a, row));
    else store_integer(into + place, row);
  });
}

}  // namespace

CenterSortPlan plan_center_sort(const Machine& machine, int64_t n, int64_t k) {
  int total = 1;
  while (k + 1 >> total != 0) ++total;
  CenterSortPlan plan{};
  plan.passes = ceil_div(total, kMaxBits);
  plan.bits = ceil_div(total, plan.passes);
  const int64_t room = machine.shared_per_block - static_cast<int64_t>(sizeof(SortShared));
  plan.tile = static_cast<int>(n);
  plan.blocks = 1;
  plan.shared = sizeof(SortShared);
  if (n <= kSortHere && 8 * n <= room) {
    plan.shared += static_cast<unsigned>(8 * n);
    return plan;
  }
  plan.tile = static_cast<int>(std::max(std::min(kTile, n), ceil_div(n, kMaxTiles)));
  plan.blocks = static_cast<unsigned>(ceil_div(n, int64_t{plan.tile}));
  return plan;
}

void launch_center_sort(const Queue& queue, const CenterSortPlan& plan, const CenterSortArgs& a) {
  if (a.offsets == nullptr) return launch(queue, {1, kThreads, plan.shared}, center_sort_kernel, a, plan);
  for (int pass = 0; pass < plan.passes; ++pass) {
    launch(queue, {plan.blocks, kThreads, plan.shared, 1, pass > 0}, center_sort_count_kernel, a, plan, pass);
    launch(queue, {plan.blocks, kThreads, plan.shared, 1, true}, center_sort_place_kernel, a, plan, pass);
  }
}

}  // namespace dlkernels
