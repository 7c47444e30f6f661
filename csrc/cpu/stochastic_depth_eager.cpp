// Stochastic depth in plain eager mode on CPU tensors: one C++ call from Python to the kernel, the mask drawn on the
// way, with its autograd node.
#include "stochastic_depth_eager.h"

#include <ATen/record_function.h>

#include "../common/eager.h"
#include "../common/host.h"
#include "stochastic_depth.h"

namespace py = pybind11;

namespace dlkernels {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct StochasticDepthNode : torch::autograd::Function<StochasticDepthNode> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& input, const std::optional<at::Tensor>& residual,
                            const at::Tensor& noise) {
    ctx->save_for_backward({noise});
    ctx->saved_data["last"] = channels_last(input);
    ctx->saved_data["has_residual"] = residual.has_value();
    return stochastic_depth_forward(input, noise, value_or_undefined(residual));
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    RECORD_FUNCTION("dlkernels::stochastic_depth_fwd", c10::ArrayRef<const c10::IValue>{});
    const at::Tensor noise = ctx->get_saved_variables()[0], &g = grads[0];
    const at::Tensor dresidual = ctx->saved_data["has_residual"].toBool() ? g : at::Tensor();
    if (!ctx->needs_input_grad(0)) return {{}, dresidual, {}};
    const bool last = ctx->saved_data["last"].toBool();
    if (!at::GradMode::is_enabled() && plain_eager() && plain_cpu(g)) {
      const bool in_place = last ? channels_last(g) : g.is_contiguous();
      const at::Tensor rows = in_place ? g : last ? g.movedim(1, -1).contiguous().movedim(-1, 1) : g.contiguous();
      return {stochastic_depth_forward(rows, noise, {}), dresidual, {}};
    }
    static const auto fwd = op<at::Tensor(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&)>(
        "dlkernels::stochastic_depth_fwd");
    const at::Tensor order = last ? g.movedim(1, -1) : g;
    const at::Tensor dx =
        fwd.call(order.reshape({noise.numel(), g.numel() / std::max<int64_t>(1, noise.numel())}), noise, std::nullopt)
            .reshape(order.sizes());
    return {last ? dx.movedim(-1, 1) : dx, dresidual, {}};
  }
};

py::object stochastic_depth(py::handle input_object, py::handle p_object, py::handle mode, py::handle training,
                            py::handle residual_object, py::handle noise_object) {
  const at::Tensor input = tensor_or_undefined(input_object.ptr());
  if (!plain_eager() || !plain_floating(input) || training.ptr() != Py_True) return none();
  const auto p = number(p_object.ptr());
  if (!p || !(*p > 0.0 && *p <= 1.0) || !PyUnicode_CheckExact(mode.ptr())) return none();
  const bool row = PyUnicode_CompareWithASCIIString(mode.ptr(), "row") == 0;
  if (!row && PyUnicode_CompareWithASCIIString(mode.ptr(), "batch") != 0) return none();
  if (input.dim() < 1 || !(input.is_contiguous() || channels_last(input))) return none();
  const int64_t rows = row ? input.size(0) : 1;
  at::Tensor residual, noise;
  if (!residual_object.is_none()) {
    residual = tensor_or_undefined(residual_object.ptr());
    if (!plain_floating(residual) || residual.scalar_type() != input.scalar_type() || residual.sizes() != input.sizes())
      return none();
  }
  if (!noise_object.is_none()) {
    noise = tensor_or_undefined(noise_object.ptr());
    const bool half = input.scalar_type() == at::kHalf || input.scalar_type() == at::kBFloat16;
    if (!plain_floating(noise) || noise.numel() != rows || noise.requires_grad() || !noise.is_contiguous() ||
        !(noise.scalar_type() == input.scalar_type() || (half && noise.scalar_type() == at::kFloat)) ||
        !(noise.dim() == 1 || (noise.dim() == input.dim() && noise.size(0) == rows)))
      return none();
  }
  return without_gil([&] {
    RECORD_FUNCTION("dlkernels::stochastic_depth_fwd", c10::ArrayRef<const c10::IValue>{});
    if (!noise.defined()) {
      const at::NoGradGuard guard;
      noise = at::empty({rows}, input.options()).bernoulli_(1.0 - *p);
      if (*p < 1.0) noise.div_(1.0 - *p);
    }
    if (wants_grad(input) || wants_grad(residual)) return StochasticDepthNode::apply(input, optional(residual), noise);
    return stochastic_depth_forward(input, noise, residual);
  });
}

}  // namespace

void bind_stochastic_depth(py::module_& m) { m.def("stochastic_depth", torch::wrap_pybind_function(stochastic_depth)); }

}  // namespace dlkernels
