// What the host side of the center-loss family hands to its kernels: torch-free. Rows are samples, N of them, of D
// features; the centers are K.
#pragma once

#include "../common/cuda_launch.h"
#include "../common/float_kind.h"

namespace dlkernels {

// The tensors of a call, contiguous. Centers and attention may be float32 beside half-precision features.
struct CenterLossTensors {
  Float dtype, center_dtype, attention_dtype;
  const void* x;          // [N, D] features
  const void* labels;     // [N] int64, or int32 when `narrow`
  const void* centers;    // [K, D]
  const void* attention;  // [N, D], or nullptr
  bool narrow, logits;
  int64_t n, k, d, ignore_index;
};

// Rows, in their own order: loss and gradients ------------------------------------------------------------------------

constexpr int kCenterThreads = 256;

// Where the divisor of a mean comes from.
enum class CenterDivisor {
  kOne,    // it is no mean
  kLater,  // no gradient needs it: each block counts its own rows, the last one adds
  kHere,   // each block counts all labels: they are few
  kBefore  // a kernel before this one has counted them
};

// How blocks cover the rows.
struct CenterRowsPlan {
  int lanes;  // threads of a row: a power of two up to a warp, or the block
  unsigned blocks;
  CenterDivisor divisor;
  bool resident;  // features and gradients may stay in L2 for who needs them next
};
// packs: rows of 16-byte packs.
CenterRowsPlan plan_center_rows(const Machine& machine, const CenterLossTensors& t, bool packs, bool mean,
                                bool need_grad);

struct CenterRowsArgs {
  CenterLossTensors t;
  const float* grad;  // [N] of the row losses, `grad_step` apart; or nullptr: 1
  int64_t grad_step;
  void* dx;           // [N, D], or nullptr
  void* dattention;   // [N, D], or nullptr
  float* row_loss;    // [N], or nullptr
  float* loss;        // [] their sum over the divisor, or nullptr
  float* divisor;     // [], or nullptr without a loss
  float* partial;     // [blocks], with `loss`
  int* counted;       // [blocks] with CenterDivisor::kLater, [center_count_blocks] with kBefore
  unsigned* counter;  // [2] zeros
};
// Whether all rows start at a multiple of 16 bytes and end at one.
// Numbers in `counted` for CenterDivisor::kBefore.
int64_t center_count_blocks(int64_t n);
bool center_rows_in_packs(const CenterRowsArgs& args);
void launch_center_rows(const Queue& queue, const CenterRowsPlan& plan, const CenterRowsArgs& args);

// Rows by class: the centers' update and their gradient ---------------------------------------------------------------

// How the rows are sorted by class.
struct CenterSortPlan {
  int passes, bits;  // digits of a class, and bits of each
  int tile;          // rows of a block
  unsigned blocks;   // 1: one launch does it all
  unsigned shared;   // bytes
};
CenterSortPlan plan_center_sort(const Machine& machine, int64_t n, int64_t k);

constexpr int kLeftOut = -1, kOutOfRange = -2, kNoRow = -3;  // in place of a class; these come last

struct CenterSortArgs {
  const void* labels;  // [N]
  bool narrow;
  int n, k;
  int64_t ignore_index;
  int* order;         // [N] rows by class, those of a class in their own order
  int* sorted;        // [N] their classes
  int* other_order;   // [N] scratch of several blocks
  int* offsets;       // [2^bits * blocks] the same
  unsigned* counter;  // [1] zeros
};
void launch_center_sort(const Queue& queue, const CenterSortPlan& plan, const CenterSortArgs& args);

// How blocks cover the sorted rows and the features.
struct CenterSumsPlan {
  int rows;         // of a warp
  unsigned blocks;  // over the rows
  unsigned slabs;   // over the features
};
CenterSumsPlan plan_center_sums(const Machine& machine, int64_t n, int64_t d, bool packs);

struct CenterSumsArgs {
  CenterLossTensors t;
  const int* order;   // [N]
  const int* sorted;  // [N]
  const float* grad;  // [N] of the row losses, `grad_step` apart; or nullptr: 1
  int64_t grad_step;
  void* out;          // [K, D] centers or their gradient, in the centers' dtype
  bool gradient;      // out = -sum, not a step of the centers
  float alpha;        // of the step
  bool ema;           // the step is of the mean, not of sum / (1 + n)
  void* dx;           // [N, D], or nullptr
  void* dattention;   // [N, D], or nullptr
  float* partial;     // [2 blocks, D] sums of classes that lie in several blocks
  int* slots;         // [slabs, 2 blocks, 2] their classes and rows
  unsigned* counter;  // [slabs] zeros
};
bool center_sums_in_packs(const CenterSumsArgs& args);
void launch_center_sums(const Queue& queue, const CenterSumsPlan& plan, const CenterSumsArgs& args);

}  // namespace dlkernels
