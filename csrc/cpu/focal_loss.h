// The focal-loss family on CPU tensors: what the operators and the eager nodes share.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace dlkernels {

enum Reduction : int64_t { kNone = 0, kMean = 1, kSum = 2 };

struct LossResult {
  at::Tensor loss;  // float32 (float64): per element or row, or a scalar
  at::Tensor grad;  // in the input's dtype and layout, divided by divisor except in float16; undefined if not asked for
  double divisor;   // of the reduction
};

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
