#pragma once

#include <pybind11/pybind11.h>

namespace dlkernels {

// Binds gccs_loss: the loss, or None when the call is not plain eager CPU.
void bind_gccs_loss(pybind11::module_& m);

}  // namespace dlkernels
