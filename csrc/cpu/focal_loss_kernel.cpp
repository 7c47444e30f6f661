// The focal-loss loops of one instruction set: compiled once for each, with CPU_CAPABILITY naming it.
#include "focal_loss_kernel.h"

#include "../common/loops.h"
#include "focal_loss_sigmoid.h"
#include "focal_loss_softmax.h"
#include "focal_loss_strips.h"

namespace dlkernels {
inline namespace CPU_CAPABILITY {

template <class T>
bool side_by_side(const SoftmaxArgs& a) {
  return a.inner > 1 || a.classes <= kShortRow;
}

static int64_t softmax_tiles(const SoftmaxArgs& a) {
  return with_float(a.dtype, [&](auto t) -> int64_t {
    using T = decltype(t);
    const int64_t rows = a.outer * a.inner;
    if (!side_by_side<T>(a)) return rows;
    const int64_t per_outer = strips_per_outer<T>(a), lanes = strip_lanes<T>(a);
    return per_outer > 0 ? a.outer * per_outer : (rows + lanes - 1) / lanes;
  });
}

static int64_t softmax_scratch_bytes(const SoftmaxArgs& a) {
  return with_float(a.dtype, [&](auto t) -> int64_t {
    using T = decltype(t);
    const int64_t lanes = side_by_side<T>(a) ? strip_lanes<T>(a) : 1;
    return 3 * (a.classes * lanes + 16) * static_cast<int64_t>(sizeof(typename Lanes<T>::scalar));
  });
}

template <class T, class TT, Gamma G>
void softmax_gamma(const SoftmaxArgs& a, int64_t begin, int64_t end, void* scratch) {
  using A = typename Lanes<T>::scalar;
  const SoftmaxRows<T, TT> rows{a};
  A* work = static_cast<A*>(scratch);
  if (side_by_side<T>(a)) {
    for (int64_t tile = begin; tile < end; ++tile) strip<T, TT, G>(rows, tile, work);
  } else if (rows.dense()) {
    for (int64_t row = begin; row < end; ++row) dense_row<T, TT, G>(rows, row, work);
  } else {
    for (int64_t row = begin; row < end; ++row) index_row<T, TT, G>(rows, row, work);
  }
  if (a.stream) store_fence();
}

template <class T, class TT>
void softmax_typed(const SoftmaxArgs& a, int64_t begin, int64_t end, void* scratch) {
  switch (gamma_kind(a.gamma)) {
    case Gamma::kZero: return softmax_gamma<T, TT, Gamma::kZero>(a, begin, end, scratch);
    case Gamma::kTwo: return softmax_gamma<T, TT, Gamma::kTwo>(a, begin, end, scratch);
    default: return softmax_gamma<T, TT, Gamma::kAny>(a, begin, end, scratch);
  }
}

static void softmax(const SoftmaxArgs& a, int64_t begin, int64_t end, void* scratch) {
  with_float(a.dtype, [&](auto t) {
    using T = decltype(t);
    if constexpr (sizeof(T) == 2)
      if (a.target_kind == Target::kFloat32) return softmax_typed<T, float>(a, begin, end, scratch);
    return softmax_typed<T, T>(a, begin, end, scratch);
  });
}

}  // namespace CPU_CAPABILITY

FocalLossKernels DL_CONCAT(focal_loss_kernels_, CPU_CAPABILITY)() {
  return {sigmoid, softmax_tiles, softmax_scratch_bytes, softmax};
}

}  // namespace dlkernels
