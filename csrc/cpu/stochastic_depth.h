// Stochastic depth of CPU tensors: what the operator and the eager node share.
#pragma once

#include <ATen/core/Tensor.h>

namespace dlkernels {

// residual + noise[row] * input; input is dense with its rows one after another in memory, the residual (or an
// undefined tensor) is brought to its layout, noise has one element per row. Shapes and dtypes are checked by the
// caller.
at::Tensor stochastic_depth_forward(const at::Tensor& input, const at::Tensor& noise, const at::Tensor& residual);

}  // namespace dlkernels
