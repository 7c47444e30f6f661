// The GCCS loss in plain eager mode on CPU tensors: one C++ call from Python to the kernel, with its autograd node.
// What needs a conversion or an error message is answered with None, and Python's path goes on.
#include "gccs_loss_eager.h"

#include <ATen/record_function.h>

#include <cmath>

#include "../common/stored_node.h"
#include "gccs_loss.h"

namespace py = pybind11;

namespace dlkernels {
namespace {

using torch::autograd::variable_list;

struct GccsLossNode : StoredGradNode<2> {
  GccsOptions options{};

  std::string name() const override { return "GCCSLossBackward"; }

  variable_list apply(variable_list&& grads) override {
    RECORD_FUNCTION("dlkernels::gccs_loss_bwd", c10::ArrayRef<const c10::IValue>{});
    const at::Tensor& g = grads[0];
    if (!g.defined()) return {at::Tensor()};
    if (use_stored()) {
      if (!dropped) unpack();  // raises where the features were changed in place
      return {take(g)};
    }
    const auto [features, labels] = unpack();
    if (!at::GradMode::is_enabled() && plain_eager() && plain_cpu(g))
      return {gccs_loss_backward(g, features, labels, options)};
    static const auto bwd = op<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, double, double,
                                          double, double, int64_t)>("dlkernels::gccs_loss_bwd");
    return {bwd.call(stores ? spread(g, {features.size(1)}) : g, features, labels, options.target_mean,
                     options.target_std, options.eps, options.kurtosis_weight, options.ignore_index)};
  }
};

py::object gccs_loss(py::handle features_object, py::handle labels_object, py::handle target_mean,
                     py::handle target_std, py::handle covariance, py::handle kurtosis_weight,
                     py::handle reduction_object, py::handle ignore_index, py::handle eps, py::handle higher_order) {
  const at::Tensor features = tensor_or_undefined(features_object.ptr());
  const at::Tensor labels = tensor_or_undefined(labels_object.ptr());
  const auto mean = number(target_mean.ptr()), std = number(target_std.ptr()), ridge = number(eps.ptr()),
             weight = number(kurtosis_weight.ptr());
  const auto ignored = integer(ignore_index.ptr());
  const auto reduction = reduction_code(reduction_object.ptr());
  if (!mean || !std || !ridge || !weight || !ignored || !reduction || !PyBool_Check(higher_order.ptr())) return none();
  if (code_of(covariance.ptr(), {"diagonal"}) != 0) return none();
  if (!std::isfinite(*mean) || !(*std >= 1e-150 && *std <= 1e150) || !(*ridge >= 0) || !std::isfinite(*ridge) ||
      !(*weight >= 0) || !std::isfinite(*weight))
    return none();
  if (!plain_eager() || !plain_floating(features) || features.dim() != 2 || !features.is_contiguous() ||
      features.size(1) < 1)
    return none();
  if (!labels.defined() || !plain_cpu(labels) || !labels.is_contiguous() ||
      labels.sizes() != features.sizes().slice(0, 1) ||
      !(labels.scalar_type() == at::kLong || labels.scalar_type() == at::kInt))
    return none();
  const GccsOptions options{*mean, *std, *ridge, *weight, *ignored};
  return without_gil([&] {
    RECORD_FUNCTION("dlkernels::gccs_loss_fwd", c10::ArrayRef<const c10::IValue>{});
    const bool wants = wants_grad(features), stores = wants && *reduction != kNone;
    const LossResult result = gccs_loss_forward(features, labels, options, *reduction, stores);
    if (!wants) return result.loss;
    auto node = std::make_unique<GccsLossNode>();
    node->options = options;
    node->keep(result.grad, stores, result.divisor, higher_order.ptr() == Py_True);
    return GccsLossNode::attach(std::move(node), result.loss, {features, labels}, features);
  });
}

}  // namespace

void bind_gccs_loss(py::module_& m) { m.def("gccs_loss", torch::wrap_pybind_function(gccs_loss)); }

}  // namespace dlkernels
