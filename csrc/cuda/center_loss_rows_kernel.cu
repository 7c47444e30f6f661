// The center loss by rows in their own order, on GPUs: losses, gradients in features and attention, rows that count.
#include <algorithm>

#include "center_loss_device.h"

namespace dlkernels {
namespace {

constexpr int kThreads = kCenterThreads;
constexpr int kBlocksPerProcessor = 16;        // before a block does several sets of rows
constexpr int64_t kCountHereBytes = 16 << 20;  // of labels that all blocks together may read again, from L2
constexpr int kCountUnroll = 4;                // labels of a thread that are on their way at a time
constexpr int64_t kCountRows = 16 * kThreads;  // of a block of the counting kernel
constexpr int64_t kMaxPartials = 1 << 16;

// Packs of a thread's row that are on their way at a time.
constexpr int row_unroll(int pack, bool attention) { return pack == 1 ? 4 : 16 / pack / (attention ? 2 : 1); }

struct RowsShared {
  BlockSums<float, 1> sums[2];
  BlockSums<int64_t, 1> counts;
  bool last;
};

// Rows of [begin, end) that count, of this thread.
DL_DEVICE int64_t count_labels(const CenterLossTensors& t, int64_t begin, int64_t end) {
  int64_t found = 0;
  for (int64_t i = begin + threadIdx.x; i < end; i += int64_t{kCountUnroll} * blockDim.x) {
    int64_t labels[kCountUnroll];
    DL_UNROLL
    for (int u = 0; u < kCountUnroll; ++u) {
      const int64_t at = i + int64_t{u} * blockDim.x;
      labels[u] = at < end ? load_label(t.labels, t.narrow, at) : kLeftOut;
    }
    DL_UNROLL
    for (int u = 0; u < kCountUnroll; ++u) found += counts(labels[u], t.ignore_index);
  }
  return found;
}

// A row in the hands of `lanes` threads; this one does packs `member`, `member + lanes`, ...
template <class T, int N, bool kAttention>
struct CenterRow {
  static constexpr int U = row_unroll(N, kAttention);
  const CenterRowsArgs& a;
  int lanes, member;
  bool wide_centers, wide_attention;

  // What a row that is not read has for gradients: 0, or NaN where its label is out of range.
  DL_DEVICE void fill(int64_t row, float value) const {
    Floats<N> values;
    DL_UNROLL
    for (int i = 0; i < N; ++i) values[i] = value;
    for (int64_t j = int64_t{member} * N; j < a.t.d; j += int64_t{lanes} * N) {
      store<N>(static_cast<T*>(a.dx) + row * a.t.d + j, values);
      if (kAttention) store_mixed<T, N>(a.dattention, row * a.t.d + j, values, wide_attention);
    }
  }

