// Squeeze-and-excitation: the formulas, for one scalar or one vector V of them.
//
//   s = mean_S x,  z1 = W1 s + b1,  z2 = W2 act(z1) + b2,  e = gate(z2),  y = ract(x e + residual)
//
// Backward, dz = dy ract'(x e + residual):
//   de = sum_S dz x,  dz2 = de gate'(z2),  dz1 = (W2^T dz2) act'(z1),  ds = W1^T dz1,  dx = dz e + ds / S,
//   dW2 = sum_n dz2 act(z1)^T,  db2 = sum_n dz2,  dW1 = sum_n dz1 s^T,  db1 = sum_n dz1.
// With one layer z2 = W2 s + b2 and ds = W2^T dz2.
#pragma once

#include "../common/activation.h"

namespace dlkernels {
inline namespace CPU_CAPABILITY {

template <Activation K, class V>
DL_INLINE V squeeze_excite_output(V x, V e, V residual) {
  return activate<K>(x * e + residual);
}

// dz, the gradient before the last activation.
template <Activation K, class V>
DL_INLINE V squeeze_excite_upstream(V x, V e, V residual, V dy) {
  if constexpr (K == Activation::kNone) return dy;
  return dy * slope<K>(x * e + residual);
}

}  // namespace CPU_CAPABILITY
}  // namespace dlkernels
