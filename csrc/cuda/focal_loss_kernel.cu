// Sigmoid focal loss on GPUs: losses, their sum and their gradients from one read of the logits.
#include "focal_loss_kernel.h"

#include <algorithm>
#include <type_traits>

#include "../common/cuda_dtype.h"
#include "../common/cuda_reduce.h"
#include "../math/focal_loss.h"
#include "focal_loss_elements.h"

namespace dlkernels {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerMultiprocessor = 4;
constexpr int kBackwardBlocksPerMultiprocessor = 3;  // with registers for the gradients of the losses
// Packs of a thread that are on their way at a time. One of half precision has the elements, and the work, of two.
template <class T>
constexpr int kUnroll = sizeof(T) == 2 ? 1 : 2;
constexpr int kStep = 4;  // elements of a pack that are in the making at a time

enum class Targets { kOwn, kFloat32, kLabels, kClasses };
enum class Makes { kLosses, kSumAndGrads, kGrads };  // kLosses: each, or their sum

struct Shared {
  BlockSums<float, 1> sums;
  BlockSums<int64_t, 1> counts;
  bool last;
};

template <class I>
DL_DEVICE int64_t count_ignored(const I* labels, int64_t count, int64_t ignore_index) {
  int n = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads)
    n += static_cast<int64_t>(load_integer(labels + i)) == ignore_index;
  return n;
}

// Loss and gradient of an element, weighted; the gradient times `factor`.
template <Gamma G, Exp E>
struct Weighted {
  const float alpha_1, alpha_0, gamma, grad_1, grad_0;

  DL_DEVICE Weighted(const SigmoidFocalArgs& a, float factor)
      : alpha_1(a.alpha_1),
        alpha_0(a.alpha_0),
        gamma(a.gamma),
        grad_1(a.alpha_1 * factor),
        grad_0(a.alpha_0 * factor) {}

  DL_DEVICE LossAndGrad<float> hard(float x, bool positive) const {
    const auto out = sigmoid_focal_hard<G, E>(positive ? -x : x, gamma);
    return {out.loss * (positive ? alpha_1 : alpha_0), out.grad * (positive ? -grad_1 : grad_0)};
  }
  DL_DEVICE LossAndGrad<float> soft(float x, float y) const {
    const auto out = sigmoid_focal_soft<G, E>(x, y, gamma);
    const float not_y = 1.0f - y;
    return {out.loss * fmaf(alpha_1, y, alpha_0 * not_y), out.grad * fmaf(grad_1, y, grad_0 * not_y)};
  }
};

