// The region biased loss in plain eager mode on CPU tensors: one C++ call from Python to the kernel, with its autograd
// node. What needs a conversion or an error message is answered with None, and Python's path goes on.
#include "region_biased_loss_eager.h"

#include <ATen/record_function.h>

#include <cmath>

#include "../common/stored_node.h"
#include "region_biased_loss.h"

namespace py = pybind11;

namespace dlkernels {
namespace {

using torch::autograd::variable_list;

struct RegionBiasedLossNode : StoredGradNode<2> {
  RegionBiasedOptions options{};

  std::string name() const override { return "RegionBiasedLossBackward"; }

  variable_list apply(variable_list&& grads) override {
    RECORD_FUNCTION("dlkernels::region_biased_loss_bwd", c10::ArrayRef<const c10::IValue>{});
    const at::Tensor& g = grads[0];
    if (!g.defined()) return {at::Tensor()};
    if (use_stored()) {
      if (!dropped) unpack();  // raises where the attention was changed in place
      return {take(g)};
    }
    const auto [attention, mask] = unpack();
    if (!at::GradMode::is_enabled() && plain_eager() && plain_cpu(g))
      return {region_biased_loss_backward(g, attention, mask, options)};
    static const auto bwd =
        op<at::Tensor(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, int64_t, double, bool)>(
            "dlkernels::region_biased_loss_bwd");
    return {bwd.call(stores ? spread(g, {attention.size(0)}) : g, attention, optional(mask), options.origin,
                     options.margin, options.softmax)};
  }
};

py::object region_biased_loss(py::handle attention_object, py::handle origin_index, py::handle margin,
                              py::handle normalize, py::handle mask_object, py::handle reduction_object,
                              py::handle higher_order) {
  const at::Tensor attention = tensor_or_undefined(attention_object.ptr());
  const auto origin = integer(origin_index.ptr());
  const auto by = number(margin.ptr());
  const auto softmax = code_of(normalize.ptr(), {"", "softmax"});
  const auto reduction = reduction_code(reduction_object.ptr());
  if (!origin || !by || !softmax || !reduction || !PyBool_Check(higher_order.ptr())) return none();
  if (!plain_eager() || !plain_floating(attention) || attention.dim() != 2 || !attention.is_contiguous()) return none();
  const int64_t regions = attention.size(1);
  if (regions < 1 || regions > (int64_t{1} << 24) || *origin < -regions || *origin >= regions || !std::isfinite(*by))
    return none();
  at::Tensor mask;
  if (!mask_object.is_none()) {
    mask = tensor_or_undefined(mask_object.ptr());
    if (!mask.defined() || !plain_cpu(mask) || mask.scalar_type() != at::kBool || mask.sizes() != attention.sizes() ||
        !mask.is_contiguous())
      return none();
  }
  const RegionBiasedOptions options{*origin < 0 ? *origin + regions : *origin, *by, *softmax == 1};
  return without_gil([&] {
    RECORD_FUNCTION("dlkernels::region_biased_loss_fwd", c10::ArrayRef<const c10::IValue>{});
    const bool wants = wants_grad(attention), stores = wants && *reduction != kNone;
    const LossResult result = region_biased_loss_forward(attention, mask, options, *reduction, stores);
    if (!wants) return result.loss;
    auto node = std::make_unique<RegionBiasedLossNode>();
    node->options = options;
    node->keep(result.grad, stores, result.divisor, higher_order.ptr() == Py_True);
    return RegionBiasedLossNode::attach(std::move(node), result.loss, {attention, mask}, attention);
  });
}

}  // namespace

void bind_region_biased_loss(py::module_& m) {
  m.def("region_biased_loss", torch::wrap_pybind_function(region_biased_loss));
}

}  // namespace dlkernels
