// What the host side hands to the GroupNorm loops, and the loops of each instruction set.
//
// Shared by torch-free files compiled once per instruction set and by group_norm.cpp.
#pragma once

#include <cstdint>

#include "../common/float_kind.h"

namespace dlkernels {

// A per-channel parameter of the layer: [C], or [N, C] for scale and shift. No pointer: not given.
struct Parameter {
  const void* data = nullptr;
  Float dtype = Float::kFloat32;
};

struct GroupNormArgs {
  Float dtype;
  int64_t n, c, s, groups;
  bool channels_last;  // [N, S, C], else [N, C, S]
  double eps;
  int activation;
  Parameter weight, bias, scale, shift;
  const void* x;
  const void* residual;  // like x, or nullptr
  void* mean;            // [N, G] float32 (float64)
  void* rstd;            // [N, G]
  void* y;               // forward: like x
  const void* dy;        // backward, from here on: like x
  void* dx;              // like x
  void* dresidual;       // like x, or nullptr
  void* da;              // [N, C] float32 (float64): sum dz x_hat
  void* db;              // [N, C]: sum dz
  bool stream;           // write y or dx past the caches
  int64_t wanted_items;  // how many items would keep all threads busy
};

// Gradients of the parameters; nullptr where there is none.
struct GroupNormParameterGrads {
  void *weight, *bias, *scale, *shift;
};

struct GroupNormKernels {
  // Items are what one pass of the loop keeps in the second-level cache: a group, or whole groups of channels_last.
  int64_t (*items)(const GroupNormArgs&);
  int64_t (*scratch_bytes)(const GroupNormArgs&);
  void (*forward)(const GroupNormArgs&, int64_t item_begin, int64_t item_end, void* scratch);
  void (*backward)(const GroupNormArgs&, int64_t item_begin, int64_t item_end, void* scratch);
  void (*parameter_grads)(const GroupNormArgs&, const GroupNormParameterGrads&, int64_t c_begin, int64_t c_end);
};

GroupNormKernels group_norm_kernels_DEFAULT();
GroupNormKernels group_norm_kernels_AVX2();
GroupNormKernels group_norm_kernels_AVX512();

}  // namespace dlkernels
