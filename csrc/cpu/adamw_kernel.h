// What the host side hands to the AdamW loops, and the loops of each instruction set.
#pragma once

#include <cstdint>

#include "../common/optimizer.h"

namespace dlkernels {

struct AdamWScalars {
  double multiplier;  // of the gradient: unscaling, clipping, and -1 to maximize
  double keep;        // 1 - decay
  double step_size;   // lr / (1 - beta1^t)
  double beta1, beta2, eps;
  double inv_sqrt_correction2;  // 1 / sqrt(1 - beta2^t)
  double average_decay;
  Rounding rounding;
};

struct AdamWKernels {
  // Elements [begin, end) of one parameter.
  void (*step)(const StepTensor&, const AdamWScalars&, int64_t begin, int64_t end);
  // The sum of the squares of elements [begin, end): not finite only if one of them is not (but for float64).
  double (*squares)(const void* grad, Float dtype, int64_t begin, int64_t end);
};

AdamWKernels adamw_kernels_DEFAULT();
AdamWKernels adamw_kernels_AVX2();
AdamWKernels adamw_kernels_AVX512();

}  // namespace dlkernels
