// Squeeze-and-excitation in plain eager mode: one C++ call from Python to the kernel, with its autograd node. CPU
// tensors go to the loops, CUDA tensors to the operators of CUDA C++.
//
// Second derivatives and batched gradients leave through the dispatcher's differentiable operators.
#include "squeeze_excite_eager.h"

#include <ATen/record_function.h>

#include "../common/eager.h"
#include "../common/node.h"
#include "squeeze_excite.h"

namespace py = pybind11;

namespace dlkernels {
namespace {

using torch::autograd::variable_list;

// A weight as a matrix: [R, C, 1, 1] of a 1x1 convolution too.
at::Tensor matrix(const at::Tensor& w) { return w.defined() && w.dim() > 2 ? w.flatten(1) : w; }

// A channels-first view of what has its channels last: the layout of the result follows from its strides.
at::Tensor channels_first(const at::Tensor& x, bool channels_inner) {
  return x.defined() && channels_inner ? x.movedim(-1, 1) : x;
}

using T = const at::Tensor&;
using Forward = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>(T, const Optional&, const Optional&, T,
                                                                           const Optional&, const Optional&, int64_t,
                                                                           int64_t, int64_t, bool);
using Backward = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>(
    T, T, T, T, T, const Optional&, const Optional&, T, const Optional&, const Optional&, int64_t, int64_t, int64_t,
    bool);

SqueezeExciteResult forward_on_gpu(const SqueezeExciteTensors& t, const Rows& rows, const SqueezeExciteOptions& o) {
  static const auto fwd = gpu_op<Forward>("squeeze_excite_fwd");
  const Optional residual = t.residual.defined() ? optional(as_rows(t.residual, rows)) : std::nullopt;
  const auto [y, mean, hidden, gate] =
      fwd.call(as_rows(t.x, rows), optional(t.w1), optional(t.b1), t.w2, optional(t.b2), residual, o.activation, o.gate,
               o.residual_activation, rows.channels_last);
  return {from_rows(y, t.x, rows), mean, hidden, gate};
}

// Keeps x, mean, hidden, gate, w1, b1, w2, b2, residual (with an activation); x and residual as they were given.
struct SqueezeExciteNode : LightNode<9> {
  SqueezeExciteOptions options{};
  bool channels_inner = false, has_residual = false;

  std::string name() const override { return "SqueezeExciteBackward"; }

  variable_list apply(variable_list&& grads) override {
    RECORD_FUNCTION("dlkernels::squeeze_excite_bwd", c10::ArrayRef<const c10::IValue>{});
    const auto saved = unpack();
    if (!grads[0].defined()) return variable_list(6);
    const at::Tensor x = channels_first(saved[0], channels_inner);
    const at::Tensor dy = channels_first(grads[0], channels_inner);
    const at::Tensor residual = channels_first(saved[8], channels_inner);
    const Rows rows = rows_of(x);
    SqueezeExciteGrads g;
    if (!at::GradMode::is_enabled() && plain_eager() && plain_cpu(grads[0])) {
      g = squeeze_excite_backward(dy, {x, matrix(saved[4]), saved[5], matrix(saved[6]), saved[7], residual},
                                  {at::Tensor(), saved[1], saved[2], saved[3]}, rows, options);
    } else if (!at::GradMode::is_enabled() && plain_eager() && plain_gpu(grads[0])) {
      static const auto bwd = gpu_op<Backward>("squeeze_excite_bwd");
      const at::AutoDispatchBelowADInplaceOrView guard;
      g = by_operator(bwd, dy, x, residual, saved, rows, options);
    } else {
      static const auto bwd = op<Backward>("dlkernels::squeeze_excite_bwd");
      g = by_operator(bwd, dy, x, residual, saved, rows, options);
    }
    const auto back = [&](const at::Tensor& d) { return d.defined() && channels_inner ? d.movedim(1, -1) : d; };
    const auto shaped = [](const at::Tensor& d, const at::Tensor& w) {
      return d.defined() && d.dim() != w.dim() ? d.reshape(w.sizes()) : d;
    };
    const at::Tensor dresidual = has_residual && !options.residual_activation ? grads[0] : back(g.residual);
    return {back(g.x), shaped(g.w1, saved[4]), g.b1, shaped(g.w2, saved[6]), g.b2, dresidual};
  }

