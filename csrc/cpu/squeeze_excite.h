// Squeeze-and-excitation on CPU tensors: what the operators and the eager node share.
#pragma once

#include <ATen/core/Tensor.h>

#include "../common/layer.h"

namespace dlkernels {

struct SqueezeExciteOptions {
  int64_t activation, gate, residual_activation;
};

// Undefined tensors stand for what is not given. Everything dense, in the order that `rows` says; weights contiguous,
// w1 [R, C] and w2 [C, R] with any trailing ones.
struct SqueezeExciteTensors {
  at::Tensor x, w1, b1, w2, b2, residual;
};

struct SqueezeExciteResult {
  at::Tensor y, mean, hidden, gate;
};

struct SqueezeExciteGrads {
  at::Tensor x, w1, b1, w2, b2, residual;
};

SqueezeExciteResult squeeze_excite_forward(const SqueezeExciteTensors& t, const Rows& rows,
                                           const SqueezeExciteOptions& o);

// `saved.y` is not looked at. The residual's gradient is written only with an activation; without one it is
// grad_output.
SqueezeExciteGrads squeeze_excite_backward(const at::Tensor& grad_output, const SqueezeExciteTensors& t,
                                           const SqueezeExciteResult& saved, const Rows& rows,
                                           const SqueezeExciteOptions& o);

}  // namespace dlkernels
