// What the host side hands to the squeeze-and-excitation loops, and the loops of each instruction set.
//
// Shared by torch-free files compiled once per instruction set and by squeeze_excite.cpp.
#pragma once

#include <cstdint>

#include "../common/float_kind.h"

namespace dlkernels {

// "A" below is float32, float64 for float64. r = 0: one layer, w2 [C, C].
struct SqueezeExciteArgs {
  Float dtype;
  int64_t n, c, s, r;
  bool channels_last;  // [N, S, C], else [N, C, S]
  int activation, gate, residual_activation;
  const void* w1;  // [R, C] A
  const void* b1;  // [R] A, or nullptr
  const void* w2;  // [C, R] A
  const void* b2;  // [C] A, or nullptr
  const void* x;
  const void* residual;  // like x, or nullptr
  void* mean;            // [N, C] A
  void* hidden;          // [N, R] A, before its activation
  void* gate_value;      // [N, C] A
  void* y;               // forward: like x
  const void* dy;        // backward, from here on: like x
  void* dx;              // like x
  void* dresidual;       // like x, or nullptr
  void* dz2;             // [N, C] A
  void* dz1;             // [N, R] A
  void* activated;       // [N, R] A: act(hidden)
  bool stream;           // write y or dx past the caches
};

// out[o][i] = sum_n u[n][o] v[n][i] in the parameter's dtype; with v == nullptr out[o] = sum_n u[n][o].
struct OuterSum {
  const void *u, *v;  // [N, outputs], [N, inputs] A
  int64_t n, outputs, inputs;
  void* out;
  Float dtype;
};

struct SqueezeExciteKernels {
  int64_t (*samples_per_item)(const SqueezeExciteArgs&);
  int64_t (*scratch_bytes)(const SqueezeExciteArgs&);
  void (*forward)(const SqueezeExciteArgs&, int64_t item_begin, int64_t item_end, void* scratch);
  void (*backward)(const SqueezeExciteArgs&, int64_t item_begin, int64_t item_end, void* scratch);
  void (*outer_sum)(Float arithmetic, const OuterSum&, int64_t o_begin, int64_t o_end);
};

SqueezeExciteKernels squeeze_excite_kernels_DEFAULT();
SqueezeExciteKernels squeeze_excite_kernels_AVX2();
SqueezeExciteKernels squeeze_excite_kernels_AVX512();

}  // namespace dlkernels
