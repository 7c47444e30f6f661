// Squeeze-and-excitation on CPU tensors: threads, outputs, registration. The loops are in squeeze_excite_kernel.cpp.
#include "squeeze_excite.h"

#include <ATen/ops/empty.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include "../common/host.h"
#include "squeeze_excite_kernel.h"

namespace dlkernels {
namespace {

const SqueezeExciteKernels& kernels() {
  static const SqueezeExciteKernels table = DL_KERNELS_OF_THIS_MACHINE(squeeze_excite_kernels);
  return table;
}

// The weights in the dtype of arithmetic; they stay alive with this.
struct Weights {
  at::Tensor w1, b1, w2, b2;

  explicit Weights(const SqueezeExciteTensors& t) {
    const auto dtype = accumulate_type(t.x);
    const auto converted = [&](const at::Tensor& w) { return w.defined() ? w.to(dtype) : w; };
    w1 = converted(t.w1), b1 = converted(t.b1), w2 = converted(t.w2), b2 = converted(t.b2);
  }
};

SqueezeExciteArgs arguments(const SqueezeExciteTensors& t, const Weights& w, const Rows& rows,
                            const SqueezeExciteOptions& o) {
  SqueezeExciteArgs a{};
  a.dtype = float_kind("x", t.x);
  a.n = rows.n, a.c = rows.c, a.s = rows.s, a.r = t.w1.defined() ? t.w1.size(0) : 0;
  a.channels_last = rows.channels_last || rows.s == 1;  // one position: the same memory, and channels fill the vectors
  a.activation = static_cast<int>(o.activation);
  a.gate = static_cast<int>(o.gate);
  a.residual_activation = static_cast<int>(o.residual_activation);
  a.w1 = data_or_null(w.w1), a.b1 = data_or_null(w.b1), a.w2 = data_or_null(w.w2), a.b2 = data_or_null(w.b2);
  a.x = t.x.const_data_ptr();
  a.residual = data_or_null(t.residual);
  a.stream = static_cast<int64_t>(t.x.nbytes()) > kStreamLayerBytes;
  return a;
}

void take_saved(SqueezeExciteArgs& a, const SqueezeExciteResult& r) {
  a.mean = const_cast<void*>(r.mean.const_data_ptr());
  a.hidden = const_cast<void*>(r.hidden.const_data_ptr());
  a.gate_value = const_cast<void*>(r.gate.const_data_ptr());
}

template <class F>
void for_items(const SqueezeExciteArgs& a, F loop) {
  if (a.n == 0) return;
  const int64_t per = kernels().samples_per_item(a), items = (a.n + per - 1) / per, bytes = kernels().scratch_bytes(a);
  at::parallel_for(0, items, grain(per * a.c * a.s), [&](int64_t begin, int64_t end) {
    const c10::DataPtr scratch = c10::GetCPUAllocator()->allocate(bytes);
    loop(a, begin, end, scratch.get());
  });
}

// sum_n u[n] v[n]^T of the last dimensions, or sum_n u[n] without v.
void outer_sum(const at::Tensor& u, const at::Tensor& v, const at::Tensor& out) {
  if (!out.defined()) return;
  const OuterSum sum{
      u.const_data_ptr(),     data_or_null(v),          u.size(0), u.size(1), v.defined() ? v.size(1) : 0,
      out.mutable_data_ptr(), float_kind("weight", out)};
  at::parallel_for(0, sum.outputs, grain(sum.n * std::max<int64_t>(1, sum.inputs)), [&](int64_t begin, int64_t end) {
    kernels().outer_sum(float_kind("gradient", u), sum, begin, end);
  });
}

}  // namespace

SqueezeExciteResult squeeze_excite_forward(const SqueezeExciteTensors& t, const Rows& rows,
                                           const SqueezeExciteOptions& o) {
  const Weights weights(t);
  SqueezeExciteArgs a = arguments(t, weights, rows, o);
  const auto options = t.x.options().dtype(accumulate_type(t.x));
  const SqueezeExciteResult out{at::empty_like(t.x), at::empty({a.n, a.c}, options), at::empty({a.n, a.r}, options),
                                at::empty({a.n, a.c}, options)};
  take_saved(a, out);
  a.y = out.y.mutable_data_ptr();
  for_items(a, kernels().forward);
  return out;
}

SqueezeExciteGrads squeeze_excite_backward(const at::Tensor& grad_output, const SqueezeExciteTensors& t,
                                           const SqueezeExciteResult& saved, const Rows& rows,
                                           const SqueezeExciteOptions& o) {
  const Weights weights(t);
  SqueezeExciteArgs a = arguments(t, weights, rows, o);
  const at::Tensor dy = in_layout_of(t.x, grad_output);
  const bool writes_residual = t.residual.defined() && o.residual_activation != 0;
  const SqueezeExciteGrads out{at::empty_like(t.x),      empty_or_undefined(t.w1),
                               empty_or_undefined(t.b1), empty_or_undefined(t.w2),
                               empty_or_undefined(t.b2), writes_residual ? at::empty_like(t.x) : at::Tensor()};
  const at::Tensor dz2 = at::empty_like(saved.gate), dz1 = at::empty_like(saved.hidden);
  const at::Tensor activated = at::empty_like(saved.hidden);
  take_saved(a, saved);
  a.dy = dy.const_data_ptr();
  a.dx = out.x.mutable_data_ptr();
  a.dresidual = written(out.residual);
  a.dz2 = dz2.mutable_data_ptr();
  a.dz1 = dz1.mutable_data_ptr();
  a.activated = activated.mutable_data_ptr();
  for_items(a, kernels().backward);
  outer_sum(dz1, saved.mean, out.w1);
  outer_sum(dz1, at::Tensor(), out.b1);
  outer_sum(dz2, a.r > 0 ? activated : saved.mean, out.w2);
  outer_sum(dz2, at::Tensor(), out.b2);
  return out;
}

// Operators: three dimensions, contiguous in, contiguous out
// ------------------------------------------------------------------------------

namespace {

SqueezeExciteTensors tensors(const at::Tensor& input, const Optional& w1, const Optional& b1, const at::Tensor& w2,
                             const Optional& b2, const Optional& residual) {
  return {input.contiguous(), contiguous(w1), contiguous(b1), w2.contiguous(), contiguous(b2), contiguous(residual)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> squeeze_excite_fwd(
    const at::Tensor& input, const Optional& w1, const Optional& b1, const at::Tensor& w2, const Optional& b2,
    const Optional& residual, int64_t activation, int64_t gate, int64_t residual_activation, bool channels_last) {
  const SqueezeExciteResult r = squeeze_excite_forward(
      tensors(input, w1, b1, w2, b2, residual), rows_of(input, channels_last), {activation, gate, residual_activation});
  return {r.y, r.mean, r.hidden, r.gate};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> squeeze_excite_bwd(
    const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& mean, const at::Tensor& hidden,
    const at::Tensor& gate_value, const Optional& w1, const Optional& b1, const at::Tensor& w2, const Optional& b2,
    const Optional& residual, int64_t activation, int64_t gate, int64_t residual_activation, bool channels_last) {
  const SqueezeExciteTensors t = tensors(input, w1, b1, w2, b2, residual);
  SqueezeExciteGrads g = squeeze_excite_backward(
      grad_output, t, {at::Tensor(), mean.contiguous(), hidden.contiguous(), gate_value.contiguous()},
      rows_of(input, channels_last), {activation, gate, residual_activation});
  // The operator promises a gradient of the residual it was given.
  if (t.residual.defined() && !g.residual.defined()) g.residual = grad_output.clone(at::MemoryFormat::Contiguous);
  return {g.x, given(g.w1, g.x), given(g.b1, g.x), g.w2, given(g.b2, g.x), given(g.residual, g.x)};
}

}  // namespace

TORCH_LIBRARY_IMPL(dlkernels, CPU, m) {
  m.impl("squeeze_excite_fwd", squeeze_excite_fwd);
  m.impl("squeeze_excite_bwd", squeeze_excite_bwd);
}

}  // namespace dlkernels
