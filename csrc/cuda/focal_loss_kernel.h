// What the host side of the sigmoid focal loss hands to its kernels: torch-free.
#pragma once

#include "../common/cuda_launch.h"
#include "../common/float_kind.h"

namespace dlkernels {

// What a sum of losses is divided by.
enum class Divisor {
  kKnown,       // a number that the host knows
  kRead,        // a number in device memory
  kCountHere,   // what is not left out: each block counts the labels itself
  kCountAlong,  // the same, counted on the way: no gradient waits for it
};

struct SigmoidFocalArgs {
  Float dtype;
  Float target_dtype;  // of floating targets: float32, or the input's
  int label_bytes;     // of integer targets: 1, 4 or 8, or 0
  const void* x;       // [numel]
  const void* target;  // [numel], or [labels] class indices
  int64_t numel, labels;
  int classes;  // 0: one target per element
  int64_t ignore_index;
  float alpha_1, alpha_0, gamma;
  float* loss;             // [numel] or nullptr
  void* dx;                // [numel] or nullptr
  const float* grad_each;  // [numel] gradient of the losses, or nullptr
  const float* grad_one;   // [] the same for all losses, or nullptr
  float* total;            // [] sum of the losses, divided; or nullptr
  float* partial;          // [grid] where the grid has several blocks
  int64_t* left_out;       // [grid], for kCountAlong
  unsigned* counter;       // 0
  Divisor divisor_from;
  float known;              // kKnown
  const float* normalizer;  // [] kRead
  float* divisor;           // [] to publish it; or nullptr
  bool fold;                // divide the gradient
  bool overlap;             // the kernel before is count_labels
};

// Blocks: of the shape and the machine alone, so that sums have one order.
unsigned sigmoid_focal_grid(const Machine& machine, Float dtype, int64_t numel, bool backward);
void launch_sigmoid_focal_loss(const Queue& queue, const SigmoidFocalArgs& args);

// Labels that each block of the loss' kernel may count for itself: what that costs is less than a launch.
constexpr int64_t kCountHereBytes = 16 << 10;

struct CountLabelsArgs {
  const void* labels;  // [count]
  int label_bytes;     // 1, 4 or 8
  int64_t count, ignore_index;
  int64_t per_label;  // elements of a label
  int64_t* left_out;  // [grid]
  unsigned* counter;  // 0
  float* divisor;     // []
};

unsigned count_labels_grid(const Machine& machine, int64_t count, int label_bytes);
void launch_count_labels(const Queue& queue, const CountLabelsArgs& args);

}  // namespace dlkernels
