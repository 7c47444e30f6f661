// What the host side hands to the focal-loss loops, and the loops of each instruction set.
//
// Shared by torch-free files compiled once per instruction set and by focal_loss.cpp.
#pragma once

#include <cstdint>

#include "../common/float_kind.h"

namespace dlkernels {

enum class Target : int {
  kFloat,    // floats of the input's dtype, one per element
  kFloat32,  // float32, one per element
  kUInt8,    // 0/1 per element (bool, uint8); class indices (uint8)
  kInt32,
  kInt64,
};

// Sigmoid: `count` elements in memory order; with class indices, `classes` > 0 elements share a target.
struct SigmoidArgs {
  Float dtype;
  Target target_kind;
  const void* input;       // [count]
  const void* target;      // [count], or [count / classes] class indices
  int64_t count, classes;  // classes = 0: one target per element
  double alpha, gamma;     // alpha < 0: off
  int64_t ignore_index;
  void* loss;                // [count] float32 (float64 for float64), or nullptr
  double* partial;           // [blocks] sums of the losses, or nullptr
  void* grad;                // [count] in the input's dtype, or nullptr
  const void* grad_output;   // [count] float32 (float64), or nullptr: then grad_scale alone
  int64_t grad_output_step;  // 1, or 0 for one value
  double grad_scale;
  bool stream;  // write grad past the caches
};

// Softmax: rows (n, s) of `classes` logits, element (n, c, s) at (n * classes + c) * inner + s.
struct SoftmaxArgs {
  Float dtype;
  Target target_kind;
  const void* input;   // [outer, classes, inner]
  const void* target;  // [outer, inner] indices, or [outer, classes, inner] probabilities
  const void* weight;  // [classes] float32 (float64), or nullptr
  int64_t outer, classes, inner;
  double gamma, label_smoothing;
  int64_t ignore_index;
  void* loss;                // [outer, inner] float32 (float64), or nullptr
  void* grad;                // [outer, classes, inner] in the input's dtype, or nullptr
  const void* grad_output;   // [outer, inner] float32 (float64), or nullptr: then grad_scale alone
  int64_t grad_output_step;  // 1, or 0 for one value
  double grad_scale;
  bool stream;
};

constexpr int64_t kSigmoidBlock = 2048;  // elements per partial sum: fixed, so that sums do not depend on threads

struct FocalLossKernels {
  void (*sigmoid)(const SigmoidArgs&, int64_t block_begin, int64_t block_end);
  // Tiles are what one pass of the loop handles: a row, or a strip of rows across vector lanes.
  int64_t (*softmax_tiles)(const SoftmaxArgs&);
  int64_t (*softmax_scratch_bytes)(const SoftmaxArgs&);
  void (*softmax)(const SoftmaxArgs&, int64_t tile_begin, int64_t tile_end, void* scratch);
};

FocalLossKernels focal_loss_kernels_DEFAULT();
FocalLossKernels focal_loss_kernels_AVX2();
FocalLossKernels focal_loss_kernels_AVX512();

}  // namespace dlkernels
