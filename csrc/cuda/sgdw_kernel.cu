// SGDW on GPUs: all parameters in one launch.
#include "optimizer_step.h"
//
#include "../math/sgdw.h"

namespace dlkernels {
namespace {

struct Sgdw {
  static constexpr int kSlots = 1, kPlainSlots = 1;  // momentum
  struct Row {
    SgdwFactors<float> factors;
    int nesterov;
  };

  static DL_DEVICE Row row(const StepRow& r, double lr, double multiplier, double) {
    const bool paper = r.own[1] != 0.0;
    const auto f = [](double x) { return static_cast<float>(x); };
    return {{f(multiplier), f(1.0 - lr * r.decay_rate), f(r.own[0]), f(paper ? lr : 1.0), f(paper ? 1.0 : lr)},
            r.own[2] != 0.0 ? 1 : 0};
  }

  template <int N, Needs kNeeds, class Round>
  static DL_DEVICE void update(const Row& row, Floats<N>& theta, const Floats<N>& grad, Floats<N> (&slots)[kSlots],
                               const Has<kSlots>& has, Round round) {
    const SgdwFactors<float>& f = row.factors;
    Floats<N>& m = slots[0];
    DL_UNROLL
    for (int i = 0; i < N; ++i) {
      const float g = grad[i] * f.multiplier;
      m[i] = has.slot[0] ? sgdw_momentum(m[i], g, f) : sgdw_first_momentum(g, f);
      theta[i] = sgdw_parameter(theta[i], row.nesterov != 0 ? sgdw_nesterov(m[i], g, f) : m[i], f);
    }
    m = round(1, m);
  }
};

// Math      g = multiplier grad;  m = momentum m + gain g, without a slot gain g;  d = m, or with nesterov
//           g + momentum m;  theta = keep theta - rate d;  average += (1 - decay) (theta - average);  t += 1.
// Traffic   per element: read and write theta and m, read grad: 20 bytes in float32, 10 in bfloat16. master and average
//           are read and written too; beside a master the parameter is only written. Nothing of a step that is skipped.
// Grid      as many blocks as run at a time, each takes every gridDim.x-th unit of h.table.length elements of an item.
// Requires  tensors of an item dense, in one layout; packs of 16 bytes where all of its addresses are multiples of 16
//           and random numbers come in groups, else one element at a time.
// Result    bitwise reproducible; stochastic rounding depends on seed, step, parameter and element only.
template <Needs kNeeds, int kBytes>
DL_KERNEL(kStepThreads, kStepBlocks)
sgdw_kernel(DL_CONSTANT Argument<StepHeader, kBytes> a) {
  step_all<Sgdw, kNeeds>(a.header, a.inlined);
}

}  // namespace

void launch_sgdw_step(const Queue& queue, const StepHeader& header, const void* inlined, int bytes) {
  const LaunchShape shape = step_shape(header.table.units, sizeof(StepShared<Sgdw>), *queue.machine, kStepBlocks);
  with_needs(header.needs, [&](auto needs) {
    with_argument(header, inlined, bytes, [&](const auto& argument) {
      launch(queue, shape, sgdw_kernel<decltype(needs)::value, sizeof(argument)>, argument);
    });
  });
}

}  // namespace dlkernels
