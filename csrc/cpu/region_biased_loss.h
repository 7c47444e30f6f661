// The region biased loss of CPU tensors: what the operators and the eager node share.
#pragma once

#include "../common/loss.h"

namespace dlkernels {

struct RegionBiasedOptions {
  int64_t origin;  // in [0, R)
  double margin;
  bool softmax;
};

// attention (N, R); mask (N, R), bool, or an undefined tensor; both contiguous, and checked by the caller.
LossResult region_biased_loss_forward(const at::Tensor& attention, const at::Tensor& mask,
                                      const RegionBiasedOptions& options, int64_t reduction, bool need_grad);
// grad_output (N,), any strides.
at::Tensor region_biased_loss_backward(const at::Tensor& grad_output, const at::Tensor& attention,
                                       const at::Tensor& mask, const RegionBiasedOptions& options);

}  // namespace dlkernels
