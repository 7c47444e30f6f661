// A light autograd node of a loss whose forward pass wrote its gradient.
#pragma once

#include <utility>

#include "eager.h"
#include "node.h"
#include "stored_grad.h"

namespace dlkernels {

// N: how many tensors are kept beside the gradient, none of them with higher_order=False.
template <size_t N>
class StoredGradNode : public LightNode<N> {
 public:
  at::Tensor stored;          // undefined for reduction="none"
  bool stores = false;        // there was a stored gradient
  double divisor = 1.0;       // of the reduction
  at::Tensor divisor_on_gpu;  // there, instead
  bool dropped = false;       // the inputs are not kept

  // What the forward pass left: a gradient where it stored one, and with that no inputs unless they are asked for.
  void keep(at::Tensor grad, bool has_stored, double by, bool higher_order) {
    stored = std::move(grad);
    stores = has_stored;
    divisor = by;
    dropped = has_stored && !higher_order;
  }

  // As LightNode's; `kept` is let go where the inputs are dropped.
  template <class T, class... Inputs>
  static at::Tensor attach(std::unique_ptr<T> made, at::Tensor output, std::array<at::Tensor, N> kept,
                           const Inputs&... inputs) {
    if (made->dropped) kept = {};
    return LightNode<N>::attach(std::move(made), std::move(output), kept, inputs...);
  }

  void release_variables() override {
    LightNode<N>::release_variables();
    const std::lock_guard<std::mutex> lock(this->mutex_);
    stored.reset();
  }

 protected:
  // stored * grad_output: in place when the graph is freed after this pass, nothing at all when the factor is 1; a copy
  // when the graph is kept. float16 was stored undivided.
  at::Tensor take(const at::Tensor& grad_output) { return take(stored, grad_output); }
  at::Tensor take(at::Tensor& from, const at::Tensor& grad_output) {
    const std::lock_guard<std::mutex> lock(this->mutex_);
    TORCH_CHECK(from.defined(), kStoredGradUsed);
    const bool undivided = from.scalar_type() == at::kHalf;
    if (plain_gpu(from)) return scale_stored_grad_on_gpu(from, undivided ? divisor_on_gpu : at::Tensor(), grad_output);
    return scale_stored_grad(from, undivided ? divisor : 1.0, grad_output);
  }

  // For second derivatives: the gradient of the reduced loss as one of every row, differentiable.
  at::Tensor spread(const at::Tensor& grad_output, at::IntArrayRef rows) const {
    const at::Tensor g = divisor_on_gpu.defined() ? grad_output.div(divisor_on_gpu) : grad_output.div(divisor);
    return g.expand(rows);
  }

  // Whether this pass needs no more than what is stored; else the inputs have to be there.
  bool use_stored() const {
    const bool enough = stores && !at::GradMode::is_enabled();
    TORCH_CHECK(enough || !dropped, kInputDropped);
    return enough;
  }
};

}  // namespace dlkernels
