// Vectors of one instruction set, from the compiler's vector extensions: no torch headers, no intrinsics where plain
// operators do. Every file that includes this is compiled once per instruction set, with CPU_CAPABILITY naming it, and
// everything here lives in an inline namespace of that name, so that no symbol compiled for AVX-512 can be picked for a
// machine without it.
#pragma once

#if defined(__CUDACC__) || defined(DL_CUDA_HOST)

#include "cuda_math.h"  // the same names for one number, in kernels for GPUs

#else

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#ifndef CPU_CAPABILITY
#define CPU_CAPABILITY DEFAULT
#endif

#if defined(__AVX512F__)
#define DL_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define DL_VECTOR_BYTES 32
#else
#define DL_VECTOR_BYTES 16
#endif

#define DL_INLINE inline __attribute__((always_inline))
#define DL_HOST_DEVICE  // a function that kernels for GPUs call too
#define DL_IN_KERNELS   // and that on a GPU nobody else calls: what it is given may be a kernel's own lambda
// Behind the parameters of a lambda that is the body of a loop.
#define DL_BODY __attribute__((always_inline))

namespace dlkernels {
inline namespace CPU_CAPABILITY {

constexpr int kFloatLanes = DL_VECTOR_BYTES / 4;

typedef float vfloat __attribute__((vector_size(DL_VECTOR_BYTES)));
typedef int32_t vint __attribute__((vector_size(DL_VECTOR_BYTES)));
typedef uint32_t vuint __attribute__((vector_size(DL_VECTOR_BYTES)));
typedef uint16_t vhalf __attribute__((vector_size(DL_VECTOR_BYTES / 2)));

// Half-precision storage types: bits only, arithmetic happens in float.
struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// The arithmetic type of a storage type: a vector of float, or one double (float64 exists for gradient checks).
template <class T>
struct Lanes {
  using scalar = float;
  using vec = vfloat;
  static constexpr int width = kFloatLanes;
};
template <>
struct Lanes<double> {
  using scalar = double;
  using vec = double;
  static constexpr int width = 1;
};

template <class To, class From>
DL_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// ---- arithmetic on vectors and on scalars, under one set of names ---------------------------------------------------

template <class V>
DL_INLINE V splat(double value);
template <>
DL_INLINE vfloat splat<vfloat>(double value) {
  return vfloat{} + static_cast<float>(value);
}
template <>
DL_INLINE float splat<float>(double value) {
  return static_cast<float>(value);
}
template <>
DL_INLINE double splat<double>(double value) {
  return value;
}

DL_INLINE vfloat select(vint mask, vfloat a, vfloat b) { return mask ? a : b; }
DL_INLINE float select(bool mask, float a, float b) { return mask ? a : b; }
DL_INLINE double select(bool mask, double a, double b) { return mask ? a : b; }

// A NaN in the first argument stays a NaN.
template <class V>
DL_INLINE V vmax(V a, V b) {
  return select(a < b, b, a);
}
template <class V>
DL_INLINE V vmin(V a, V b) {
  return select(a > b, b, a);
}
#if defined(__AVX512F__)
// The instruction gives its second operand where either is NaN.
template <>
DL_INLINE vfloat vmax(vfloat a, vfloat b) {
  return reinterpret_cast<vfloat>(_mm512_max_ps(reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(a)));
}
template <>
DL_INLINE vfloat vmin(vfloat a, vfloat b) {
  return reinterpret_cast<vfloat>(_mm512_min_ps(reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(a)));
}
#endif

DL_INLINE vfloat vabs(vfloat x) { return bit_cast<vfloat>(bit_cast<vuint>(x) & 0x7fffffffu); }
DL_INLINE float vabs(float x) { return std::fabs(x); }
DL_INLINE double vabs(double x) { return std::fabs(x); }

DL_INLINE bool all(vint mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask(reinterpret_cast<__m512i>(mask)) == 0xffff;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(reinterpret_cast<__m256>(mask)) == 0xff;
#else
  return (mask[0] & mask[1] & mask[2] & mask[3]) != 0;
#endif
}
DL_INLINE bool all(bool mask) { return mask; }

DL_INLINE double sum(double v) { return v; }
DL_INLINE double maximum(double v) { return v; }
// Horizontal sum in a fixed tree, and maximum (a NaN may or may not survive it).
#if defined(__AVX512F__)
DL_INLINE float sum(vfloat v) { return _mm512_reduce_add_ps(reinterpret_cast<__m512>(v)); }
DL_INLINE float maximum(vfloat v) { return _mm512_reduce_max_ps(reinterpret_cast<__m512>(v)); }
#else
DL_INLINE float sum(vfloat v) {
  float a[kFloatLanes];
  std::memcpy(a, &v, sizeof(v));
  for (int half = kFloatLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) a[i] += a[i + half];
  return a[0];
}
DL_INLINE float maximum(vfloat v) {
  float a[kFloatLanes];
  std::memcpy(a, &v, sizeof(v));
  for (int half = kFloatLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) a[i] = a[i] < a[i + half] ? a[i + half] : a[i];
  return a[0];
}
#endif

// v with lane `lane` set to 0.
DL_INLINE vfloat without_lane(vfloat v, int64_t lane) {
  vint index;
  for (int i = 0; i < kFloatLanes; ++i) index[i] = i;
  return index == static_cast<int32_t>(lane) ? vfloat{} : v;
}
DL_INLINE double without_lane(double, int64_t) { return 0; }
DL_INLINE float lane(vfloat v, int64_t lane) {
  float a[kFloatLanes];
  std::memcpy(a, &v, sizeof(v));
  return a[lane];
}
DL_INLINE double lane(double v, int64_t) { return v; }

// ---- exp, log, log1p: polynomials of 1 to 2 ulp ---------------------------------------------------------------------

// e^x for x <= 0 (also right up to 88): 0 far below, where the result would not be a normal number, and NaN at NaN.
DL_INLINE vfloat vexp(vfloat x) {
  const float shifter = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer and leaves it in the low bits
#if defined(__AVX512F__)
  const vfloat clamped = vmax(x, splat<vfloat>(-150.0f));
#else
  const vfloat clamped = vmax(x, splat<vfloat>(-87.336544f));
#endif
  const vfloat shifted = clamped * 1.44269504f + shifter;
  const vfloat n = shifted - shifter;
#if defined(__FMA__)
  const vfloat r =
      clamped - n * 0.693147182f;  // one rounding: exact but for n times the 2e-9 that float leaves of log 2
#else
  const vfloat r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
#endif
  vfloat p = splat<vfloat>(8.290271614e-3f);
  p = p * r + 4.1898159867e-2f;
  p = p * r + 1.66676381352e-1f;
  p = p * r + 4.99991478385e-1f;
  p = p * r + 9.99999706311e-1f;
  p = p * r + 1.0f;
#if defined(__AVX512F__)
  return reinterpret_cast<vfloat>(_mm512_scalef_ps(reinterpret_cast<__m512>(p), reinterpret_cast<__m512>(n)));
#else
  const vfloat scale = bit_cast<vfloat>((bit_cast<vuint>(shifted) << 23) + 0x3f800000u);
  return select(x < -87.336544f, splat<vfloat>(0), p * scale);
#endif
}
DL_INLINE float vexp(float x) { return std::exp(x); }
DL_INLINE double vexp(double x) { return std::exp(x); }

// log(1 + e) for e in [0, 1]; NaN at NaN.
DL_INLINE vfloat vlog1p_unit(vfloat e) {
  vfloat p = splat<vfloat>(0.0052326248f);
  p = p * e + -0.0295049602f;
  p = p * e + 0.0782254983f;
  p = p * e + -0.1366320732f;
  p = p * e + 0.1910598867f;
  p = p * e + -0.2484297759f;
  p = p * e + 0.3331909623f;
  p = p * e + -0.4999949311f;
  p = p * e + 0.9999999699f;
  return p * e;
}
DL_INLINE float vlog1p_unit(float e) { return std::log1p(e); }
DL_INLINE double vlog1p_unit(double e) { return std::log1p(e); }

// log x for normal x > 0; -inf at 0 and below the normal range, NaN at NaN, +inf at +inf.
DL_INLINE vfloat vlog(vfloat x) {
  const vuint bits = bit_cast<vuint>(x) - 0x3f3504f3u;  // x = 2^n m with m in [sqrt(1/2), sqrt(2))
  const vint n = bit_cast<vint>(bits) >> 23;
  const vfloat f = bit_cast<vfloat>((bits & 0x007fffffu) + 0x3f3504f3u) - 1.0f;
  vfloat q = splat<vfloat>(-0.07777938f);
  q = q * f + 0.12777285f;
  q = q * f + -0.13114052f;
  q = q * f + 0.14196154f;
  q = q * f + -0.16627093f;
  q = q * f + 0.20001636f;
  q = q * f + -0.25000779f;
  q = q * f + 0.33333325f;
  q = q * f + -0.49999998f;
  const vfloat k = __builtin_convertvector(n, vfloat);
  vfloat y = k * 0.693359375f + (f + (f * f * q + k * -2.12194440e-4f));
  y = select(x < 1.17549435e-38f, splat<vfloat>(-INFINITY), y);
  return select(x == x, select(x == INFINITY, x, y), x);
}
DL_INLINE float vlog(float x) { return std::log(x); }
DL_INLINE double vlog(double x) { return std::log(x); }

// log(1 + x) for x >= 0.
template <class V>
DL_INLINE V vlog1p(V x) {
  return select(x <= 1.0f, vlog1p_unit(vmin(x, splat<V>(1))), vlog(x + 1.0f));
}

template <class V>
DL_INLINE V vsqrt(V x);
template <>
DL_INLINE double vsqrt(double x) {
  return std::sqrt(x);
}
template <>
DL_INLINE float vsqrt(float x) {
  return std::sqrt(x);
}
template <>
DL_INLINE vfloat vsqrt(vfloat x) {
#if defined(__AVX512F__)
  return reinterpret_cast<vfloat>(_mm512_sqrt_ps(reinterpret_cast<__m512>(x)));
#elif defined(__AVX2__)
  return reinterpret_cast<vfloat>(_mm256_sqrt_ps(reinterpret_cast<__m256>(x)));
#else
  for (int i = 0; i < kFloatLanes; ++i) x[i] = std::sqrt(x[i]);
  return x;
#endif
}

// ---- loads and stores -----------------------------------------------------------------------------------------------

DL_INLINE vfloat load(const float* p) {
  vfloat v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
DL_INLINE double load(const double* p) { return *p; }
// Between 16 and 32 bits. The compiler's own conversion goes by halves or by lanes.
DL_INLINE vuint widen(vhalf h) {
#if defined(__AVX512F__)
  return bit_cast<vuint>(_mm512_cvtepu16_epi32(bit_cast<__m256i>(h)));
#elif defined(__AVX2__)
  return bit_cast<vuint>(_mm256_cvtepu16_epi32(bit_cast<__m128i>(h)));
#else
  return __builtin_convertvector(h, vuint);
#endif
}
DL_INLINE vhalf narrow(vuint v) {
#if defined(__AVX512F__)
  return bit_cast<vhalf>(_mm512_cvtepi32_epi16(bit_cast<__m512i>(v)));
#elif defined(__AVX2__)
  const __m256i bits = bit_cast<__m256i>(v & 0xffffu);
  return bit_cast<vhalf>(_mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(bits, bits), 0x08)));
#else
  return __builtin_convertvector(v, vhalf);
#endif
}
DL_INLINE vfloat load(const bfloat16* p) {
  vhalf h;
  std::memcpy(&h, p, sizeof(h));
  return bit_cast<vfloat>(widen(h) << 16);
}

DL_INLINE float to_float(float x) { return x; }
DL_INLINE double to_float(double x) { return x; }
DL_INLINE float to_float(bfloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
DL_INLINE float to_float(float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00u) return bit_cast<float>(sign | 0x7f800000u | ((rest & 0x3ffu) << 13));
  // Normal and subnormal alike: the exponent moves by a multiplication, which is exact.
  return bit_cast<float>(sign | bit_cast<uint32_t>(bit_cast<float>(rest << 13) * 5.192296858534828e33f));
}

template <class T>
DL_INLINE T from_float(typename Lanes<T>::scalar x);
template <>
DL_INLINE float from_float<float>(float x) {
  return x;
}
template <>
DL_INLINE double from_float<double>(double x) {
  return x;
}
template <>
DL_INLINE bfloat16 from_float<bfloat16>(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  if (x != x) return {0x7fc0};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
template <>
DL_INLINE float16 from_float<float16>(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds beyond 65504
  if (magnitude < 0x38800000u) {  // subnormal: let the float adder round to multiples of 2^-24
    const float aligned = bit_cast<float>(magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (bit_cast<uint32_t>(aligned) - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u);
  return {static_cast<uint16_t>(sign | (rounded >> 13))};
}

#if defined(__AVX512F__)
DL_INLINE vfloat load(const float16* p) {
  return reinterpret_cast<vfloat>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
}
#elif defined(__AVX2__)
DL_INLINE vfloat load(const float16* p) {
  return reinterpret_cast<vfloat>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
#else
DL_INLINE vfloat load(const float16* p) {
  vfloat v;
  for (int i = 0; i < kFloatLanes; ++i) v[i] = to_float(p[i]);
  return v;
}
#endif

DL_INLINE void store(float* p, vfloat v) { std::memcpy(p, &v, sizeof(v)); }
DL_INLINE void store(double* p, double v) { *p = v; }
#if defined(__AVX512F__)
// Most machines with AVX-512 round in one instruction, which needs no compiler flag here. It makes subnormals 0.
static const bool kRoundsBFloat16 = __builtin_cpu_supports("avx512bf16");
#endif
DL_INLINE vhalf round_bfloat16(vfloat v) {
#if defined(__AVX512F__)
  if (__builtin_expect(kRoundsBFloat16, 1)) {
    vhalf h;
    __asm__("vcvtneps2bf16 %1, %0" : "=v"(h) : "v"(v));
    return h;
  }
#endif
  const vuint bits = bit_cast<vuint>(v);
  const vuint rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const vuint quiet = vuint{} + 0x7fc0u;
  return narrow(v == v ? rounded : quiet);
}
DL_INLINE vhalf round_float16(vfloat v) {
#if defined(__AVX512F__)
  return bit_cast<vhalf>(_mm512_cvtps_ph(reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__AVX2__)
  return bit_cast<vhalf>(_mm256_cvtps_ph(reinterpret_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  vhalf h;
  for (int i = 0; i < kFloatLanes; ++i) h[i] = from_float<float16>(v[i]).bits;
  return h;
#endif
}
DL_INLINE void store(bfloat16* p, vfloat v) {
  const vhalf h = round_bfloat16(v);
  std::memcpy(p, &h, sizeof(h));
}
DL_INLINE void store(float16* p, vfloat v) {
  const vhalf h = round_float16(v);
  std::memcpy(p, &h, sizeof(h));
}

// Ask for [p, p + n) to be brought to the second-level cache. Past the end of an array it does nothing.
template <class T>
DL_INLINE void prefetch(const T* p, int64_t n) {
  const char* line = reinterpret_cast<const char*>(p);
  for (int64_t at = 0; at < n * static_cast<int64_t>(sizeof(T)); at += 64) __builtin_prefetch(line + at, 0, 2);
}

// The first n lanes, n < width; the others read as `rest` and are not written.
template <class T>
DL_INLINE typename Lanes<T>::vec load_part(const T* p, int64_t n, typename Lanes<T>::scalar rest) {
  typename Lanes<T>::scalar a[Lanes<T>::width];
  for (int i = 0; i < Lanes<T>::width; ++i) a[i] = i < n ? to_float(p[i]) : rest;
  return load(a);
}
template <class T>
DL_INLINE void store_part(T* p, typename Lanes<T>::vec v, int64_t n) {
  typename Lanes<T>::scalar a[Lanes<T>::width];
  store(a, v);
  for (int64_t i = 0; i < n; ++i) p[i] = from_float<T>(a[i]);
}
#if defined(__AVX512F__)
DL_INLINE __mmask16 first(int64_t n) { return static_cast<__mmask16>((1u << n) - 1u); }
template <>
DL_INLINE vfloat load_part<float>(const float* p, int64_t n, float rest) {
  return reinterpret_cast<vfloat>(_mm512_mask_loadu_ps(_mm512_set1_ps(rest), first(n), p));
}
template <>
DL_INLINE vfloat load_part<bfloat16>(const bfloat16* p, int64_t n, float rest) {
  const vhalf h = bit_cast<vhalf>(_mm256_maskz_loadu_epi16(first(n), p));
  const __m512 v = bit_cast<__m512>(widen(h) << 16);
  return reinterpret_cast<vfloat>(_mm512_mask_mov_ps(_mm512_set1_ps(rest), first(n), v));
}
template <>
DL_INLINE vfloat load_part<float16>(const float16* p, int64_t n, float rest) {
  const __m512 v = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p));
  return reinterpret_cast<vfloat>(_mm512_mask_mov_ps(_mm512_set1_ps(rest), first(n), v));
}
template <>
DL_INLINE void store_part<float>(float* p, vfloat v, int64_t n) {
  _mm512_mask_storeu_ps(p, first(n), reinterpret_cast<__m512>(v));
}
template <>
DL_INLINE void store_part<bfloat16>(bfloat16* p, vfloat v, int64_t n) {
  _mm256_mask_storeu_epi16(p, first(n), bit_cast<__m256i>(round_bfloat16(v)));
}
template <>
DL_INLINE void store_part<float16>(float16* p, vfloat v, int64_t n) {
  _mm256_mask_storeu_epi16(p, first(n), bit_cast<__m256i>(round_float16(v)));
}
#endif

// Stores that bypass the caches, to addresses aligned to the vector; call store_fence() after the last one.
template <class T>
DL_INLINE void stream(T* p, typename Lanes<T>::vec v) {
  store(p, v);
}
#if defined(__AVX512F__)
template <>
DL_INLINE void stream<float>(float* p, vfloat v) {
  _mm512_stream_ps(p, reinterpret_cast<__m512>(v));
}
template <>
DL_INLINE void stream<bfloat16>(bfloat16* p, vfloat v) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bit_cast<__m256i>(round_bfloat16(v)));
}
template <>
DL_INLINE void stream<float16>(float16* p, vfloat v) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bit_cast<__m256i>(round_float16(v)));
}
#elif defined(__AVX2__)
template <>
DL_INLINE void stream<float>(float* p, vfloat v) {
  _mm256_stream_ps(p, reinterpret_cast<__m256>(v));
}
#endif
DL_INLINE void store_fence() {
#if defined(__AVX2__) || defined(__AVX512F__)
  _mm_sfence();
#endif
}

}  // namespace CPU_CAPABILITY
}  // namespace dlkernels

#endif
