// Sums over the rows of a class, on GPUs: the centers' update, their gradient, and with it those of the rows.
#include <algorithm>

#include "center_loss_device.h"

namespace dlkernels {
namespace {

constexpr int kThreads = kCenterThreads, kWarps = kThreads / kWarp;
constexpr int kSlots = 2 * kWarps;
constexpr int kMinRows = 4, kMaxRows = 256;  // of a warp
constexpr int kBlocksPerProcessor = 4;       // before a warp takes more rows

// Elements of a thread's access: no more, so that a thread has room for several, and rows of half precision have as
// many blocks side by side as others.
constexpr int kPacked = 4;
// Rows of a warp, and sums of slots, that are on their way at a time.
template <int N, bool kAttention>
constexpr int kRowUnroll = kAttention && N > 1 ? 2 : 4;
constexpr int kSlotUnroll = 4;

// A class in the course of its rows: what a thread has of their sum.
template <int N>
struct ClassSum {
  int label, count;
  Floats<N> sum;
  DL_DEVICE void start(int of) {
    label = of, count = 0;
    DL_UNROLL
    for (int i = 0; i < N; ++i) sum[i] = 0.0f;
  }
};

// A range of sorted rows leaves up to two sums unfinished: slot 0 has that of a class that came from before the range,
// slot 1 that of one that starts inside and goes on behind. In their order, slots are the rows of their classes again.
struct Slot {
  int label = kNoRow, count = 0;
};
template <int N>
struct SumsShared {
  float sum[kSlots][N][kWarp];
  Slot slot[kSlots];
  bool last;
};

// A warp goes through positions [begin, end), 32 labels at a time and U values at a time. label(i) and number(i) are
// asked of one lane, load(raw, label, number, i, fresh) and add(sum, raw, label, number) of all; `fresh`: the first of
// its class here. close(sum, first, last): of the classes here.
template <int U, class Raw, int N, class Label, class Number, class Load, class Add, class Close>
DL_DEVICE void walk(int begin, int end, Label label, Number number, Load load, Add add, Close close) {
  ClassSum<N> open;
  open.start(kNoRow);
  bool first = true;
  DL_LOOPED
  for (int from = begin; from < end; from += kWarp) {
    const int own = from + lane(), some = end - from < kWarp ? end - from : kWarp;
    const int own_label = own < end ? label(own) : kNoRow, own_number = own < end ? number(own) : 0;
    DL_LOOPED
    for (int j = 0; j < some; j += U) {
      Raw raw[U];
      int labels[U], numbers[U];
      DL_UNROLL
      for (int u = 0; u < U; ++u) {
        labels[u] = shuffle(own_label, j + u);
        numbers[u] = shuffle(own_number, j + u);
        load(raw[u], labels[u], numbers[u], from + j + u, labels[u] != (u == 0 ? open.label : labels[u - 1]));
      }
      DL_UNROLL
      for (int u = 0; u < U; ++u) {
        if (labels[u] >= 0 && labels[u] != open.label) {
          if (open.label >= 0) close(open, first, false), first = false;
          open.start(labels[u]);
        }
        add(open, raw[u], labels[u], numbers[u]);
      }
    }
  }
  if (open.label >= 0) close(open, first, true);
}

template <class T, int N, bool kAttention>
struct CenterSums {
  static constexpr int U = kRowUnroll<N, kAttention>;
  const CenterSumsArgs& a;
  SumsShared<N>& shared;
  int block, blocks;
  int column;  // first of this thread's N
  bool mine;   // whether there are any
  bool wide_centers, wide_attention;
  Slot head, tail;  // of this warp

  struct Row {
    Pack<T, N> x;
    Mixed<T, N> center, attention;
    float g;
  };

  DL_DEVICE int64_t at(int64_t row) const { return row * a.t.d + column; }
  DL_DEVICE int label(int position) const {
    return position >= 0 && position < a.t.n ? load_integer<Use::kAgain>(a.sorted + position) : kNoRow;
  }

