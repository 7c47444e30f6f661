// Global memory in packs of up to 16 bytes a thread, with a word on whether the data will be wanted again; copies to
// shared memory that do not wait. Every access to a large tensor goes through here: the host twin counts its bytes.
#pragma once

#include "cuda_math.h"
#include "cuda_platform.h"

namespace dlkernels {

// What will become of the cache lines that an access touches.
enum class Use {
  kOnce,    // nobody needs them again: they leave the caches first
  kAgain,   // the second read is to come from L2; also for what other blocks of the same kernel wrote
  kShared,  // small and read by many blocks: parameters. Constant for as long as the kernel runs, from its start on:
            // such a load may come before wait_for_previous_kernel()
  kHanded   // the same, behind wait_for_previous_kernel(), of what that kernel wrote
};

constexpr int kPackBytes = 16;

// The elements of 16 bytes.
template <class T>
constexpr int kPack = kPackBytes / static_cast<int>(sizeof(T));

// N elements as they lie in memory: N * sizeof(T) is 2, 4, 8 or 16 bytes.
template <class T, int N>
struct alignas(N * sizeof(T)) Pack {
  static_assert(N * sizeof(T) <= kPackBytes, "at most 16 bytes");
  T v[N];
};

// N numbers to compute with.
template <int N>
struct Floats {
  float v[N];
  DL_DEVICE float& operator[](int i) { return v[i]; }
  DL_DEVICE const float& operator[](int i) const { return v[i]; }
};

namespace memory {

template <int kBytes>
struct Word;
template <>
struct Word<1> {
  using type = uint8_t;
};
template <>
struct Word<2> {
  using type = uint16_t;
};
template <>
struct Word<4> {
  using type = uint32_t;
};
#if defined(__CUDACC__)
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

template <Use U, class W>
DL_DEVICE W load_word(const W* p) {
  if constexpr (U == Use::kOnce) return __ldcs(p);
  if constexpr (U == Use::kShared) return __ldg(p);
  if constexpr (U == Use::kHanded) return *p;
  return __ldcg(p);  // past L1, which does not see what other multiprocessors write
}
template <Use U, class W>
DL_DEVICE void store_word(W* p, W w) {
  if constexpr (U == Use::kOnce) __stcs(p, w);
  else *p = w;
}
#else
template <>
struct Word<8> {
  using type = shim::Bytes<8>;
};
template <>
struct Word<16> {
  using type = shim::Bytes<16>;
};

template <Use U, class W>
DL_DEVICE W load_word(const W* p) {
  if constexpr (U == Use::kShared) shim::on_load_of_constant(p, sizeof(W));
  shim::on_load(p, sizeof(W));
  return *p;
}
template <Use U, class W>
DL_DEVICE void store_word(W* p, W w) {
  shim::on_store(p, sizeof(W));
  *p = w;
}
#endif

}  // namespace memory

// p is a multiple of N * sizeof(T) bytes.
template <int N, Use U = Use::kOnce, class T>
DL_DEVICE Pack<T, N> load_pack(const T* p) {
  using W = typename memory::Word<N * sizeof(T)>::type;
  return bit_cast<Pack<T, N>>(memory::load_word<U>(reinterpret_cast<const W*>(p)));
}
template <int N, Use U = Use::kOnce, class T>
DL_DEVICE void store_pack(T* p, const Pack<T, N>& pack) {
  using W = typename memory::Word<N * sizeof(T)>::type;
  memory::store_word<U>(reinterpret_cast<W*>(p), bit_cast<W>(pack));
}

template <class T, int N>
DL_DEVICE Floats<N> to_floats(const Pack<T, N>& pack) {
  Floats<N> x;
  DL_UNROLL
  for (int i = 0; i < N; ++i) x[i] = to_float(pack.v[i]);
  return x;
}
template <class T, int N>
DL_DEVICE Pack<T, N> to_pack(const Floats<N>& x) {
  Pack<T, N> pack;
  if constexpr (sizeof(T) == 2 && N % 2 == 0) {
    uint32_t words[N / 2];
    DL_UNROLL
    for (int i = 0; i < N / 2; ++i) words[i] = from_floats<T>(x[2 * i], x[2 * i + 1]);
    memcpy(&pack, words, sizeof(pack));
  } else {
    DL_UNROLL
    for (int i = 0; i < N; ++i) pack.v[i] = from_float<T>(x[i]);
  }
  return pack;
}

// A pack that stays in registers as it lies in memory: numbers made from it before are made anew, not kept.
template <class T, int N>
DL_DEVICE void keep_packed([[maybe_unused]] Pack<T, N>& pack) {
#if defined(__CUDACC__)
  if constexpr (sizeof(pack) == kPackBytes && sizeof(T) < 4) {
    uint4 w = bit_cast<uint4>(pack);
    asm volatile("" : "+r"(w.x), "+r"(w.y), "+r"(w.z), "+r"(w.w));
    pack = bit_cast<Pack<T, N>>(w);
  }
#endif
}

// A number that the compiler knows nothing about.
DL_DEVICE void opaque([[maybe_unused]] int& x) {
#if defined(__CUDACC__)
  asm volatile("" : "+r"(x));
#endif
}

// N elements as numbers; for float, N may be twice a pack.
template <int N, Use U = Use::kOnce, class T>
DL_DEVICE Floats<N> load(const T* p) {
  if constexpr (N * sizeof(T) > kPackBytes) {
    Floats<N> x;
    constexpr int kHalf = N / 2;
    const Floats<kHalf> low = load<kHalf, U>(p), high = load<kHalf, U>(p + kHalf);
    DL_UNROLL
    for (int i = 0; i < kHalf; ++i) x[i] = low[i], x[kHalf + i] = high[i];
    return x;
  } else {
    return to_floats(load_pack<N, U>(p));
  }
}
template <int N, Use U = Use::kOnce, class T>
DL_DEVICE void store(T* p, const Floats<N>& x) {
  if constexpr (N * sizeof(T) > kPackBytes) {
    constexpr int kHalf = N / 2;
    Floats<kHalf> low, high;
    DL_UNROLL
    for (int i = 0; i < kHalf; ++i) low[i] = x[i], high[i] = x[kHalf + i];
    store<kHalf, U>(p, low);
    store<kHalf, U>(p + kHalf, high);
  } else {
    store_pack<N, U>(p, to_pack<T>(x));
  }
}

// One element.
template <Use U = Use::kShared, class T>
DL_DEVICE float load_one(const T* p) {
  return load<1, U>(p)[0];
}
template <Use U = Use::kOnce, class T>
DL_DEVICE void store_one(T* p, float x) {
  store<1, U>(p, Floats<1>{{x}});
}
// An integer: a label, a counter, an index.
template <Use U = Use::kShared, class I>
DL_DEVICE I load_integer(const I* p) {
  return load_pack<1, U>(p).v[0];
}
template <Use U = Use::kAgain, class I>
DL_DEVICE void store_integer(I* p, I value) {
  store_pack<1, U>(p, Pack<I, 1>{{value}});
}

// 16 bytes from global to shared memory, without waiting (sm_80 on). Both are multiples of 16 bytes. What this thread
// has asked for is there behind copies_done(), what other threads have behind a barrier too.
DL_DEVICE void copy_16_bytes(void* shared, const void* global) {
#if defined(__CUDACC__)
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
#else
  *static_cast<uint4*>(shared) = __ldcs(static_cast<const uint4*>(global));
#endif
#else
  shim::on_load(global, 16);
  shim::copy_later(shared, global, 16);
#endif
}
// Closes a group of copies; copies_done<N>() waits until at most the N newest groups are under way.
DL_DEVICE void close_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#elif !defined(__CUDACC__)
  shim::close_copies();
#endif
}
template <int N = 0>
DL_DEVICE void copies_done() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#elif !defined(__CUDACC__)
  shim::copies_done(N);
#endif
}

}  // namespace dlkernels
