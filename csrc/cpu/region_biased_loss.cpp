// The region biased loss on CPU tensors: divisors, threads; then the registration of the operators.
// The loops are in region_biased_loss_kernel.cpp, once per instruction set.
#include "region_biased_loss.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include <algorithm>

#include "../common/host.h"
#include "../common/layer.h"
#include "region_biased_loss_kernel.h"

namespace dlkernels {
namespace {

const RegionBiasedLossKernels& kernels() {
  static const RegionBiasedLossKernels table = DL_KERNELS_OF_THIS_MACHINE(region_biased_loss_kernels);
  return table;
}

RegionBiasedArgs arguments(const at::Tensor& attention, const at::Tensor& mask, const RegionBiasedOptions& options) {
  RegionBiasedArgs a{};
  a.dtype = float_kind("attention", attention);
  a.attention = attention.const_data_ptr();
  a.mask = static_cast<const uint8_t*>(data_or_null(mask));
  a.rows = attention.size(0);
  a.regions = attention.size(1);
  a.origin = options.origin;
  a.margin = options.margin;
  a.softmax = options.softmax;
  a.grad_scale = 1.0;
  return a;
}

void run(const RegionBiasedArgs& a) {
  if (a.rows == 0) return;
  const int64_t tiles = kernels().tiles(a), bytes = kernels().scratch_bytes(a);
  at::parallel_for(0, tiles, grain(a.rows / tiles * a.regions), [&](int64_t begin, int64_t end) {
    const c10::DataPtr scratch = c10::GetCPUAllocator()->allocate(bytes);
    kernels().run(a, begin, end, scratch.get());
  });
}

}  // namespace

LossResult region_biased_loss_forward(const at::Tensor& attention, const at::Tensor& mask,
                                      const RegionBiasedOptions& options, int64_t reduction, bool need_grad) {
  RegionBiasedArgs a = arguments(attention, mask, options);
  // The mean over no row is 0.
  LossResult result{{}, {}, reduction == kMean ? static_cast<double>(std::max<int64_t>(1, a.rows)) : 1.0};
  const at::Tensor rows = at::empty({a.rows}, attention.options().dtype(accumulate_type(attention)));
  a.loss = rows.mutable_data_ptr();
  if (need_grad && reduction != kNone) {
    result.grad = at::empty_like(attention);
    a.grad = result.grad.mutable_data_ptr();
    a.grad_scale = stored_scale(attention, result.divisor);
  }
  run(a);
  if (reduction == kNone) {
    result.loss = rows;
  } else {
    const double sum = rows.scalar_type() == at::kDouble ? sum_in_order(rows.const_data_ptr<double>(), a.rows)
                                                         : sum_in_order(rows.const_data_ptr<float>(), a.rows);
    result.loss = scalar(sum / result.divisor, attention);
  }
  return result;
}

at::Tensor region_biased_loss_backward(const at::Tensor& grad_output, const at::Tensor& attention,
                                       const at::Tensor& mask, const RegionBiasedOptions& options) {
  RegionBiasedArgs a = arguments(attention, mask, options);
  const at::Tensor grad = at::empty_like(attention);
  const at::Tensor g = read_grad_output(a, grad_output, attention);
  a.grad = grad.mutable_data_ptr();
  run(a);
  return grad;
}

// Operators: contiguous in, contiguous out
// ------------------------------------------------------------------------------

namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> region_biased_loss_fwd(const at::Tensor& attention, const Optional& mask,
                                                                      int64_t origin_index, double margin, bool softmax,
                                                                      int64_t reduction, bool need_grad, bool) {
  const at::Tensor x = attention.contiguous();
  const LossResult r =
      region_biased_loss_forward(x, contiguous(mask), {origin_index, margin, softmax}, reduction, need_grad);
  return {r.loss, given(r.grad, x), scalar(r.divisor, x)};
}

at::Tensor region_biased_loss_bwd(const at::Tensor& grad_output, const at::Tensor& attention, const Optional& mask,
                                  int64_t origin_index, double margin, bool softmax) {
  return region_biased_loss_backward(grad_output, attention.contiguous(), contiguous(mask),
                                     {origin_index, margin, softmax});
}

}  // namespace

TORCH_LIBRARY_IMPL(dlkernels, CPU, m) {
  m.impl("region_biased_loss_fwd", region_biased_loss_fwd);
  m.impl("region_biased_loss_bwd", region_biased_loss_bwd);
}

}  // namespace dlkernels
