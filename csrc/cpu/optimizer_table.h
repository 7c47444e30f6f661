// The pointers of a fused optimizer step on CPU tensors, kept between steps; and what each family adds to it.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "../common/optimizer.h"

namespace dlkernels {

// What is the same for all parameters of a step.
struct StepCommon {
  double factor;  // of every gradient: unscaling and clipping
  double average_decay;
  bool rounds;
  uint64_t seed;
};

// The scalars of one step, ready for the loops.
class StepLoop {
 public:
  virtual ~StepLoop() = default;
  // The scalars of a row from its numbers (dlkernels/optim/_items.py, Scalars) and the step being made, from 1 on.
  virtual void add_row(const std::vector<double>& values, int64_t t) = 0;
  virtual void run(const StepTensor& tensor, int64_t begin, int64_t end) const = 0;
};

// The loop of a family: its kernel, and how it makes the scalars of a row.
template <class Scalars>
class RowLoop final : public StepLoop {
 public:
  using Make = Scalars (*)(const std::vector<double>& values, int64_t t);  // what is the family's own
  using Step = void (*)(const StepTensor&, const Scalars&, int64_t begin, int64_t end);
  RowLoop(const StepCommon& common, Make make, Step step) : common_(common), make_(make), step_(step) {}

  void add_row(const std::vector<double>& values, int64_t t) override {
    Scalars s = make_(values, t);
    s.multiplier = values[2] * common_.factor;
    s.keep = 1 - values[0] * values[1];
    s.average_decay = common_.average_decay;
    s.rounding = {common_.rounds, common_.seed, t};
    rows_.push_back(s);
  }
  void run(const StepTensor& tensor, int64_t begin, int64_t end) const override {
    step_(tensor, rows_[tensor.row], begin, end);
  }

 private:
  StepCommon common_;
  Make make_;
  Step step_;
  std::vector<Scalars> rows_;
};

struct OptimizerFamily {
  size_t values;  // numbers in a row
  std::unique_ptr<StepLoop> (*loop)(const StepCommon&);
  double (*squares)(const void* grad, Float dtype, int64_t begin, int64_t end);
};

OptimizerFamily adamw_family();
OptimizerFamily sgdw_family();

void bind_optimizers(pybind11::module_& m);

}  // namespace dlkernels
