// What the host side hands to the stochastic-depth loops, and the loops of each instruction set.
#pragma once

#include <cstdint>

#include "../common/float_kind.h"

namespace dlkernels {

struct StochasticDepthArgs {
  Float dtype, noise_dtype;
  const void* input;     // [rows, count]
  const void* noise;     // [rows]
  const void* residual;  // [rows, count], or nullptr
  void* out;             // [rows, count]
  int64_t rows, count;
  bool stream;  // write out past the caches
};

struct StochasticDepthKernels {
  // Elements [begin, end) of the whole, in memory order.
  void (*forward)(const StochasticDepthArgs&, int64_t begin, int64_t end);
};

StochasticDepthKernels stochastic_depth_kernels_DEFAULT();
StochasticDepthKernels stochastic_depth_kernels_AVX2();
StochasticDepthKernels stochastic_depth_kernels_AVX512();

}  // namespace dlkernels
