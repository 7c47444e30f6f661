// The tables of fused optimizer steps on CUDA tensors.
#pragma once

#include <pybind11/pybind11.h>

namespace dlkernels {

void bind_cuda_optimizers(pybind11::module_& m);

}  // namespace dlkernels
