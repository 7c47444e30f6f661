// What the host side of scale_stored_grad hands to its kernel: torch-free.
#pragma once

#include "../common/cuda_launch.h"
#include "../common/float_kind.h"

namespace dlkernels {

struct StoredGradArgs {
  const void* x;         // [numel] the stored gradient
  void* y;               // [numel], or x
  const float* grad;     // [] of the loss
  const float* divisor;  // [] or nullptr
  int64_t numel;
  Float dtype;
};

void launch_scale_stored_grad(const Queue& queue, const StoredGradArgs& args);

}  // namespace dlkernels
