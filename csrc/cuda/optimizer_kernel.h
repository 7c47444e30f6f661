// What the host side of a fused optimizer step hands to its kernels: torch-free.
//
// What stays from step to step lies in device memory: items and where their units begin. What may change with every
// step, addresses of gradients and numbers of groups, travels as the argument of the launch where it fits: nothing is
// copied before the kernel, and a CUDA graph has it in its node, as it was when the step was captured.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "../common/cuda_launch.h"
#include "../common/optimizer.h"

namespace dlkernels {

// A number that was known at launch, or one that the kernel reads when it runs.
struct Number {
  const void* at = nullptr;  // [] on the device, or nullptr: `value`
  Float dtype = Float::kFloat32;
  double value = 0;
};

// What the parameters of a group that share a step counter are stepped with.
struct StepRow {
  float* counter;  // [] steps made; nullptr where nobody counts
  bool advances;   // one row of each counter does, when its parameters are stepped
  Number lr;
  double decay_rate, sign;  // lr * decay_rate is the decay; -1 to maximize
  double own[3];            // AdamW: beta1, beta2, eps; SGDW: momentum, paper, nesterov
  double log_beta[2];       // of AdamW
};

// Parameters, cut into units that a block takes one after another.
struct UnitTable {
  const StepTensor* items;  // [count] their gradients are elsewhere
  const int* first_unit;    // [count + 1] of each item
  int count, units;
  int length;  // elements of a unit; the last one of an item may have less
};

// What some of the items of a step need: they are all stepped by one kernel.
enum class Needs {
  kLittle,    // the parameter, its gradient and the family's usual slots, all rounded to nearest
  kRounding,  // and stochastic rounding
  kAll        // any slots, master copies, averages
};

struct StepHeader {
  UnitTable table;
  const StepRow* rows;       // [num_rows] on the device, or nullptr: in the argument
  const void* const* grads;  // [table.count] on the device, or nullptr: in the argument, behind such rows. nullptr each
                             // for the items that are not stepped
  int num_rows;
  bool counts;  // some row advances
  bool rounds;  // stochastic rounding of what is stored in bfloat16
  Needs needs;
  bool skip_nonfinite;
  float average_weight;  // 1 - decay of the moving averages
  uint64_t seed;
  Number scale, found_inf;     // of the gradients: divided by the one, not stepped where the other is not 0
  const double* norm_squares;  // [] of the gradients as they are, or nullptr
  float* norm;                 // [] written: the norm after unscaling
  double max_norm;             // clipped to, or negative
  unsigned* ticket;            // 0, and left so
};

struct SquaresHeader {
  UnitTable table;
  const void* const* grads;  // as above
  const int* set_begin;      // [known + 1] the first unit of each norm set
  double* partial;           // [table.units]
  double* squares;           // [sets]
  int sets, known;           // sets from `known` on have no gradient here
  unsigned* ticket;
};

// Arguments of kernels, in bytes: what every driver takes, and what those of CUDA 12.1 on take.
constexpr int kSmallArgument = 4096, kLargeArgument = 32760;

template <class Header, int kBytes>
struct Argument {
  Header header;
  alignas(8) unsigned char inlined[kBytes - sizeof(Header)];
};

template <class Header>
constexpr int room_in(int argument) {
  return argument - static_cast<int>(sizeof(Header));
}

constexpr int kStepThreads = 256;
constexpr int kStepBlocks = 2;  // of a multiprocessor
constexpr int kUnitStep = 2048;

// Elements of a unit: several units for each block, so that all end together, and long enough to make up for finding
// them. A multiple of kUnitStep.
inline int unit_length(int64_t elements, const Machine& machine) {
  constexpr int64_t kUnitsPerBlock = 8, kMost = 8;
  const int64_t blocks = int64_t{kStepBlocks} * machine.multiprocessors;
  return static_cast<int>(kUnitStep * std::clamp<int64_t>(elements / (blocks * kUnitsPerBlock * kUnitStep), 1, kMost));
}

// f(integral constant)
template <class F>
void with_needs(Needs needs, F f) {
  if (needs == Needs::kLittle) return f(std::integral_constant<Needs, Needs::kLittle>{});
  if (needs == Needs::kRounding) return f(std::integral_constant<Needs, Needs::kRounding>{});
  f(std::integral_constant<Needs, Needs::kAll>{});
}

// As many blocks as run at a time, or as there are units.
inline LaunchShape step_shape(int units, unsigned shared, const Machine& machine, int per_multiprocessor) {
  const int blocks = std::clamp(units, 1, per_multiprocessor * machine.multiprocessors);
  return {static_cast<unsigned>(blocks), kStepThreads, shared, 1, true};
}

// `inlined` are the bytes behind the header.
void launch_adamw_step(const Queue& queue, const StepHeader& header, const void* inlined, int bytes);
void launch_sgdw_step(const Queue& queue, const StepHeader& header, const void* inlined, int bytes);
void launch_gradient_squares(const Queue& queue, const SquaresHeader& header, const void* inlined, int bytes);

// `words` of 8 bytes from the host to the device, without memory in between that would have to stay: they travel as
// arguments of at most so many bytes, and in a CUDA graph with it.
void launch_write_table(const Queue& queue, void* to, const void* from, int64_t words, int argument);

// f(argument of the kernel): the header and what is behind it, in the smaller of the two sizes that holds it.
template <class Header, class F>
void with_argument(const Header& header, const void* inlined, int bytes, F f) {
  const auto filled = [&](auto size) {
    Argument<Header, decltype(size)::value> argument;  // its bytes are not cleared
    argument.header = header;
    if (bytes > 0) memcpy(argument.inlined, inlined, static_cast<size_t>(bytes));
    f(argument);
  };
  if (bytes <= room_in<Header>(kSmallArgument)) filled(std::integral_constant<int, kSmallArgument>{});
  else filled(std::integral_constant<int, kLargeArgument>{});
}

}  // namespace dlkernels
