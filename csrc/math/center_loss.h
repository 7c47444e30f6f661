// Center loss of one element: L = 1/2 A (x - c)^2. Wen et al. 2016, eq. 2; with A, Farzaneh and Qi 2021, eq. 5.
// The island's terms of one center: Cai et al. 2018, eq. 3 and 6, in closed form.
#pragma once

namespace dlkernels {
inline namespace CPU_CAPABILITY {

// dL/dx = A (x - c); twice the loss is this times (x - c).
template <class V>
DL_INLINE V center_loss_dx(V difference, V attention) {
  return attention * difference;
}
// dL/dA, and dL/da for A = sigmoid(a) with `rest` = 1 - A.
template <class V>
DL_INLINE V center_loss_dattention(V difference) {
  return 0.5f * difference * difference;
}
template <class V>
DL_INLINE V center_loss_dlogit(V difference, V attention, V rest) {
  return center_loss_dattention(difference) * attention * rest;
}

// c + alpha sum A (x - c) / (1 + n), or sum / n: what the sum is multiplied by.
inline double center_step(double alpha, int64_t count, bool ema) {
  return alpha / static_cast<double>(ema ? count : 1 + count);
}

// (S - (n . S) n) / ||c||, n = c / ||c||: half the gradient of the island's pairs.
template <class V>
DL_INLINE V island_direction(V c, V total, V inverse_norm, V projection) {
  return inverse_norm * (total - projection * (c * inverse_norm));
}

}  // namespace CPU_CAPABILITY
}  // namespace dlkernels
