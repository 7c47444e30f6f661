// The focal-loss family in plain eager mode: one C++ call from Python to the kernel, with its autograd node. CPU
// tensors go to the loops, CUDA tensors of the sigmoid form to the operators of CUDA C++.
//
// It takes only what needs no conversion and no error message; for the rest it answers None and Python's path, which
// checks, converts and explains, goes on. Second derivatives leave through the dispatcher's differentiable operators.
#include "focal_loss_eager.h"

#include <ATen/ops/full.h>
#include <ATen/record_function.h>

#include <cmath>
#include <tuple>

#include "../common/eager.h"
#include "../common/host.h"
#include "../common/stored_node.h"
#include "focal_loss.h"

namespace py = pybind11;

namespace dlkernels {
namespace {

using torch::autograd::variable_list;

bool floating_target(const at::Tensor& t, const at::Tensor& x) {
  return (t.scalar_type() == x.scalar_type() || (t.scalar_type() == at::kFloat && x.scalar_type() != at::kDouble)) &&
         t.sizes() == x.sizes() && !wants_grad(t);
}

// The arguments that all the losses share; `ok` is false when the call is not for this path.
struct Common {
  at::Tensor input, target;
  int64_t reduction = kNone, ignore_index = 0;
  std::optional<double> normalizer;
  bool higher_order = true, ok = false;

  Common(PyObject* x, PyObject* t, PyObject* red, PyObject* ignore, PyObject* norm, PyObject* higher) {
    input = tensor_or_undefined(x);
    target = tensor_or_undefined(t);
    const auto code = reduction_code(red);
    const auto ignored = integer(ignore);
    if (!target.defined() || !code || !ignored || !PyBool_Check(higher)) return;
    if (!plain_eager() || !plain_floating_here(input) || !plain_here(target) || target.device() != input.device())
      return;
    reduction = *code;
    ignore_index = *ignored;
    higher_order = higher == Py_True;
    if (norm != Py_None) {
      normalizer = number(norm);
      if (!normalizer || reduction != kSum) return;
    }
    ok = true;
  }
};

using T = const at::Tensor&;
using Forward = std::tuple<at::Tensor, at::Tensor, at::Tensor>(T, T, const Optional&, double, double, int64_t, int64_t,
                                                               bool, bool);
using SigmoidBackward = at::Tensor(T, T, T, double, double, int64_t);
using SoftmaxBackward = at::Tensor(T, T, T, const Optional&, double, double, int64_t);

// Keeps the input and its target.
struct SigmoidNode : StoredGradNode<2> {
  SigmoidOptions options{};

  std::string name() const override { return "SigmoidFocalLossBackward"; }

