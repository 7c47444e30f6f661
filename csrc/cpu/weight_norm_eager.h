#pragma once

#include <pybind11/pybind11.h>

namespace dlkernels {

// Binds weight_norm: the weight, or None when the call is not plain eager CPU.
void bind_weight_norm(pybind11::module_& m);

}  // namespace dlkernels
