// Stochastic depth on CPU tensors: threads; then the registration of the operator.
// The loops are in stochastic_depth_kernel.cpp, once per instruction set.
#include "stochastic_depth.h"

#include <torch/library.h>

#include "../common/host.h"
#include "stochastic_depth_kernel.h"

namespace dlkernels {
namespace {

const StochasticDepthKernels& kernels() {
  static const StochasticDepthKernels table = DL_KERNELS_OF_THIS_MACHINE(stochastic_depth_kernels);
  return table;
}

}  // namespace

at::Tensor stochastic_depth_forward(const at::Tensor& input, const at::Tensor& noise, const at::Tensor& residual) {
  const at::Tensor out = at::empty_like(input);
  const at::Tensor r = residual.defined() ? in_layout_of(input, residual) : residual;
  const int64_t total = input.numel();
  if (total == 0) return out;
  StochasticDepthArgs a{};
  a.dtype = float_kind("input", input);
  a.noise_dtype = float_kind("noise", noise);
  a.input = input.const_data_ptr();
  a.noise = noise.const_data_ptr();
  a.residual = r.defined() ? r.const_data_ptr() : nullptr;
  a.out = out.mutable_data_ptr();
  a.rows = noise.numel();
  a.count = total / a.rows;
  a.stream = static_cast<int64_t>(out.nbytes()) > kStreamLayerBytes;
  at::parallel_for(0, total, 32768, [&](int64_t begin, int64_t end) { kernels().forward(a, begin, end); });
  return out;
}

namespace {

// The operator: contiguous in, contiguous out.
at::Tensor stochastic_depth_fwd(const at::Tensor& input, const at::Tensor& noise,
                                const std::optional<at::Tensor>& residual) {
  return stochastic_depth_forward(input.contiguous(), noise.contiguous(), residual.value_or(at::Tensor()));
}

}  // namespace

TORCH_LIBRARY_IMPL(dlkernels, CPU, m) { m.impl("stochastic_depth_fwd", stochastic_depth_fwd); }

}  // namespace dlkernels