  variable_list apply(variable_list&& grads) override {
    RECORD_FUNCTION("dlkernels::sigmoid_focal_loss_bwd", c10::ArrayRef<const c10::IValue>{});
    if (!grads[0].defined()) return variable_list(1);
    if (use_stored()) {
      if (!dropped) unpack();  // raises where the input was changed in place
      return {take(grads[0])};
    }
    const auto [input, target] = unpack();
    const SigmoidOptions& o = options;
    if (!stores && !at::GradMode::is_enabled() && plain_eager() && plain_cpu(grads[0]))
      return {sigmoid_focal_loss_backward(grads[0], input, target, o)};
    if (!stores && !at::GradMode::is_enabled() && plain_eager() && plain_gpu(grads[0])) {
      static const auto bwd = gpu_op<SigmoidBackward>("sigmoid_focal_loss_bwd");
      const at::AutoDispatchBelowADInplaceOrView guard;
      return {bwd.call(grads[0], input, target, o.alpha, o.gamma, o.ignore_index)};
    }
    static const auto bwd = op<SigmoidBackward>("dlkernels::sigmoid_focal_loss_bwd");
    const at::Tensor g = stores ? spread(grads[0], input.sizes()) : grads[0];
    return {bwd.call(g, input, target, o.alpha, o.gamma, o.ignore_index)};
  }
};

at::Tensor sigmoid_loss(const Common& call, const SigmoidOptions& o) {
  const at::Tensor &input = call.input, &target = call.target;
  const bool differentiable = wants_grad(input), stores = differentiable && call.reduction != kNone;
  LossResult result;
  at::Tensor divisor_on_gpu;
  if (plain_gpu(input)) {
    static const auto fwd = gpu_op<Forward>("sigmoid_focal_loss_fwd");
    const at::AutoDispatchBelowADInplaceOrView guard;
    std::tie(result.loss, result.grad, divisor_on_gpu) = fwd.call(
        input, target, std::nullopt, o.alpha, o.gamma, o.ignore_index, call.reduction, stores, call.higher_order);
  } else {
    result = sigmoid_focal_loss_forward(input, target, o, call.reduction, call.normalizer, stores);
  }
  if (!differentiable) return result.loss;
  auto node = std::make_unique<SigmoidNode>();
  node->options = o;
  node->keep(std::move(result.grad), stores, result.divisor, call.higher_order);
  node->divisor_on_gpu = divisor_on_gpu;
  return SigmoidNode::attach(std::move(node), result.loss, {input, target}, input);
}

// Keeps the input, its target and the weights of classes.
struct SoftmaxNode : StoredGradNode<3> {
  SoftmaxOptions options{};

  std::string name() const override { return "SoftmaxFocalLossBackward"; }

