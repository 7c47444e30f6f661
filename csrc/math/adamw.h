// AdamW: one step of one element. Loshchilov and Hutter, "Decoupled Weight Decay Regularization", algorithm 2.
#pragma once

namespace dlkernels {
inline namespace CPU_CAPABILITY {

//   m = beta1 m + gain1 g,   v = beta2 v + gain2 g^2,   theta = keep theta - step_size m / (sqrt(v) / correction + eps)
//
// with gain1 = 1 - beta1, gain2 = 1 - beta2 and inv_correction = 1 / correction = 1 / sqrt(1 - beta2^t).
template <class V>
struct AdamWFactors {
  V multiplier, keep, step_size, beta1, gain1, beta2, gain2, eps, inv_correction;
};

template <class V>
DL_INLINE V adamw_first_moment(V m, V g, const AdamWFactors<V>& f) {
  return f.beta1 * m + f.gain1 * g;
}
template <class V>
DL_INLINE V adamw_second_moment(V v, V g, const AdamWFactors<V>& f) {
  return f.beta2 * v + f.gain2 * g * g;
}
template <class V>
DL_INLINE V adamw_parameter(V theta, V m, V v, const AdamWFactors<V>& f) {
  return theta * f.keep - f.step_size * m / (vsqrt(v) * f.inv_correction + f.eps);
}

}  // namespace CPU_CAPABILITY
}  // namespace dlkernels
