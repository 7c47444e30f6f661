// Region biased loss: the formulas, for one row or one vector V of rows. Include after a header that gives V its
// arithmetic. Wang et al., "Region Attention Networks for Pose and Occlusion Robust Facial Expression Recognition".
#pragma once

namespace dlkernels {
inline namespace CPU_CAPABILITY {

// L = max(0, margin - gap), gap = mu_max - mu_0:   dL/dmu_0 = active,   dL/dmu_max = -active;   0 at equality.
template <class V>
struct RegionBiasedTerms {
  V loss, active;
};
template <class V>
DL_INLINE RegionBiasedTerms<V> region_biased(V gap, V margin) {
  const V zero = splat<V>(0), value = margin - gap;
  return {select(value <= 0.0f, zero, value), select(value > 0.0f, splat<V>(1), zero)};  // a NaN stays one
}

// Of mu = softmax(z) with dL/dmu_r = in_mu, whose mean under mu is -active gap: dL/dz_r.
template <class V>
DL_INLINE V region_biased_softmax_grad(V mu, V in_mu, V gap, V active) {
  return mu * (in_mu + active * gap);
}

}  // namespace CPU_CAPABILITY
}  // namespace dlkernels
