// What the host side hands to the region-biased-loss loops, and the loops of each instruction set.
#pragma once

#include <cstdint>

#include "../common/float_kind.h"

namespace dlkernels {

struct RegionBiasedArgs {
  Float dtype;
  const void* attention;  // [rows, regions]
  const uint8_t* mask;    // [rows, regions] 0 or 1, or nullptr
  int64_t rows, regions, origin;
  double margin;
  bool softmax;
  void* loss;                // [rows] float32 (float64), or nullptr
  void* grad;                // [rows, regions] in the attention's dtype, or nullptr
  const void* grad_output;   // [rows] float32 (float64), or nullptr: then grad_scale alone
  int64_t grad_output_step;  // 1, or 0 for one value
  double grad_scale;
};

struct RegionBiasedLossKernels {
  // Tiles are the rows that one pass of the loop handles side by side.
  int64_t (*tiles)(const RegionBiasedArgs&);
  int64_t (*scratch_bytes)(const RegionBiasedArgs&);
  void (*run)(const RegionBiasedArgs&, int64_t tile_begin, int64_t tile_end, void* scratch);
};

RegionBiasedLossKernels region_biased_loss_kernels_DEFAULT();
RegionBiasedLossKernels region_biased_loss_kernels_AVX2();
RegionBiasedLossKernels region_biased_loss_kernels_AVX512();

}  // namespace dlkernels
