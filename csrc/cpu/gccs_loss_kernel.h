// What the host side hands to the GCCS loops, and the loops of each instruction set.
//
// Rows come grouped by class. A task is a slab of columns of one class: its size is fixed, so that sums do not depend
// on the number of threads.
#pragma once

#include <cstdint>

#include "../common/float_kind.h"
#include "../common/segments.h"

namespace dlkernels {

constexpr int64_t kGccsSlab = 256;  // columns per task

struct GccsArgs {
  Float dtype;
  const void* features;      // [N, D]
  const int32_t* order;      // [counted] rows, grouped by class
  const Segment* segments;   // [classes present]
  int64_t present, classes;  // D
  double target_mean, target_std, eps, kurtosis_weight;
  double* partial;          // [classes present, slabs] losses, or nullptr
  void* grad;               // [N, D] in the features' dtype, or nullptr; rows that do not count are not written
  const void* grad_output;  // [D] float32 (float64), or nullptr: then grad_scale alone
  int64_t grad_output_step;
  double grad_scale;
  bool stream;  // write grad past the caches

  int64_t slabs() const { return (classes + kGccsSlab - 1) / kGccsSlab; }
};

struct GccsLossKernels {
  // Task segment * slabs + slab.
  void (*run)(const GccsArgs&, int64_t task_begin, int64_t task_end);
};

GccsLossKernels gccs_loss_kernels_DEFAULT();
GccsLossKernels gccs_loss_kernels_AVX2();
GccsLossKernels gccs_loss_kernels_AVX512();

}  // namespace dlkernels
