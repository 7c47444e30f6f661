// The GroupNorm loops of one instruction set: compiled once for each, with CPU_CAPABILITY naming it.
#include "group_norm_kernel.h"

#include "group_norm_backward.h"
#include "group_norm_forward.h"
#include "group_norm_vectors.h"

namespace dlkernels {
inline namespace CPU_CAPABILITY {

static int64_t items(const GroupNormArgs& a) { return a.n * items_per_sample(a); }

static int64_t scratch_bytes(const GroupNormArgs& a) {
  const int64_t channels = groups_per_item(a) * (a.c / a.groups), width = a.channels_last ? channels : 0;
  if (a.dtype == Float::kFloat64) return GroupNormScratch<double>::bytes(width, 0);
  const bool stashes = stashes_in_scratch(a) && channels * a.s <= kStashInScratch;
  return GroupNormScratch<float>::bytes(width, stashes ? channels * a.s : 0);
}

// f(T, activation tag), for the dtype and the activation at hand.
template <class F>
void with_types(const GroupNormArgs& a, F f) {
  with_float(a.dtype,
             [&](auto t) { with_activation(static_cast<Activation>(a.activation), [&](auto kind) { f(t, kind); }); });
}

static void forward(const GroupNormArgs& a, int64_t begin, int64_t end, void* scratch) {
  with_types(a, [&](auto t, auto kind) {
    using T = decltype(t);
    constexpr Activation K = decltype(kind)::value;
    for (int64_t i = begin; i < end; ++i) {
      const Item item = item_of(a, i);
      if (a.channels_last && a.s == 1) {
        forward_vectors<T, K>(a, item, {scratch, item.c_end - item.c_begin});
      } else if (a.channels_last) {
        forward_channels_last<T, K>(a, item, {scratch, item.c_end - item.c_begin});
      } else {
        forward_contiguous<T, K>(a, item);
      }
    }
  });
  if (a.stream) store_fence();
}

static void backward(const GroupNormArgs& a, int64_t begin, int64_t end, void* scratch) {
  with_types(a, [&](auto t, auto kind) {
    using T = decltype(t);
    constexpr Activation K = decltype(kind)::value;
    for (int64_t i = begin; i < end; ++i) {
      const Item item = item_of(a, i);
      if (a.channels_last && a.s == 1) {
        backward_vectors<T, K>(a, item, {scratch, item.c_end - item.c_begin});
      } else if (a.channels_last) {
        backward_channels_last<T, K>(a, item, {scratch, item.c_end - item.c_begin});
      } else {
        backward_contiguous<T, K>(a, item, {scratch, 0});
      }
    }
  });
  if (a.stream) store_fence();
}

static void parameter_grads(const GroupNormArgs& a, const GroupNormParameterGrads& to, int64_t begin, int64_t end) {
  if (a.dtype == Float::kFloat64) return parameter_grads<double>(a, to, begin, end);
  parameter_grads<float>(a, to, begin, end);
}

}  // namespace CPU_CAPABILITY

GroupNormKernels DL_CONCAT(group_norm_kernels_, CPU_CAPABILITY)() {
  return {items, scratch_bytes, forward, backward, parameter_grads};
}

}  // namespace dlkernels
