// Stochastic depth: y = residual + f x, f one factor per row. Huang et al., "Deep Networks with Stochastic Depth",
// eq. 2.
#pragma once

namespace dlkernels {
inline namespace CPU_CAPABILITY {

template <class V>
DL_INLINE V stochastic_depth_kept(V x, V f) {
  return x * f;
}
template <class V>
DL_INLINE V stochastic_depth_kept(V x, V f, V residual) {
  return residual + x * f;
}

}  // namespace CPU_CAPABILITY
}  // namespace dlkernels
