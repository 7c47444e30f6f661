// GroupNorm in plain eager mode: one C++ call from Python to the kernel, with its autograd node. CPU tensors go to the
// loops, CUDA tensors to the operators of CUDA C++.
//
// Second derivatives and batched gradients leave through the dispatcher's differentiable operators.
#include "group_norm_eager.h"

#include <ATen/record_function.h>

#include <cmath>

#include "../common/eager.h"
#include "../common/node.h"
#include "group_norm.h"

namespace py = pybind11;

namespace dlkernels {
namespace {

using torch::autograd::variable_list;

using T = const at::Tensor&;
using Forward = std::tuple<at::Tensor, at::Tensor, at::Tensor>(T, const Optional&, const Optional&, const Optional&,
                                                               const Optional&, const Optional&, int64_t, double,
                                                               int64_t, bool);
using Backward = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>(
    T, T, T, T, const Optional&, const Optional&, const Optional&, const Optional&, const Optional&, int64_t, double,
    int64_t, bool);

GroupNormResult forward_on_gpu(const GroupNormTensors& t, const Rows& rows, const GroupNormOptions& o) {
  static const auto fwd = gpu_op<Forward>("group_norm_fwd");
  const at::AutoDispatchBelowADInplaceOrView guard;
  const Optional residual = t.residual.defined() ? optional(as_rows(t.residual, rows)) : std::nullopt;
  const auto [y, mean, rstd] =
      fwd.call(as_rows(t.x, rows), optional(t.weight), optional(t.bias), residual, optional(t.scale), optional(t.shift),
               o.groups, o.eps, o.activation, rows.channels_last);
  return {from_rows(y, t.x, rows), mean, rstd};
}

// Keeps x, mean, rstd, weight, bias, residual (with an activation), scale, shift.
struct GroupNormNode : LightNode<8> {
  GroupNormOptions options{};
  bool has_residual = false;

  std::string name() const override { return "GroupNormBackward"; }

  variable_list apply(variable_list&& grads) override {
    RECORD_FUNCTION("dlkernels::group_norm_bwd", c10::ArrayRef<const c10::IValue>{});
    const auto saved = unpack();
    if (!grads[0].defined()) return variable_list(6);
    const at::Tensor &x = saved[0], &mean = saved[1], &rstd = saved[2];
    const Rows rows = rows_of(x);
    GroupNormGrads g;
    if (!at::GradMode::is_enabled() && plain_eager() && plain_cpu(grads[0])) {
      g = group_norm_backward(grads[0], {x, saved[3], saved[4], saved[5], saved[6], saved[7]}, mean, rstd, rows,
                              options);
    } else if (!at::GradMode::is_enabled() && plain_eager() && plain_gpu(grads[0])) {
      static const auto bwd = gpu_op<Backward>("group_norm_bwd");
      const at::AutoDispatchBelowADInplaceOrView guard;
      g = by_operator(bwd, grads[0], saved, rows, options);
    } else {
      static const auto bwd = op<Backward>("dlkernels::group_norm_bwd");
      g = by_operator(bwd, grads[0], saved, rows, options);
    }
    if (has_residual && !options.activation) g.residual = grads[0];
    return {g.x, g.weight, g.bias, g.residual, g.scale, g.shift};
  }

  static GroupNormGrads by_operator(const c10::TypedOperatorHandle<Backward>& bwd, const at::Tensor& grad_output,
                                    const std::array<at::Tensor, 8>& saved, const Rows& rows,
                                    const GroupNormOptions& o) {
    const at::Tensor& x = saved[0];
    const Optional residual = saved[5].defined() ? optional(as_rows(saved[5], rows)) : std::nullopt;
    const auto [dx, dw, db, dr, dscale, dshift] = bwd.call(
        as_rows(grad_output, rows), as_rows(x, rows), saved[1], saved[2], optional(saved[3]), optional(saved[4]),
        residual, optional(saved[6]), optional(saved[7]), o.groups, o.eps, o.activation, rows.channels_last);
    const auto if_given = [](const at::Tensor& g, const at::Tensor& t) { return t.defined() ? g : at::Tensor(); };
    return {from_rows(dx, x, rows),     if_given(dw, saved[3]),
            if_given(db, saved[4]),     residual ? from_rows(dr, x, rows) : at::Tensor(),
            if_given(dscale, saved[6]), if_given(dshift, saved[7])};
  }
};

py::object group_norm(py::handle input, py::handle num_groups, py::handle weight, py::handle bias, py::handle eps,
                      py::handle activation, py::handle residual, py::handle scale, py::handle shift) {
  const auto groups = integer(num_groups.ptr());
  const auto epsilon = number(eps.ptr());
  const auto code = activation_code(activation.ptr());
  const at::Tensor x = tensor_or_undefined(input.ptr());
  if (!groups || !epsilon || !code || !plain_eager() || !plain_floating_here(x) || x.dim() < 2) return none();
  const Rows rows = rows_of(x);
  if (*groups < 1 || !rows.dense || x.numel() == 0 || rows.c % *groups || rows.n * (rows.c / *groups) * rows.s == 1)
    return none();
  GroupNormTensors t{x, {}, {}, {}, {}, {}};
  if (!take_parameter(weight.ptr(), x, {rows.c}, t.weight) || !take_parameter(bias.ptr(), x, {rows.c}, t.bias) ||
      !take_parameter(scale.ptr(), x, {rows.n, rows.c}, t.scale) ||
      !take_parameter(shift.ptr(), x, {rows.n, rows.c}, t.shift) || !take_like(residual.ptr(), x, t.residual))
    return none();
  const GroupNormOptions o{*groups, *epsilon, *code};
  return without_gil([&] {
    RECORD_FUNCTION("dlkernels::group_norm_fwd", c10::ArrayRef<const c10::IValue>{});
    const GroupNormResult r = plain_gpu(x) ? forward_on_gpu(t, rows, o) : group_norm_forward(t, rows, o);
    if (!(wants_grad(x) || wants_grad(t.weight) || wants_grad(t.bias) || wants_grad(t.residual) ||
          wants_grad(t.scale) || wants_grad(t.shift)))
      return r.y;
    auto node = std::make_unique<GroupNormNode>();
    node->options = o;
    node->has_residual = t.residual.defined();
    return GroupNormNode::attach(
        std::move(node), r.y,
        {x, r.mean, r.rstd, t.weight, t.bias, o.activation ? t.residual : at::Tensor(), t.scale, t.shift}, x, t.weight,
        t.bias, t.residual, t.scale, t.shift);
  });
}

}  // namespace

void bind_group_norm(py::module_& m) { m.def("group_norm", torch::wrap_pybind_function(group_norm)); }

}  // namespace dlkernels
