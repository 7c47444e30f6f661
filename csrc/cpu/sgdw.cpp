// SGDW on CPU tensors: the scalars of a step. The loops are in sgdw_kernel.cpp, once per instruction set.
#include "../common/host.h"
#include "optimizer_table.h"
#include "sgdw_kernel.h"

namespace dlkernels {
namespace {

const SgdwKernels& kernels() {
  static const SgdwKernels table = DL_KERNELS_OF_THIS_MACHINE(sgdw_kernels);
  return table;
}

SgdwScalars scalars(const std::vector<double>& values, int64_t) {
  const double lr = values[0];
  const bool paper = values[4] != 0;
  SgdwScalars s{};
  s.momentum = values[3];
  s.gain = paper ? lr : 1;
  s.rate = paper ? 1 : lr;
  s.nesterov = values[5] != 0;
  return s;
}

std::unique_ptr<StepLoop> loop(const StepCommon& common) {
  return std::make_unique<RowLoop<SgdwScalars>>(common, scalars, kernels().step);
}

}  // namespace

OptimizerFamily sgdw_family() { return {6, loop, kernels().squares}; }

}  // namespace dlkernels
