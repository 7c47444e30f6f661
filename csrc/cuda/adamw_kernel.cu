// AdamW on GPUs: all parameters in one launch.
#include "optimizer_step.h"
//
#include "../math/adamw.h"

namespace dlkernels {
namespace {

struct AdamW {
  static constexpr int kSlots = 3, kPlainSlots = 2;  // first moment, second, its maximum
  using Row = AdamWFactors<float>;

  static DL_DEVICE Row row(const StepRow& r, double lr, double multiplier, double t) {
    const double beta1 = r.own[0], beta2 = r.own[1];
    const double correction1 = -expm1(t * r.log_beta[0]), correction2 = -expm1(t * r.log_beta[1]);
    const auto f = [](double x) { return static_cast<float>(x); };
    return {f(multiplier),
            f(1.0 - lr * r.decay_rate),
            f(lr / correction1),
            f(beta1),
            f(1.0 - beta1),
            f(beta2),
            f(1.0 - beta2),
            f(r.own[2]),
            f(1.0 / sqrt(correction2))};
  }

  template <int N, Needs kNeeds, class Round>
  static DL_DEVICE void update(const Row& f, Floats<N>& theta, const Floats<N>& grad, Floats<N> (&slots)[kSlots],
                               const Has<kSlots>& has, Round round) {
    Floats<N>&m = slots[0], &v = slots[1], &largest = slots[2], used;
    DL_UNROLL
    for (int i = 0; i < N; ++i) {
      const float g = grad[i] * f.multiplier;
      m[i] = adamw_first_moment(m[i], g, f);
      used[i] = v[i] = adamw_second_moment(v[i], g, f);
    }
    v = round(2, v);
    if (kNeeds == Needs::kAll && has.slot[2]) {
      DL_UNROLL
      for (int i = 0; i < N; ++i) {  // of what is stored, the maximum stays exact; NaN in either stays
        const float now = v[i];
        used[i] = now <= largest[i] || largest[i] != largest[i] ? largest[i] : now;
        largest[i] = used[i];
      }
    }
    DL_UNROLL
    for (int i = 0; i < N; ++i) {  // adamw_parameter() without branches
      const float denominator = quick_sqrt(used[i]) * f.inv_correction + f.eps;
      theta[i] = theta[i] * f.keep - quick_divide(f.step_size * m[i], denominator);
    }
    m = round(1, m);
  }
};

// Math      g = multiplier grad;  m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2;  vh = v, or with a third
//           slot the largest so far;  theta = keep theta - step_size m / (sqrt(vh) / correction + eps);
//           average += (1 - decay) (theta - average);  t += 1. multiplier = sign min(1, max_norm / norm) / scale.
// Traffic   per element: read and write theta, m and v, read grad: 28 bytes in float32, 14 in bfloat16. The largest v,
//           master and average are read and written too; beside a master the parameter is only written. Nothing of a
//           step that is skipped.
// Grid      as many blocks as run at a time, each takes every gridDim.x-th unit of h.table.length elements of an item.
// Requires  tensors of an item dense, in one layout; packs of 16 bytes where all of its addresses are multiples of 16
//           and random numbers come in groups, else one element at a time.
// Result    bitwise reproducible; stochastic rounding depends on seed, step, parameter and element only.
template <Needs kNeeds, int kBytes>
DL_KERNEL(kStepThreads, kStepBlocks)
adamw_kernel(DL_CONSTANT Argument<StepHeader, kBytes> a) {
  step_all<AdamW, kNeeds>(a.header, a.inlined);
}

}  // namespace

void launch_adamw_step(const Queue& queue, const StepHeader& header, const void* inlined, int bytes) {
  const LaunchShape shape = step_shape(header.table.units, sizeof(StepShared<AdamW>), *queue.machine, kStepBlocks);
  with_needs(header.needs, [&](auto needs) {
    with_argument(header, inlined, bytes, [&](const auto& argument) {
      launch(queue, shape, adamw_kernel<decltype(needs)::value, sizeof(argument)>, argument);
    });
  });
}

}  // namespace dlkernels
