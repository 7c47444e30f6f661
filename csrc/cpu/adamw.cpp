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

class AdamWLoop final : public StepLoop {
 public:
  explicit AdamWLoop(const StepCommon& common) : common_(common) {}

  void add_row(const std::vector<double>& values, int64_t t) override {
    const double lr = values[0], decay_rate = values[1], sign = values[2], beta1 = values[3], beta2 = values[4];
    AdamWScalars s{};
    s.multiplier = sign * common_.factor;
    s.keep = 1 - lr * decay_rate;
    s.step_size = lr / (1 - std::pow(beta1, t));
    s.beta1 = beta1, s.beta2 = beta2, s.eps = values[5];
    s.inv_sqrt_correction2 = 1 / std::sqrt(1 - std::pow(beta2, t));
    s.average_decay = common_.average_decay;
    s.rounding = {common_.rounds, common_.seed, t};
    rows_.push_back(s);
  }

  void run(const StepTensor& tensor, int64_t begin, int64_t end) const override {
    kernels().step(tensor, rows_[tensor.row], begin, end);
  }

 private:
  StepCommon common_;
  std::vector<AdamWScalars> rows_;
};

}  // namespace

OptimizerFamily adamw_family() {
  return {6, [](const StepCommon& c) -> std::unique_ptr<StepLoop> { return std::make_unique<AdamWLoop>(c); },
          kernels().squares};
}

}  // namespace dlkernels
