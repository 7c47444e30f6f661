// Gradients of GroupNorm's parameters from the sums of each sample and channel.
#include "group_norm_pieces.h"

namespace dlkernels {
namespace {

constexpr int kChannels = kGroupNormGradChannels;
constexpr int kRows = 16;
constexpr int kThreads = kChannels * kRows;

struct Shared {
  float sums[2][kRows][kChannels];
  bool last;
};

DL_DEVICE void set_parameter(void* p, Float dtype, int64_t i, float value) {
  switch (dtype) {
    case Float::kFloat16: return store_one(static_cast<float16*>(p) + i, value);
    case Float::kBFloat16: return store_one(static_cast<bfloat16*>(p) + i, value);
    default: return store_one(static_cast<float*>(p) + i, value);
  }
}

// Each pair of values becomes its sum over the rows of threads, in the threads of row 0. Two barriers.
DL_DEVICE void sum_over_rows(float& first, float& second, Shared& shared, int row, int column) {
  __syncthreads();
  shared.sums[0][row][column] = first;
  shared.sums[1][row][column] = second;
  __syncthreads();
  if (row != 0) return;
  first = second = 0.0f;
  for (int r = 0; r < kRows; ++r) {
    first += shared.sums[0][r][column];
    second += shared.sums[1][r][column];
  }
}

// Math      da = sum over parts of sums[0], db of sums[1], per sample and channel;
//           dweight = sum_n (1 + scale) da,  dbias = sum_n (1 + scale) db,  dscale = weight da + bias db,  dshift = db.
// Traffic   read 2 N C position_parts floats (and scale), write 2 C (and 2 N C).
// Grid      blocks of 32 channels x splits, which share the samples.
// Requires  nothing of alignment.
// Result    bitwise reproducible: samples and parts in a fixed order; the last block adds up what the splits found.
DL_KERNEL(kThreads, 1)
group_norm_parameter_grads_kernel(const GroupNormParameterGrads a) {
  Shared& shared = *shared_memory<Shared>();
  const int column = static_cast<int>(threadIdx.x) % kChannels, row = static_cast<int>(threadIdx.x) / kChannels;
  const unsigned channel_blocks = gridDim.x / a.splits, channel_block = blockIdx.x % channel_blocks;
  const unsigned split = blockIdx.x / channel_blocks;
  const int64_t c = int64_t{channel_block} * kChannels + column;
  const bool there = c < a.c;
  const int64_t each = ceil_div(a.n, int64_t{a.splits}), begin = split * each;
  const int64_t end = begin + each < a.n ? begin + each : a.n;
  const int64_t plane = a.n * a.position_parts * a.c;
  float dweight = 0.0f, dbias = 0.0f;
  const float weight = there ? parameter_at(a.given_weight, c, 1.0f) : 0.0f;
  const float bias = there ? parameter_at(a.given_bias, c, 0.0f) : 0.0f;
  const auto add = [&](int64_t n, float da, float db) {
    const int64_t nc = n * a.c + c;
    const float factor = 1.0f + parameter_at(a.given_scale, nc, 0.0f);
    dweight += factor * da;
    dbias += factor * db;
    if (a.scale != nullptr) set_parameter(a.scale, a.given_scale.dtype, nc, weight * da + bias * db);
    if (a.shift != nullptr) set_parameter(a.shift, a.shift_dtype, nc, db);
  };
  wait_for_previous_kernel();
  if (a.position_parts == 1) {
    for (int64_t n = begin + row; n < end; n += kRows)
      if (there)
        add(n, load_one<Use::kAgain>(a.sums + n * a.c + c), load_one<Use::kAgain>(a.sums + plane + n * a.c + c));
  } else {
    for (int64_t n = begin; n < end; ++n) {
      float da = 0.0f, db = 0.0f;
      for (unsigned part = row; there && part < a.position_parts; part += kRows) {
        const int64_t at = (n * a.position_parts + part) * a.c + c;
        da += load_one<Use::kAgain>(a.sums + at);
        db += load_one<Use::kAgain>(a.sums + plane + at);
      }
      sum_over_rows(da, db, shared, row, column);
      if (there && row == 0) add(n, da, db);
    }
  }
  if (a.weight == nullptr && a.bias == nullptr) return;
  sum_over_rows(dweight, dbias, shared, row, column);
  if (a.splits > 1) {
    if (there && row == 0) {
      float* own = a.partial + split * 2 * a.c + c;
      store_one<Use::kAgain>(own, dweight);
      store_one<Use::kAgain>(own + a.c, dbias);
    }
    if (!last_block(a.counters + channel_block, a.splits, shared.last)) return;
    dweight = dbias = 0.0f;
    for (unsigned other = row; there && other < a.splits; other += kRows) {
      dweight += load_one<Use::kAgain>(a.partial + other * 2 * a.c + c);
      dbias += load_one<Use::kAgain>(a.partial + other * 2 * a.c + a.c + c);
    }
    sum_over_rows(dweight, dbias, shared, row, column);
  }
  if (!there || row != 0) return;
  if (a.weight != nullptr) set_parameter(a.weight, a.given_weight.dtype, c, dweight);
  if (a.bias != nullptr) set_parameter(a.bias, a.given_bias.dtype, c, dbias);
}

}  // namespace

void launch_group_norm_parameter_grads(const Queue& queue, const GroupNormParameterGrads& a) {
  LaunchShape s;
  s.grid = static_cast<unsigned>(ceil_div<int64_t>(a.c, kChannels)) * a.splits;
  s.block = kThreads;
  s.shared = sizeof(Shared);
  s.overlap = true;
  launch(queue, s, group_norm_parameter_grads_kernel, a);
}

}  // namespace dlkernels
