#pragma once

#include <pybind11/pybind11.h>

namespace dlkernels {

// Binds group_norm: the output, or None when the call is not plain eager CPU on dense tensors.
void bind_group_norm(pybind11::module_& m);

}  // namespace dlkernels
