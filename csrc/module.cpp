// The module dlkernels._C: loads the operator registrations, binds the eager entries, says what it was built with.
#include <ATen/Version.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/version.h>

#include <string>
#include <vector>

#include "common/gpu.h"
#include "common/host.h"
#include "cpu/center_loss_eager.h"
#include "cpu/focal_loss_eager.h"
#include "cpu/gccs_loss_eager.h"
#include "cpu/group_norm_eager.h"
#include "cpu/optimizer_table.h"
#include "cpu/region_biased_loss_eager.h"
#include "cpu/squeeze_excite_eager.h"
#include "cpu/stochastic_depth_eager.h"
#include "cpu/weight_norm_eager.h"

#ifdef DLKERNELS_WITH_CUDA
#include "common/cuda_call.h"
#include "cuda/optimizer_table.h"
#endif

#ifndef DLKERNELS_CUDA_ARCHS
#define DLKERNELS_CUDA_ARCHS ""
#endif

namespace dlkernels {

std::string cpu_capability_name() { return at::get_cpu_capability(); }

Capability cpu_capability() {
  const std::string name = cpu_capability_name();
  if (name.rfind("AVX512", 0) == 0) return Capability::kAvx512;
  return name == "AVX2" ? Capability::kAvx2 : Capability::kDefault;
}

namespace {

pybind11::dict build_info() {
  pybind11::dict info;
  info["torch"] = TORCH_VERSION;
  info["compiler"] = __VERSION__;
#if defined(__x86_64__)
  info["instruction_sets"] = std::vector<std::string>{"DEFAULT", "AVX2", "AVX512"};
  const Capability capability = cpu_capability();
  info["instruction_set"] = capability == Capability::kAvx512 ? "AVX512"
                            : capability == Capability::kAvx2 ? "AVX2"
                                                              : "DEFAULT";
#else
  info["instruction_sets"] = std::vector<std::string>{"DEFAULT"};
  info["instruction_set"] = "DEFAULT";
#endif
#ifdef DLKERNELS_WITH_CUDA
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
  info["cuda_archs"] = std::string(DLKERNELS_CUDA_ARCHS);
  return info;
}

}  // namespace
}  // namespace dlkernels

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled part of dlkernels.";
  m.def("build_info", &dlkernels::build_info);
  m.def("serve_from_host_twin", &dlkernels::serve_from_host_twin);
#ifdef DLKERNELS_WITH_CUDA
  m.def("cuda_code_problem", &dlkernels::cuda_code_problem);
  dlkernels::bind_cuda_optimizers(m);
#endif
  dlkernels::bind_center_loss(m);
  dlkernels::bind_focal_loss(m);
  dlkernels::bind_gccs_loss(m);
  dlkernels::bind_group_norm(m);
  dlkernels::bind_optimizers(m);
  dlkernels::bind_region_biased_loss(m);
  dlkernels::bind_squeeze_excite(m);
  dlkernels::bind_stochastic_depth(m);
  dlkernels::bind_weight_norm(m);
}
