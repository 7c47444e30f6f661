// What the host side of squeeze-and-excitation hands to its kernels, and how they cover (N, C, S): torch-free.
#pragma once

#include "../common/cuda_launch.h"
#include "../common/float_kind.h"

namespace dlkernels {

// The dynamic shared memory of a block: parts of tensors, then floats.
struct SqueezeExciteShared {
  unsigned slab = 0;     // bytes of one tensor's part, a multiple of 16
  unsigned slabs = 0;    // 0 to 3 of them
  unsigned visible = 0;  // channels whose sums the block holds
  unsigned gates = 0;    // backward: their gates beside them
  unsigned wide = 0;     // outputs of the first layer
  unsigned hidden = 0;   // R
  unsigned scratch = 0;  // floats
  unsigned bytes() const { return slab * slabs + 4 * (visible + gates + wide + hidden + scratch + 1); }
};

// A sample is seen as rows that lie behind each other: with channels first a row is a channel and holds S positions,
// with channels last a row is a position and holds C channels.
struct SqueezeExcitePlan {
  enum class Regime {
    kCluster,  // a sample stays in the shared memory of a cluster of blocks: one launch
    kWalk,     // sums with the layers, then the scale, in batches of samples that L2 holds between the two
    kMatmul    // sums, the layers as matrix products of all samples, the scale
  };
  Regime regime = Regime::kMatmul;
  bool packs = false;      // 16 bytes an access
  bool straddles = false;  // with packs: a row is not a multiple of a pack, so that sums are taken from shared memory
  unsigned threads = 256;  // of the kernel that sums
  SqueezeExciteShared shared;
  int row_lanes = 1;  // channels first: threads that sum a piece of a row, a power of two
  int pieces = 1;     // and the pieces of a row
  // Cluster
  unsigned cluster = 1;
  int slab = 0;  // rows of a block
  int own = 0;   // channels whose layers are a block's
  // Walk and matmul
  bool sum_packs = false;  // as packs, for the sums
  int tile_channels = 0;   // of a block
  int64_t tile_positions = 0;
  int channel_tiles = 1;
  int64_t chunks = 1;  // tiles along the positions
  int64_t batch = 1;   // samples of a launch
};

// "A weight" is float32, or of the dtype of x where its `single` is false. r = 0: one layer, w2 [C, C].
struct SqueezeExciteWeight {
  const void* data = nullptr;
  bool single = false;
};

struct SqueezeExciteArgs {
  SqueezeExcitePlan plan;
  Float dtype;
  int64_t n, s;
  int c, r;
  bool last;  // [N, S, C], else [N, C, S]
  int activation, gate, residual_activation;
  SqueezeExciteWeight w1, b1, w2, b2;  // [R, C], [R], [C, R], [C]
  const void* x;
  const void* residual;  // like x, or nullptr
  float* mean;           // [N, C]
  float* hidden;         // [N, R] before its activation
  float* gate_value;     // [N, C]
  void* y;               // forward: like x
  const void* dy;        // backward, from here on: like x
  void* dx;              // like x
  void* dresidual;       // like x with an activation behind the sum, else nullptr
  float* dz2;            // [N, C]
  float* dz1;            // [N, R]
  float* activated;      // [N, R] act(hidden)
  // Walk and matmul
  float* ds;                 // [N, C] gradient of the mean, divided by S; nullptr in a cluster
  float* pooled;             // [N, C] matmul: the mean or, backward, the gate's gradient
  float* partial;            // [batch, chunks, C]
  unsigned* counters;        // [batch], zero
  int64_t first_n, samples;  // of this launch
};

// False where the device cannot run a cluster of this size.
bool launch_squeeze_excite_cluster(const Queue& queue, const SqueezeExciteArgs& a);
bool launch_squeeze_excite_cluster_grad(const Queue& queue, const SqueezeExciteArgs& a);

void launch_squeeze_excite_sums(const Queue& queue, const SqueezeExciteArgs& a);
void launch_squeeze_excite_sums_grad(const Queue& queue, const SqueezeExciteArgs& a);
void launch_squeeze_excite_scale(const Queue& queue, const SqueezeExciteArgs& a);
void launch_squeeze_excite_scale_grad(const Queue& queue, const SqueezeExciteArgs& a);

// Between matrix products: out = act(a), gate(a), a act'(b) or a gate'(b), the last with b the gate's value.
enum class SqueezeExcitePoint { kActivate, kGate, kActivateGrad, kGateGrad };
void launch_squeeze_excite_point(const Queue& queue, SqueezeExcitePoint kind, int code, const float* a, const float* b,
                                 float* out, int64_t numel);

}  // namespace dlkernels
