#pragma once

#include <pybind11/pybind11.h>

namespace dlkernels {

// Binds sigmoid_focal_loss and softmax_focal_loss: the loss, or None when the call is not plain eager CPU.
void bind_focal_loss(pybind11::module_& m);

}  // namespace dlkernels
