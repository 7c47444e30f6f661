// What the host sides of all losses share: reductions, results, stored gradients, labels.
#pragma once

#include <ATen/core/Tensor.h>

#include "host.h"

namespace dlkernels {

enum Reduction : int64_t { kNone = 0, kMean = 1, kSum = 2 };

struct LossResult {
  at::Tensor loss;  // float32 (float64): per element or row, or a scalar
  at::Tensor grad;  // in the input's dtype and layout, divided by divisor except in float16; undefined if not asked for
  double divisor;   // of the reduction
};

// What a stored gradient is multiplied by. float16 keeps it undivided: 1 / N would underflow before a loss scale can
// help.
inline double stored_scale(const at::Tensor& grad, double divisor) {
  return grad.scalar_type() == at::kHalf ? 1.0 : 1.0 / divisor;
}

// grad_output (M,) as the loops read it: one value after another, or one for all. The tensor returned holds it.
template <class Args>
at::Tensor read_grad_output(Args& args, const at::Tensor& grad_output, const at::Tensor& input) {
  at::Tensor g = grad_output.to(accumulate_type(input));
  if (g.stride(0) != 0) g = g.contiguous();
  args.grad_output = g.const_data_ptr();
  args.grad_output_step = g.stride(0) == 0 ? 0 : 1;
  return g;
}

// f(pointer to int32 or int64 labels).
template <class F>
auto with_labels(const at::Tensor& labels, F f) {
  return labels.scalar_type() == at::kInt ? f(labels.const_data_ptr<int32_t>()) : f(labels.const_data_ptr<int64_t>());
}

}  // namespace dlkernels
