// Focal loss, sigmoid and softmax: the formulas, for one scalar or one vector V of them.
//
// Include after a header that gives V its arithmetic: splat, select, vmin, vmax, vexp, vlog, vlog1p, vlog1p_unit.
// No form below subtracts from 1 what is close to 1, and none has a power with a negative exponent at 0,
// so that small losses keep their digits and gamma < 1 has finite gradients.
#pragma once

namespace dlkernels {
inline namespace CPU_CAPABILITY {

// How u^gamma is formed.
enum class Gamma { kZero, kOne, kTwo, kAny };

inline Gamma gamma_kind(double gamma) {
  return gamma == 0 ? Gamma::kZero : gamma == 1 ? Gamma::kOne : gamma == 2 ? Gamma::kTwo : Gamma::kAny;
}

// Exponentials and logarithms for float32 inputs; or short ones for half-precision inputs, whose own rounding is
// larger.
enum class Exp { kFull, kShort };

// 1 / x. For float on GPUs, cuda_math.h has one without a division.
template <class V>
DL_INLINE V vreciprocal(V x) {
  return splat<V>(1) / x;
}

template <Exp E, class V>
DL_INLINE V exp_of(V x) {
  if constexpr (E == Exp::kShort) return vexp_short(x);
  else return vexp(x);
}

template <Exp E, class V>
DL_INLINE V log_of(V x) {
  if constexpr (E == Exp::kShort) return vlog_short(x);
  else return vlog(x);
}

// u^gamma for u in [0, 1], with log_u at hand for the general exponent: finite, so that gamma = 0 gives 1 at u = 0 too.
template <Gamma G, Exp E = Exp::kFull, class V>
DL_INLINE V power(V u, V log_u, double gamma) {
  if constexpr (G == Gamma::kZero) return splat<V>(1);
  if constexpr (G == Gamma::kOne) return u;
  if constexpr (G == Gamma::kTwo) return u * u;
  if constexpr (G == Gamma::kAny) return exp_of<E>(vmax(log_u, splat<V>(-3e38f)) * splat<V>(gamma));
}

template <class V>
struct LossAndGrad {
  V loss;
  V grad;
};

// e = exp(-|x|), r = 1 / (1 + e), log(1 + e): what both sigmoid forms are made of.
template <class V>
struct Logistic {
  V e, r, log1p_e;
};
template <Exp E, class V>
DL_INLINE Logistic<V> logistic(V x) {
  const V e = exp_of<E>(-vabs(x));
  return {e, vreciprocal(e + 1.0f), vlog1p_unit(e)};
}

// Hard labels. u = -s x with s = +-1; q = sigmoid(u) = 1 - p_t; ell = softplus(u) = -log p_t:
//   FL = q^gamma ell,   dFL/du = q^gamma (q + gamma p_t ell).
// alpha_t and the sign -s are the caller's.
template <Gamma G, Exp E = Exp::kFull, class V>
DL_INLINE LossAndGrad<V> sigmoid_focal_hard(V u, double gamma) {
  const Logistic<V> f = logistic<E>(u);
  const V small = f.e * f.r;
  const V q = select(u < 0.0f, small, f.r);
  const V ell = vmax(u, splat<V>(0)) + f.log1p_e;
  const V focus = power<G, E>(q, vmin(u, splat<V>(0)) - f.log1p_e, gamma);
  if constexpr (G == Gamma::kZero) return {ell, q};
  const V p_t = select(u < 0.0f, f.r, small);
  // ell is infinite only where p_t is 0, and their product tends to 0.
  const V slope = q + p_t * vmin(ell, splat<V>(3e38f)) * splat<V>(gamma);
  return {focus * ell, focus * slope};
}

// Any labels y in [0, 1]. p = sigmoid(x), v = p (1 - y) + y (1 - p), ce = softplus(x) - y x:
//   FL = v^gamma ce,   dFL/dx = v^gamma (p - y) + gamma v^(gamma - 1) (1 - 2 y) p (1 - p) ce.
// Written in |x|, and in the shares of y on the wrong and on the right side of x's sign: nothing cancels where y is
// close to 0 or 1, and both ends are the hard labels' form.
template <Gamma G, Exp E = Exp::kFull, class V>
DL_INLINE LossAndGrad<V> sigmoid_focal_soft(V x, V y, double gamma) {
  const Logistic<V> f = logistic<E>(x);
  const V small = f.e * f.r, not_y = splat<V>(1) - y;
  const V share = select(x < 0.0f, y, not_y), other = select(x < 0.0f, not_y, y);
  const V wrong = f.r * share, right = small * other;
  const V v = wrong + right;
  const V ce = select(share == 0.0f, f.log1p_e, share * vabs(x) + f.log1p_e);  // not 0 * infinity
  const V apart = wrong - right;
  if constexpr (G == Gamma::kZero) return {ce, select(x < 0.0f, -apart, apart)};
  const V tail = small * f.r * vmin(ce, splat<V>(3e38f)) * (share - other);  // 0 at infinite x
  if constexpr (G == Gamma::kTwo) {
    const V slope = v * (v * apart + tail * 2.0f);
    return {v * v * ce, select(x < 0.0f, -slope, slope)};
  }
  const V focus = power<G, E>(v, log_of<E>(v), gamma);
  const V ratio = select(v >= 1.17549435e-38f, tail * vreciprocal(v), splat<V>(0));
  const V slope = focus * (apart + ratio * splat<V>(gamma));
  return {focus * ce, select(x < 0.0f, -slope, slope)};
}

// One row of softmax focal loss with target class y, from e_y = exp(z_y - m), other = sum_{k != y} exp(z_k - m) and
// d_y = z_y - m, where m = max z:
//   p = e_y / (e_y + other), u = other / (e_y + other),  FL = u^gamma (-log p),
//   dFL/dz_k = omega (p_k - delta_ky),  omega = u^gamma (1 + gamma p (-log p) / u).
template <class V>
DL_INLINE V minus_log_p(V e_y, V other, V total, V d_y) {
  const V ratio = select(e_y > 0.0f, vmin(other, e_y) / e_y, splat<V>(0));
  return select(other < e_y, vlog1p_unit(ratio), vlog(total) - d_y);
}
template <>
DL_INLINE float minus_log_p(float e_y, float other, float total, float d_y) {
  return other < e_y ? vlog1p_unit(other / e_y) : vlog(total) - d_y;
}
template <class V>
struct SoftmaxRow {
  V loss, omega, u, inverse_sum;
};
template <Gamma G, class V>
DL_INLINE SoftmaxRow<V> softmax_focal_row(V e_y, V other, V d_y, double gamma) {
  const V total = e_y + other;
  const V inverse = splat<V>(1) / total;
  // log p in the form that keeps its digits: close to 0 when y dominates, close to d_y when it does not.
  const V ell = minus_log_p(e_y, other, total, d_y);
  const V u = other * inverse;
  if constexpr (G == Gamma::kZero) return {ell, splat<V>(1), u, inverse};
  const V focus = power<G>(u, vlog(u), gamma);
  const V r = select(u > 0.0f, ell / u, splat<V>(1));
  const V omega = focus * (splat<V>(1) + e_y * inverse * vmin(r, splat<V>(3e38f)) * splat<V>(gamma));
  return {select(u == 0.0f, splat<V>(0), focus * ell), omega, u, inverse};
}

// One class of softmax focal loss with target weights t_c: (1 - p_c)^gamma (-log p_c) and h_c / t_c = omega_c.
// d = z_c - m; log_sum = log sum_k exp(z_k - m); rest = sum_k exp(z_k - m) - 1, formed without the subtraction.
template <Gamma G, class V>
DL_INLINE LossAndGrad<V> softmax_focal_class(V e, V d, V log_sum, V rest, V inverse, double gamma) {
  const V p = e * inverse;
  const V ell = log_sum - d;
  const V u = select(d == 0.0f, rest * inverse, splat<V>(1) - p);
  const V focus = power<G>(u, vlog(u), gamma);
  const V r = select(u > 0.0f, ell / u, splat<V>(1));
  // p = 0 where ell is infinite: their product tends to 0.
  const V omega = focus * (splat<V>(1) + p * vmin(r, splat<V>(3e38f)) * splat<V>(gamma));
  return {select(u == 0.0f, splat<V>(0), focus * ell), omega};
}

}  // namespace CPU_CAPABILITY
}  // namespace dlkernels
