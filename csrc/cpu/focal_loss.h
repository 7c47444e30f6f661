// The focal-loss family on CPU tensors: what the operators and the eager nodes share.
#pragma once

#include <optional>

#include "../common/loss.h"

namespace dlkernels {

struct SigmoidOptions {
  double alpha, gamma;  // alpha < 0: off
  int64_t ignore_index;
};

struct SoftmaxOptions {
  double gamma, label_smoothing;
  int64_t ignore_index;
  bool mean_of_weights;
};

// Shapes and dtypes are checked by the caller; integer targets are checked here (IndexError).
LossResult sigmoid_focal_loss_forward(const at::Tensor& input, const at::Tensor& target, const SigmoidOptions& options,
                                      int64_t reduction, std::optional<double> normalizer, bool need_grad);
at::Tensor sigmoid_focal_loss_backward(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& target,
                                       const SigmoidOptions& options);
LossResult softmax_focal_loss_forward(const at::Tensor& input, const at::Tensor& target, const at::Tensor& weight,
                                      const SoftmaxOptions& options, int64_t reduction,
                                      std::optional<double> normalizer, bool need_grad);
at::Tensor softmax_focal_loss_backward(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& target,
                                       const at::Tensor& weight, const SoftmaxOptions& options);

}  // namespace dlkernels
