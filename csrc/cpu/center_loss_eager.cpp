// Center loss and sparse center loss in plain eager mode on CPU tensors, with or without the centers' update: one C++
// call from Python to the kernel, with its autograd node.
#include "center_loss_eager.h"

#include <ATen/record_function.h>

#include <cmath>

#include "../common/eager.h"
#include "../common/host.h"
#include "../common/node.h"
#include "../common/stored_grad.h"
#include "center_loss.h"

namespace py = pybind11;

namespace dlkernels {
namespace {

using torch::autograd::variable_list;

constexpr int64_t kNone = 0;

// Keeps the gradients in features and attention, or what they are made from, or both.
struct CenterLossNode : LightNode<4> {
  at::Tensor dx, dattention;
  int64_t reduction = kNone, ignore_index = 0;
  double divisor = 1;
  bool logits = false, stores = false, keeps = true;

  std::string name() const override { return "CenterLossBackward"; }

  void release_variables() override {
    LightNode<4>::release_variables();
    dx.reset(), dattention.reset();
  }

  at::Tensor take(at::Tensor& stored, const at::Tensor& grad_output) const {
    if (!stored.defined()) return {};
    if (reduction == kNone) return stored.mul(grad_output.unsqueeze(1)).to(stored.scalar_type());
    return scale_stored_grad(stored, stored.scalar_type() == at::kHalf ? divisor : 1.0, grad_output);
  }

  variable_list apply(variable_list&& grads) override {
    RECORD_FUNCTION("dlkernels::center_loss_bwd", c10::ArrayRef<const c10::IValue>{});
    if (!grads[0].defined()) return {{}, {}, {}};
    if (stores && !at::GradMode::is_enabled()) {
      TORCH_CHECK(dx.defined(), kStoredGradUsed);
      at::Tensor in_features = take(dx, grads[0]);
      return {in_features, {}, take(dattention, grads[0])};
    }
    TORCH_CHECK(keeps,
                "this loss kept its gradient but not its input: pass higher_order=True (the default) to the "
                "loss to keep its input for second derivatives");
    const auto [features, labels, centers, attention] = unpack();
    const bool need_centers = task_should_compute_output(1);
    const at::Tensor g = reduction == kNone ? grads[0] : grads[0].div(divisor).expand(labels.sizes());
    if (!at::GradMode::is_enabled() && plain_eager() && plain_cpu(grads[0])) {
      CenterLossGrads found =
          center_loss_backward(g, {features, labels, centers, attention, logits, ignore_index}, need_centers);
      return {found.dx, found.dcenters, found.dattention};
    }
    static const auto bwd = op<std::tuple<at::Tensor, at::Tensor, at::Tensor>(
        const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
        bool, int64_t, bool)>("dlkernels::center_loss_bwd");
    auto [in_features, in_centers, in_attention] =
        bwd.call(g, features, labels, centers, optional(attention), logits, ignore_index, need_centers);
    return {in_features, need_centers ? in_centers : at::Tensor(), attention.defined() ? in_attention : at::Tensor()};
  }
};

// (alpha, ema, island_weight), or None. False: not for this path.
bool take_update(PyObject* object, std::optional<CenterUpdate>& into) {
  if (object == Py_None) return true;
  if (!PyTuple_CheckExact(object) || PyTuple_GET_SIZE(object) != 3) return false;
  const auto alpha = number(PyTuple_GET_ITEM(object, 0)), island = number(PyTuple_GET_ITEM(object, 2));
  PyObject* ema = PyTuple_GET_ITEM(object, 1);
  if (!alpha || !island || !PyBool_Check(ema)) return false;
  if (!(*alpha >= 0 && *alpha <= 1) || !(*island >= 0) || !std::isfinite(*island)) return false;
  into = CenterUpdate{*alpha, ema == Py_True, *island};
  return true;
}

py::object center_loss(py::handle features_object, py::handle labels_object, py::handle centers_object,
                       py::handle attention_object, py::handle logits_object, py::handle reduction_object,
                       py::handle ignore_object, py::handle higher_object, py::handle update_object) {
  const at::Tensor features = tensor_or_undefined(features_object.ptr());
  const at::Tensor labels = tensor_or_undefined(labels_object.ptr());
  const at::Tensor centers = tensor_or_undefined(centers_object.ptr());
  const auto reduction = code_of(reduction_object.ptr(), {"none", "mean", "sum"});
  const auto ignore_index = integer(ignore_object.ptr());
  if (!reduction || !ignore_index || !PyBool_Check(logits_object.ptr()) || !PyBool_Check(higher_object.ptr()))
    return none();
  if (!plain_eager() || !plain_floating(features) || !plain_floating(centers)) return none();
  if (!labels.defined() || !plain_cpu(labels) || !labels.is_contiguous()) return none();
  if (labels.scalar_type() != at::kLong && labels.scalar_type() != at::kInt) return none();
  if (features.dim() != 2 || centers.dim() != 2 || labels.dim() != 1 || labels.size(0) != features.size(0))
    return none();
  if (!features.is_contiguous() || !fits_parameter(centers, features, {centers.size(0), features.size(1)}))
    return none();
  at::Tensor attention;
  if (!take_parameter(attention_object.ptr(), features, features.sizes(), attention)) return none();
  std::optional<CenterUpdate> update;
  if (!take_update(update_object.ptr(), update)) return none();
  const bool in_centers = wants_grad(centers), logits = logits_object.ptr() == Py_True;
  if (update && (centers.requires_grad() || centers.is_inference())) return none();
  return without_gil([&] {
    RECORD_FUNCTION("dlkernels::center_loss_fwd", c10::ArrayRef<const c10::IValue>{});
    const bool differentiable = wants_grad(features) || wants_grad(attention) || in_centers;
    const bool stores = differentiable && !in_centers && (*reduction != kNone || update);
    const CenterLossInputs in{features, labels, centers, attention, logits, *ignore_index};
    CenterLossResult result = center_loss_forward(in, *reduction, stores, update ? &*update : nullptr);
    if (update) centers.unsafeGetTensorImpl()->bump_version();
    if (!differentiable) return result.loss;
    auto node = std::make_unique<CenterLossNode>();
    node->reduction = *reduction;
    node->ignore_index = *ignore_index;
    node->divisor = result.divisor;
    node->logits = logits;
    node->stores = stores;
    node->keeps = !stores || higher_object.ptr() == Py_True;
    node->dx = std::move(result.dx);
    node->dattention = std::move(result.dattention);
    using Kept = std::array<at::Tensor, 4>;
    const Kept kept = node->keeps ? Kept{features, labels, centers, attention} : Kept{};
    return CenterLossNode::attach(std::move(node), result.loss, kept, features, centers, attention);
  });
}

}  // namespace

void bind_center_loss(py::module_& m) { m.def("center_loss", torch::wrap_pybind_function(center_loss)); }

}  // namespace dlkernels