  // What becomes of a whole class. c: its center.
  DL_DEVICE void finish(const ClassSum<N>& s, const Floats<N>& c) const {
    if (!mine) return;
    const float rows = static_cast<float>(a.ema ? s.count : 1 + s.count);
    Floats<N> out;
    DL_UNROLL
    for (int i = 0; i < N; ++i) out[i] = a.gradient ? -s.sum[i] : c[i] + a.alpha * (s.sum[i] / rows);
    store_mixed<T, N, Use::kAgain>(a.out, at(s.label), out, wide_centers);
  }
  DL_DEVICE void finish(const ClassSum<N>& s) const {
    Mixed<T, N> c;
    if (mine) c.template load<Use::kAgain>(a.t.centers, at(s.label), wide_centers), finish(s, c.floats(wide_centers));
  }

  DL_DEVICE void keep(const ClassSum<N>& s, bool front) {
    DL_UNROLL
    for (int i = 0; i < N; ++i) shared.sum[2 * warp() + (front ? 0 : 1)][i][lane()] = s.sum[i];
    if (front) head = {s.label, s.count};
    else tail = {s.label, s.count};
  }

  DL_DEVICE void add_row(ClassSum<N>& s, const Row& row, const Floats<N>& c, int64_t to) const {
    Floats<N> dx = to_floats(row.x), da;
    if (kAttention) da = row.attention.floats(wide_attention);
    DL_UNROLL
    for (int i = 0; i < N; ++i) {
      const float difference = dx[i] - c[i];
      float pull = difference;
      if (kAttention) {
        const Weight w = attention_weight(da[i], a.t.logits);
        pull = center_loss_dx(difference, a.gradient && !a.t.logits ? checked_weight(w.value) : w.value);
        da[i] = row.g * (w.slope * center_loss_dattention(difference));
      }
      dx[i] = row.g * pull;
      s.sum[i] += dx[i];
    }
    if (a.dx == nullptr) return;
    store<N>(static_cast<T*>(a.dx) + to, dx);
    if (kAttention) store_mixed<T, N>(a.dattention, to, da, wide_attention);
  }

  // The gradients of a row that is not read.
  DL_DEVICE void fill(int64_t to, float value) const {
    Floats<N> values;
    DL_UNROLL
    for (int i = 0; i < N; ++i) values[i] = value;
    store<N>(static_cast<T*>(a.dx) + to, values);
    if (kAttention) store_mixed<T, N>(a.dattention, to, values, wide_attention);
  }

  // Rows [begin, end) of this warp.
  DL_DEVICE void rows(int begin, int end) {
    const int before = label(begin - 1), after = label(end);
    Floats<N> center;
    int center_of = kNoRow;
    walk<U, Row, N>(
        begin, end, [&](int i) { return label(i); }, [&](int i) { return load_integer<Use::kAgain>(a.order + i); },
        [&](Row& raw, int of, int row, int, bool fresh) {
          if (of < 0) return;
          raw.g = a.grad == nullptr ? 1.0f : load_one(a.grad + row * a.grad_step);
          if (!mine) return;
          raw.x = load_pack<N>(static_cast<const T*>(a.t.x) + at(row));
          if (kAttention) raw.attention.template load<Use::kOnce>(a.t.attention, at(row), wide_attention);
          // Not kShared: the update writes it, if only when all rows of the class have been read.
          if (fresh) raw.center.template load<Use::kAgain>(a.t.centers, at(of), wide_centers);
        },
        [&](ClassSum<N>& s, const Row& raw, int of, int row) {
          if (of >= 0) {
            if (mine && of != center_of) center = raw.center.floats(wide_centers);
            center_of = of;
            ++s.count;
            if (mine) add_row(s, raw, center, at(row));
          } else if (of != kNoRow && mine && a.dx != nullptr) {
            fill(at(row), of == kOutOfRange ? NAN : 0.0f);
          }
        },
        [&](const ClassSum<N>& s, bool, bool) {
          const bool front = s.label == before;
          if (front || s.label == after) keep(s, front);
          else finish(s, center);
        });
  }

