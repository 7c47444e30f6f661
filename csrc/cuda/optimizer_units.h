// What the kernels over tables of tensors share: finding a unit, numbers on the device, streams of elements.
#pragma once

#include <type_traits>

#include "../common/cuda_memory.h"
#include "../common/cuda_reduce.h"
#include "optimizer_kernel.h"

namespace dlkernels {

// The item that a unit belongs to, by all threads of a warp: each step looks at 32 places.
DL_DEVICE int find_item(const UnitTable& table, int unit) {
  int low = 0, span = table.count;  // it is one of items [low, low + span)
  while (span > 1) {
    const int stride = ceil_div(span, kWarp);
    const int own = lane() * stride;
    const unsigned begun = ballot(own < span && table.first_unit[low + own] <= unit);
    const int skipped = (__popc(begun) - 1) * stride;  // the first lane's item has begun
    low += skipped;
    span = stride < span - skipped ? stride : span - skipped;
  }
  return low;
}

DL_DEVICE double read(const Number& n) {
  if (n.at == nullptr) return n.value;
  switch (n.dtype) {
    case Float::kFloat64: return load_integer<Use::kAgain>(static_cast<const double*>(n.at));
    case Float::kFloat16: return load_one<Use::kAgain>(static_cast<const float16*>(n.at));
    case Float::kBFloat16: return load_one<Use::kAgain>(static_cast<const bfloat16*>(n.at));
    default: return load_one<Use::kAgain>(static_cast<const float*>(n.at));
  }
}

// Elements from one on, of a dtype known when the kernel is compiled. What is loaded stays as it lies in memory, in few
// registers, until it is computed with.
template <class T>
struct Stream {
  T* p;
  Stream() = default;
  DL_DEVICE Stream(const void* base, Float, int64_t begin)  // without a base, of no use
      : p(reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(base) + static_cast<uintptr_t>(begin) * sizeof(T))) {}
  template <int N>
  using Loaded = Pack<T, N>;
  template <int N>
  DL_DEVICE Pack<T, N> load(int i) const {
    return load_pack<N>(p + i);
  }
  template <int N>
  DL_DEVICE void store(int i, const Pack<T, N>& pack) const {
    store_pack<N>(p + i, pack);
  }
  // The part-th C elements of a pack, as numbers; and the way back.
  template <int C, int N>
  DL_DEVICE Floats<C> floats(const Pack<T, N>& pack, int part) const {
    return to_floats(bit_cast<Parts<C, N>>(pack).v[part]);
  }
  template <int C, int N>
  DL_DEVICE void put(Pack<T, N>& pack, int part, const Floats<C>& x) const {
    Parts<C, N> parts = bit_cast<Parts<C, N>>(pack);
    parts.v[part] = to_pack<T>(x);
    pack = bit_cast<Pack<T, N>>(parts);
  }
  // x as it comes back from memory.
  template <int N>
  DL_DEVICE Floats<N> stored(const Floats<N>& x) const {
    Floats<N> y;
    DL_UNROLL
    for (int i = 0; i < N; ++i) y[i] = to_float(from_float<T>(x[i]));
    return y;
  }
  DL_DEVICE static constexpr bool is_bfloat16() { return std::is_same<T, bfloat16>::value; }

 private:
  template <int C, int N>
  struct Parts {
    Pack<T, C> v[N / C];
  };
};

// The same of any dtype, one element at a time.
struct AnyStream {
  uintptr_t p;
  Float dtype;
  AnyStream() = default;
  DL_DEVICE AnyStream(const void* base, Float dtype, int64_t begin)
      : p(reinterpret_cast<uintptr_t>(base) + (static_cast<uintptr_t>(begin) << (dtype == Float::kFloat32 ? 2 : 1))),
        dtype(dtype) {}
  template <class T>
  DL_DEVICE T* at(int i) const {
    return reinterpret_cast<T*>(p) + i;
  }
  template <int N>
  using Loaded = Floats<1>;
  template <int N>
  DL_DEVICE Floats<1> load(int i) const {
    if (dtype == Float::kFloat16) return {{load_one<Use::kOnce>(at<float16>(i))}};
    if (dtype == Float::kBFloat16) return {{load_one<Use::kOnce>(at<bfloat16>(i))}};
    return {{load_one<Use::kOnce>(at<float>(i))}};
  }
  DL_DEVICE void store(int i, const Floats<1>& x) const {
    if (dtype == Float::kFloat16) return store_one(at<float16>(i), x[0]);
    if (dtype == Float::kBFloat16) return store_one(at<bfloat16>(i), x[0]);
    store_one(at<float>(i), x[0]);
  }
  template <int C>
  DL_DEVICE Floats<1> floats(const Floats<1>& x, int) const {
    return x;
  }
  DL_DEVICE void put(Floats<1>& to, int, const Floats<1>& x) const { to = x; }
  DL_DEVICE Floats<1> stored(const Floats<1>& x) const {
    if (dtype == Float::kFloat16) return {{to_float(from_float<float16>(x[0]))}};
    if (dtype == Float::kBFloat16) return {{to_float(from_float<bfloat16>(x[0]))}};
    return x;
  }
  DL_DEVICE bool is_bfloat16() const { return dtype == Float::kBFloat16; }
};

}  // namespace dlkernels
