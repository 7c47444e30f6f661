// What the host side hands to the weight-norm loops, and the loops of each instruction set.
//
// v is [A, K, B]: one norm per k, over A chunks of B elements. Rows (A = 1, or long chunks) are summed one k at a time,
// columns (short chunks) for a block of neighbours at once. Sums are made over segments of a fixed size and added in
// their order, in double: the same bits for any number of threads.
#pragma once

#include <cstdint>

#include "../common/float_kind.h"

namespace dlkernels {

constexpr int64_t kWeightNormSegment = 16384;  // elements of a row per partial sum
constexpr int64_t kWeightNormShortChunk = 64;  // chunks shorter than this go by columns

// How [A, K, B] is cut up: by its shape alone.
struct WeightNormPlan {
  bool columns;
  int64_t segments;       // per row, or of the columns
  int64_t parts, chunks;  // rows: parts of a chunk, chunks of a segment (one of the two is 1)
  int64_t height;         // columns: chunks per segment
  int64_t pieces, slots;  // items of the steps `sum` and `apply`; numbers in `partial`
};

// Internal linkage: compiled into files of several instruction sets.
[[maybe_unused]] static WeightNormPlan weight_norm_plan(int64_t outer, int64_t rows, int64_t inner) {
  const auto up = [](int64_t n, int64_t d) { return (n + d - 1) / d; };
  const int64_t width = rows * inner;
  WeightNormPlan p{};
  p.columns = outer > 1 && inner < kWeightNormShortChunk;
  p.parts = inner > kWeightNormSegment ? up(inner, kWeightNormSegment) : 1;
  p.chunks = p.parts > 1 || inner == 0 ? 1 : kWeightNormSegment / inner;
  p.height = width > 1024 || width == 0 ? 32 : 32768 / width;
  p.segments = p.columns ? up(outer, p.height) : p.parts > 1 ? outer * p.parts : up(outer, p.chunks);
  p.pieces = p.columns ? p.segments : rows * p.segments;
  p.slots = p.columns ? p.segments * width : p.pieces;
  return p;
}

struct WeightNormArgs {
  Float dtype, g_dtype;
  const void* v;               // [A, K, B]
  const void* g;               // [K] in g_dtype
  const void* grad_output;     // [A, K, B], or nullptr: forward
  void* norm;                  // [K] float32 (float64): written forward, read backward
  void* out;                   // [A, K, B]: w, or dv
  void* dg;                    // [K] in g_dtype, or nullptr: forward
  int64_t outer, rows, inner;  // A, K, B
  WeightNormPlan plan;
  bool stream;  // write w or dv past the caches
  // Scratch of the three steps.
  void* partial;    // rows: [K, segments] double; columns: [segments, K B] float32 (float64)
  double* factors;  // [3, K]: a, b and the kind of the row
  void* spread;     // columns: [2, K B] float32 (float64), a and b per column
};

struct WeightNormKernels {
  // Whole rows k: the sum, then the result while the row is in the cache.
  void (*rows)(const WeightNormArgs&, int64_t row_begin, int64_t row_end);
  // The same in three steps, for few long rows and for columns: partial sums of the pieces, the factors of each k,
  // the result of the pieces.
  void (*sum)(const WeightNormArgs&, int64_t begin, int64_t end);
  void (*factor)(const WeightNormArgs&, int64_t row_begin, int64_t row_end);
  void (*apply)(const WeightNormArgs&, int64_t begin, int64_t end);
};

WeightNormKernels weight_norm_kernels_DEFAULT();
WeightNormKernels weight_norm_kernels_AVX2();
WeightNormKernels weight_norm_kernels_AVX512();

}  // namespace dlkernels