  DL_DEVICE Slot* slots(int slab) const { return reinterpret_cast<Slot*>(a.slots) + int64_t{slab} * 2 * blocks; }

  // Slots [begin, end) of all blocks, of this warp.
  DL_DEVICE void merge(const Slot* slots, int begin, int end) {
    walk<kSlotUnroll, Floats<N>, N>(
        begin, end, [&](int i) { return load_integer<Use::kAgain>(&slots[i].label); },
        [&](int i) { return load_integer<Use::kAgain>(&slots[i].count); },
        [&](Floats<N>& raw, int of, int, int i, bool) {
          if (of >= 0 && mine) raw = load<N, Use::kAgain>(a.partial + at(i));
        },
        [&](ClassSum<N>& s, const Floats<N>& raw, int of, int count) { add_slot(s, raw, of, count); },
        [&](const ClassSum<N>& s, bool first, bool last) {
          if (first || last) keep(s, first);  // may go on in another warp's
          else finish(s);
        });
  }

  DL_DEVICE void add_slot(ClassSum<N>& s, const Floats<N>& sum, int of, int count) const {
    if (of < 0) return;
    s.count += count;
    DL_UNROLL
    for (int i = 0; i < N; ++i)
      if (mine) s.sum[i] += sum[i];
  }

  // The slots of the block's warps, by one warp; `into`: what goes on outside of [begin, end) goes there.
  DL_DEVICE void combine(int begin, int end, Slot* into) {
    const int before = into == nullptr ? kNoRow : label(begin - 1), after = into == nullptr ? kNoRow : label(end);
    head = tail = {};
    walk<kSlotUnroll, Floats<N>, N>(
        0, kSlots, [&](int i) { return shared.slot[i].label; }, [&](int i) { return shared.slot[i].count; },
        [&](Floats<N>& raw, int of, int, int i, bool) {
          if (of < 0) return;
          DL_UNROLL
          for (int j = 0; j < N; ++j) raw[j] = shared.sum[i][j][lane()];
        },
        [&](ClassSum<N>& s, const Floats<N>& raw, int of, int count) { add_slot(s, raw, of, count); },
        [&](const ClassSum<N>& s, bool, bool) {
          const bool front = s.label == before;
          if (!front && s.label != after) return finish(s);
          if (mine) store<N, Use::kAgain>(a.partial + at(2 * block + (front ? 0 : 1)), s.sum);
          if (front) head = {s.label, s.count};
          else tail = {s.label, s.count};
        });
    if (into == nullptr || lane() >= 2) return;
    store_integer(&into[2 * block + lane()].label, lane() == 0 ? head.label : tail.label);
    store_integer(&into[2 * block + lane()].count, lane() == 0 ? head.count : tail.count);
  }
};

// Sums over classes.
//
// Math      s_j = sum_{y_i = j} g_i A_i (x_i - c_j);  dc_j = -s_j, dx_i = g_i A_i (x_i - c_j), dA as in the row kernel;
// or
//           c_j <- c_j + alpha s_j / (1 + n_j) (EMA: / n_j).
// Traffic   per element of a row that counts: read x (and A), write dx (and dA) where asked for; per class: read c_j,
// once
//           for each warp that has rows of it, write the result. Sums of classes that lie in several blocks, two per
//           block at most, are written and read once.
// Grid      blocks x slabs: a block has kWarps * rows sorted rows and 32 N features, N = 4 or 1. Work is the same
// however rows are
//           spread over classes. The last block of a slab adds what lies in several blocks.
// Requires  with N > 1, rows of whole packs, tensors at multiples of 16 bytes; rows sorted by class, those without one
// last. Result    bitwise reproducible on one kind of device: rows, warps and blocks in their order. Labels out of
// range: no
//           sum, NaN in dx and dA.
template <class T, int N, bool kAttention>
DL_KERNEL(kThreads, 2)
center_sums_kernel(const CenterSumsArgs a, const CenterSumsPlan plan) {
  SumsShared<N>& shared = *shared_memory<SumsShared<N>>();
  const int slab = static_cast<int>(blockIdx.x % plan.slabs), block = static_cast<int>(blockIdx.x / plan.slabs);
  const int blocks = static_cast<int>(plan.blocks), column = (slab * kWarp + lane()) * N;
  CenterSums<T, N, kAttention> sums{a,
                                    shared,
                                    block,
                                    blocks,
                                    column,
                                    column < a.t.d,
                                    a.t.center_dtype == Float::kFloat32,
                                    a.t.attention_dtype == Float::kFloat32,
                                    {},
                                    {}};
  wait_for_previous_kernel();
  const int n = static_cast<int>(a.t.n), rows = plan.rows;
  const int block_begin = block * kWarps * rows, block_end = block_begin + kWarps * rows;
  Slot* slots = blocks > 1 ? sums.slots(slab) : nullptr;
  DL_LOOPED
  for (bool merging = false;;) {
    sums.head = sums.tail = {};
    if (!merging) {
      const int begin = block_begin + warp() * rows;
      sums.rows(begin < n ? begin : n, begin + rows < n ? begin + rows : n);
    } else {
      const int each = ceil_div(2 * blocks, kWarps), begin = warp() * each;
      sums.merge(slots, begin < 2 * blocks ? begin : 2 * blocks, begin + each < 2 * blocks ? begin + each : 2 * blocks);
    }
    if (lane() == 0) shared.slot[2 * warp()] = sums.head, shared.slot[2 * warp() + 1] = sums.tail;
    __syncthreads();
    if (warp() == 0) sums.combine(block_begin, block_end < n ? block_end : n, merging ? nullptr : slots);
    if (merging || blocks == 1) return;
    if (!last_block(a.counter + slab, plan.blocks, shared.last)) return;
    merging = true;
  }
}

}  // namespace

CenterSumsPlan plan_center_sums(const Machine& machine, int64_t n, int64_t d, bool packs) {
  CenterSumsPlan plan{kMinRows, 0, static_cast<unsigned>(ceil_div(d, int64_t{kWarp} * (packs ? kPacked : 1)))};
  const int64_t most = int64_t{machine.multiprocessors} * kBlocksPerProcessor;
  while (plan.rows < kMaxRows && ceil_div(n, int64_t{kWarps} * plan.rows) * plan.slabs > most) plan.rows *= 2;
  plan.blocks = static_cast<unsigned>(ceil_div(n, int64_t{kWarps} * plan.rows));
  return plan;
}

bool center_sums_in_packs(const CenterSumsArgs& a) {
  return a.t.d % kPacked == 0 && aligned(a.t.x, a.t.centers, a.t.attention, a.out, a.dx, a.dattention);
}

void launch_center_sums(const Queue& queue, const CenterSumsPlan& plan, const CenterSumsArgs& a) {
  const auto start = [&](auto t, auto n, auto attention) {
    constexpr int N = decltype(n)::value;
    launch(queue, {plan.blocks * plan.slabs, kThreads, sizeof(SumsShared<N>), 1, true},
           center_sums_kernel<decltype(t), N, decltype(attention)::value>, a, plan);
  };
  with_dtype(a.t.dtype, [&](auto t) {
    with_bool(a.t.attention != nullptr, [&](auto attention) {
      if (center_sums_in_packs(a)) start(t, std::integral_constant<int, kPacked>{}, attention);
      else start(t, std::integral_constant<int, 1>{}, attention);
    });
  });
}

}  // namespace dlkernels
