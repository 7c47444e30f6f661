// What the host side hands to the center-loss loops, and the loops of each instruction set.
#pragma once

#include <cstdint>

#include "../common/float_kind.h"

namespace dlkernels {

// Sorted rows [begin, end) of one class, at most kPieceRows of them.
struct CenterPiece {
  int64_t label, begin, end;
  int64_t slot;   // where its sum goes in `sums`, or -1: the piece is its whole class, and done with at once
  int64_t count;  // rows of the class
};
// The sums of a class in slots [slot, slot + pieces).
struct CenterClass {
  int64_t label, slot, pieces, count;
};
constexpr int64_t kPieceRows = 256;
constexpr int64_t kBlockRows = 64;  // rows per partial sum of the losses, in their own order

enum class CenterSums { kNone, kUpdate, kGradient };

struct CenterLossArgs {
  Float dtype, center_dtype, attention_dtype;
  const void* features;   // [n, d]
  const void* labels;     // [n] int64, or int32 when `narrow`
  void* centers;          // [k, d]; written by CenterSums::kUpdate only
  const void* attention;  // [n, d], or nullptr
  bool narrow, logits;
  int64_t n, k, d, ignore_index;
  void* loss;                          // [n] float (double), or nullptr
  double* partial;                     // where loss is nullptr: sums of the losses, of each block or piece; or nullptr
  void* dx;                            // [n, d], or nullptr
  void* dattention;                    // [n, d], or nullptr
  const void* grad_output;             // [n] float (double), or nullptr: then grad_scale alone
  int64_t grad_output_step;            // 1, or 0 for one value
  double grad_scale, attention_scale;  // of dx and of dattention
  bool stream;                         // write dx and dattention past the caches
  // By class:
  CenterSums mode;
  const int32_t* order;        // [n] rows, by class
  const CenterPiece* pieces;   // in the order of the classes
  const CenterClass* classes;  // those with slots
  void* sums;                  // [slots, d] float (double)
  void* dcenters;              // [k, d] in the centers' dtype, for CenterSums::kGradient; zeros
  double alpha;
  bool ema;
};

struct IslandArgs {
  Float dtype;
  const void* centers;  // [k, d]
  int64_t k, d;
  void* inverse_norms;  // [k] float (double)
  void* partial;        // [blocks, d] float (double): sums of normalised centers
  const void* total;    // [d] float (double)
  void* out;            // [k, d]: the gradient, or the centers themselves
  double scale;         // of the direction
  // Centers by class sums too, where out = centers:
  const CenterClass* classes;  // in the order of the labels
  int64_t present;
  const void* sums;
  double alpha;
  bool ema;
};
constexpr int64_t kCenterScratch = 4;
constexpr int64_t kIslandBlock = 128;  // centers per partial sum

struct CenterLossKernels {
  // Blocks of rows in their own order: loss, dx, dattention. False: an attention outside of [0, 1].
  // scratch here and below: kCenterScratch rows of d floats (doubles).
  bool (*blocks)(const CenterLossArgs&, int64_t begin, int64_t end, void* scratch);
  // The same for the rows of pieces [begin, end), and their sums of A (x - c).
  void (*pieces)(const CenterLossArgs&, int64_t begin, int64_t end, void* scratch);
  // Classes with slots: their sums, in order, and (mode) what becomes of them.
  void (*merge)(const CenterLossArgs&, int64_t begin, int64_t end);
  // Whether the attention of rows [begin, end) lies in [0, 1].
  bool (*in_range)(const CenterLossArgs&, int64_t begin, int64_t end);
  // Zeros for those of rows [begin, end) that do not count.
  void (*left_out)(const CenterLossArgs&, int64_t begin, int64_t end);
  void (*island_sums)(const IslandArgs&, int64_t block_begin, int64_t block_end);
  // out = scale * direction; and where out is the centers, added to them together with the steps of `classes`.
  void (*island_apply)(const IslandArgs&, int64_t begin, int64_t end);
};

CenterLossKernels center_loss_kernels_DEFAULT();
CenterLossKernels center_loss_kernels_AVX2();
CenterLossKernels center_loss_kernels_AVX512();

}  // namespace dlkernels
