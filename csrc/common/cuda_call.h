// One operator call on CUDA tensors, seen from the host: its device, its stream, what it may use, and the way out to
// Triton for what CUDA C++ does not serve. Compiled by the C++ compiler: no kernel in here.
//
//   at::Tensor foo_cuda(const at::Tensor& input, double factor) {
//     if (!served(input)) return find_in_triton<decltype(foo_cuda)>("foo").call(input, factor);
//     const CudaCall call("foo", input);
//     at::Tensor y = at::empty_like(input);
//     launch_foo(call.queue, {...});
//     return y;
//   }
//   DL_CUDA_LIBRARY(m) { m.impl("foo", foo_cuda); }
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <string>

#include "cuda_launch.h"
#include "host.h"

#if !defined(DL_CUDA_HOST)
#include <c10/cuda/CUDAGuard.h>
#endif

// The host twin's operators stand in a library of their own, and take CPU tensors.
#if defined(DL_CUDA_HOST)
#define DL_CUDA_LIBRARY(m) TORCH_LIBRARY_IMPL(dlkernels_cuda_host, CPU, m)
#else
#define DL_CUDA_LIBRARY(m) TORCH_LIBRARY_IMPL(dlkernels, CUDA, m)
#endif

namespace dlkernels {

// The device of a tensor, looked up once.
const Machine& machine_of(const at::Tensor& x);

// Whether CUDA C++ has code for the device of x, and kernels for its dtype: float32, float16, bfloat16. Triton serves
// float64, which exists for gradient checks.
bool served(const at::Tensor& x);

// Counters in device memory that are 0, and that the kernel leaves at 0: for last_block(). Two streams never share
// them, nor does a CUDA graph with anything else. Held until the kernel is launched.
struct Counters {
  at::Tensor held;
  unsigned* data;
};
Counters zeroed_counters(const Queue& queue, int64_t count);

// Whether what is launched now is recorded, to run whenever a CUDA graph is replayed.
bool is_capturing(const Queue& queue);

#if defined(DL_CUDA_HOST)
void forget_counters();  // what kernels left in them, and that nobody is to be told of
#endif

// Why this build has no code for an architecture, or nothing.
std::string cuda_code_problem(int arch);

// Makes x's device the current one while it lives.
class CudaCall {
 public:
  CudaCall(const char* op, const at::Tensor& x);
  Queue queue;

 private:
#if !defined(DL_CUDA_HOST)
  c10::cuda::CUDAGuard guard_;
#endif
};

// The operator of the same name and arguments that Triton serves.
template <class Signature>
c10::TypedOperatorHandle<Signature> find_in_triton(const char* op) {
  return c10::Dispatcher::singleton()
      .findSchemaOrThrow((std::string("dlkernels_triton::") + op).c_str(), "")
      .template typed<Signature>();
}

}  // namespace dlkernels
