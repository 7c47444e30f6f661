// GroupNorm on CPU tensors: threads, outputs, operator registration. The loops are in group_norm_kernel.cpp.
#include "group_norm.h"

#include <ATen/ops/empty.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include "../common/host.h"
#include "group_norm_kernel.h"

namespace dlkernels {
namespace {

const GroupNormKernels& kernels() {
  static const GroupNormKernels table = DL_KERNELS_OF_THIS_MACHINE(group_norm_kernels);
  return table;
}

Parameter parameter(const at::Tensor& x) {
  return x.defined() ? Parameter{x.const_data_ptr(), float_kind("parameter", x)} : Parameter{};
}

GroupNormArgs arguments(const GroupNormTensors& t, const Rows& rows, const GroupNormOptions& o) {
  GroupNormArgs a{};
  a.dtype = float_kind("input", t.x);
  a.n = rows.n, a.c = rows.c, a.s = rows.s, a.groups = o.groups;
  a.channels_last = rows.channels_last || rows.s == 1;  // one position: the same memory, and channels fill the vectors
  a.eps = o.eps;
  a.activation = static_cast<int>(o.activation);
  a.weight = parameter(t.weight), a.bias = parameter(t.bias), a.scale = parameter(t.scale),
  a.shift = parameter(t.shift);
  a.x = t.x.const_data_ptr();
  a.residual = data_or_null(t.residual);
  a.stream = static_cast<int64_t>(t.x.nbytes()) > kStreamLayerBytes;
  a.wanted_items = at::get_num_threads() > 1 ? 2 * at::get_num_threads() : 1;
  return a;
}

template <class F>
void for_items(const GroupNormArgs& a, F loop) {
  const int64_t items = kernels().items(a);
  if (items == 0) return;
  const int64_t bytes = kernels().scratch_bytes(a);
  at::parallel_for(0, items, grain(a.n * a.c * a.s / items), [&](int64_t begin, int64_t end) {
    const c10::DataPtr scratch = c10::GetCPUAllocator()->allocate(bytes);
    loop(a, begin, end, scratch.get());
  });
}

}  // namespace

GroupNormResult group_norm_forward(const GroupNormTensors& t, const Rows& rows, const GroupNormOptions& o) {
  GroupNormArgs a = arguments(t, rows, o);
  const auto options = t.x.options().dtype(accumulate_type(t.x));
  const GroupNormResult out{at::empty_like(t.x), at::empty({rows.n, o.groups}, options),
                            at::empty({rows.n, o.groups}, options)};
  a.y = out.y.mutable_data_ptr();
  a.mean = out.mean.mutable_data_ptr();
  a.rstd = out.rstd.mutable_data_ptr();
  for_items(a, kernels().forward);
  return out;
}

GroupNormGrads group_norm_backward(const at::Tensor& grad_output, const GroupNormTensors& t, const at::Tensor& mean,
                                   const at::Tensor& rstd, const Rows& rows, const GroupNormOptions& o) {
  GroupNormArgs a = arguments(t, rows, o);
  const at::Tensor dy = in_layout_of(t.x, grad_output);
  const bool writes_residual = t.residual.defined() && o.activation != 0;
  const GroupNormGrads out{at::empty_like(t.x),         empty_or_undefined(t.weight),
                           empty_or_undefined(t.bias),  writes_residual ? at::empty_like(t.x) : at::Tensor(),
                           empty_or_undefined(t.scale), empty_or_undefined(t.shift)};
  const at::Tensor sums = at::empty({2, rows.n, rows.c}, t.x.options().dtype(accumulate_type(t.x)));
  a.mean = const_cast<void*>(mean.const_data_ptr());
  a.rstd = const_cast<void*>(rstd.const_data_ptr());
  a.dy = dy.const_data_ptr();
  a.dx = out.x.mutable_data_ptr();
  a.dresidual = written(out.residual);
  a.da = sums.mutable_data_ptr();
  a.db = static_cast<char*>(a.da) + rows.n * rows.c * static_cast<int64_t>(sums.element_size());
  for_items(a, kernels().backward);
  const GroupNormParameterGrads to{written(out.weight), written(out.bias), written(out.scale), written(out.shift)};
  if (to.weight || to.bias || to.scale || to.shift)
    at::parallel_for(0, rows.c, grain(rows.n * 4),
                     [&](int64_t begin, int64_t end) { kernels().parameter_grads(a, to, begin, end); });
  return out;
}

// Operators: three dimensions, contiguous in, contiguous out
// ------------------------------------------------------------------------------

namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> group_norm_fwd(const at::Tensor& input, const Optional& weight,
                                                              const Optional& bias, const Optional& residual,
                                                              const Optional& scale, const Optional& shift,
                                                              int64_t num_groups, double eps, int64_t activation,
                                                              bool channels_last) {
  const GroupNormTensors t{input.contiguous(),   contiguous(weight), contiguous(bias),
                           contiguous(residual), contiguous(scale),  contiguous(shift)};
  const GroupNormResult r = group_norm_forward(t, rows_of(input, channels_last), {num_groups, eps, activation});
  return {r.y, r.mean, r.rstd};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> group_norm_bwd(
    const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& mean, const at::Tensor& rstd,
    const Optional& weight, const Optional& bias, const Optional& residual, const Optional& scale,
    const Optional& shift, int64_t num_groups, double eps, int64_t activation, bool channels_last) {
  const GroupNormTensors t{input.contiguous(),   contiguous(weight), contiguous(bias),
                           contiguous(residual), contiguous(scale),  contiguous(shift)};
  GroupNormGrads g = group_norm_backward(grad_output, t, mean.contiguous(), rstd.contiguous(),
                                         rows_of(input, channels_last), {num_groups, eps, activation});
  // The operator promises a gradient of the residual it was given.
  if (t.residual.defined() && !g.residual.defined()) g.residual = grad_output.clone(at::MemoryFormat::Contiguous);
  return {
      g.x, given(g.weight, g.x), given(g.bias, g.x), given(g.residual, g.x), given(g.scale, g.x), given(g.shift, g.x)};
}

}  // namespace

TORCH_LIBRARY_IMPL(dlkernels, CPU, m) {
  m.impl("group_norm_fwd", group_norm_fwd);
  m.impl("group_norm_bwd", group_norm_bwd);
}

}  // namespace dlkernels
