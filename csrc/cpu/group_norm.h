// GroupNorm on CPU tensors: what the operators and the eager node share.
#pragma once

#include <ATen/core/Tensor.h>

#include "../common/layer.h"

namespace dlkernels {

struct GroupNormOptions {
  int64_t groups;
  double eps;
  int64_t activation;
};

// Undefined tensors stand for what is not given. Everything dense, in the order that `rows` says; parameters
// contiguous.
struct GroupNormTensors {
  at::Tensor x, weight, bias, residual, scale, shift;
};

struct GroupNormResult {
  at::Tensor y, mean, rstd;
};

struct GroupNormGrads {
  at::Tensor x, weight, bias, residual, scale, shift;
};

GroupNormResult group_norm_forward(const GroupNormTensors& t, const Rows& rows, const GroupNormOptions& o);

// The residual's gradient is written only with an activation; without one it is grad_output.
GroupNormGrads group_norm_backward(const at::Tensor& grad_output, const GroupNormTensors& t, const at::Tensor& mean,
                                   const at::Tensor& rstd, const Rows& rows, const GroupNormOptions& o);

}  // namespace dlkernels
