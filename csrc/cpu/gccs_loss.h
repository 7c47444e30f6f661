// The GCCS loss on CPU tensors: what the operators and the eager node share.
#pragma once

#include "../common/loss.h"

namespace dlkernels {

struct GccsOptions {
  double target_mean, target_std, eps, kurtosis_weight;
  int64_t ignore_index;
};

// features (N, D) and labels (N,), int32 or int64, contiguous. Labels are checked here (IndexError), the rest by the
// caller. grad_output: (D,).
LossResult gccs_loss_forward(const at::Tensor& features, const at::Tensor& labels, const GccsOptions& options,
                             int64_t reduction, bool need_grad);
at::Tensor gccs_loss_backward(const at::Tensor& grad_output, const at::Tensor& features, const at::Tensor& labels,
                              const GccsOptions& options);

}  // namespace dlkernels
