#pragma once

#include <pybind11/pybind11.h>

namespace dlkernels {

// Binds region_biased_loss: the loss, or None when the call is not plain eager CPU.
void bind_region_biased_loss(pybind11::module_& m);

}  // namespace dlkernels
