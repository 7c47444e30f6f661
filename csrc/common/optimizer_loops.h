// What the loops of the optimizers share: torch-free, once per instruction set.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../math/philox.h"
#include "loops.h"
#include "optimizer.h"
#include "prefetch.h"

namespace dlkernels {
inline namespace CPU_CAPABILITY {

// f of the storage types of a parameter and of its slots.
template <class F>
void with_types(const StepTensor& t, F f) {
  switch (t.dtype) {
    case Float::kFloat64: return f(double{}, double{});
    case Float::kFloat16:
      if (t.slot_dtype == Float::kFloat32) return f(float16{}, float{});
      if (t.slot_dtype == Float::kBFloat16) return f(float16{}, bfloat16{});
      return f(float16{}, float16{});
    case Float::kBFloat16:
      if (t.slot_dtype == Float::kFloat32) return f(bfloat16{}, float{});
      return f(bfloat16{}, bfloat16{});
    default:
      if (t.slot_dtype == Float::kBFloat16) return f(float{}, bfloat16{});
      return f(float{}, float{});
  }
}

// A vector of an array that is read from its beginning to its end.
template <class W, class T>
DL_INLINE typename Lanes<T>::vec load_in_turn(W w, const T* p, int64_t count) {
  prefetch_page_ahead(p);
  return load_as(w, p, count);
}

// f(whole or partial, i, count) for every vector of elements [begin, end).
template <class T, int kUnroll, class F>
DL_INLINE void for_elements(int64_t begin, int64_t end, F f) {
  constexpr int64_t w = Lanes<T>::width;
  int64_t i = begin;
  for (; i + kUnroll * w <= end; i += kUnroll * w) {
#pragma GCC unroll 4
    for (int64_t j = 0; j < kUnroll; ++j) f(Whole{}, i + j * w, w);
  }
  if constexpr (kUnroll > 1)
    for (; i + w <= end; i += w) f(Whole{}, i, w);
  if (i < end) f(Partial{}, i, end - i);
}

// The random numbers that a parameter's elements are rounded with, for the streams that are rounded so: 0 is the
// parameter, the slots follow. Without any, all elements come in one piece.
template <class T, class S>
class Randoms {
 public:
  static constexpr bool kParameter = std::is_same<T, bfloat16>::value, kSlots = std::is_same<S, bfloat16>::value;
  static constexpr bool kAny = kParameter || kSlots;
  static constexpr int64_t kStride = kPhiloxRandoms + 32;  // a vector may begin at the last number

  // `slots`: how many of them are rounded if they are bfloat16.
  DL_INLINE Randoms(const StepTensor& t, const Rounding& r, int slots)
      : tensor_(t), rounding_(r), begin_(kParameter && !t.master ? 0 : 1), end_(kSlots ? 1 + slots : 1) {
    if (!on()) return;
    for (int64_t stream = 0; stream < kStreams; ++stream)
      std::memset(bits_ + stream * kStride + kPhiloxRandoms, 0, 2 * (kStride - kPhiloxRandoms));
  }
  DL_INLINE bool on() const { return kAny && rounding_.on && begin_ < end_; }

  // Draws for elements i, i + 1, ...; returns how many of them have their numbers, `end` - i at most.
  DL_INLINE int64_t draw(int64_t i, int64_t end) {
    first_ = nullptr;
    if (!on()) return end - i;
    const int64_t column = i % tensor_.period;
    const int64_t element = i / tensor_.period * tensor_.full_period + tensor_.offset + column;
    const int64_t skipped = element % kRandomsPerBlock;
    for (int stream = begin_; stream < end_; ++stream)
      philox(rounding_.seed, static_cast<uint64_t>(element / kRandomsPerBlock) + (static_cast<uint64_t>(stream) << 56),
             static_cast<uint32_t>(tensor_.index), static_cast<uint32_t>(rounding_.step), bits_ + stream * kStride);
    first_ = bits_ + skipped;
    const int64_t row = tensor_.period - column, block = kPhiloxRandoms - skipped;
    const int64_t count = row < block ? row : block;
    return end - i < count ? end - i : count;
  }
  // The numbers of the element j behind the first one drawn, or nullptr where a stream is rounded to nearest.
  DL_INLINE const uint16_t* parameter(int64_t j) const {
    return kParameter && first_ && begin_ == 0 ? first_ + j : nullptr;
  }
  DL_INLINE const uint16_t* slot(int k, int64_t j) const {
    return kSlots && first_ ? first_ + (k + 1) * kStride + j : nullptr;
  }

 private:
  static constexpr int64_t kStreams = kSlots ? 3 : 1;

  const StepTensor& tensor_;
  const Rounding& rounding_;
  const int begin_, end_;
  const uint16_t* first_ = nullptr;
  alignas(64) uint16_t bits_[kStreams * kStride];
};

// (bits + random) >> 16: up with the probability of the bits that are cut off.
DL_INLINE vhalf round_bfloat16(vfloat v, const uint16_t* random) {
  vhalf r;
  std::memcpy(&r, random, sizeof(r));
  const vuint rounded = (bit_cast<vuint>(v) + widen(r)) >> 16;
  const vuint quiet = vuint{} + 0x7fc0u;
  return narrow(v == v ? rounded : quiet);
}

// To nearest where `random` is nullptr.
template <class W, class T>
DL_INLINE void store_rounded(W w, T* p, typename Lanes<T>::vec v, int64_t count, const uint16_t* random) {
  if constexpr (std::is_same<T, bfloat16>::value) {
    if (random) {
      const vhalf h = round_bfloat16(v, random);
      if constexpr (W::value) return static_cast<void>(std::memcpy(p, &h, sizeof(h)));
      for (int64_t i = 0; i < count; ++i) p[i].bits = h[i];
      return;
    }
  }
  store_as(w, p, v, count);
}

// A parameter with what may accompany it: a master copy, a moving average. A plain one has neither.
template <class T, bool kPlain>
struct Parameter {
  using A = typename Lanes<T>::scalar;
  using V = typename Lanes<T>::vec;
  T* param;
  A *master, *average;
  V average_gain;

  DL_INLINE Parameter(const StepTensor& t, double average_decay)
      : param(static_cast<T*>(t.param)),
        master(static_cast<A*>(t.master)),
        average(static_cast<A*>(t.average)),
        average_gain(splat<V>(1 - average_decay)) {}

  template <class W>
  DL_INLINE V read(W w, int64_t i, int64_t count) const {
    if (!kPlain && master) return load_in_turn(w, master + i, count);
    return load_in_turn(w, param + i, count);
  }
  template <class W>
  DL_INLINE void write(W w, int64_t i, V theta, int64_t count, const uint16_t* random) const {
    if constexpr (kPlain) return store_as(w, param + i, theta, count);
    store_rounded(w, param + i, theta, count, random);
    if (master) store_as(w, master + i, theta, count);
    if (average) {
      const V stored = master ? theta : load_as(w, param + i, count), mean = load_in_turn(w, average + i, count);
      store_as(w, average + i, mean + average_gain * (stored - mean), count);
    }
  }
};

}  // namespace CPU_CAPABILITY
}  // namespace dlkernels
