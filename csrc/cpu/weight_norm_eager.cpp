// Weight normalisation in plain eager mode: one C++ call from Python to the kernel, with its autograd node. CPU tensors
// go to the loops, CUDA tensors to the operators of CUDA C++.
#include "weight_norm_eager.h"

#include <ATen/record_function.h>

#include "../common/eager.h"
#include "../common/host.h"
#include "../common/node.h"
#include "weight_norm.h"

namespace py = pybind11;

namespace dlkernels {
namespace {

using torch::autograd::variable_list;

// Dimensions in memory order, for a contiguous or channels_last tensor: those before `dim`, itself, those behind.
WeightNormView memory_view(const at::Tensor& v, std::optional<int64_t> dim, bool last) {
  if (!dim) return {1, 1, v.numel()};
  const int64_t rank = v.dim();
  const int64_t position = !last || *dim == 0 ? *dim : *dim == 1 ? rank - 1 : *dim - 1;
  WeightNormView view{1, v.size(*dim), 1};
  for (int64_t i = 0; i < rank; ++i) {
    const int64_t size = v.size(!last || i == 0 ? i : i == rank - 1 ? 1 : i + 1);
    if (i < position) view.outer *= size;
    if (i > position) view.inner *= size;
  }
  return view;
}

// The tensor as the operators take it: [outer, rows, inner].
at::Tensor rows_of(const at::Tensor& x, bool last, WeightNormView view) {
  return (last ? x.movedim(1, -1) : x).reshape({view.outer, view.rows, view.inner});
}

at::Tensor from_rows(const at::Tensor& x, bool last, const at::Tensor& like) {
  if (!last) return x.reshape(like.sizes());
  return x.reshape(like.movedim(1, -1).sizes()).movedim(-1, 1);
}

using T = const at::Tensor&;
using Backward = std::tuple<at::Tensor, at::Tensor>(T, T, T, T);

std::tuple<at::Tensor, at::Tensor> forward_on_gpu(const at::Tensor& v, const at::Tensor& g, bool last,
                                                  WeightNormView view) {
  static const auto fwd = gpu_op<std::tuple<at::Tensor, at::Tensor>(T, T)>("weight_norm_fwd");
  const at::AutoDispatchBelowADInplaceOrView guard;
  auto [w, norm] = fwd.call(rows_of(v, last, view), g.reshape({view.rows}));
  return {from_rows(w, last, v), norm};
}

struct WeightNormNode : LightNode<3> {
  WeightNormView view{};
  bool last = false;

  std::string name() const override { return "WeightNormBackward"; }

  variable_list apply(variable_list&& grads) override {
    RECORD_FUNCTION("dlkernels::weight_norm_bwd", c10::ArrayRef<const c10::IValue>{});
    const auto [v, g, norm] = unpack();
    if (!grads[0].defined()) return {at::Tensor(), at::Tensor()};
    if (!at::GradMode::is_enabled() && plain_eager() && plain_cpu(grads[0])) {
      auto [dv, dg] = weight_norm_backward(grads[0], v, g, norm, view);
      return {dv, dg};
    }
    if (!at::GradMode::is_enabled() && plain_eager() && plain_gpu(grads[0])) {
      static const auto on_gpu = gpu_op<Backward>("weight_norm_bwd");
      const at::AutoDispatchBelowADInplaceOrView guard;
      return by_operator(on_gpu, grads[0], v, g, norm);
    }
    static const auto bwd = op<Backward>("dlkernels::weight_norm_bwd");
    return by_operator(bwd, grads[0], v, g, norm);
  }

  variable_list by_operator(const c10::TypedOperatorHandle<Backward>& bwd, const at::Tensor& grad_output,
                            const at::Tensor& v, const at::Tensor& g, const at::Tensor& norm) const {
    auto [dv, dg] = bwd.call(rows_of(grad_output, last, view), rows_of(v, last, view), g.reshape({view.rows}), norm);
    return {from_rows(dv, last, v), dg.reshape(g.sizes())};
  }
};

py::object weight_norm(py::handle v_object, py::handle g_object, py::handle dim_object) {
  const at::Tensor v = tensor_or_undefined(v_object.ptr()), g = tensor_or_undefined(g_object.ptr());
  if (!plain_eager() || !plain_floating_here(v) || !plain_floating_here(g) || v.device() != g.device()) return none();
  std::optional<int64_t> dim;
  if (!dim_object.is_none()) {
    dim = integer(dim_object.ptr());
    if (!dim || *dim < -v.dim() || *dim >= v.dim()) return none();
    if (*dim == -1) dim.reset();  // the whole tensor, as in torch
    else if (*dim < 0) *dim += v.dim();
  }
  const bool half = v.scalar_type() == at::kHalf || v.scalar_type() == at::kBFloat16;
  if (g.scalar_type() != v.scalar_type() && !(half && g.scalar_type() == at::kFloat)) return none();
  const bool last = channels_last(v);
  if (!(last || v.is_contiguous()) || !g.is_contiguous()) return none();
  if (dim) {
    if (g.dim() != v.dim()) return none();
    for (int64_t i = 0; i < v.dim(); ++i)
      if (g.size(i) != (i == *dim ? v.size(i) : 1)) return none();
  } else if (g.numel() != 1 || g.dim() > v.dim()) {
    return none();
  }
  return without_gil([&] {
    RECORD_FUNCTION("dlkernels::weight_norm_fwd", c10::ArrayRef<const c10::IValue>{});
    const WeightNormView view = memory_view(v, dim, last);
    const auto [w, norm] = plain_gpu(v) ? forward_on_gpu(v, g, last, view) : weight_norm_forward(v, g, view);
    if (!wants_grad(v) && !wants_grad(g)) return w;
    auto node = std::make_unique<WeightNormNode>();
    node->view = view;
    node->last = last;
    return WeightNormNode::attach(std::move(node), w, {v, g, norm}, v, g);
  });
}

}  // namespace

void bind_weight_norm(py::module_& m) { m.def("weight_norm", torch::wrap_pybind_function(weight_norm)); }

}  // namespace dlkernels
