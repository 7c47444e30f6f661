// What the host side of a fused optimizer step hands to its loops: torch-free.
#pragma once

#include <cstdint>

#include "float_kind.h"

namespace dlkernels {

constexpr int kSlots = 3;                // moments of one parameter at most
constexpr int64_t kPiece = 16384;        // elements of a parameter that one task takes: 5 arrays of it stay in L2
constexpr int64_t kRandomsPerBlock = 8;  // 16-bit random numbers of one Philox block

// One parameter of one step. Everything is dense and of the parameter's memory layout.
struct StepTensor {
  void* param;
  const void* grad;
  void* slots[kSlots];  // AdamW: first moment, second, its maximum; SGDW: momentum. nullptr where there is none
  void* master;         // the parameter in float32, or nullptr
  void* average;        // moving average of the parameter, or nullptr
  int64_t numel;
  Float dtype, slot_dtype;  // of param and grad; of the slots. master, average: float64 beside float64, else float32

  // Where element i lies in the whole parameter, of which this may be a shard: i / period * full_period + offset
  // + i % period. Stochastic rounding draws by it.
  int64_t offset, period, full_period;
  int64_t index;  // of the parameter in the optimizer
  int32_t row;    // of the scalars that it is stepped with
};

// Stochastic rounding of what is stored in bfloat16: param and slots.
struct Rounding {
  bool on;
  uint64_t seed;
  int64_t step;  // the step being made, from 1 on
};

}  // namespace dlkernels
