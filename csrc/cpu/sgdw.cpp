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

class SgdwLoop final : public StepLoop {
 public:
  explicit SgdwLoop(const StepCommon& common) : common_(common) {}

  void add_row(const std::vector<double>& values, int64_t t) override {
    const double lr = values[0], decay_rate = values[1], sign = values[2];
    const bool paper = values[4] != 0;
    SgdwScalars s{};
    s.multiplier = sign * common_.factor;
    s.keep = 1 - lr * decay_rate;
    s.momentum = values[3];
    s.gain = paper ? lr : 1;
    s.rate = paper ? 1 : lr;
    s.nesterov = values[5] != 0;
    s.average_decay = common_.average_decay;
    s.rounding = {common_.rounds, common_.seed, t};
    rows_.push_back(s);
  }

  void run(const StepTensor& tensor, int64_t begin, int64_t end) const override {
    kernels().step(tensor, rows_[tensor.row], begin, end);
  }

 private:
  StepCommon common_;
  std::vector<SgdwScalars> rows_;
};

}  // namespace

OptimizerFamily sgdw_family() {
  return {6, [](const StepCommon& c) -> std::unique_ptr<StepLoop> { return std::make_unique<SgdwLoop>(c); },
          kernels().squares};
}

}  // namespace dlkernels
