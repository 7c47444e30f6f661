// scale_stored_grad on CPU tensors, and the eager node's use of it.
#include "../common/stored_grad.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/jit/frontend/tracer.h>
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

void keep_stored_grad(torch::autograd::AutogradContext* ctx, const at::Tensor& grad, double divisor) {
  ctx->saved_data["grad"] = grad;
  ctx->saved_data["divisor"] = grad.scalar_type() == at::kHalf ? divisor : 1.0;
}

at::Tensor scale_stored_grad(at::Tensor& stored, double divisor, const at::Tensor& grad_output) {
  if (!plain_eager() || !plain_cpu(grad_output)) return stored.mul(grad_output.div(divisor));  // batched gradients
  const double scale = factor(grad_output, std::nullopt) / divisor;
  if (torch::autograd::get_current_graph_task_keep_graph()) return scaled(stored, scale);
  const at::Tensor last = std::move(stored);  // .grad takes the buffer over without a copy
  return std::isfinite(scale) ? (scale == 1.0 ? last : last.mul_(as_tensor(scale))) : scaled(last, scale);
}

at::Tensor take_stored_grad(torch::autograd::AutogradContext* ctx, const at::Tensor& grad_output) {
  const auto found = ctx->saved_data.find("grad");
  TORCH_CHECK(found != ctx->saved_data.end(), kStoredGradUsed);
  at::Tensor stored = found->second.toTensor();
  const double divisor = ctx->saved_data["divisor"].toDouble();
  const at::Tensor grad = scale_stored_grad(stored, divisor, grad_output);
  if (!stored.defined()) ctx->saved_data.erase("grad");  // that was the last use
  return grad;
}

bool plain_eager() {
  using c10::DispatchKey;
  return !c10::impl::tls_is_dispatch_key_included(DispatchKey::FuncTorchDynamicLayerFrontMode) &&
         !c10::impl::TorchDispatchModeTLS::any_modes_set() && !torch::jit::tracer::isTracing();
}

bool plain_cpu(const at::Tensor& x) {
  return x.is_cpu() && x.has_storage() && x.layout() == at::kStrided && !x.key_set().has(c10::DispatchKey::Python) &&
         !x.is_neg() && !x._is_zerotensor();
}

TORCH_LIBRARY_IMPL(dlkernels, CPU, m) { m.impl("scale_stored_grad", scale_stored_grad_op); }

}  // namespace dlkernels
