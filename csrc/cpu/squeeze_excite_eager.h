#pragma once

#include <pybind11/pybind11.h>

namespace dlkernels {

// Binds squeeze_excite: the output, or None when the call is not plain eager CPU on dense tensors.
void bind_squeeze_excite(pybind11::module_& m);

}  // namespace dlkernels
