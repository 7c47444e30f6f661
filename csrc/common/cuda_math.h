// What csrc/math is written with, for one float or double in a CUDA kernel: simd.h's names without its vectors.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define DL_INLINE __host__ __device__ __forceinline__
#define DL_HOST_DEVICE __host__ __device__
#define DL_IN_KERNELS __device__
#else
#define DL_INLINE inline __attribute__((always_inline))
#define DL_HOST_DEVICE
#define DL_IN_KERNELS
#endif
#define DL_BODY

#ifndef CPU_CAPABILITY
#define CPU_CAPABILITY CUDA
#endif

namespace dlkernels {
inline namespace CPU_CAPABILITY {

// Half-precision storage types: bits only, arithmetic happens in float.
struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

template <class To, class From>
DL_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "of one size");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

template <class V>
DL_INLINE V splat(double value) {
  return static_cast<V>(value);
}
DL_INLINE float select(bool mask, float a, float b) { return mask ? a : b; }
DL_INLINE double select(bool mask, double a, double b) { return mask ? a : b; }

// As compiled for CPUs: the second operand where either is NaN.
template <class V>
DL_INLINE V vmax(V a, V b) {
  return a > b ? a : b;
}
template <class V>
DL_INLINE V vmin(V a, V b) {
  return a < b ? a : b;
}
DL_INLINE float vabs(float x) { return fabsf(x); }
DL_INLINE double vabs(double x) { return fabs(x); }
DL_INLINE float vexp(float x) { return expf(x); }
DL_INLINE double vexp(double x) { return exp(x); }
DL_INLINE float vlog(float x) { return logf(x); }
DL_INLINE double vlog(double x) { return log(x); }
DL_INLINE float vlog1p(float x) { return log1pf(x); }
DL_INLINE double vlog1p(double x) { return log1p(x); }

// log(1 + e) for e in [0, 1]: simd.h's polynomial, a third of log1pf's instructions.
DL_INLINE float vlog1p_unit(float e) {
  float p = 0.0052326248f;
  p = fmaf(p, e, -0.0295049602f);
  p = fmaf(p, e, 0.0782254983f);
  p = fmaf(p, e, -0.1366320732f);
  p = fmaf(p, e, 0.1910598867f);
  p = fmaf(p, e, -0.2484297759f);
  p = fmaf(p, e, 0.3331909623f);
  p = fmaf(p, e, -0.4999949311f);
  p = fmaf(p, e, 0.9999999699f);
  return p * e;
}
DL_INLINE double vlog1p_unit(double e) { return log1p(e); }

// 1 / x for normal x, to 1 ulp: one instruction where a division is ten and a branch.
DL_INLINE float vreciprocal(float x) {
#if defined(__CUDA_ARCH__)
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
#else
  return 1.0f / x;
#endif
}
DL_INLINE double vreciprocal(double x) { return 1.0 / x; }

// exp(x) for x <= 0 in two instructions, to 2 ulp plus |x| / 2 ulp: for numbers that half-precision inputs make, whose
// rounding is worth thousands of that. 0 where the result is below the normal numbers.
DL_INLINE float vexp_short(float x) {
  const float y = x * 1.44269504f;
#if defined(__CUDA_ARCH__)
  float e;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(y));
  return e;
#else
  const float e = exp2f(y);
  return e < 1.17549435e-38f ? 0.0f : e;
#endif
}
// Its inverse, for x >= 0: an error of 1.7e-7, or of that share of the result.
DL_INLINE float vlog_short(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
#else
  const float y = log2f(x < 1.17549435e-38f ? 0.0f : x);
#endif
  return y * 0.693147182f;
}
template <class V>
DL_INLINE V vsqrt(V x);
template <>
DL_INLINE float vsqrt(float x) {
  return sqrtf(x);
}
template <>
DL_INLINE double vsqrt(double x) {
  return sqrt(x);
}

// To 2 units in the last place, over all of float: the exact ones branch, and hold registers meanwhile.
#if defined(__CUDA_ARCH__)
DL_INLINE float quick_sqrt(float x) {
  float root;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(root) : "f"(x));
  return root;
}
DL_INLINE float quick_divide(float a, float b) {
  float ratio;
  asm("div.full.f32 %0, %1, %2;" : "=f"(ratio) : "f"(a), "f"(b));
  return ratio;
}
#else
DL_INLINE float quick_sqrt(float x) { return sqrtf(x); }
DL_INLINE float quick_divide(float a, float b) { return a / b; }
#endif

DL_INLINE float to_float(float x) { return x; }
DL_INLINE double to_float(double x) { return x; }
DL_INLINE float to_float(bfloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

#if defined(__CUDACC__)
DL_INLINE float to_float(float16 x) {
  __half_raw raw;
  raw.x = x.bits;
  return __half2float(__half(raw));
}
#else
DL_INLINE float to_float(float16 x) { return static_cast<float>(bit_cast<_Float16>(x.bits)); }
#endif

template <class T>
DL_INLINE T from_float(float x);
template <>
DL_INLINE float from_float<float>(float x) {
  return x;
}
#if defined(__CUDACC__)
template <>
DL_INLINE bfloat16 from_float<bfloat16>(float x) {
  return {static_cast<__nv_bfloat16_raw>(__float2bfloat16_rn(x)).x};
}
template <>
DL_INLINE float16 from_float<float16>(float x) {
  return {static_cast<__half_raw>(__float2half_rn(x)).x};
}
#else
template <>
DL_INLINE bfloat16 from_float<bfloat16>(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
template <>
DL_INLINE float16 from_float<float16>(float x) {
  return {bit_cast<uint16_t>(static_cast<_Float16>(x))};
}
#endif

// Two at once, where the hardware converts pairs: the first in the low half.
template <class T>
DL_INLINE uint32_t from_floats(float a, float b) {
  return from_float<T>(a).bits | static_cast<uint32_t>(from_float<T>(b).bits) << 16;
}
#if defined(__CUDACC__)
template <>
DL_INLINE uint32_t from_floats<bfloat16>(float a, float b) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
  return bit_cast<uint32_t>(pair);
}
template <>
DL_INLINE uint32_t from_floats<float16>(float a, float b) {
  const __half2 pair = __floats2half2_rn(a, b);
  return bit_cast<uint32_t>(pair);
}
#endif

}  // namespace CPU_CAPABILITY
}  // namespace dlkernels
