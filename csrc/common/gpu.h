// Operators on CUDA tensors called from C++, below autograd: for the eager nodes, which differentiate by themselves.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <string>

namespace dlkernels {

// A plain CUDA tensor, in a build that has CUDA C++ kernels. In tests of these kernels on the host: a CPU tensor.
bool plain_gpu(const at::Tensor& x);

// From now on the host twin of the CUDA kernels serves CPU tensors, as if they were on a GPU.
void serve_from_host_twin(bool on);

// The library whose operators serve the tensors of plain_gpu().
const char* gpu_library();

template <class Signature>
c10::TypedOperatorHandle<Signature> gpu_op(const char* name) {
  const std::string full = std::string(gpu_library()) + "::" + name;
  return c10::Dispatcher::singleton().findSchemaOrThrow(full.c_str(), "").template typed<Signature>();
}

}  // namespace dlkernels
