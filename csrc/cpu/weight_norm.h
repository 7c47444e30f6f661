// Weight normalisation of CPU tensors: what the operators and the eager node share.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

namespace dlkernels {

// A dense tensor seen as [outer, rows, inner] in memory order: one norm per row, over outer and inner.
struct WeightNormView {
  int64_t outer, rows, inner;
};

// v and the result have one layout; g has view.rows elements. Shapes and dtypes are checked by the caller.
// Forward: w like v, and the norms, (K,) float32 (float64).
std::tuple<at::Tensor, at::Tensor> weight_norm_forward(const at::Tensor& v, const at::Tensor& g, WeightNormView view);
// Backward: dv like v, dg like g.
std::tuple<at::Tensor, at::Tensor> weight_norm_backward(const at::Tensor& grad_output, const at::Tensor& v,
                                                        const at::Tensor& g, const at::Tensor& norm,
                                                        WeightNormView view);

}  // namespace dlkernels
