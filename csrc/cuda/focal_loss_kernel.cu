// Sigmoid focal loss on GPUs: losses, their sum and their gradients from one read of the logits.
#include "focal_loss_kernel.h"

#include <algorithm>
#include <type_traits>

#include "../common/cuda_dtype.h"
#include "../common/cuda_reduce.h"
#include "../math/focal_loss.h"

namespace dlkernels {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerMultiprocessor = 4;
constexpr int kUnroll =
    2;                    // packs of a thread that are on their way at a time; 1 beside twice as many bytes of targets
constexpr int kStep = 4;  // elements of a pack that are in the making at a time

// Elements and labels in memory --------------------------------------------------------------------------------------

// N elements as they lie in memory, in words: a choice between two of them is one of words, not of elements.
template <class T, int N>
struct Elements {
  static constexpr int kSize = static_cast<int>(sizeof(T)), kWords = N * kSize / 4;
  uint32_t words[kWords];

  DL_DEVICE T operator[](int i) const {
    if constexpr (kSize == 8) return static_cast<T>(words[2 * i] | static_cast<uint64_t>(words[2 * i + 1]) << 32);
    if constexpr (kSize == 4) return bit_cast<T>(words[i]);
    if constexpr (kSize == 2) return bit_cast<T>(static_cast<uint16_t>(words[i / 2] >> (16 * (i % 2))));
    if constexpr (kSize == 1) return static_cast<T>(words[i / 4] >> (8 * (i % 4)));
  }
};

// The pack of a thread: elements `at` to `at + n - 1`; whole: all N, and 16 bytes at a time.
struct Place {
  int64_t at;
  int n;
  bool whole;
};

template <int N, Use U = Use::kOnce, class T>
DL_DEVICE Elements<T, N> read(const T* p, const Place& place) {
  Elements<T, N> out;
  if (place.whole) {
    constexpr int kChunk = N < kPack<T> ? N : kPack<T>;
    DL_UNROLL
    for (int i = 0; i < N; i += kChunk) {
      const Pack<T, kChunk> pack = load_pack<kChunk, U>(p + place.at + i);
      memcpy(out.words + i * sizeof(T) / 4, pack.v, sizeof(pack));
    }
  } else {
    DL_UNROLL
    for (uint32_t& word : out.words) word = 0;
    DL_UNROLL
    for (int i = 0; i < N; ++i) {
      if (i >= place.n) continue;
      const Pack<T, 1> one = load_pack<1, U>(p + place.at + i);
      if constexpr (sizeof(T) >= 4) {
        memcpy(out.words + i * sizeof(T) / 4, one.v, sizeof(T));
      } else {
        std::conditional_t<sizeof(T) == 2, uint16_t, uint8_t> bits;
        memcpy(&bits, one.v, sizeof(T));
        out.words[i * sizeof(T) / 4] |= uint32_t{bits} << (8 * (i * sizeof(T) % 4));
      }
    }
  }
  return out;
}

template <class T, int N>
DL_DEVICE void write(T* p, const Place& place, const Elements<T, N>& x) {
  if (place.whole) {
    Pack<T, N> pack;
    memcpy(pack.v, x.words, sizeof(pack));
    return store_pack<N>(p + place.at, pack);
  }
  DL_UNROLL
  for (int i = 0; i < N; ++i)
    if (i < place.n) store_pack<1>(p + place.at + i, Pack<T, 1>{{x[i]}});
}

// Elements begin to begin + M - 1 of x.
template <class T, int N, int M>
DL_DEVICE void put(Elements<T, N>& x, int begin, const Floats<M>& values) {
  const Pack<T, M> pack = to_pack<T>(values);
  memcpy(x.words + begin * sizeof(T) / 4, pack.v, sizeof(pack));
}

// What the labels of a pack say, in bits: which elements are positive; which are left out; which have a bad label.
constexpr int kLeftOut = 8, kBad = 16;
constexpr unsigned kOfOne = 0xff;  // the bits that say one thing

DL_DEVICE int less(int a, int b) { return a < b ? a : b; }
DL_DEVICE unsigned first_bits(int n) { return (1u << n) - 1; }

// Element i of a label per element.
DL_DEVICE unsigned label_bits(int64_t label, int i, int64_t ignore_index) {
  if (label == ignore_index) return 1u << (kLeftOut + i);
  return label == 1 ? 1u << i : label != 0 ? 1u << (kBad + i) : 0;
}

template <int N, class I>
DL_DEVICE unsigned read_labels(const I* labels, const Place& place, int64_t ignore_index) {
  unsigned bits = 0;
  if (!place.whole) {
    DL_LOOPED
    for (int i = 0; i < place.n; ++i)
      bits |= label_bits(load_integer<Use::kOnce>(labels + place.at + i), i, ignore_index);
    return bits;
  }
  const Elements<I, N> of = read<N>(labels, place);
  if constexpr (sizeof(I) == 1) {  // four at a time, where they are 0 or 1 and neither is left out
    uint32_t all = 0;
    DL_UNROLL
    for (int i = 0; i < N / 4; ++i) {
      all |= of.words[i];
      // The product puts bits 0, 8, 16, 24 side by side at the top, with nothing carried into them.
      bits |= ((of.words[i] & 0x01010101u) * 0x01020408u >> 24) << (4 * i);
    }
    if ((all & 0xfefefefeu) == 0 && static_cast<uint64_t>(ignore_index) > 1) return bits;
    bits = 0;
  }
  DL_UNROLL
  for (int i = 0; i < N; ++i) bits |= label_bits(of[i], i, ignore_index);
  return bits;
}

// Elements begin to end - 1 of a pack, where element i is class i + shift of a row with this label.
DL_DEVICE unsigned class_bits(int64_t label, int begin, int end, int shift, const SigmoidFocalArgs& a) {
  const unsigned these = first_bits(end) & ~first_bits(begin);
  if (label == a.ignore_index) return these << kLeftOut;
  if (label < -1 || label >= a.classes) return these << kBad;
  const int i = static_cast<int>(label) - shift;
  return i >= begin && i < end ? 1u << i : 0;
}

// Where a pack begins among the rows of classes.
struct RowPlace {
  int64_t row;
  int first;  // the class of its first element
};

template <class F>
DL_DEVICE void with_label_type(const void* labels, int bytes, F f) {
  if (bytes == 1) f(static_cast<const uint8_t*>(labels));
  else if (bytes == 4) f(static_cast<const int32_t*>(labels));
  else f(static_cast<const int64_t*>(labels));
}

DL_DEVICE int64_t read_class(const SigmoidFocalArgs& a, int64_t row) {
  int64_t label = 0;
  with_label_type(a.target, a.label_bytes, [&](auto t) { label = load_integer(t + row); });
  return label;
}

// Of a pack of n elements, with the label of the row it begins in.
DL_DEVICE unsigned class_bits(const SigmoidFocalArgs& a, const RowPlace& place, int n, int64_t label) {
  int begin = less(n, a.classes - place.first);
  unsigned bits = class_bits(label, 0, begin, place.first, a);
  DL_LOOPED
  for (int64_t row = place.row + 1; begin < n; ++row) {
    const int end = begin + less(n - begin, a.classes);
    bits |= class_bits(read_class(a, row), begin, end, -begin, a);
    begin = end;
  }
  return bits;
}

// Floating targets: 1 has the bits kLow * kFactor, kLow being the lowest of them; twice in a word for half precision.
template <class TT>
struct BitsOfOne {
  static constexpr uint32_t kLow = 0x00800080u, kFactor = 127;
};
template <>
struct BitsOfOne<float16> {
  static constexpr uint32_t kLow = 0x04000400u, kFactor = 15;
};
template <>
struct BitsOfOne<float> {
  static constexpr uint32_t kLow = 0x00800000u, kFactor = 127;
};

// Whether each of the targets is 0 or 1.
template <class TT, int N>
DL_DEVICE bool all_hard(const Elements<TT, N>& t) {
  uint32_t rest = 0;
  DL_UNROLL
  for (const uint32_t word : t.words) rest |= word ^ (word & BitsOfOne<TT>::kLow) * BitsOfOne<TT>::kFactor;
  return rest == 0;
}
// Of a target that is 0 or 1.
template <class TT, int N>
DL_DEVICE bool is_one(const Elements<TT, N>& t, int i) {
  constexpr int kPerWord = 4 / static_cast<int>(sizeof(TT));
  return (t.words[i / kPerWord] & BitsOfOne<TT>::kLow & (kPerWord == 1 ? ~0u : 0xffffu << (i % kPerWord * 16))) != 0;
}

// Sigmoid -------------------------------------------------------------------------------------------------------------

enum class Targets { kOwn, kFloat32, kLabels, kClasses };

struct Shared {
  BlockSums<float, 1> sums;
  BlockSums<int64_t, 1> counts;
  bool last;
};

template <class I>
DL_DEVICE int64_t count_left_out(const I* labels, int64_t count, int64_t ignore_index) {
  int n = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads)
    n += static_cast<int64_t>(load_integer(labels + i)) == ignore_index;
  return n;
}

