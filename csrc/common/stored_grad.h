// A loss whose forward pass wrote its gradient: what its backward pass does with it.
#pragma once

#include <torch/csrc/autograd/custom_function.h>

namespace dlkernels {

// Keeps the gradient (float16: undivided, so the divisor too) with the node.
void keep_stored_grad(torch::autograd::AutogradContext* ctx, const at::Tensor& grad, double divisor);

// stored * grad_output: in place when the graph is freed after this pass, nothing at all when grad_output is 1;
// a copy when the graph is kept. Raises torch's message on a second pass through a freed graph.
at::Tensor take_stored_grad(torch::autograd::AutogradContext* ctx, const at::Tensor& grad_output);

// The same for a node that keeps its gradient itself: stored * grad_output / divisor. Taken out of `stored` when this
// is its last use, so that .grad can take the buffer over.
at::Tensor scale_stored_grad(at::Tensor& stored, double divisor, const at::Tensor& grad_output);

constexpr const char* kStoredGradUsed =
    "Trying to backward through the graph a second time: the stored gradient has been used. Specify "
    "retain_graph=True for the first pass if a second one is needed.";
constexpr const char* kInputDropped =
    "this loss kept its gradient but not its input: pass higher_order=True (the default) to the loss to keep its input "
    "for second derivatives";

}  // namespace dlkernels
