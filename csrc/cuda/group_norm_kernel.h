// What the host side of GroupNorm hands to its kernels: torch-free.
#pragma once

#include "group_norm_plan.h"

namespace dlkernels {

// A per-channel parameter of the layer: [C], or [N, C] for scale and shift. No pointer: not given.
struct GroupNormParameter {
  const void* data = nullptr;
  Float dtype = Float::kFloat32;
};

// Which of its two halves a launch does, where a group is read twice.
enum class GroupNormStage { kBoth, kSums, kRest };

struct GroupNormCall {
  const void* x;         // [N, C, S], with channels_last [N, S, C]
  const void* residual;  // like x, or nullptr
  void* y;               // forward: like x
  const void* dy;        // backward: like x
  void* dx;              // like x
  void* dresidual;       // like x, or nullptr
  float *mean, *rstd;    // [N, G]
  GroupNormParameter weight, bias, scale, shift;
  float* sums;   // backward: [2, N, position_parts, C], sums of dz x_hat and of dz; nullptr: nobody wants them
  float* parts;  // split: [tiles, parts, groups of a tile, 2], mean and m2; backward: sums of a dz x_hat and of a dz
  float* terms;  // split, backward: [tiles, groups of a tile, 2], the sums over the parts
  unsigned* counters;  // split: [tiles], 0
  int64_t n, c, s;
  unsigned groups, d;  // d: channels of a group
  float eps;
  int activation;
  Float dtype;
  bool backward;
  GroupNormPlan plan;
  // Of a launch.
  GroupNormStage stage;
  unsigned first_tile, tiles;
};

// Gradients of the parameters from the sums: what nobody wants is nullptr.
struct GroupNormParameterGrads {
  void *weight, *bias;  // [C]
  void *scale, *shift;  // [N, C]
  const float* sums;    // [2, N, position_parts, C]
  float* partial;       // [splits, 2, C] where the samples are shared out to several blocks
  unsigned* counters;   // [blocks of channels], 0
  GroupNormParameter given_weight, given_bias, given_scale;
  Float shift_dtype;
  int64_t n, c;
  unsigned position_parts;
  unsigned splits;  // blocks that share the samples of a channel
};

// Whether the device runs the clusters of call.plan.
bool group_norm_clusters_run(const Queue& queue, const GroupNormCall& call);
bool group_norm_last_clusters_run(const Queue& queue, const GroupNormCall& call);

void launch_group_norm(const Queue& queue, const GroupNormCall& call);
void launch_group_norm_last(const Queue& queue, const GroupNormCall& call);

constexpr int kGroupNormGradChannels = 32;  // of a block
void launch_group_norm_parameter_grads(const Queue& queue, const GroupNormParameterGrads& grads);

}  // namespace dlkernels
