// AdamW on CPU tensors: the scalars of a step. The loops are in adamw_kernel.cpp, once per instruction set.
#include <cmath>

#include "../common/host.h"
#include "adamw_kernel.h"
#include "optimizer_table.h"

namespace dlkernels {
namespace {

const AdamWKernels& kernels() {
  static const AdamWKernels table = DL_KERNELS_OF_THIS_MACHINE(adamw_kernels);
  return table;
}

AdamWScalars scalars(const std::vector<double>& values, int64_t t) {
  const double lr = values[0], beta1 = values[3], beta2 = values[4];
  AdamWScalars s{};
  s.step_size = lr / (1 - std::pow(beta1, t));
  s.beta1 = beta1, s.beta2 = beta2, s.eps = values[5];
  s.inv_sqrt_correction2 = 1 / std::sqrt(1 - std::pow(beta2, t));
  return s;
}

std::unique_ptr<StepLoop> loop(const StepCommon& common) {
  return std::make_unique<RowLoop<AdamWScalars>>(common, scalars, kernels().step);
}

}  // namespace

OptimizerFamily adamw_family() { return {6, loop, kernels().squares}; }

}  // namespace dlkernels
