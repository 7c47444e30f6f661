// scale_stored_grad on CPU tensors, and the eager node's use of it.
#include "../common/stored_grad.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>

#include <cmath>

#include "../common/eager.h"
#include "../common/host.h"

namespace dlkernels {
namespace {

double factor(const at::Tensor& grad_output, const std::optional<at::Tensor>& divisor) {
  const double g = *value_of(grad_output.scalar_type() == at::kDouble ? grad_output : grad_output.to(at::kFloat));
  return divisor.has_value() ? g / *value_of(divisor) : g;
}

// As a tensor: a plain number would be rounded to the gradient's dtype first, and a large loss scale lost in float16.
at::Tensor as_tensor(double scale) { return at::scalar_tensor(scale, at::TensorOptions().dtype(at::kDouble)); }

// A copy of stored, scaled; where nothing counted (a divisor of 0) zeros stay zeros: no 0 * inf.
at::Tensor scaled(const at::Tensor& stored, double scale) {
  const at::Tensor out = stored.mul(as_tensor(scale));
  return std::isfinite(scale) ? out : out.masked_fill_(stored.eq(0), 0);
}

at::Tensor scale_stored_grad_op(const at::Tensor& grad_output, const at::Tensor& stored,
                                const std::optional<at::Tensor>& divisor) {
  return scaled(stored.contiguous(), factor(grad_output, divisor));
}

}  // namespace

at::Tensor scale_stored_grad(at::Tensor& stored, double divisor, const at::Tensor& grad_output) {
  if (!plain_eager() || !plain_cpu(grad_output)) return stored.mul(grad_output.div(divisor));  // batched gradients
  const double scale = factor(grad_output, std::nullopt) / divisor;
  if (torch::autograd::get_current_graph_task_keep_graph()) return scaled(stored, scale);
  const at::Tensor last = std::move(stored);  // .grad takes the buffer over without a copy
  return std::isfinite(scale) ? (scale == 1.0 ? last : last.mul_(as_tensor(scale))) : scaled(last, scale);
}

at::Tensor scale_stored_grad_on_gpu(at::Tensor& stored, const at::Tensor& divisor, const at::Tensor& grad_output) {
  if (!plain_eager() || !plain_gpu(grad_output)) {  // batched gradients
    const at::Tensor scaled = stored.mul(grad_output);
    return divisor.defined() ? scaled.div(divisor).to(stored.scalar_type()) : scaled;
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  if (torch::autograd::get_current_graph_task_keep_graph()) {
    static const auto scale =
        gpu_op<at::Tensor(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&)>("scale_stored_grad");
    return scale.call(grad_output, stored, optional(divisor));
  }
  static const auto scale_ =
      gpu_op<void(at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&)>("scale_stored_grad_");
  at::Tensor last = std::move(stored);  // .grad takes the buffer over without a copy
  scale_.call(last, grad_output, optional(divisor));
  return last;
}

TORCH_LIBRARY_IMPL(dlkernels, CPU, m) { m.impl("scale_stored_grad", scale_stored_grad_op); }

}  // namespace dlkernels
