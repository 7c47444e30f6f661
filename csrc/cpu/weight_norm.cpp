// Weight normalisation on CPU tensors: scratch and threads; then the registration of the operators.
// The loops are in weight_norm_kernel.cpp, once per instruction set.
#include "weight_norm.h"

#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include "../common/host.h"
#include "weight_norm_kernel.h"

namespace dlkernels {
namespace {

const WeightNormKernels& kernels() {
  static const WeightNormKernels table = DL_KERNELS_OF_THIS_MACHINE(weight_norm_kernels);
  return table;
}

// A task's share, so that a task is worth handing to another thread.
int64_t share(const WeightNormArgs& a, int64_t items) {
  return grain(a.outer * a.rows * a.inner / std::max<int64_t>(1, items));
}

void run(WeightNormArgs& a) {
  a.plan = weight_norm_plan(a.outer, a.rows, a.inner);
  // Rows go whole, unless there are too few of them for the threads: the partial sums are the same either way.
  const int64_t threads = at::get_num_threads();
  const bool few = a.plan.segments > 1 && threads > 1 && a.rows < 2 * threads;
  if (!a.plan.columns && !few) {
    at::parallel_for(0, a.rows, share(a, a.rows), [&](int64_t begin, int64_t end) { kernels().rows(a, begin, end); });
    return;
  }
  const int64_t width = a.plan.columns ? a.rows * a.inner : 0;
  const c10::DataPtr scratch = c10::GetCPUAllocator()->allocate(8 * (a.plan.slots + 3 * a.rows + 2 * width));
  a.partial = scratch.get();
  a.factors = static_cast<double*>(scratch.get()) + a.plan.slots;
  a.spread = a.factors + 3 * a.rows;
  at::parallel_for(0, a.plan.pieces, share(a, a.plan.pieces),
                   [&](int64_t begin, int64_t end) { kernels().sum(a, begin, end); });
  at::parallel_for(0, a.rows, grain(a.plan.slots / std::max<int64_t>(1, a.rows)),
                   [&](int64_t begin, int64_t end) { kernels().factor(a, begin, end); });
  at::parallel_for(0, a.plan.pieces, share(a, a.plan.pieces),
                   [&](int64_t begin, int64_t end) { kernels().apply(a, begin, end); });
}

WeightNormArgs arguments(const at::Tensor& v, const at::Tensor& g, WeightNormView view) {
  WeightNormArgs a{};
  a.dtype = float_kind("v", v);
  a.g_dtype = float_kind("g", g);
  a.v = v.const_data_ptr();
  a.g = g.const_data_ptr();
  a.outer = view.outer, a.rows = view.rows, a.inner = view.inner;
  return a;
}

WeightNormView view_of(const at::Tensor& v) { return {v.size(0), v.size(1), v.size(2)}; }

}  // namespace

std::tuple<at::Tensor, at::Tensor> weight_norm_forward(const at::Tensor& v, const at::Tensor& g, WeightNormView view) {
  const at::Tensor w = at::empty_like(v), norm = at::empty({view.rows}, v.options().dtype(accumulate_type(v)));
  WeightNormArgs a = arguments(v, g, view);
  a.out = w.mutable_data_ptr();
  a.norm = norm.mutable_data_ptr();
  a.stream = static_cast<int64_t>(w.nbytes()) > kStreamLayerBytes;
  run(a);
  return {w, norm};
}

std::tuple<at::Tensor, at::Tensor> weight_norm_backward(const at::Tensor& grad_output, const at::Tensor& v,
                                                        const at::Tensor& g, const at::Tensor& norm,
                                                        WeightNormView view) {
  const at::Tensor dv = at::empty_like(v), dg = at::empty_like(g), dw = in_layout_of(v, grad_output);
  if (v.numel() == 0) return {dv, dg.zero_()};
  WeightNormArgs a = arguments(v, g, view);
  a.grad_output = dw.const_data_ptr();
  a.out = dv.mutable_data_ptr();
  a.dg = dg.mutable_data_ptr();
  a.stream = static_cast<int64_t>(dv.nbytes()) > kStreamLayerBytes;
  a.norm = const_cast<void*>(norm.const_data_ptr());  // only read, where grad_output is given
  run(a);
  return {dv, dg};
}

// Operators: contiguous in, contiguous out
// ------------------------------------------------------------------------------

namespace {

std::tuple<at::Tensor, at::Tensor> weight_norm_fwd(const at::Tensor& v, const at::Tensor& g) {
  const at::Tensor x = v.contiguous();
  return weight_norm_forward(x, g.contiguous(), view_of(x));
}

std::tuple<at::Tensor, at::Tensor> weight_norm_bwd(const at::Tensor& grad_output, const at::Tensor& v,
                                                   const at::Tensor& g, const at::Tensor& norm) {
  const at::Tensor x = v.contiguous();
  return weight_norm_backward(grad_output, x, g.contiguous(), norm.contiguous(), view_of(x));
}

}  // namespace

TORCH_LIBRARY_IMPL(dlkernels, CPU, m) {
  m.impl("weight_norm_fwd", weight_norm_fwd);
  m.impl("weight_norm_bwd", weight_norm_bwd);
}

}  // namespace dlkernels
