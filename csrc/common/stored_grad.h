// A loss whose forward pass wrote its gradient: what its backward pass does with it.
#pragma once

#include <ATen/core/Tensor.h>

namespace dlkernels {

// stored * grad_output / divisor: in place when the graph is freed after this pass, nothing at all when the factor is
// 1; a copy when the graph is kept. Taken out of `stored` when this is its last use, so that .grad can take the buffer
// over.
at::Tensor scale_stored_grad(at::Tensor& stored, double divisor, const at::Tensor& grad_output);

// The same on a GPU, where `divisor` is a tensor, or undefined for 1.
at::Tensor scale_stored_grad_on_gpu(at::Tensor& stored, const at::Tensor& divisor, const at::Tensor& grad_output);

constexpr const char* kStoredGradUsed =
    "Trying to backward through the graph a second time: the stored gradient has been used. Specify "
    "retain_graph=True for the first pass if a second one is needed.";
constexpr const char* kInputDropped =
    "this loss kept its gradient but not its input: pass higher_order=True (the default) to the loss to keep its input "
    "for second derivatives";

}  // namespace dlkernels