  // This thread's part of sum A (x - c)^2, and the gradients.
  template <Use U_>
  DL_DEVICE float run(int64_t row, int64_t label, float scale_x, float scale_a) const {
    const int64_t base = row * a.t.d, base_c = label * a.t.d;
    const T* x = static_cast<const T*>(a.t.x);
    float total = 0;
    DL_LOOPED
    for (int64_t first = int64_t{member} * N; first < a.t.d; first += int64_t{lanes} * N * U) {
      Pack<T, N> xs[U];
      Mixed<T, N> cs[U], as[U];
      DL_UNROLL
      for (int u = 0; u < U; ++u) {
        const int64_t j = first + int64_t{u} * lanes * N;
        if (j < a.t.d) {
          xs[u] = load_pack<N, U_>(x + base + j);
          cs[u].template load<Use::kShared>(a.t.centers, base_c + j, wide_centers);
          if (kAttention) as[u].template load<U_>(a.t.attention, base + j, wide_attention);
        }
      }
      DL_UNROLL
      for (int u = 0; u < U; ++u) {
        const int64_t j = first + int64_t{u} * lanes * N;
        if (j >= a.t.d) continue;
        Floats<N> dx = to_floats(xs[u]), da;
        const Floats<N> c = cs[u].floats(wide_centers);
        if (kAttention) da = as[u].floats(wide_attention);
        DL_UNROLL
        for (int i = 0; i < N; ++i) {
          const float difference = dx[i] - c[i];
          float pull = difference;
          if (kAttention) {
            const Weight w = attention_weight(da[i], a.t.logits);
            pull = center_loss_dx(difference, a.t.logits ? w.value : checked_weight(w.value));
            da[i] = scale_a * (w.slope * center_loss_dattention(difference));
          }
          total += pull * difference;
          dx[i] = scale_x * pull;
        }
        if (a.dx != nullptr) {
          store<N>(static_cast<T*>(a.dx) + base + j, dx);
          if (kAttention) store_mixed<T, N>(a.dattention, base + j, da, wide_attention);
        }
      }
    }
    return total;
  }
};

// Rows.
//
// Math      loss_i = 1/2 sum_d A (x - c)^2, c the center of row i's class;  dx = s A (x - c),
//           dA = s/2 (x - c)^2, times A (1 - A) for logits;  s = g_i, or 1 / divisor for a gradient that is stored
//           (float16: 1). divisor = max(1, rows that count) for a mean. Rows left out: 0; labels of K or more: NaN.
// Traffic   per element of a row that counts: read x (and A), write dx (and dA); centers from the caches, labels too.
// Grid      kThreads / lanes rows at a time and block, every gridDim-th set of rows; lanes up to a warp, or all of the
//           block's threads.
// Requires  with N > 1, rows of whole packs at multiples of 16 bytes.
// Result    bitwise reproducible on one kind of device: blocks and their sums in a fixed order, no float atomics.
template <class T, int N, bool kAttention>
DL_KERNEL(kThreads, 2)
center_rows_kernel(const CenterRowsArgs a, const CenterRowsPlan plan) {
  RowsShared& shared = *shared_memory<RowsShared>();
  const CenterLossTensors& t = a.t;
  wait_for_previous_kernel();
  float divisor = 1.0f;
  if (plan.divisor == CenterDivisor::kHere) {
    const int64_t found = block_sum(count_labels(t, 0, t.n), shared.counts);
    divisor = static_cast<float>(found > 1 ? found : 1);
  }
  if (plan.divisor == CenterDivisor::kBefore) divisor = load_one<Use::kAgain>(a.divisor);
  const bool wide_centers = t.center_dtype == Float::kFloat32, wide_attention = t.attention_dtype == Float::kFloat32;
  const int lanes = plan.lanes, rows = kThreads / lanes;
  const int group = static_cast<int>(threadIdx.x) / lanes;
  const CenterRow<T, N, kAttention> engine{a, lanes, static_cast<int>(threadIdx.x) % lanes, wide_centers,
                                           wide_attention};
  const bool halves_x = t.dtype == Float::kFloat16, halves_a = t.attention_dtype == Float::kFloat16;
  const int64_t step = int64_t{gridDim.x} * rows;
  float total = 0;
  int64_t found = 0;
  int parity = 0;
  int64_t first = int64_t{blockIdx.x} * rows;
  int64_t next = first + group < t.n ? load_label(t.labels, t.narrow, first + group) : kLeftOut;
  DL_LOOPED
  for (; first < t.n; first += step) {
    const int64_t row = first + group, label = next;
    next = row + step < t.n ? load_label(t.labels, t.narrow, row + step) : kLeftOut;  // on its way meanwhile
    const bool keeps = counts(label, t.ignore_index), reads = keeps && label < t.k;
    float part = keeps && !reads ? NAN : 0.0f;
    if (row < t.n && reads) {
      const float g = a.grad == nullptr ? 1.0f : load_one(a.grad + row * a.grad_step);
      const float scale_x = halves_x ? g : g / divisor, scale_a = halves_a ? g : g / divisor;
      part = plan.resident ? engine.template run<Use::kAgain>(row, label, scale_x, scale_a)
                           : engine.template run<Use::kOnce>(row, label, scale_x, scale_a);
    } else if (row < t.n && a.dx != nullptr) {
      engine.fill(row, part);
    }
    if (engine.member == 0) found += keeps;
    if (a.row_loss != nullptr) {
      if (lanes > kWarp) part = block_sum(part, shared.sums[parity]);
      else part = warp_sum(part, lanes);
      parity ^= 1;  // the one barrier of a sum lies between two uses of the same half
      if (row < t.n && engine.member == 0) store_one<Use::kAgain>(a.row_loss + row, 0.5f * part);
    }
    total += part;
  }
  if (a.loss == nullptr) {
    if (a.divisor != nullptr && blockIdx.x == 0 && threadIdx.x == 0) store_one<Use::kAgain>(a.divisor, divisor);
    return;
  }
  total = block_sum(total, shared.sums[0]);
  const bool later = plan.divisor == CenterDivisor::kLater;
  if (later) found = block_sum(found, shared.counts);
  if (threadIdx.x == 0) {
    store_one<Use::kAgain>(a.partial + blockIdx.x, total);
    if (later) store_integer(a.counted + blockIdx.x, static_cast<int>(found));
  }
  if (!last_block(a.counter, gridDim.x, shared.last)) return;
  total = 0, found = 0;
  for (unsigned b = threadIdx.x; b < gridDim.x; b += kThreads) {
    total += load_one<Use::kAgain>(a.partial + b);
    if (later) found += load_integer<Use::kAgain>(a.counted + b);
  }
  total = block_sum(total, shared.sums[0]);
  if (later) {
    found = block_sum(found, shared.counts);
    divisor = static_cast<float>(found > 1 ? found : 1);
  }
  if (threadIdx.x == 0) {
    store_one<Use::kAgain>(a.loss, 0.5f * total / divisor);
    if (plan.divisor != CenterDivisor::kBefore) store_one<Use::kAgain>(a.divisor, divisor);
  }
}

// How many rows count.
//
// Math      max(1, sum_i [y_i >= 0 and y_i != ignore_index]).
// Traffic   read y once.
// Grid      a block per kCountRows labels or, of very many, per more of them.
// Requires  contiguous labels.
// Result    exact.
DL_KERNEL(kThreads, 4)
center_count_kernel(const CenterRowsArgs a, const int64_t rows) {
  RowsShared& shared = *shared_memory<RowsShared>();
  allow_next_kernel();
  const int64_t begin = int64_t{blockIdx.x} * rows, end = begin + rows < a.t.n ? begin + rows : a.t.n;
  int64_t found = block_sum(count_labels(a.t, begin, end), shared.counts);
  if (threadIdx.x == 0) store_integer(a.counted + blockIdx.x, static_cast<int>(found));
  if (!last_block(a.counter + 1, gridDim.x, shared.last)) return;
  found = 0;
  for (unsigned b = threadIdx.x; b < gridDim.x; b += kThreads) found += load_integer<Use::kAgain>(a.counted + b);
  found = block_sum(found, shared.counts);
  if (threadIdx.x == 0) store_one<Use::kAgain>(a.divisor, static_cast<float>(found > 1 ? found : 1));
}

}  // namespace

CenterRowsPlan plan_center_rows(const Machine& machine, const CenterLossTensors& t, bool packs, bool mean,
                                bool need_grad) {
  const int64_t size = size_of(t.dtype), pack = packs ? 16 / size : 1;
  const int64_t unroll = row_unroll(static_cast<int>(pack), t.attention != nullptr),
                each = ceil_div(ceil_div(t.d, pack), unroll);
  CenterRowsPlan plan{1, 0, CenterDivisor::kOne, false};
  while (plan.lanes < kWarp && plan.lanes < each) plan.lanes *= 2;
  // Long rows, and rows that are too few to give each multiprocessor several warps.
  const bool few = t.n * kWarp < int64_t{machine.multiprocessors} * machine.threads_per_multiprocessor / 2;
  if (each >= kThreads / 2 || (each > kWarp && few)) plan.lanes = kThreads;
  const int64_t most = int64_t{machine.multiprocessors} * kBlocksPerProcessor;
  plan.blocks = static_cast<unsigned>(std::min(ceil_div(t.n, int64_t{kThreads / plan.lanes}), most));
  if (mean) {
    const int64_t again = t.n * (t.narrow ? 4 : 8) * plan.blocks;
    plan.divisor = !need_grad                 ? CenterDivisor::kLater
                   : again <= kCountHereBytes ? CenterDivisor::kHere
                                              : CenterDivisor::kBefore;
  }
  const int64_t tensors = (t.attention == nullptr ? 1 : 2) * (need_grad ? 2 : 1);
  plan.resident = tensors * t.n * t.d * size <= machine.l2 / 2;
  return plan;
}

int64_t center_count_blocks(int64_t n) { return std::min(ceil_div(n, kCountRows), kMaxPartials); }

bool center_rows_in_packs(const CenterRowsArgs& a) {
  const int64_t pack = 16 / size_of(a.t.dtype);
  return a.t.d % pack == 0 && aligned(a.t.x, a.t.centers, a.t.attention, a.dx, a.dattention);
}

void launch_center_rows(const Queue& queue, const CenterRowsPlan& plan, const CenterRowsArgs& a) {
  const bool before = plan.divisor == CenterDivisor::kBefore;
  if (before) {
    const int64_t blocks = center_count_blocks(a.t.n);
    launch(queue, {static_cast<unsigned>(blocks), kThreads, sizeof(RowsShared)}, center_count_kernel, a,
           ceil_div(a.t.n, blocks));
  }
  with_dtype(a.t.dtype, [&](auto t) {
    using T = decltype(t);
    with_pack<T>(center_rows_in_packs(a), [&](auto n) {
      with_bool(a.t.attention != nullptr, [&](auto attention) {
        launch(queue, {plan.blocks, kThreads, sizeof(RowsShared), 1, before},
               center_rows_kernel<T, decltype(n)::value, decltype(attention)::value>, a, plan);
      });
    });
  });
}

}  // namespace dlkernels