// Math      u = -s x, q = sigmoid(u), ce = softplus(u): loss = a_t q^g ce, dx = -s a_t q^g (g (1 - q) ce + q); the
//           general formula in packs where a floating target is neither 0 nor 1. math/focal_loss.h.
// Traffic   per element: read x and the target, write the loss and / or dx, read the gradient of the loss in the
//           backward pass; class indices are read once per pack, and once more by each block for kCountHere.
// Grid      blocks of the shape and machine, sigmoid_focal_grid(); a thread owns packs of 16 bytes of x, a grid apart;
//           the first threads own what is left over.
// Requires  contiguous tensors; packs = numel / N, below 2^31; aligned: all tensors are multiples of 16 bytes, else
//           they are read one element at a time.
// Result    bitwise reproducible: fixed trees in threads and blocks, blocks summed in order by the last one to end.
template <class T, Targets K, Gamma G, Makes M>
DL_KERNEL(kThreads, (M == Makes::kGrads ? kBackwardBlocksPerMultiprocessor : kBlocksPerMultiprocessor))
sigmoid_focal_loss_kernel(const SigmoidFocalArgs a, const unsigned packs, const bool aligned) {
  constexpr int N = kPack<T>;
  constexpr Exp E = sizeof(T) == 2 ? Exp::kShort : Exp::kFull;
  using TT = std::conditional_t<K == Targets::kFloat32, float, T>;
  constexpr int U = kUnroll<T>;
  constexpr bool kIntegers = K == Targets::kLabels || K == Targets::kClasses;
  Shared& shared = *shared_memory<Shared>();
  wait_for_previous_kernel();

  float factor = 1.0f;
  if constexpr (M == Makes::kGrads) {
    if (a.grad_one != nullptr) factor = load_one(a.grad_one);
  } else {
    float divisor = a.known;
    if (a.divisor_from == Divisor::kRead) divisor = load_one<Use::kAgain>(a.normalizer);
    if constexpr (kIntegers && M == Makes::kSumAndGrads) {
      if (a.divisor_from == Divisor::kCountHere) {
        int64_t n = 0;
        with_label_type(a.target, a.label_bytes, [&](auto t) { n = count_ignored(t, a.labels, a.ignore_index); });
        divisor = static_cast<float>((a.labels - block_sum(n, shared.counts)) * (a.numel / a.labels));
      }
    }
    const bool publish = a.divisor_from != Divisor::kCountAlong && a.divisor != a.normalizer;
    if (publish && blockIdx.x == 0 && threadIdx.x == 0) store_one<Use::kAgain>(a.divisor, divisor);
    if (a.fold) factor = 1.0f / divisor;
  }

  const T* x = static_cast<const T*>(a.x);
  const TT* t = static_cast<const TT*>(a.target);
  const Weighted<G, E> weighted(a, factor);
  const unsigned stride = gridDim.x * kThreads, first = blockIdx.x * kThreads + threadIdx.x;
  float total = 0.0f;
  int left_out = 0;
  // What is left over is less than a pack.
  const int64_t at = int64_t{packs} * N + first;
  if (at < a.numel) {
    unsigned bits = 0;
    float y = 0.0f;
    if constexpr (K == Targets::kLabels)
      with_label_type(a.target, a.label_bytes,
                      [&](auto labels) { bits = label_bits(load_integer(labels + at), 0, a.ignore_index); });
    if constexpr (K == Targets::kClasses) {
      const RowPlace place = {at / a.classes, static_cast<int>(at % a.classes)};
      bits = class_bits(a, place, 1, read_class(a, place.row));
    }
    if constexpr (kIntegers) y = is_positive(bits, 0) ? 1.0f : 0.0f;
    else y = load_one<Use::kOnce>(t + at);
    left_out += count_left_out(bits);
    LossAndGrad<float> out = weighted.soft(load_one<Use::kOnce>(x + at), y);
    out.loss = judged(out.loss, bits, 0);
    if (a.loss != nullptr) store_one(a.loss + at, out.loss);
    else total += out.loss;
    if (M == Makes::kGrads && a.grad_each != nullptr) out.grad *= load_one<Use::kOnce>(a.grad_each + at);
    if constexpr (M != Makes::kLosses) store_one(static_cast<T*>(a.dx) + at, judged(out.grad, bits, 0));
  }

  RowPlace row{}, row_stride{};
  if constexpr (K == Targets::kClasses) {
    row = {int64_t{first} * N / a.classes, static_cast<int>(int64_t{first} * N % a.classes)};
    row_stride = {int64_t{stride} * N / a.classes, static_cast<int>(int64_t{stride} * N % a.classes)};
  }

  for (unsigned p = first; p < packs; p += U * stride) {
    Elements<T, N> x_of[U];
    [[maybe_unused]] Elements<TT, N> t_of[U];
    [[maybe_unused]] Elements<float, N> g_of[U];
    RowPlace rows[U];
    int of_row[U];
    DL_UNROLL
    for (int u = 0; u < U; ++u) {
      const unsigned own = p + u * stride;
      rows[u] = row;
      if constexpr (K == Targets::kClasses) {
        row.row += row_stride.row;
        row.first += row_stride.first;
        if (row.first >= a.classes) ++row.row, row.first -= a.classes;
      }
      if (own >= packs) continue;
      x_of[u] = read<N>(x + int64_t{own} * N, aligned);
      if constexpr (!kIntegers) t_of[u] = read<N>(t + int64_t{own} * N, aligned);
      if (M == Makes::kGrads && a.grad_each != nullptr) g_of[u] = read<N>(a.grad_each + int64_t{own} * N, aligned);
      if constexpr (K == Targets::kClasses) of_row[u] = read_class(a, rows[u].row);
    }

    DL_UNROLL
    for (int u = 0; u < U; ++u) {
      if (p + u * stride >= packs) continue;
      const int64_t at = int64_t{p + u * stride} * N;
      unsigned bits = 0;
      if constexpr (K == Targets::kLabels)
        with_label_type(a.target, a.label_bytes,
                        [&](auto labels) { bits = read_labels<N>(labels + at, aligned, a.ignore_index); });
      if constexpr (K == Targets::kClasses) bits = class_bits(a, rows[u], N, of_row[u]);
      if constexpr (kIntegers) left_out += count_left_out(bits);

      // term(i): loss and gradient of element i; judge: some labels are not 0 or 1.
      const auto pack = [&](auto judge, auto term) {
        constexpr bool kJudge = decltype(judge)::value;
        [[maybe_unused]] Elements<T, N> dx_of;
        DL_UNROLL
        for (int begin = 0; begin < N; begin += kStep) {
          Floats<kStep> losses, grads;
          DL_UNROLL
          for (int i = 0; i < kStep; ++i) {
            const LossAndGrad<float> out = term(begin + i);
            losses[i] = kJudge ? judged(out.loss, bits, begin + i) : out.loss;
            grads[i] = out.grad;
          }
          if (M == Makes::kLosses && a.loss != nullptr) {
            Elements<float, kStep> values;
            put(values, 0, losses);
            write(a.loss + at + begin, aligned, values);
          } else {
            total += (losses[0] + losses[1]) + (losses[2] + losses[3]);
          }
          if (M == Makes::kGrads && a.grad_each != nullptr) {
            DL_UNROLL
            for (int i = 0; i < kStep; ++i) grads[i] *= g_of[u][begin + i];
          }
          if constexpr (kJudge) {
            DL_UNROLL
            for (int i = 0; i < kStep; ++i) grads[i] = judged(grads[i], bits, begin + i);
          }
          put(dx_of, begin, grads);
        }
        if constexpr (M != Makes::kLosses) write(static_cast<T*>(a.dx) + at, aligned, dx_of);
      };
      const auto logit = [&](int i) { return to_float(x_of[u][i]); };
      if constexpr (kIntegers) {
        const auto term = [&](int i) { return weighted.hard(logit(i), is_positive(bits, i)); };
        if (bits <= kHard) pack(std::false_type{}, term);
        else pack(std::true_type{}, term);
      } else if (all_hard(t_of[u])) {
        pack(std::false_type{}, [&](int i) { return weighted.hard(logit(i), is_one(t_of[u], i)); });
      } else {
        pack(std::false_type{}, [&](int i) { return weighted.soft(logit(i), to_float(t_of[u][i])); });
      }
    }
  }

  if (M == Makes::kGrads || a.total == nullptr) return;
  const bool counts = kIntegers && a.divisor_from == Divisor::kCountAlong;
  total = block_sum(total, shared.sums);
  int64_t ignored = counts ? block_sum(int64_t{left_out}, shared.counts) : 0;
  if (gridDim.x > 1) {
    if (threadIdx.x == 0) {
      store_one<Use::kAgain>(a.partial + blockIdx.x, total);
      if (counts) store_integer(a.left_out + blockIdx.x, ignored);
    }
    if (!last_block(a.counter, gridDim.x, shared.last)) return;
    total = 0.0f;
    ignored = 0;
    for (unsigned i = threadIdx.x; i < gridDim.x; i += kThreads) {
      total += load_one<Use::kAgain>(a.partial + i);
      if (counts) ignored += load_integer<Use::kAgain>(a.left_out + i);
    }
    total = block_sum(total, shared.sums);
    if (counts) ignored = block_sum(ignored, shared.counts);
  }
  if (threadIdx.x != 0) return;
  if (counts) store_one<Use::kAgain>(a.divisor, static_cast<float>(a.numel - ignored));
  store_one(a.total, total / load_one<Use::kAgain>(a.divisor));
}