  static SqueezeExciteGrads by_operator(const c10::TypedOperatorHandle<Backward>& bwd, const at::Tensor& dy,
                                        const at::Tensor& x, const at::Tensor& residual,
                                        const std::array<at::Tensor, 9>& saved, const Rows& rows,
                                        const SqueezeExciteOptions& o) {
    const Optional r = residual.defined() ? optional(as_rows(residual, rows)) : std::nullopt;
    const auto [dx, dw1, db1, dw2, db2, dr] =
        bwd.call(as_rows(dy, rows), as_rows(x, rows), saved[1], saved[2], saved[3], optional(matrix(saved[4])),
                 optional(saved[5]), matrix(saved[6]), optional(saved[7]), r, o.activation, o.gate,
                 o.residual_activation, rows.channels_last);
    const auto if_given = [](const at::Tensor& g, const at::Tensor& t) { return t.defined() ? g : at::Tensor(); };
    return {from_rows(dx, x, rows),  if_given(dw1, saved[4]),
            if_given(db1, saved[5]), dw2,
            if_given(db2, saved[7]), r ? from_rows(dr, x, rows) : at::Tensor()};
  }
};

bool is_matrix(const at::Tensor& w, const at::Tensor& x, int64_t outputs, int64_t inputs) {
  if (!plain_floating_here(w) || w.device() != x.device() || w.dim() < 2 || w.size(1) != inputs ||
      (outputs >= 0 && w.size(0) != outputs))
    return false;
  return w.size(0) > 0 && w.numel() == w.size(0) * inputs && fits_parameter(w, x, w.sizes());
}

py::object squeeze_excite(py::handle input, py::handle w1, py::handle b1, py::handle w2, py::handle b2,
                          py::handle activation, py::handle gate, py::handle residual, py::handle residual_activation,
                          py::handle layout) {
  const auto act = activation_code(activation.ptr()), after = activation_code(residual_activation.ptr());
  const auto gate_code = code_of(gate.ptr(), {"sigmoid", "hard_sigmoid", "relu"});
  const auto order = code_of(layout.ptr(), {"channels_first", "channels_last", "tokens"});
  const at::Tensor given_x = tensor_or_undefined(input.ptr());
  // gelu_tanh (5) and none (0) are no hidden activations.
  if (!act || *act < 1 || *act > 4 || !after || !gate_code || !order || !plain_eager() ||
      !plain_floating_here(given_x) || given_x.dim() < 2 || given_x.numel() == 0 || (*order == 2 && given_x.dim() != 3))
    return none();
  const at::Tensor x = channels_first(given_x.detach(), *order > 0);
  const Rows rows = rows_of(x);
  if (!rows.dense) return none();
  SqueezeExciteTensors t{given_x, {}, {}, tensor_or_undefined(w2.ptr()), {}, {}};
  int64_t hidden = rows.c;
  if (w1.is_none()) {
    if (!b1.is_none()) return none();
  } else {
    t.w1 = tensor_or_undefined(w1.ptr());
    if (!t.w1.defined() || !is_matrix(t.w1, x, -1, rows.c)) return none();
    hidden = t.w1.size(0);
  }
  if (!t.w2.defined() || !is_matrix(t.w2, x, rows.c, hidden) || !take_parameter(b1.ptr(), x, {hidden}, t.b1) ||
      !take_parameter(b2.ptr(), x, {rows.c}, t.b2) || !take_like(residual.ptr(), given_x, t.residual) ||
      (*after && !t.residual.defined()))
    return none();
  const SqueezeExciteOptions o{*act, *gate_code, *after};
  return without_gil([&] {
    RECORD_FUNCTION("dlkernels::squeeze_excite_fwd", c10::ArrayRef<const c10::IValue>{});
    const bool inner = *order > 0;
    SqueezeExciteResult r;
    {
      const at::AutoDispatchBelowADInplaceOrView guard;  // views without a history
      const SqueezeExciteTensors seen{x, matrix(t.w1), t.b1, matrix(t.w2), t.b2, channels_first(t.residual, inner)};
      r = plain_gpu(x) ? forward_on_gpu(seen, rows, o) : squeeze_excite_forward(seen, rows, o);
      if (inner) r.y = r.y.movedim(1, -1);
    }
    if (!(wants_grad(given_x) || wants_grad(t.w1) || wants_grad(t.b1) || wants_grad(t.w2) || wants_grad(t.b2) ||
          wants_grad(t.residual)))
      return r.y;
    auto node = std::make_unique<SqueezeExciteNode>();
    node->options = o;
    node->channels_inner = inner;
    node->has_residual = t.residual.defined();
    return SqueezeExciteNode::attach(
        std::move(node), r.y,
        {given_x, r.mean, r.hidden, r.gate, t.w1, t.b1, t.w2, t.b2, o.residual_activation ? t.residual : at::Tensor()},
        given_x, t.w1, t.b1, t.w2, t.b2, t.residual);
  });
}

}  // namespace

void bind_squeeze_excite(py::module_& m) { m.def("squeeze_excite", torch::wrap_pybind_function(squeeze_excite)); }

}  // namespace dlkernels
