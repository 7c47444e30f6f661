// What the sigmoid focal loss reads: packs of logits and floating targets, and labels as bits.
#pragma once

#include <cmath>
#include <type_traits>

#include "../common/cuda_memory.h"
#include "focal_loss_kernel.h"

namespace dlkernels {

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

// The N elements at p; packs: 16 bytes at a time.
template <int N, Use U = Use::kOnce, class T>
DL_DEVICE Elements<T, N> read(const T* p, bool packs) {
  Elements<T, N> out;
  if (packs) {
    constexpr int kChunk = N < kPack<T> ? N : kPack<T>;
    DL_UNROLL
    for (int i = 0; i < N; i += kChunk) {
      const Pack<T, kChunk> pack = load_pack<kChunk, U>(p + i);
      memcpy(out.words + i * sizeof(T) / 4, pack.v, sizeof(pack));
    }
    return out;
  }
  DL_UNROLL
  for (uint32_t& word : out.words) word = 0;
  DL_UNROLL
  for (int i = 0; i < N; ++i) {
    const Pack<T, 1> one = load_pack<1, U>(p + i);
    if constexpr (sizeof(T) >= 4) {
      memcpy(out.words + i * sizeof(T) / 4, one.v, sizeof(T));
    } else {
      std::conditional_t<sizeof(T) == 2, uint16_t, uint8_t> bits;
      memcpy(&bits, one.v, sizeof(T));
      out.words[i * sizeof(T) / 4] |= uint32_t{bits} << (8 * (i * sizeof(T) % 4));
    }
  }
  return out;
}

template <class T, int N>
DL_DEVICE void write(T* p, bool packs, const Elements<T, N>& x) {
  if (packs) {
    Pack<T, N> pack;
    memcpy(pack.v, x.words, sizeof(pack));
    return store_pack<N>(p, pack);
  }
  DL_UNROLL
  for (int i = 0; i < N; ++i) store_pack<1>(p + i, Pack<T, 1>{{x[i]}});
}

// Elements begin to begin + M - 1 of x.
template <class T, int N, int M>
DL_DEVICE void put(Elements<T, N>& x, int begin, const Floats<M>& values) {
  const Pack<T, M> pack = to_pack<T>(values);
  memcpy(x.words + begin * sizeof(T) / 4, pack.v, sizeof(pack));
}

// What the labels of a pack say, in bits: kPositive << i, element i is positive (two bits: their test is one
// instruction, that of one bit is three); kLeftOut << i, it is left out; kBad << i, its label is out of range.
constexpr unsigned kPositive = 0x101, kLeftOut = 1u << 16, kBad = 1u << 24;
constexpr unsigned kHard = kLeftOut - 1;  // no bits above these: all labels are 0 or 1

DL_DEVICE bool is_positive(unsigned bits, int i) { return (bits & kPositive << i) != 0; }
DL_DEVICE int count_left_out(unsigned bits) { return __popc(bits / kLeftOut & 0xff); }

// What is left out gives 0 whatever it was multiplied by; a bad label gives NaN.
DL_DEVICE float judged(float value, unsigned bits, int i) {
  return bits & kLeftOut << i ? 0.0f : bits & kBad << i ? NAN : value;
}

// Element i of a label per element.
DL_DEVICE unsigned label_bits(int64_t label, int i, int64_t ignore_index) {
  if (label == ignore_index) return kLeftOut << i;
  return label == 1 ? kPositive << i : label != 0 ? kBad << i : 0;
}

template <int N, class I>
DL_DEVICE unsigned read_labels(const I* labels, bool packs, int64_t ignore_index) {
  unsigned bits = 0;
  if (!packs) {
    DL_LOOPED
    for (int i = 0; i < N; ++i) bits |= label_bits(load_integer<Use::kOnce>(labels + i), i, ignore_index);
    return bits;
  }
  const Elements<I, N> of = read<N>(labels, true);
  if constexpr (sizeof(I) == 1) {  // four at a time, where they are 0 or 1 and neither is left out
    uint32_t all = 0;
    DL_UNROLL
    for (int i = 0; i < N / 4; ++i) {
      all |= of.words[i];
      // The product puts bits 0, 8, 16, 24 side by side at the top, with nothing carried into them.
      bits |= ((of.words[i] & 0x01010101u) * 0x01020408u >> 24) << (4 * i);
    }
    if ((all & 0xfefefefeu) == 0 && static_cast<uint64_t>(ignore_index) > 1) return bits * kPositive;
    bits = 0;
  }
  DL_UNROLL
  for (int i = 0; i < N; ++i) bits |= label_bits(of[i], i, ignore_index);
  return bits;
}

template <class F>
DL_DEVICE void with_label_type(const void* labels, int bytes, F f) {
  if (bytes == 1) f(static_cast<const uint8_t*>(labels));
  else if (bytes == 4) f(static_cast<const int32_t*>(labels));
  else f(static_cast<const int64_t*>(labels));
}

// The class of a row: -1 for none, or one of these.
constexpr int kLeftOutRow = -2, kBadRow = -3;
DL_DEVICE int read_class(const SigmoidFocalArgs& a, int64_t row) {
  int result = 0;
  with_label_type(a.target, a.label_bytes, [&](auto labels) {
    const auto label = static_cast<int64_t>(load_integer(labels + row));
    result = static_cast<int>(label);
    if (label < -1 || label >= a.classes) result = kBadRow;
    if (label == a.ignore_index) result = kLeftOutRow;
  });
  return result;
}

// Where a pack begins among the rows of classes.
struct RowPlace {
  int64_t row;
  int first;  // the class of its first element
};

// Of n elements, with the class of the row they begin in.
DL_DEVICE unsigned class_bits(const SigmoidFocalArgs& a, const RowPlace& place, int n, int of_row) {
  const auto bits_of = [](int i, int n) {
    return static_cast<unsigned>(i) < static_cast<unsigned>(n) ? kPositive << i : 0;
  };
  if (place.first + n <= a.classes && of_row >= -1) return bits_of(of_row - place.first, n);
  unsigned bits = 0;
  int begin = 0, first = place.first;
  DL_LOOPED
  for (int64_t row = place.row + 1;; ++row) {
    const int end = begin + (n - begin < a.classes - first ? n - begin : a.classes - first);
    const unsigned these = (1u << end) - (1u << begin);
    bits |= of_row == kLeftOutRow ? these * kLeftOut
            : of_row == kBadRow   ? these * kBad
                                  : bits_of(of_row - first + begin, n) & these * kPositive;
    if (end == n) return bits;
    begin = end;
    first = 0;
    of_row = read_class(a, row);
  }
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
// Of a target that is 0 or 1: some bit is set. (A test of one bit would cost two instructions more.)
template <class TT, int N>
DL_DEVICE bool is_one(const Elements<TT, N>& t, int i) {
  constexpr int kPerWord = 4 / static_cast<int>(sizeof(TT));
  return (t.words[i / kPerWord] & (kPerWord == 1 ? ~0u : 0xffffu << (i % kPerWord * 16))) != 0;
}

}  // namespace dlkernels
