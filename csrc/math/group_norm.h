// Group normalisation and what surrounds it: the formulas, for one scalar or one vector V of them.
//
//   x_hat = (x - mean) rstd,   z = a x_hat + b + residual,   y = act(z)
//   a = weight (1 + scale),    b = bias (1 + scale) + shift
//
// Backward, dz = dy act'(z):  da = sum dz x_hat,  db = sum dz  per sample and channel, and with M values in a group
//   dx = rstd (a dz - mean_g(a dz) - x_hat mean_g(a dz x_hat)),
//   dweight = sum_n (1 + scale) da,  dbias = sum_n (1 + scale) db,  dscale = weight da + bias db,  dshift = db.
#pragma once

#include <cmath>

#include "../common/activation.h"

namespace dlkernels {
inline namespace CPU_CAPABILITY {

// What a channel of one sample is mapped with: z = (x - mean) slope + offset (+ residual), slope = rstd a.
// The mean is subtracted first: folded into the offset it would cancel where it is far from 0.
template <class V>
struct ChannelMap {
  V mean, slope, offset;
};

template <class V>
DL_INLINE V group_norm_before_activation(V x, const ChannelMap<V>& m) {
  return (x - m.mean) * m.slope + m.offset;
}

// dx = dz p + (x - mean) q + r, with p = rstd a, q = -rstd^2 mean_g(a dz x_hat), r = -rstd mean_g(a dz).
template <class V>
struct GradientMap {
  V mean, p, q, r;
};

template <class V>
DL_INLINE V group_norm_input_gradient_from_deviation(V x_less_mean, V dz, const GradientMap<V>& m) {
  return dz * m.p + (x_less_mean * m.q + m.r);
}
template <class V>
DL_INLINE V group_norm_input_gradient(V x, V dz, const GradientMap<V>& m) {
  return group_norm_input_gradient_from_deviation(x - m.mean, dz, m);
}

// Count, mean and sum of squared deviations of a set of values, and of two sets together (Chan et al. 1983).
struct Moments {
  double count = 0, mean = 0, m2 = 0;
};
DL_INLINE void merge(Moments& into, const Moments& other) {
  const double total = into.count + other.count, delta = other.mean - into.mean;
  if (total == 0) return;
  into.m2 += other.m2 + delta * delta * into.count * other.count / total;
  into.mean += delta * other.count / total;
  into.count = total;
}

DL_INLINE double reciprocal_std(const Moments& m, double eps) { return 1.0 / std::sqrt(m.m2 / m.count + eps); }

}  // namespace CPU_CAPABILITY
}  // namespace dlkernels
