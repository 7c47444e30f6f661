// What the host side hands to the SGDW loops, and the loops of each instruction set.
#pragma once

#include <cstdint>

#include "../common/optimizer.h"

namespace dlkernels {

struct SgdwScalars {
  double multiplier;  // of the gradient: unscaling, clipping, and -1 to maximize
  double keep;        // 1 - decay
  double momentum;
  double gain;  // of the gradient in the momentum: the learning rate, or 1
  double rate;  // of the momentum in the step: 1, or the learning rate
  bool nesterov;
  double average_decay;
  Rounding rounding;
};

struct SgdwKernels {
  // Elements [begin, end) of one parameter.
  void (*step)(const StepTensor&, const SgdwScalars&, int64_t begin, int64_t end);
  // The sum of the squares of elements [begin, end): not finite only if one of them is not (but for float64).
  double (*squares)(const void* grad, Float dtype, int64_t begin, int64_t end);
};

SgdwKernels sgdw_kernels_DEFAULT();
SgdwKernels sgdw_kernels_AVX2();
SgdwKernels sgdw_kernels_AVX512();

}  // namespace dlkernels