// Math      divisor = (count - labels equal to ignore_index) * per_label.
// Traffic   read the labels once.
// Grid      count_labels_grid(); a thread owns packs of 16 bytes, a grid apart.
// Requires  contiguous labels; aligned: a multiple of 16 bytes, else one at a time.
// Result    exact.
template <class I>
DL_KERNEL(kThreads, kBlocksPerMultiprocessor)
count_labels_kernel(const CountLabelsArgs a, const bool aligned) {
  constexpr int N = kPack<I>, U = 2;
  Shared& shared = *shared_memory<Shared>();
  const I* labels = static_cast<const I*>(a.labels);
  const int64_t stride = int64_t{gridDim.x} * kThreads * N;
  int64_t left_out = 0;
  for (int64_t at = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * N; at < a.count; at += U * stride) {
    Elements<I, N> of[U];
    DL_UNROLL
    for (int u = 0; u < U; ++u)
      if (at + u * stride + N <= a.count) of[u] = read<N, Use::kAgain>(labels + at + u * stride, aligned);
    DL_UNROLL
    for (int u = 0; u < U; ++u) {
      const int64_t own = at + u * stride;
      if (own + N <= a.count) {
        DL_UNROLL
        for (int i = 0; i < N; ++i) left_out += static_cast<int64_t>(of[u][i]) == a.ignore_index;
      } else {
        for (int64_t i = own; i < a.count; ++i)
          left_out += static_cast<int64_t>(load_integer(labels + i)) == a.ignore_index;
      }
    }
  }
  allow_next_kernel();
  left_out = block_sum(left_out, shared.counts);
  if (gridDim.x > 1) {
    if (threadIdx.x == 0) store_integer(a.left_out + blockIdx.x, left_out);
    if (!last_block(a.counter, gridDim.x, shared.last)) return;
    left_out = 0;
    for (unsigned i = threadIdx.x; i < gridDim.x; i += kThreads) left_out += load_integer<Use::kAgain>(a.left_out + i);
    left_out = block_sum(left_out, shared.counts);
  }
  if (threadIdx.x == 0) store_one<Use::kAgain>(a.divisor, static_cast<float>((a.count - left_out) * a.per_label));
}

