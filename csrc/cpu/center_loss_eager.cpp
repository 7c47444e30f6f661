// Center loss and sparse center loss in plain eager mode, with or without the centers' update: one C++ call from Python
// to the kernel, with its autograd node. CPU tensors go to the loops, CUDA tensors to the operators of CUDA C++.
#include "center_loss_eager.h"

#include <ATen/record_function.h>

#include <cmath>

#include "../common/eager.h"
#include "../common/host.h"
#include "../common/stored_node.h"
#include "center_loss.h"

namespace py = pybind11;

namespace dlkernels {
namespace {

using torch::autograd::variable_list;

using T = const at::Tensor&;
using Forward = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>(T, T, T, const Optional&, bool, int64_t,
                                                                           int64_t, bool, bool);
using Update = void(at::Tensor&, T, T, const Optional&, bool, double, bool, double, int64_t);
using Backward = std::tuple<at::Tensor, at::Tensor, at::Tensor>(T, T, T, T, const Optional&, bool, int64_t, bool);

// Keeps the gradients in features (`stored`) and attention, or what they are made from, or both.
struct CenterLossNode : StoredGradNode<4> {
  at::Tensor stored_attention;
  int64_t reduction = kNone, ignore_index = 0;
  bool logits = false;

  std::string name() const override { return "CenterLossBackward"; }

  void release_variables() override {
    StoredGradNode<4>::release_variables();
    const std::lock_guard<std::mutex> lock(mutex_);
    stored_attention.reset();
  }

  // With "none" what is stored are the gradients of each row's own loss.
  at::Tensor use(at::Tensor& from, const at::Tensor& grad_output) {
    if (reduction != kNone) return take(from, grad_output);
    TORCH_CHECK(from.defined(), kStoredGradUsed);
    return from.mul(grad_output.unsqueeze(1)).to(from.scalar_type());
  }

  variable_list apply(variable_list&& grads) override {
    RECORD_FUNCTION("dlkernels::center_loss_bwd", c10::ArrayRef<const c10::IValue>{});
    if (!grads[0].defined()) return {{}, {}, {}};
    if (use_stored()) {
      at::Tensor in_attention = stored_attention.defined() ? use(stored_attention, grads[0]) : at::Tensor();
      return {use(stored, grads[0]), {}, in_attention};
    }
    const auto [features, labels, centers, attention] = unpack();
    const bool need_centers = task_should_compute_output(1);
    const at::Tensor g = reduction == kNone ? grads[0] : spread(grads[0], labels.sizes());
    if (!at::GradMode::is_enabled() && plain_eager() && plain_cpu(grads[0])) {
      CenterLossGrads found =
          center_loss_backward(g, {features, labels, centers, attention, logits, ignore_index}, need_centers);
      return {found.dx, found.dcenters, found.dattention};
    }
    if (!at::GradMode::is_enabled() && plain_eager() && plain_gpu(grads[0])) {
      static const auto on_gpu = gpu_op<Backward>("center_loss_bwd");
      const at::AutoDispatchBelowADInplaceOrView guard;
      return by_operator(on_gpu, g, features, labels, centers, attention, need_centers);
    }
    static const auto bwd = op<Backward>("dlkernels::center_loss_bwd");
    return by_operator(bwd, g, features, labels, centers, attention, need_centers);
  }

  variable_list by_operator(const c10::TypedOperatorHandle<Backward>& bwd, const at::Tensor& g,
                            const at::Tensor& features, const at::Tensor& labels, const at::Tensor& centers,
                            const at::Tensor& attention, bool need_centers) const {
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

CenterLossResult forward_on_gpu(const CenterLossInputs& in, int64_t reduction, bool stores,
                                const std::optional<CenterUpdate>& update, at::Tensor& divisor) {
  static const auto fwd = gpu_op<Forward>("center_loss_fwd");
  const at::AutoDispatchBelowADInplaceOrView guard;
  const Optional attention = optional(in.attention);
  CenterLossResult result{};
  std::tie(result.loss, result.dx, result.dattention, divisor) =
      fwd.call(in.features, in.labels, in.centers, attention, in.logits, in.ignore_index, reduction, stores, true);
  if (!in.attention.defined()) result.dattention.reset();
  if (update) {
    static const auto update_centers = gpu_op<Update>("update_centers_");
    at::Tensor centers = in.centers;
    update_centers.call(centers, in.features, in.labels, attention, in.logits, update->alpha, update->ema,
                        update->island_weight, in.ignore_index);
  }
  return result;
}

py::object center_loss(py::handle features_object, py::handle labels_object, py::handle centers_object,
                       py::handle attention_object, py::handle logits_object, py::handle reduction_object,
                       py::handle ignore_object, py::handle higher_object, py::handle update_object) {
  const at::Tensor features = tensor_or_undefined(features_object.ptr());
  const at::Tensor labels = tensor_or_undefined(labels_object.ptr());
  const at::Tensor centers = tensor_or_undefined(centers_object.ptr());
  const auto reduction = reduction_code(reduction_object.ptr());
  const auto ignore_index = integer(ignore_object.ptr());
  if (!reduction || !ignore_index || !PyBool_Check(logits_object.ptr()) || !PyBool_Check(higher_object.ptr()))
    return none();
  if (!plain_eager() || !plain_floating_here(features) || !plain_floating_here(centers)) return none();
  if (!labels.defined() || !plain_here(labels) || !labels.is_contiguous()) return none();
  if (labels.device() != features.device() || centers.device() != features.device()) return none();
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
    at::Tensor divisor_on_gpu;
    CenterLossResult result = plain_gpu(features)
                                  ? forward_on_gpu(in, *reduction, stores, update, divisor_on_gpu)
                                  : center_loss_forward(in, *reduction, stores, update ? &*update : nullptr);
    if (update) centers.unsafeGetTensorImpl()->bump_version();
    if (!differentiable) return result.loss;
    auto node = std::make_unique<CenterLossNode>();
    node->reduction = *reduction;
    node->ignore_index = *ignore_index;
    node->logits = logits;
    node->keep(std::move(result.dx), stores, result.divisor, higher_object.ptr() == Py_True);
    node->divisor_on_gpu = divisor_on_gpu;
    node->stored_attention = std::move(result.dattention);
    return CenterLossNode::attach(std::move(node), result.loss, {features, labels, centers, attention}, features,
                                  centers, attention);
  });
}

}  // namespace

void bind_center_loss(py::module_& m) { m.def("center_loss", torch::wrap_pybind_function(center_loss)); }

}  // namespace dlkernels
