// scale_stored_grad on CUDA tensors: outputs and registration. The kernel is in stored_grad_kernel.cu.
#include <ATen/ops/empty_like.h>

#include "../common/cuda_call.h"
#include "stored_grad_kernel.h"

namespace dlkernels {
namespace {

using Divisor = std::optional<at::Tensor>;

void run(const char* op, const at::Tensor& grad_output, const at::Tensor& stored, const Divisor& divisor,
         const at::Tensor& out) {
  const CudaCall call(op, stored);
  const at::Tensor grad = grad_output.to(at::kFloat);
  launch_scale_stored_grad(call.queue, {stored.const_data_ptr(), out.mutable_data_ptr(), grad.const_data_ptr<float>(),
                                        divisor.has_value() ? divisor->const_data_ptr<float>() : nullptr,
                                        stored.numel(), float_kind("stored", stored)});
}

at::Tensor scale_stored_grad(const at::Tensor& grad_output, const at::Tensor& stored, const Divisor& divisor) {
  if (!served(stored))
    return find_in_triton<decltype(scale_stored_grad)>("scale_stored_grad").call(grad_output, stored, divisor);
  const at::Tensor x = stored.contiguous(), out = at::empty_like(x);
  run("scale_stored_grad", grad_output, x, divisor, out);
  return out;
}

void scale_stored_grad_(at::Tensor& stored, const at::Tensor& grad_output, const Divisor& divisor) {
  if (!served(stored))
    return find_in_triton<decltype(scale_stored_grad_)>("scale_stored_grad_").call(stored, grad_output, divisor);
  TORCH_CHECK_VALUE(stored.is_contiguous(), "`stored` must be contiguous, got strides ", stored.strides());
  run("scale_stored_grad_", grad_output, stored, divisor, stored);
}

}  // namespace

DL_CUDA_LIBRARY(m) {
  m.impl("scale_stored_grad", scale_stored_grad);
  m.impl("scale_stored_grad_", scale_stored_grad_);
}

}  // namespace dlkernels