  variable_list apply(variable_list&& grads) override {
    RECORD_FUNCTION("dlkernels::softmax_focal_loss_bwd", c10::ArrayRef<const c10::IValue>{});
    if (!grads[0].defined()) return variable_list(1);
    if (use_stored()) {
      if (!dropped) unpack();  // raises where the input was changed in place
      return {take(grads[0])};
    }
    const auto [input, target, weight] = unpack();
    const SoftmaxOptions& o = options;
    if (!stores && !at::GradMode::is_enabled() && plain_eager() && plain_cpu(grads[0]))
      return {softmax_focal_loss_backward(grads[0], input, target, weight, o)};
    static const auto bwd = op<SoftmaxBackward>("dlkernels::softmax_focal_loss_bwd");
    at::DimVector rows(input.sizes());
    rows.erase(rows.begin() + 1);
    const at::Tensor g = stores ? spread(grads[0], rows) : grads[0];
    return {bwd.call(g, input, target, optional(weight), o.gamma, o.label_smoothing, o.ignore_index)};
  }
};

at::Tensor softmax_loss(const Common& call, const at::Tensor& weight, const SoftmaxOptions& o) {
  const at::Tensor &input = call.input, &target = call.target;
  const bool differentiable = wants_grad(input), stores = differentiable && call.reduction != kNone;
  LossResult result = softmax_focal_loss_forward(input, target, weight, o, call.reduction, call.normalizer, stores);
  if (!differentiable) return result.loss;
  auto node = std::make_unique<SoftmaxNode>();
  node->options = o;
  node->options.mean_of_weights = false;  // that was the divisor's
  node->keep(std::move(result.grad), stores, result.divisor, call.higher_order);
  return SoftmaxNode::attach(std::move(node), result.loss, {input, target, weight}, input);
}

py::object sigmoid_focal_loss(py::handle x, py::handle t, py::handle alpha, py::handle gamma, py::handle reduction,
                              py::handle ignore_index, py::handle normalizer, py::handle higher_order) {
  const Common call(x.ptr(), t.ptr(), reduction.ptr(), ignore_index.ptr(), normalizer.ptr(), higher_order.ptr());
  if (!call.ok) return none();
  const auto a = alpha.is_none() ? -1.0 : number(alpha.ptr()), g = number(gamma.ptr());
  if (!a || !g || !(*a <= 1.0) || !(*g >= 0.0) || !std::isfinite(*g)) return none();
  const at::Tensor& input = call.input;
  const at::Tensor& target = call.target;
  const auto type = target.scalar_type();
  const bool in_place_order = input.is_contiguous() || input.strides() == target.strides();
  if (target.is_floating_point()) {
    if (!floating_target(target, input)) return none();
  } else {
    const bool elements = target.sizes() == input.sizes();
    const bool classes = !elements && input.dim() > 0 && target.sizes() == input.sizes().slice(0, input.dim() - 1);
    if (!(type == at::kLong || type == at::kInt || type == at::kByte || (type == at::kBool && elements))) return none();
    if (!elements && !(classes && input.is_contiguous())) return none();
  }
  if (!in_place_order || !input.is_non_overlapping_and_dense()) return none();
  if (plain_gpu(input) && (call.normalizer || !input.is_contiguous() || !target.is_contiguous())) return none();
  const SigmoidOptions options{*a < 0 ? -1.0 : *a, *g, call.ignore_index};
  return without_gil([&] {
    RECORD_FUNCTION("dlkernels::sigmoid_focal_loss_fwd", c10::ArrayRef<const c10::IValue>{});
    return sigmoid_loss(call, options);
  });
}

py::object softmax_focal_loss(py::handle x, py::handle t, py::handle alpha, py::handle gamma, py::handle reduction,
                              py::handle ignore_index, py::handle label_smoothing, py::handle normalizer,
                              py::handle mean_of_weights, py::handle higher_order) {
  const Common call(x.ptr(), t.ptr(), reduction.ptr(), ignore_index.ptr(), normalizer.ptr(), higher_order.ptr());
  if (!call.ok) return none();
  const auto g = number(gamma.ptr()), eps = number(label_smoothing.ptr());
  if (!plain_cpu(call.input)) return none();  // Triton's
  if (!g || !eps || !(*g >= 0.0) || !std::isfinite(*g) || !(*eps >= 0.0 && *eps <= 1.0)) return none();
  const at::Tensor& input = call.input;
  const at::Tensor& target = call.target;
  if (input.dim() < 2 || input.size(1) == 0) return none();
  if (target.is_floating_point()) {
    if (!floating_target(target, input) || call.ignore_index >= 0 || !(input.is_contiguous() && target.is_contiguous()))
      return none();
  } else {
    const auto type = target.scalar_type();
    if (!(type == at::kLong || type == at::kInt) || target.dim() != input.dim() - 1) return none();
    if (target.size(0) != input.size(0)) return none();
    for (int64_t d = 1; d < target.dim(); ++d)
      if (target.size(d) != input.size(d + 1)) return none();
    if (!input.is_non_overlapping_and_dense()) return none();
  }
  at::Tensor weight;
  if (!alpha.is_none()) {
    const auto type = accumulate_type(input);
    if (const auto value = number(alpha.ptr())) {
      if (!(*value >= 0.0 && *value <= 1.0) || mean_of_weights.ptr() == Py_True) return none();
      weight = at::full({input.size(1)}, *value, input.options().dtype(type));
    } else {
      weight = tensor_or_undefined(alpha.ptr());
      if (!weight.defined() || !plain_cpu(weight) || weight.dim() != 1 || weight.size(0) != input.size(1) ||
          weight.scalar_type() != type || !weight.is_contiguous() || wants_grad(weight))
        return none();
    }
  }
  const SoftmaxOptions options{*g, *eps, call.ignore_index, mean_of_weights.ptr() == Py_True};
  return without_gil([&] {
    RECORD_FUNCTION("dlkernels::softmax_focal_loss_fwd", c10::ArrayRef<const c10::IValue>{});
    return softmax_loss(call, weight, options);
  });
}

}  // namespace

void bind_focal_loss(py::module_& m) {
  m.def("sigmoid_focal_loss", torch::wrap_pybind_function(sigmoid_focal_loss));
  m.def("softmax_focal_loss", torch::wrap_pybind_function(softmax_focal_loss));
}

}  // namespace dlkernels
