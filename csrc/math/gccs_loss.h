// Gaussian class-conditional simplex loss: the formulas of one column of one class, for one scalar or one vector V.
//
// Include after a header that gives V its arithmetic: splat, select, vabs, vlog.
#pragma once

namespace dlkernels {
inline namespace CPU_CAPABILITY {

// r - 1 - log r for f = r - 1: the divergence of two variances of ratio r. Near 1, where it is f^2 / 2 and the
// difference would lose its digits, by the series of log r = 2 artanh(f / (2 + f)).
template <class V>
DL_INLINE V variance_divergence(V f, V r) {
  const V s = f / (f + 2.0f), q = s * s;
  V tail = q * splat<V>(1.0 / 13) + splat<V>(1.0 / 11);
  tail = tail * q + splat<V>(1.0 / 9);
  tail = tail * q + splat<V>(1.0 / 7);
  tail = tail * q + splat<V>(1.0 / 5);
  tail = tail * q + splat<V>(1.0 / 3);
  return select(vabs(f) < 0.4f, f * s - q * s * tail * 2.0f, f - vlog(r));
}
template <>
DL_INLINE double variance_divergence(double f, double r) {
  return f - (std::fabs(f) < 0.4 ? std::log1p(f) : std::log(r));
}

// What a class asks for, in the arithmetic of V.
template <class V>
struct GccsTarget {
  V variance, precision;  // s^2 and 1 / s^2
  V eps;
  V kurtosis_weight;  // divided by D
};

// The loss of one column and, with dz = offset + d (slope + cubic d^2) per row, d = z - mu, its gradient, n times over:
//   L = 1/2 [log(s^2 / u) - 1 + v / s^2 + t^2 / s^2] + (w / D) |K - 3|,   u = v + eps,  t = mu - m,  K = M4 / u^2
//   n dL/dz = t / s^2 + d (1 / s^2 - 1 / u) + (w / D) sign(K - 3) 4 [(d^3 - M3) / u^2 - M4 d / u^3]
// `several` is false for a class of one row: only its mean counts.
template <class V>
struct GccsColumn {
  V loss, offset, slope, cubic;
};
template <bool kKurtosis, class V>
DL_INLINE GccsColumn<V> gccs_column(const GccsTarget<V>& to, bool several, V t, V v, V m3, V m4) {
  const V zero = splat<V>(0);
  GccsColumn<V> c{t * t * to.precision, t * to.precision, zero, zero};
  if (several) {
    const V u = v + to.eps, f = ((v - to.variance) + to.eps) * to.precision, inverse = splat<V>(1) / u;
    // log(s^2 / u) - 1 + v / s^2 = (r - 1 - log r) - eps / s^2 with r = u / s^2.
    c.loss += variance_divergence(f, u * to.precision) - to.eps * to.precision;
    c.slope = f * inverse;
    if constexpr (kKurtosis) {
      const V k = m4 * inverse * inverse, w = to.kurtosis_weight;
      const V scaled = select(k > 3.0f, w, select(k < 3.0f, -w, zero)) * inverse * inverse * 4.0f;
      c.loss += w * vabs(k - 3.0f) * 2.0f;
      c.offset -= scaled * m3;
      c.slope -= scaled * (m4 * inverse);
      c.cubic = scaled;
    }
  }
  c.loss *= 0.5f;
  return c;
}

}  // namespace CPU_CAPABILITY
}  // namespace dlkernels
