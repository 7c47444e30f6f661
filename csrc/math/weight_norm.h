// Weight normalisation: what one row's sums become. Salimans and Kingma, "Weight Normalization", eq. 2 and 3.
#pragma once

namespace dlkernels {
inline namespace CPU_CAPABILITY {

// w = g v / n with n = ||v||:                      out = a v.
// dv = (g / n) (dw - (dg / n) v), dg = <dw, v> / n:  out = a dw - b v.
// A row of zeros has no direction: its weight and its gradients are 0.
struct WeightNormFactors {
  double a, b, dg;
};

inline WeightNormFactors weight_norm_forward(double n, double g) { return {n == 0 ? 0 : g / n, 0, 0}; }

inline WeightNormFactors weight_norm_backward(double n, double g, double dot) {
  if (n == 0) return {0, 0, 0};
  const double dg = dot / n;
  return {g / n, g / n * (dg / n), dg};
}

// False where squares, or what is divided by the norm, may leave float32's range: such rows are computed in float64.
inline bool weight_norm_in_range(double n) { return n > 1e-15 && n < 1e18; }

}  // namespace CPU_CAPABILITY
}  // namespace dlkernels
