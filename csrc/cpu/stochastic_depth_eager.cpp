// Stochastic depth in plain eager mode on CPU tensors: one C++ call from Python to the kernel, the mask drawn on the
// way, with its autograd node.
#include "stochastic_depth_eager.h"

#include <ATen/record_function.h>

#include "../common/eager.h"
#include "../common/host.h"
#include "../common/node.h"
#include "stochastic_depth.h"

namespace py = pybind11;

namespace dlkernels {
namespace {

using torch::autograd::variable_list;

struct StochasticDepthNode : LightNode<1> {
  bool last = false, has_residual = false;

  std::string name() const override { return "StochasticDepthBackward"; }

  variable_list apply(variable_list&& grads) override {
    RECORD_FUNCTION("dlkernels::stochastic_depth_fwd", c10::ArrayRef<const c10::IValue>{});
    const auto [noise] = unpack();
    const at::Tensor& g = grads[0];
    variable_list result{at::Tensor()};
    if (has_residual) result.push_back(g);
    if (!g.defined() || !task_should_compute_output(0)) return result;
    if (!at::GradMode::is_enabled() && plain_eager() && plain_cpu(g)) {
      const bool in_place = last ? channels_last(g) : g.is_contiguous();
      const at::Tensor rows = in_place ? g : last ? g.movedim(1, -1).contiguous().movedim(-1, 1) : g.contiguous();
      result[0] = stochastic_depth_forward(rows, noise, {});
      return result;
    }
    static const auto fwd = op<at::Tensor(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&)>(
        "dlkernels::stochastic_depth_fwd");
    const at::Tensor order = last ? g.movedim(1, -1) : g;
    const at::Tensor dx =
        fwd.call(order.reshape({noise.numel(), g.numel() / std::max<int64_t>(1, noise.numel())}), noise, std::nullopt)
            .reshape(order.sizes());
    result[0] = last ? dx.movedim(-1, 1) : dx;
    return result;
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
    const at::Tensor y = stochastic_depth_forward(input, noise, residual);
    if (!wants_grad(input) && !wants_grad(residual)) return y;
    auto node = std::make_unique<StochasticDepthNode>();
    node->last = channels_last(input);
    node->has_residual = residual.defined();
    if (!residual.defined()) return StochasticDepthNode::attach(std::move(node), y, {noise}, input);
    return StochasticDepthNode::attach(std::move(node), y, {noise}, input, residual);
  });
}

}  // namespace

void bind_stochastic_depth(py::module_& m) { m.def("stochastic_depth", torch::wrap_pybind_function(stochastic_depth)); }

}  // namespace dlkernels
