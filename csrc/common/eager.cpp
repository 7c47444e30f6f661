// Which tensors the eager entries take, and whose operators serve those of a GPU.
#include "eager.h"

#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/jit/frontend/tracer.h>

#include "gpu.h"

namespace dlkernels {

bool plain_eager() {
  using c10::DispatchKey;
  return !c10::impl::tls_is_dispatch_key_included(DispatchKey::FuncTorchDynamicLayerFrontMode) &&
         !c10::impl::TorchDispatchModeTLS::any_modes_set() && !torch::jit::tracer::isTracing();
}

namespace {

bool twin_serves = false;

bool plain_strided(const at::Tensor& x) {
  return x.has_storage() && x.layout() == at::kStrided && !x.key_set().has(c10::DispatchKey::Python) && !x.is_neg() &&
         !x._is_zerotensor();
}

}  // namespace

bool plain_cpu(const at::Tensor& x) { return x.is_cpu() && !twin_serves && plain_strided(x); }

#ifdef DLKERNELS_WITH_CUDA
bool plain_gpu(const at::Tensor& x) { return (x.is_cuda() || (x.is_cpu() && twin_serves)) && plain_strided(x); }
#else
bool plain_gpu(const at::Tensor& x) { return x.is_cpu() && twin_serves && plain_strided(x); }
#endif

void serve_from_host_twin(bool on) { twin_serves = on; }

const char* gpu_library() { return twin_serves ? "dlkernels_cuda_host" : "dlkernels"; }

}  // namespace dlkernels