unsigned persistent_grid(const Machine& machine, int64_t packs, int blocks_per_multiprocessor) {
  const int64_t blocks = ceil_div(packs, int64_t{kThreads});
  return static_cast<unsigned>(std::min<int64_t>(blocks, int64_t{machine.multiprocessors} * blocks_per_multiprocessor));
}

}  // namespace

unsigned sigmoid_focal_grid(const Machine& machine, Float dtype, int64_t numel, bool backward) {
  return persistent_grid(machine, ceil_div(numel, 16 / size_of(dtype)),
                         backward ? kBackwardBlocksPerMultiprocessor : kBlocksPerMultiprocessor);
}
unsigned count_labels_grid(const Machine& machine, int64_t count, int label_bytes) {
  return persistent_grid(machine, ceil_div(count, int64_t{16 / label_bytes}), kBlocksPerMultiprocessor);
}

namespace {

template <class T, Targets K>
void launch_of_targets(const Queue& queue, const SigmoidFocalArgs& a) {
  const bool each = a.label_bytes == 0 || a.classes == 0;
  const bool whole = aligned(a.x, each ? a.target : nullptr) && aligned(a.loss, a.grad_each) && aligned(a.dx);
  const auto packs = static_cast<unsigned>(a.numel / kPack<T>);
  const bool backward = a.grad_each != nullptr || a.grad_one != nullptr;
  const unsigned grid = sigmoid_focal_grid(*queue.machine, a.dtype, a.numel, backward);
  const LaunchShape shape = {grid, kThreads, sizeof(Shared), 1, a.overlap};
  with_bool(a.gamma == 2.0f, [&](auto two) {
    constexpr Gamma G = decltype(two)::value ? Gamma::kTwo : Gamma::kAny;
    if (backward) launch(queue, shape, sigmoid_focal_loss_kernel<T, K, G, Makes::kGrads>, a, packs, whole);
    else if (a.dx != nullptr)
      launch(queue, shape, sigmoid_focal_loss_kernel<T, K, G, Makes::kSumAndGrads>, a, packs, whole);
    else launch(queue, shape, sigmoid_focal_loss_kernel<T, K, G, Makes::kLosses>, a, packs, whole);
  });
}

}  // namespace

void launch_sigmoid_focal_loss(const Queue& queue, const SigmoidFocalArgs& a) {
  with_dtype(a.dtype, [&](auto t) {
    using T = decltype(t);
    if (a.label_bytes != 0 && a.classes != 0) return launch_of_targets<T, Targets::kClasses>(queue, a);
    if (a.label_bytes != 0) return launch_of_targets<T, Targets::kLabels>(queue, a);
    if constexpr (sizeof(T) == 2)
      if (a.target_dtype == Float::kFloat32) return launch_of_targets<T, Targets::kFloat32>(queue, a);
    launch_of_targets<T, Targets::kOwn>(queue, a);
  });
}

void launch_count_labels(const Queue& queue, const CountLabelsArgs& a) {
  const bool whole = aligned(a.labels);
  const LaunchShape shape = {count_labels_grid(*queue.machine, a.count, a.label_bytes), kThreads, sizeof(Shared)};
  if (a.label_bytes == 1) launch(queue, shape, count_labels_kernel<uint8_t>, a, whole);
  else if (a.label_bytes == 4) launch(queue, shape, count_labels_kernel<int32_t>, a, whole);
  else launch(queue, shape, count_labels_kernel<int64_t>, a, whole);
}

}  // namespace dlkernels
