// Activations and gates of the layers with their derivatives, for one scalar or one vector V of them.
//
// The codes are those of dlkernels/reference/_activation.py.
#pragma once

#include <cmath>

#include "simd.h"

namespace dlkernels {

enum class Activation : int { kNone, kRelu, kLeakyRelu, kSilu, kGelu, kGeluTanh };
enum class Gate : int { kSigmoid, kHardSigmoid, kRelu };

inline namespace CPU_CAPABILITY {

constexpr float kNegativeSlope = 0.01f;

// 1 / x for x >= 1, up to 2^127: to the last bit or one beside it.
template <class V>
DL_INLINE V reciprocal(V x) {
  return splat<V>(1) / x;
}
#if defined(__CUDACC__) || defined(DL_CUDA_HOST)
// A division branches, which leaves nothing of one element beside another.
template <>
DL_INLINE float reciprocal(float x) {
  return vreciprocal(x);
}
#endif
#if defined(__AVX512F__)
template <>
DL_INLINE vfloat reciprocal(vfloat x) {
  const vfloat r = reinterpret_cast<vfloat>(_mm512_rcp14_ps(reinterpret_cast<__m512>(x)));
  return r + r * (1.0f - x * r);
}
#endif

// sigmoid(z) and 1 - sigmoid(z), each without a subtraction from 1.
template <class V>
struct Sigmoid {
  V value, rest;
};
template <class V>
DL_INLINE Sigmoid<V> sigmoid_and_rest(V z) {
  const V e = vexp(vmin(-z, splat<V>(87.0f))), value = reciprocal(e + 1.0f);
  return {value, e * value};
}
template <class V>
DL_INLINE V sigmoid(V z) {
  return reciprocal(vexp(vmin(-z, splat<V>(87.0f))) + 1.0f);
}
template <>
DL_INLINE double sigmoid(double z) {
  return 1 / (1 + std::exp(-z));
}
template <>
DL_INLINE float sigmoid(float z) {
  return reciprocal(1 + std::exp(-z));  // not cut off below: a NaN stays one
}

// The normal distribution: phi(z) = exp(-z^2 / 2) / sqrt(2 pi) and Phi(z), its integral.
template <class V>
struct Normal {
  V density, integral;
};
template <class V>
DL_INLINE Normal<V> normal(V z) {
  const V t = vmin(vabs(z), splat<V>(64));
  const V e = vexp(t * t * -0.5f);
  // Phi(-t) = e P(u), u = 1 / (1 + 0.27 t): relative error 2e-8 up to t = 14.
  const V u = reciprocal(t * 0.27f + 1.0f);
  V p = splat<V>(0.0289145233f);
  p = p * u + -0.126251804f;
  p = p * u + 0.169284652f;
  p = p * u + -0.068613706f;
  p = p * u + 0.107394718f;
  p = p * u + 0.0722421699f;
  p = p * u + 0.101758715f;
  p = p * u + 0.107550565f;
  p = p * u + 0.107720178f;
  const V tail = e * (p * u);
  return {e * 0.398942280f, select(z < 0.0f, tail, splat<V>(1) - tail)};
}
template <>
DL_INLINE Normal<double> normal(double z) {
  return {std::exp(-0.5 * z * z) * 0.39894228040143267794, 0.5 * std::erfc(-z * 0.70710678118654752440)};
}

// gelu_tanh(z) = z sigmoid(2 u), u = sqrt(2 / pi) (z + 0.044715 z^3): 0.5 (1 + tanh u) is sigmoid(2 u).
template <class V>
DL_INLINE V gelu_tanh_argument(V z) {
  return (z * z * splat<V>(0.044715) + splat<V>(1)) * z * splat<V>(1.5957691216057308);
}

template <Activation A, class V>
DL_INLINE V activate(V z) {
  if constexpr (A == Activation::kRelu) return select(z < 0.0f, splat<V>(0), z);
  if constexpr (A == Activation::kLeakyRelu) return select(z < 0.0f, z * splat<V>(0.01), z);
  if constexpr (A == Activation::kSilu) return z * sigmoid(z);
  if constexpr (A == Activation::kGelu) return z * normal(z).integral;
  if constexpr (A == Activation::kGeluTanh) return z * sigmoid(gelu_tanh_argument(z));
  return z;
}

// d activate(z) / dz; at a kink the value on the left, as torch has it.
template <Activation A, class V>
DL_INLINE V slope(V z) {
  if constexpr (A == Activation::kRelu) return select(z > 0.0f, splat<V>(1), splat<V>(0));
  if constexpr (A == Activation::kLeakyRelu) return select(z > 0.0f, splat<V>(1), splat<V>(0.01));
  if constexpr (A == Activation::kSilu) {
    const Sigmoid<V> s = sigmoid_and_rest(z);
    return s.value * (z * s.rest + splat<V>(1));
  }
  if constexpr (A == Activation::kGelu) {
    const Normal<V> n = normal(z);
    return n.integral + z * n.density;
  }
  if constexpr (A == Activation::kGeluTanh) {
    const Sigmoid<V> s = sigmoid_and_rest(gelu_tanh_argument(z));
    const V inner = z * z * splat<V>(3 * 0.044715 * 1.5957691216057308) + splat<V>(1.5957691216057308);
    return s.value * (z * s.rest * inner + splat<V>(1));
  }
  return splat<V>(1);
}

// Call f with the activation as a compile-time constant: decltype(kind)::value.
template <Activation A>
struct ActivationTag {
  static constexpr Activation value = A;
};
template <class F>
DL_IN_KERNELS auto with_activation(Activation a, F f) {
  switch (a) {
    case Activation::kRelu: return f(ActivationTag<Activation::kRelu>{});
    case Activation::kLeakyRelu: return f(ActivationTag<Activation::kLeakyRelu>{});
    case Activation::kSilu: return f(ActivationTag<Activation::kSilu>{});
    case Activation::kGelu: return f(ActivationTag<Activation::kGelu>{});
    case Activation::kGeluTanh: return f(ActivationTag<Activation::kGeluTanh>{});
    default: return f(ActivationTag<Activation::kNone>{});
  }
}

template <class A>
DL_INLINE A gate(Gate kind, A z) {
  switch (kind) {
    case Gate::kHardSigmoid: {
      const A shifted = z + 3;
      return (shifted < 0 ? A(0) : shifted > 6 ? A(6) : shifted) / 6;
    }
    case Gate::kRelu: return z < 0 ? A(0) : z;
    default: return sigmoid(z);
  }
}
// d gate / dz from the gate's value e.
template <class A>
DL_INLINE A gate_slope(Gate kind, A e) {
  switch (kind) {
    case Gate::kHardSigmoid: return e > 0 && e < 1 ? A(1) / 6 : A(0);
    case Gate::kRelu: return e > 0 ? A(1) : A(0);
    default: return e * (1 - e);
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace dlkernels
