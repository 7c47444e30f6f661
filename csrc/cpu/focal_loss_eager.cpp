// The focal-loss family in plain eager mode on CPU tensors: one C++ call from Python to the kernel, with its autograd
// node.
//
// It takes only what needs no conversion and no error message; for the rest it answers None and Python's path, which
// checks, converts and explains, goes on. Second derivatives leave through the dispatcher's differentiable operators.
#include "focal_loss_eager.h"

#include <ATen/ops/full.h>
#include <ATen/record_function.h>
#include <torch/csrc/autograd/custom_function.h>

#include <cmath>

#include "../common/eager.h"
#include "../common/host.h"
#include "../common/stored_grad.h"
#include "focal_loss.h"

namespace py = pybind11;

namespace dlkernels {
namespace {

using torch::autograd::AutogradContext;
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
    if (!plain_eager() || !plain_floating(input) || !plain_cpu(target)) return;
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

// grad_output of the reduced loss as one of every row: differentiable, for second derivatives.
at::Tensor spread(const at::Tensor& grad_output, double divisor, at::IntArrayRef rows) {
  return grad_output.div(divisor).expand(rows);
}

struct SigmoidNode : torch::autograd::Function<SigmoidNode> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& input, const at::Tensor& target,
                            const SigmoidOptions& options, const Common& call) {
    const bool stores = call.reduction != kNone;
    LossResult result = sigmoid_focal_loss_forward(input, target, options, call.reduction, call.normalizer, stores);
    if (stores) keep_stored_grad(ctx, result.grad, result.divisor);
    const bool keep = !stores || call.higher_order;
    ctx->save_for_backward(keep ? variable_list{input, target} : variable_list{});
    ctx->saved_data["alpha"] = options.alpha;
    ctx->saved_data["gamma"] = options.gamma;
    ctx->saved_data["ignore_index"] = options.ignore_index;
    ctx->saved_data["total"] = result.divisor;
    ctx->saved_data["stores"] = stores;
    return result.loss;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    RECORD_FUNCTION("dlkernels::sigmoid_focal_loss_bwd", c10::ArrayRef<const c10::IValue>{});
    const variable_list saved = ctx->get_saved_variables();
    const bool stores = ctx->saved_data["stores"].toBool();
    if (stores && !at::GradMode::is_enabled()) return {take_stored_grad(ctx, grads[0]), {}, {}, {}};
    TORCH_CHECK(!saved.empty(), kInputDropped);
    const SigmoidOptions o{ctx->saved_data["alpha"].toDouble(), ctx->saved_data["gamma"].toDouble(),
                           ctx->saved_data["ignore_index"].toInt()};
    if (!at::GradMode::is_enabled() && plain_eager() && plain_cpu(grads[0]))
      return {sigmoid_focal_loss_backward(grads[0], saved[0], saved[1], o), {}, {}, {}};
    const at::Tensor g = stores ? spread(grads[0], ctx->saved_data["total"].toDouble(), saved[0].sizes()) : grads[0];
    static const auto bwd =
        op<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, double, double, int64_t)>(
            "dlkernels::sigmoid_focal_loss_bwd");
    return {bwd.call(g, saved[0], saved[1], o.alpha, o.gamma, o.ignore_index), {}, {}, {}};
  }
};

struct SoftmaxNode : torch::autograd::Function<SoftmaxNode> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& input, const at::Tensor& target,
                            const std::optional<at::Tensor>& class_weight, const SoftmaxOptions& options,
                            const Common& call) {
    const at::Tensor weight = class_weight.value_or(at::Tensor());
    const bool stores = call.reduction != kNone;
    LossResult result =
        softmax_focal_loss_forward(input, target, weight, options, call.reduction, call.normalizer, stores);
    if (stores) keep_stored_grad(ctx, result.grad, result.divisor);
    const bool keep = !stores || call.higher_order;
    ctx->save_for_backward(keep ? variable_list{input, target, weight} : variable_list{});
    ctx->saved_data["gamma"] = options.gamma;
    ctx->saved_data["label_smoothing"] = options.label_smoothing;
    ctx->saved_data["ignore_index"] = options.ignore_index;
    ctx->saved_data["total"] = result.divisor;
    ctx->saved_data["stores"] = stores;
    return result.loss;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    RECORD_FUNCTION("dlkernels::softmax_focal_loss_bwd", c10::ArrayRef<const c10::IValue>{});
    const variable_list saved = ctx->get_saved_variables();
    const bool stores = ctx->saved_data["stores"].toBool();
    if (stores && !at::GradMode::is_enabled()) return {take_stored_grad(ctx, grads[0]), {}, {}, {}, {}};
    TORCH_CHECK(!saved.empty(), kInputDropped);
    const SoftmaxOptions o{ctx->saved_data["gamma"].toDouble(), ctx->saved_data["label_smoothing"].toDouble(),
                           ctx->saved_data["ignore_index"].toInt(), false};
    if (!at::GradMode::is_enabled() && plain_eager() && plain_cpu(grads[0]))
      return {softmax_focal_loss_backward(grads[0], saved[0], saved[1], saved[2], o), {}, {}, {}, {}};
    at::DimVector rows(saved[0].sizes());
    rows.erase(rows.begin() + 1);
    const at::Tensor g = stores ? spread(grads[0], ctx->saved_data["total"].toDouble(), rows) : grads[0];
    static const auto bwd =
        op<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, double,
                      double, int64_t)>("dlkernels::softmax_focal_loss_bwd");
    const std::optional<at::Tensor> weight = saved[2].defined() ? std::make_optional(saved[2]) : std::nullopt;
    return {bwd.call(g, saved[0], saved[1], weight, o.gamma, o.label_smoothing, o.ignore_index), {}, {}, {}, {}};
  }
};

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
  const SigmoidOptions options{*a < 0 ? -1.0 : *a, *g, call.ignore_index};
  return without_gil([&] {
    RECORD_FUNCTION("dlkernels::sigmoid_focal_loss_fwd", c10::ArrayRef<const c10::IValue>{});
    if (wants_grad(input)) return SigmoidNode::apply(input, target, options, call);
    return sigmoid_focal_loss_forward(input, target, options, call.reduction, call.normalizer, false).loss;
  });
}

py::object softmax_focal_loss(py::handle x, py::handle t, py::handle alpha, py::handle gamma, py::handle reduction,
                              py::handle ignore_index, py::handle label_smoothing, py::handle normalizer,
                              py::handle mean_of_weights, py::handle higher_order) {
  const Common call(x.ptr(), t.ptr(), reduction.ptr(), ignore_index.ptr(), normalizer.ptr(), higher_order.ptr());
  if (!call.ok) return none();
  const auto g = number(gamma.ptr()), eps = number(label_smoothing.ptr());
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
    if (wants_grad(input))
      return SoftmaxNode::apply(input, target, weight.defined() ? std::make_optional(weight) : std::nullopt, options,
                                call);
    return softmax_focal_loss_forward(input, target, weight, options, call.reduction, call.normalizer, false).loss;
  });
}

}  // namespace

void bind_focal_loss(py::module_& m) {
  m.def("sigmoid_focal_loss", torch::wrap_pybind_function(sigmoid_focal_loss));
  m.def("softmax_focal_loss", torch::wrap_pybind_function(softmax_focal_loss));
}

}  // namespace dlkernels
