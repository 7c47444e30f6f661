#pragma once

#include <pybind11/pybind11.h>

namespace dlkernels {

// Binds stochastic_depth: the result, or None when the call is not plain eager CPU.
void bind_stochastic_depth(pybind11::module_& m);

}  // namespace dlkernels