// Math      u = -s x, q = sigmoid(u), ce = softplus(u): loss = a_t q^g ce, dx = -s a_t q^g (g (1 - q) ce + q); the
//           general formula in packs where a floating target is neither 0 nor 1. math/focal_loss.h.
// Traffic   per element: read x and the target, write the loss and / or dx, read the gradient of the loss in the
//           backward pass; class indices are read once per pack, and once more by each block for kCountHere.
// Grid      blocks of the shape and machine, sigmoid_focal_grid(); a thread owns packs of 16 bytes of x, a grid apart.
// Requires  contiguous tensors; packs: all of them multiples of 16 bytes, else one element at a time.
// Result    bitwise reproducible: fixed trees in threads and blocks, blocks summed in order by the last one to end.
template <class T, Targets K, Gamma G, bool kGrad>
DL_KERNEL(kThreads, kBlocksPerMultiprocessor)
sigmoid_focal_loss_kernel(const SigmoidFocalArgs a, const bool packs) {
  constexpr int N = kPack<T>;
  constexpr Exp E = sizeof(T) == 2 ? Exp::kShort : Exp::kFull;
  using TT = std::conditional_t<K == Targets::kFloat32, float, T>;
  constexpr int U = K == Targets::kFloat32 ? 1 : kUnroll;
  constexpr bool kIntegers = K == Targets::kLabels || K == Targets::kClasses;
  Shared& shared = *shared_memory<Shared>();
  wait_for_previous_kernel();

  float divisor = a.known;
  if (a.divisor_from == Divisor::kRead) divisor = load_one<Use::kAgain>(a.normalizer);
  if constexpr (kIntegers) {
    if (a.divisor_from == Divisor::kCountHere) {
      int64_t n = 0;
      with_label_type(a.target, a.label_bytes, [&](auto t) { n = count_left_out(t, a.labels, a.ignore_index); });
      divisor = static_cast<float>((a.labels - block_sum(n, shared.counts)) * (a.numel / a.labels));
    }
  }
  float factor = 1.0f;
  if (kGrad && a.grad != nullptr && !a.grad_each) factor = load_one(a.grad);
  if (kGrad && a.fold) factor = 1.0f / divisor;

  const bool publish = a.divisor_from != Divisor::kCountAlong && a.divisor != a.normalizer;
  if (publish && blockIdx.x == 0 && threadIdx.x == 0) store_one<Use::kAgain>(a.divisor, divisor);

  const T* x = static_cast<const T*>(a.x);
  T* dx = static_cast<T*>(a.dx);
  const int64_t stride = int64_t{gridDim.x} * kThreads * N;
  int64_t at = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * N;
  RowPlace row{}, row_stride{};
  if constexpr (K == Targets::kClasses) {
    row = {at / a.classes, static_cast<int>(at % a.classes)};
    row_stride = {stride / a.classes, static_cast<int>(stride % a.classes)};
  }
  float total = 0.0f;
  int left_out = 0;

  for (; at < a.numel; at += U * stride) {
    Place place[U];
    Elements<T, N> x_of[U];
    Elements<TT, N> t_of[U];
    RowPlace rows[U];
    int64_t labels[U];
    DL_UNROLL
    for (int u = 0; u < U; ++u) {
      const int64_t left = a.numel - (at + u * stride);
      place[u] = {at + u * stride, left >= N ? N : left > 0 ? static_cast<int>(left) : 0, packs && left >= N};
      rows[u] = row;
      if constexpr (K == Targets::kClasses) {
        row.row += row_stride.row;
        row.first += row_stride.first;
        if (row.first >= a.classes) ++row.row, row.first -= a.classes;
      }
      if (place[u].n == 0) continue;
      x_of[u] = read<N>(x, place[u]);
      if constexpr (!kIntegers) t_of[u] = read<N>(static_cast<const TT*>(a.target), place[u]);
      if constexpr (K == Targets::kClasses) labels[u] = read_class(a, rows[u].row);
    }

    DL_UNROLL
    for (int u = 0; u < U; ++u) {
      const int n = place[u].n;
      if (n == 0) continue;
      unsigned bits = 0;
      if constexpr (K == Targets::kLabels)
        with_label_type(a.target, a.label_bytes, [&](auto t) { bits = read_labels<N>(t, place[u], a.ignore_index); });
      if constexpr (K == Targets::kClasses) bits = class_bits(a, rows[u], n, labels[u]);
      if constexpr (kIntegers) left_out += __popc(bits >> kLeftOut & kOfOne);
      bits |= (first_bits(N) & ~first_bits(n)) << kLeftOut;

      bool all_are_hard = true;
      if constexpr (!kIntegers) all_are_hard = all_hard(t_of[u]);
      const auto hard = [&](int i) {
        const float logit = to_float(x_of[u][i]);
        bool positive = bits >> i & 1;
        if constexpr (!kIntegers) positive = is_one(t_of[u], i);
        const auto out = sigmoid_focal_hard<G, E>(positive ? -logit : logit, a.gamma);
        return LossAndGrad<float>{out.loss * (positive ? a.alpha_1 : a.alpha_0),
                                  out.grad * (positive ? -a.alpha_1 * factor : a.alpha_0 * factor)};
      };
      const auto soft = [&](int i) {
        const float y = to_float(t_of[u][i]), alpha_t = fmaf(a.alpha_1, y, a.alpha_0 * (1.0f - y));
        const auto out = sigmoid_focal_soft<G, E>(to_float(x_of[u][i]), y, a.gamma);
        return LossAndGrad<float>{out.loss * alpha_t, out.grad * (alpha_t * factor)};
      };
      // What is left out, or past the end, gives 0 whatever it was multiplied by; a bad label NaN.
      const auto judge = [&](Floats<kStep>& of, int begin) {
        if (bits >> kLeftOut == 0) return;
        DL_UNROLL
        for (int i = 0; i < kStep; ++i) {
          const unsigned own = bits >> (begin + i);
          of[i] = own >> kLeftOut & 1 ? 0.0f : own >> kBad & 1 ? NAN : of[i];
        }
      };

      Elements<T, N> dx_of;
      DL_UNROLL
      for (int begin = 0; begin < N; begin += kStep) {
        const Place step = {place[u].at + begin, n - begin, place[u].whole};
        Floats<kStep> losses, slopes;
        if (kIntegers || all_are_hard) {
          DL_UNROLL
          for (int i = 0; i < kStep; ++i) {
            const LossAndGrad<float> out = hard(begin + i);
            losses[i] = out.loss;
            slopes[i] = out.grad;
          }
        } else {
          DL_UNROLL
          for (int i = 0; i < kStep; ++i) {
            const LossAndGrad<float> out = soft(begin + i);
            losses[i] = out.loss;
            slopes[i] = out.grad;
          }
        }
        judge(losses, begin);
        if (a.loss != nullptr) {
          Elements<float, kStep> values;
          put(values, 0, losses);
          write(a.loss, step, values);
        } else {
          total += (losses[0] + losses[1]) + (losses[2] + losses[3]);
        }
        if constexpr (kGrad) {
          if (a.grad_each) {
            const Elements<float, kStep> g = read<kStep>(a.grad, step);
            DL_UNROLL
            for (int i = 0; i < kStep; ++i) slopes[i] *= g[i];
          }
          judge(slopes, begin);
          put(dx_of, begin, slopes);
        }
      }
      if constexpr (kGrad) write(dx, place[u], dx_of);
    }
  }

  if (a.total == nullptr) return;
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
// Requires  contiguous labels; packs: a multiple of 16 bytes, else one at a time.
// Result    exact.
template <class I>
DL_KERNEL(kThreads, kBlocksPerMultiprocessor)
count_labels_kernel(const CountLabelsArgs a, const bool packs) {
  constexpr int N = kPack<I>;
  Shared& shared = *shared_memory<Shared>();
  const I* labels = static_cast<const I*>(a.labels);
  const int64_t stride = int64_t{gridDim.x} * kThreads * N;
  int64_t left_out = 0;
  for (int64_t at = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * N; at < a.count; at += kUnroll * stride) {
    Elements<I, N> of[kUnroll];
    int n[kUnroll];
    DL_UNROLL
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t left = a.count - (at + u * stride);
      n[u] = left >= N ? N : left > 0 ? static_cast<int>(left) : 0;
      if (n[u] > 0) of[u] = read<N, Use::kAgain>(labels, {at + u * stride, n[u], packs && n[u] == N});
    }
    DL_UNROLL
    for (int u = 0; u < kUnroll; ++u) {
      DL_UNROLL
      for (int i = 0; i < N; ++i) left_out += i < n[u] && static_cast<int64_t>(of[u][i]) == a.ignore_index;
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

unsigned persistent_grid(const Machine& machine, int64_t packs) {
  const int64_t blocks = ceil_div(packs, int64_t{kThreads});
  return static_cast<unsigned>(std::min<int64_t>(blocks, int64_t{machine.multiprocessors} * kBlocksPerMultiprocessor));
}

}  // namespace

unsigned sigmoid_focal_grid(const Machine& machine, Float dtype, int64_t numel) {
  return persistent_grid(machine, ceil_div(numel, 16 / size_of(dtype)));
}
unsigned count_labels_grid(const Machine& machine, int64_t count, int label_bytes) {
  return persistent_grid(machine, ceil_div(count, int64_t{16 / label_bytes}));
}

namespace {

template <class T, Targets K>
void launch_of_targets(const Queue& queue, const SigmoidFocalArgs& a) {
  const bool each = a.label_bytes == 0 || a.classes == 0;
  const bool packs = aligned<T>(a.x, each ? a.target : nullptr) && aligned<T>(a.loss, a.grad_each ? a.grad : nullptr) &&
                     aligned<T>(a.dx);
  const LaunchShape shape = {sigmoid_focal_grid(*queue.machine, a.dtype, a.numel), kThreads, sizeof(Shared), 1,
                             a.overlap};
  with_bool(a.gamma == 2.0f, [&](auto two) {
    with_bool(a.dx != nullptr, [&](auto grad) {
      constexpr Gamma G = decltype(two)::value ? Gamma::kTwo : Gamma::kAny;
      launch(queue, shape, sigmoid_focal_loss_kernel<T, K, G, decltype(grad)::value>, a, packs);
    });
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
  const bool packs = aligned<char>(a.labels);
  const LaunchShape shape = {count_labels_grid(*queue.machine, a.count, a.label_bytes), kThreads, sizeof(Shared)};
  if (a.label_bytes == 1) launch(queue, shape, count_labels_kernel<uint8_t>, a, packs);
  else if (a.label_bytes == 4) launch(queue, shape, count_labels_kernel<int32_t>, a, packs);
  else launch(queue, shape, count_labels_kernel<int64_t>, a, packs);
}

}  // namespace dlkernels
