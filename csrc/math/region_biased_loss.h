// Region biased loss: the formulas, for one row or one vector V of rows. Include after a header that gives V its
// arithmetic. Wang et al., "Region Attention Networks for Pose and Occlusion Robust Facial Expression Recognition".
#pragma once

namespace dlkernels {
inline namespace CPU_CAPABILITY {

// L = max(0, margin - (mu_max - mu_0)),   dL/dmu_0 = active,   dL/dmu_max = -active;   at equality nothing is active.
template <class V>
struct RegionBiasedTerms {
  V loss, active;
};
template <class V>
DL_INLINE RegionBiasedTerms<V> region_biased(V mu_max, V mu_0, V margin) {
  const V zero = splat<V>(0), value = margin - (mu_max - mu_0);
  return {select(value <= 0.0f, zero, value), select(value > 0.0f, splat<V>(1), zero)};  // a NaN stays one
}

// Of mu = softmax(z), p_0 and p_max two of its elements: dL/dz_r = p_r ([r = 0] - [r = max] - (p_0 - p_max)) active.
template <class V>
DL_INLINE V region_biased_softmax_grad(V p, V in_mu, V p_0, V p_max, V active) {
  return p * (in_mu - active * (p_0 - p_max));
}

}  // namespace CPU_CAPABILITY
}  // namespace dlkernels
