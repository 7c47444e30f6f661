// A light autograd node of a loss whose forward pass wrote its gradient.
#pragma once

#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/graph_task.h>

#include <cmath>
#include <string>

#include "eager.h"
#include "host.h"
#include "node.h"

namespace dlkernels {

// N: how many tensors are kept beside the gradient, none of them with higher_order=False.
template <size_t N>
class StoredGradNode : public LightNode<N> {
 public:
  at::Tensor stored;     // undefined for reduction="none"
  bool stores = false;   // there was a stored gradient
  double divisor = 1.0;  // of the reduction
  bool dropped = false;  // the inputs are not kept

  void release_variables() override {
    LightNode<N>::release_variables();
    const std::lock_guard<std::mutex> lock(this->mutex_);
    stored.reset();
  }

 protected:
  // stored * grad_output: in place when the graph is freed after this pass, nothing at all when the factor is 1; a copy
  // when the graph is kept. float16 was stored undivided.
  at::Tensor take(const at::Tensor& grad_output) {
    const bool kept = torch::autograd::get_current_graph_task_keep_graph();
    at::Tensor grad;
    {
      const std::lock_guard<std::mutex> lock(this->mutex_);
      grad = kept ? stored : std::exchange(stored, at::Tensor());
    }
    TORCH_CHECK(grad.defined(),
                "Trying to backward through the graph a second time: the stored gradient has been used. Specify "
                "retain_graph=True for the first pass if a second one is needed.");
    const double by = grad.scalar_type() == at::kHalf ? divisor : 1.0;
    if (!plain_eager() || !plain_cpu(grad_output)) return grad.mul(grad_output.div(by));  // batched gradients
    const double scale =
        *value_of(grad_output.scalar_type() == at::kDouble ? grad_output : grad_output.to(at::kFloat)) / by;
    // As a tensor: a plain number would be rounded to the gradient's dtype first.
    const at::Tensor factor = at::scalar_tensor(scale, at::TensorOptions().dtype(at::kDouble));
    if (!std::isfinite(scale)) return grad.mul(factor).masked_fill_(grad.eq(0), 0);  // zeros stay zeros
    if (kept) return grad.mul(factor);
    return scale == 1.0 ? grad : grad.mul_(factor);
  }

  // For second derivatives: the gradient of the reduced loss as one of every row, differentiable.
  at::Tensor spread(const at::Tensor& grad_output, int64_t rows) const {
    return stores ? grad_output.div(divisor).expand({rows}) : grad_output;
  }

  void check_kept() const {
    TORCH_CHECK(!dropped,
                "this loss kept its gradient but not its input: pass higher_order=True (the default) to the loss to "
                "keep its input for second derivatives");
  }
};

}  // namespace dlkernels
