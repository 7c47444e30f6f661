// Small pieces that every CPU operator's host side needs.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/movedim.h>
#include <ATen/ops/scalar_tensor.h>

#include <cstdint>
#include <optional>
#include <string>

#include "float_kind.h"

namespace dlkernels {

// Which instruction set ATen runs with: the machine's best, or what ATEN_CPU_CAPABILITY asks for.
enum class Capability { kDefault, kAvx2, kAvx512 };
Capability cpu_capability();
std::string cpu_capability_name();

// The table of loops of the best instruction set that runs here, from its functions foo_DEFAULT, foo_AVX2, foo_AVX512.
#if defined(__x86_64__)
#define DL_KERNELS_OF_THIS_MACHINE(foo)                     \
  (cpu_capability() == Capability::kAvx512 ? foo##_AVX512() \
   : cpu_capability() == Capability::kAvx2 ? foo##_AVX2()   \
                                           : foo##_DEFAULT())
#else
#define DL_KERNELS_OF_THIS_MACHINE(foo) foo##_DEFAULT()
#endif

// Outputs beyond this size are written past the caches: they would not be found there anyway. Layers, whose passes read
// and write as much again, gain from 2 MB on, also with what reads the output next counted in.
constexpr int64_t kStreamBytes = int64_t{12} << 20, kStreamLayerBytes = int64_t{2} << 20;

inline at::ScalarType accumulate_type(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

inline Float float_kind(const char* name, const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat: return Float::kFloat32;
    case at::kHalf: return Float::kFloat16;
    case at::kBFloat16: return Float::kBFloat16;
    case at::kDouble: return Float::kFloat64;
    default:
      TORCH_CHECK_TYPE(false, "`", name, "` must be float32, float16, bfloat16 or float64, got ", x.scalar_type());
  }
}

// Dense, with dimension 0 outermost and the channels innermost: torch's channels_last, in any number of dimensions.
inline bool channels_last(const at::Tensor& x) {
  if (x.dim() < 3 || x.is_contiguous()) return false;
  int64_t expected = 1;
  for (int64_t i = x.dim(); i-- > 0;) {  // channels, then the positions from the last to the first, then dimension 0
    const int64_t d = i == 0 ? 0 : i == x.dim() - 1 ? 1 : i + 1;
    if (x.size(d) != 1 && x.stride(d) != expected) return false;
    expected *= x.size(d);
  }
  return true;
}

// x in the memory layout of a dense tensor of the same shape: itself where it lies so, else a copy.
inline at::Tensor in_layout_of(const at::Tensor& like, const at::Tensor& x) {
  return x.strides() == like.strides() ? x : at::empty_like(like, x.options()).copy_(x);
}

// A zero-dimensional tensor of the accumulation type.
inline at::Tensor scalar(double value, const at::Tensor& like) {
  return at::scalar_tensor(value, like.options().dtype(accumulate_type(like)));
}

inline std::optional<double> value_of(const std::optional<at::Tensor>& x) {
  if (!x.has_value() || !x->defined()) return std::nullopt;
  return x->scalar_type() == at::kDouble ? *x->const_data_ptr<double>()
                                         : static_cast<double>(*x->const_data_ptr<float>());
}

// Work items of `cost` elements each per task, so that a task is worth handing to another thread.
inline int64_t grain(int64_t cost) { return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, cost)); }

// The sum in order, in double: the same for any number of threads.
template <class A>
double sum_in_order(const A* x, int64_t n) {
  double lanes[4] = {0, 0, 0, 0};
  int64_t i = 0;
  for (; i + 4 <= n; i += 4)
    for (int k = 0; k < 4; ++k) lanes[k] += static_cast<double>(x[i + k]);
  for (; i < n; ++i) lanes[0] += static_cast<double>(x[i]);
  return (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
}

}  // namespace dlkernels
