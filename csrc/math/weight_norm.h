// Weight normalisation: what one row's sums become. Salimans and Kingma, "Weight Normalization", eq. 2 and 3.
#pragma once

namespace dlkernels {
inline namespace CPU_CAPABILITY {

// w = g v / n with n = ||v||:                      out = a v.
// dv = (g / n) (dw - (dg / n) v), dg = <dw, v> / n:  out = a dw - b v.
// A row of zeros has no direction: its weight and its gradients are 0.
template <class A>
struct WeightNormFactors {
  A a, b, dg;
};

template <class A>
DL_INLINE WeightNormFactors<A> weight_norm_forward(A n, A g) {
  return {n == 0 ? A(0) : g / n, A(0), A(0)};
}

template <class A>
DL_INLINE WeightNormFactors<A> weight_norm_backward(A n, A g, A dot) {
  if (n == 0) return {A(0), A(0), A(0)};
  const A dg = dot / n;
  return {g / n, g / n * (dg / n), dg};
}

// False where squares, or what is divided by the norm, may leave float32's range: such rows are computed in float64.
template <class A>
DL_INLINE bool weight_norm_in_range(A n) {
  return n > A(1e-15) && n < A(1e18);
}

}  // namespace CPU_CAPABILITY
}  // namespace dlkernels
