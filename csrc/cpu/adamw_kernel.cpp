// The AdamW loops of one instruction set: compiled once for each, with CPU_CAPABILITY naming it.
#include "adamw_kernel.h"

#include "../common/optimizer_loops.h"
#include "../common/squares.h"
#include "../math/adamw.h"

namespace dlkernels {
inline namespace CPU_CAPABILITY {

template <class V>
DL_INLINE AdamWFactors<V> factors(const AdamWScalars& c) {
  return {splat<V>(c.multiplier), splat<V>(c.keep),      splat<V>(c.step_size),
          splat<V>(c.beta1),      splat<V>(1 - c.beta1), splat<V>(c.beta2),
          splat<V>(1 - c.beta2),  splat<V>(c.eps),       splat<V>(c.inv_sqrt_correction2)};
}

// Only the parameter, the gradient and two moments, all rounded to nearest.
template <class T, class S>
void step_plain(const StepTensor& t, const AdamWScalars& c, int64_t begin, int64_t end) {
  using V = typename Lanes<T>::vec;
  const AdamWFactors<V> f = factors<V>(c);
  const Parameter<T, true> parameter(t, 0);
  const T* grad = static_cast<const T*>(t.grad);
  S *m = static_cast<S*>(t.slots[0]), *v = static_cast<S*>(t.slots[1]);
  for_elements<T, 4>(begin, end, [&](auto w, int64_t i, int64_t count) DL_BODY {
    const V g = load_in_turn(w, grad + i, count) * f.multiplier;
    const V first = adamw_first_moment(load_in_turn(w, m + i, count), g, f);
    const V second = adamw_second_moment(load_in_turn(w, v + i, count), g, f);
    const V theta = adamw_parameter(parameter.read(w, i, count), first, second, f);
    store_as(w, m + i, first, count);
    store_as(w, v + i, second, count);
    parameter.write(w, i, theta, count, nullptr);
  });
}

template <class T, class S>
void step_full(const StepTensor& t, const AdamWScalars& c, int64_t begin, int64_t end) {
  using V = typename Lanes<T>::vec;
  const AdamWFactors<V> f = factors<V>(c);
  const Parameter<T, false> parameter(t, c.average_decay);
  const T* grad = static_cast<const T*>(t.grad);
  S *m = static_cast<S*>(t.slots[0]), *v = static_cast<S*>(t.slots[1]), *largest = static_cast<S*>(t.slots[2]);
  Randoms<T, S> randoms(t, c.rounding, 2);
  for (int64_t from = begin; from < end;) {
    const int64_t to = from + randoms.draw(from, end);
    for_elements<T, 1>(from, to, [&](auto w, int64_t i, int64_t count) DL_BODY {
      const V g = load_in_turn(w, grad + i, count) * f.multiplier;
      const V first = adamw_first_moment(load_in_turn(w, m + i, count), g, f);
      V second = adamw_second_moment(load_in_turn(w, v + i, count), g, f);
      const uint16_t* random = randoms.slot(1, i - from);
      store_rounded(w, m + i, first, count, randoms.slot(0, i - from));
      store_rounded(w, v + i, second, count, random);
      if (largest) {
        if (random) second = load_as(w, v + i, count);  // the maximum of what is stored stays exact
        second = vmax(second, load_in_turn(w, largest + i, count));
        store_as(w, largest + i, second, count);
      }
      const V theta = adamw_parameter(parameter.read(w, i, count), first, second, f);
      parameter.write(w, i, theta, count, randoms.parameter(i - from));
    });
    from = to;
  }
}

static void step(const StepTensor& t, const AdamWScalars& c, int64_t begin, int64_t end) {
  with_types(t, [&](auto p, auto s) {
    using T = decltype(p);
    using S = decltype(s);
    const bool plain = !t.slots[2] && !t.master && !t.average && !(c.rounding.on && Randoms<T, S>::kAny);
    plain ? step_plain<T, S>(t, c, begin, end) : step_full<T, S>(t, c, begin, end);
  });
}

}  // namespace CPU_CAPABILITY

AdamWKernels DL_CONCAT(adamw_kernels_, CPU_CAPABILITY)() { return {step, squares}; }

}  // namespace dlkernels
