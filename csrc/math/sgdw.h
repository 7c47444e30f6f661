// SGDW: one step of one element. Loshchilov and Hutter, "Decoupled Weight Decay Regularization", algorithm 1.
#pragma once

namespace dlkernels {
inline namespace CPU_CAPABILITY {

//   m = momentum m + gain g,   theta = keep theta - rate d,   d = m, or g + momentum m (Nesterov)
template <class V>
struct SgdwFactors {
  V multiplier, keep, momentum, gain, rate;
};

template <class V>
DL_INLINE V sgdw_momentum(V m, V g, const SgdwFactors<V>& f) {
  return f.momentum * m + f.gain * g;
}
template <class V>
DL_INLINE V sgdw_first_momentum(V g, const SgdwFactors<V>& f) {
  return f.gain * g;
}
template <class V>
DL_INLINE V sgdw_nesterov(V m, V g, const SgdwFactors<V>& f) {
  return g + f.momentum * m;
}
template <class V>
DL_INLINE V sgdw_parameter(V theta, V d, const SgdwFactors<V>& f) {
  return theta * f.keep - f.rate * d;
}

}  // namespace CPU_CAPABILITY
}  // namespace dlkernels
