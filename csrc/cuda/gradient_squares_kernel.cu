// The sum of the squares of many gradients, for their norm; and tables that travel as arguments.
#include "optimizer_units.h"

namespace dlkernels {
namespace {

constexpr int kSquaresBlocks = 4;  // of a multiprocessor

struct SquaresShared {
  BlockSums<double, 1> sums[2];  // in turn: one barrier between two uses
  bool last;
};

// The squares of elements [0, count), and of those left over by threads that take packs of N. A thread adds in float,
// each place of its packs by itself, and once more in double where its values leave the range in which float's squares
// are exact to the last digits.
template <class T, int N>
DL_DEVICE double squares_of(const T* grad, int count) {
  constexpr int U = 4, kStride = kStepThreads * N;
  const int begin = static_cast<int>(threadIdx.x) * N;
  Floats<N> sums{};
  float largest = 0.0f;
  const auto add = [&](const Floats<N>& x) {
    DL_UNROLL
    for (int k = 0; k < N; ++k) {
      sums[k] += x[k] * x[k];
      largest = vmax(fabsf(x[k]), largest);  // NaN is left out: it is in the sum
    }
  };
  int i = begin;
  DL_LOOPED
  for (; i + (U - 1) * kStride < count; i += U * kStride) {
    Pack<T, N> packs[U];
    DL_UNROLL
    for (int u = 0; u < U; ++u) packs[u] = load_pack<N, Use::kAgain>(grad + i + u * kStride);
    DL_UNROLL
    for (int u = 0; u < U; ++u) add(to_floats(packs[u]));
  }
  DL_LOOPED
  for (; i < count; i += kStride) add(load<N, Use::kAgain>(grad + i));
  double total = 0.0;
  if (largest < 0x1p40f && (largest >= 0x1p-40f || largest == 0.0f)) {
    DL_UNROLL
    for (int k = 0; k < N; ++k) total += static_cast<double>(sums[k]);
  } else {
    DL_LOOPED
    for (i = begin; i < count; i += kStride) {
      const Floats<N> x = load<N, Use::kAgain>(grad + i);
      DL_UNROLL
      for (int k = 0; k < N; ++k) total += static_cast<double>(x[k]) * static_cast<double>(x[k]);
    }
  }
  return total;
}

// Of one unit: packs where the gradient lies at a multiple of 16 bytes, single elements for the rest.
template <class T>
DL_DEVICE double squares_of_unit(const void* gradient, int64_t begin, int count) {
  const T* grad = static_cast<const T*>(gradient) + begin;
  const int whole = reinterpret_cast<uintptr_t>(gradient) % kPackBytes == 0 ? count / kPack<T> * kPack<T> : 0;
  double total = squares_of<T, kPack<T>>(grad, whole);
  if (whole < count) total += squares_of<T, 1>(grad + whole, count - whole);
  return total;
}

// Math      squares[s] = sum of g^2 over the gradients of norm set s, in double from the partial sums of threads on.
// Traffic   read each gradient once, to be found again in L2 by the step; twice where its magnitude is below 2^-40 or
//           from 2^40 on.
// Grid      as many blocks as run at a time, each takes every gridDim.x-th unit; the last one adds up.
// Requires  dense gradients, items of a norm set side by side.
// Result    bitwise reproducible: partial sums by unit, added in a fixed order. Not finite where a gradient is not.
template <int kBytes>
DL_KERNEL(kStepThreads, kSquaresBlocks)
gradient_squares_kernel(DL_CONSTANT Argument<SquaresHeader, kBytes> a) {
  SquaresShared& shared = *shared_memory<SquaresShared>();
  const SquaresHeader& h = a.header;
  wait_for_previous_kernel();
  allow_next_kernel();
  const void* const* grads = h.grads != nullptr ? h.grads : reinterpret_cast<const void* const*>(a.inlined);
  int turn = 0;
  for (int unit = static_cast<int>(blockIdx.x); unit < h.table.units; unit += static_cast<int>(gridDim.x)) {
    const int at = find_item(h.table, unit);
    const StepTensor& t = h.table.items[at];
    const int64_t begin = static_cast<int64_t>(unit - h.table.first_unit[at]) * h.table.length;
    const int64_t left = t.numel - begin;
    const int count = left < h.table.length ? static_cast<int>(left) : h.table.length;
    const void* grad = grads[at];
    double total = 0.0;
    if (grad == nullptr) total = 0.0;
    else if (t.dtype == Float::kFloat16) total = squares_of_unit<float16>(grad, begin, count);
    else if (t.dtype == Float::kBFloat16) total = squares_of_unit<bfloat16>(grad, begin, count);
    else total = squares_of_unit<float>(grad, begin, count);
    total = block_sum(total, shared.sums[turn]);
    turn ^= 1;
    if (threadIdx.x == 0) store_integer(h.partial + unit, total);
  }
  if (!last_block(h.ticket, gridDim.x, shared.last)) return;
  for (int set = 0; set < h.sets; ++set) {
    double total = 0.0;
    const int begin = set < h.known ? h.set_begin[set] : 0, end = set < h.known ? h.set_begin[set + 1] : 0;
    for (int unit = begin + static_cast<int>(threadIdx.x); unit < end; unit += kStepThreads)
      total += load_integer<Use::kAgain>(h.partial + unit);
    total = block_sum(total, shared.sums[turn]);
    turn ^= 1;
    if (threadIdx.x == 0) store_integer(h.squares + set, total);
  }
}

struct Words {
  uint64_t* to;
  int count;
};

// Math      to[i] = word i.
// Traffic   write 8 bytes a word.
// Grid      one block.
// Requires  nothing.
// Result    a copy.
template <int kBytes>
DL_KERNEL(kStepThreads, 1)
write_words_kernel(DL_CONSTANT Argument<Words, kBytes> a) {
  const uint64_t* words = reinterpret_cast<const uint64_t*>(a.inlined);
  for (int i = static_cast<int>(threadIdx.x); i < a.header.count; i += kStepThreads)
    store_integer(a.header.to + i, words[i]);
}

}  // namespace

void launch_gradient_squares(const Queue& queue, const SquaresHeader& header, const void* inlined, int bytes) {
  const LaunchShape shape = step_shape(header.table.units, sizeof(SquaresShared), *queue.machine, kSquaresBlocks);
  with_argument(header, inlined, bytes, [&](const auto& argument) {
    launch(queue, shape, gradient_squares_kernel<sizeof(argument)>, argument);
  });
}

void launch_write_table(const Queue& queue, void* to, const void* from, int64_t words, int argument_bytes) {
  const int64_t most = room_in<Words>(argument_bytes) / 8;
  for (int64_t at = 0; at < words; at += most) {
    const int count = static_cast<int>(std::min(most, words - at));
    const Words header = {static_cast<uint64_t*>(to) + at, count};
    with_argument(header, static_cast<const uint64_t*>(from) + at, 8 * count, [&](const auto& argument) {
      launch(queue, {1, kStepThreads}, write_words_kernel<sizeof(argument)>, argument);
    });
  }
}

}  // namespace dlkernels
