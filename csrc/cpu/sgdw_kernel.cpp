// The SGDW loops of one instruction set: compiled once for each, with CPU_CAPABILITY naming it.
#include "sgdw_kernel.h"

#include "../common/optimizer_loops.h"
#include "../common/squares.h"
#include "../math/sgdw.h"

namespace dlkernels {
inline namespace CPU_CAPABILITY {

template <class V>
DL_INLINE SgdwFactors<V> factors(const SgdwScalars& c) {
  return {splat<V>(c.multiplier), splat<V>(c.keep), splat<V>(c.momentum), splat<V>(c.gain), splat<V>(c.rate)};
}

// Only the parameter, the gradient and the momentum, all rounded to nearest.
template <class T, class S, bool kNesterov>
void step_plain(const StepTensor& t, const SgdwScalars& c, int64_t begin, int64_t end) {
  using V = typename Lanes<T>::vec;
  const SgdwFactors<V> f = factors<V>(c);
  const Parameter<T, true> parameter(t, 0);
  const T* grad = static_cast<const T*>(t.grad);
  S* m = static_cast<S*>(t.slots[0]);
  for_elements<T, 4>(begin, end, [&](auto w, int64_t i, int64_t count) DL_BODY {
    const V g = load_in_turn(w, grad + i, count) * f.multiplier;
    const V momentum = sgdw_momentum(load_in_turn(w, m + i, count), g, f);
    const V d = kNesterov ? sgdw_nesterov(momentum, g, f) : momentum;
    const V theta = sgdw_parameter(parameter.read(w, i, count), d, f);
    store_as(w, m + i, momentum, count);
    parameter.write(w, i, theta, count, nullptr);
  });
}

template <class T, class S>
void step_full(const StepTensor& t, const SgdwScalars& c, int64_t begin, int64_t end) {
  using V = typename Lanes<T>::vec;
  const SgdwFactors<V> f = factors<V>(c);
  const Parameter<T, false> parameter(t, c.average_decay);
  const T* grad = static_cast<const T*>(t.grad);
  S* m = static_cast<S*>(t.slots[0]);
  Randoms<T, S> randoms(t, c.rounding, m ? 1 : 0);
  for (int64_t from = begin; from < end;) {
    const int64_t to = from + randoms.draw(from, end);
    for_elements<T, 1>(from, to, [&](auto w, int64_t i, int64_t count) DL_BODY {
      const V g = load_in_turn(w, grad + i, count) * f.multiplier;
      V momentum = sgdw_first_momentum(g, f);
      if (m) {
        momentum = sgdw_momentum(load_in_turn(w, m + i, count), g, f);
        store_rounded(w, m + i, momentum, count, randoms.slot(0, i - from));
      }
      const V d = c.nesterov ? sgdw_nesterov(momentum, g, f) : momentum;
      const V theta = sgdw_parameter(parameter.read(w, i, count), d, f);
      parameter.write(w, i, theta, count, randoms.parameter(i - from));
    });
    from = to;
  }
}

static void step(const StepTensor& t, const SgdwScalars& c, int64_t begin, int64_t end) {
  with_types(t, [&](auto p, auto s) {
    using T = decltype(p);
    using S = decltype(s);
    const bool plain = t.slots[0] && !t.master && !t.average && !(c.rounding.on && Randoms<T, S>::kAny);
    if (!plain) return step_full<T, S>(t, c, begin, end);
    c.nesterov ? step_plain<T, S, true>(t, c, begin, end) : step_plain<T, S, false>(t, c, begin, end);
  });
}

}  // namespace CPU_CAPABILITY

SgdwKernels DL_CONCAT(sgdw_kernels_, CPU_CAPABILITY)() { return {step, squares}; }

}  // namespace dlkernels
