// A stored gradient times the gradient of the loss, on GPUs.
#include "stored_grad_kernel.h"

#include <algorithm>

#include "../common/cuda_dtype.h"
#include "../common/cuda_memory.h"

namespace dlkernels {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;  // packs of a thread that are on their way at a time

// Math      y = x * g / divisor;  0 stays 0 whatever g and divisor are (rows left out of a mean over nothing).
// Traffic   per element: read x, write y; nothing in place when the factor is 1.
// Grid      one block per kThreads * kUnroll packs of N elements; the last one may have elements left over.
// Requires  x and y are multiples of N * sizeof(T) bytes.
// Result    bitwise reproducible.
template <class T, int N>
DL_KERNEL(kThreads, 4)
scale_stored_grad_kernel(const StoredGradArgs a) {
  float factor = load_one(a.grad);
  if (a.divisor != nullptr) factor /= load_one(a.divisor);
  if (factor == 1.0f && a.x == a.y) return;
  const auto scaled = [&](float x) { return x == 0.0f ? 0.0f : x * factor; };
  const T* x = static_cast<const T*>(a.x);
  T* y = static_cast<T*>(a.y);
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kUnroll * kThreads + threadIdx.x) * N;
  Floats<N> values[kUnroll];
  DL_UNROLL
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t at = first + int64_t{u} * kThreads * N;
    if (at + N <= a.numel) values[u] = load<N>(x + at);
  }
  DL_UNROLL
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t at = first + int64_t{u} * kThreads * N;
    if (at + N <= a.numel) {
      DL_UNROLL
      for (int i = 0; i < N; ++i) values[u][i] = scaled(values[u][i]);
      store<N>(y + at, values[u]);
    } else {
      for (int64_t i = at; i < a.numel; ++i) store_one(y + i, scaled(load_one<Use::kOnce>(x + i)));
    }
  }
}

}  // namespace

void launch_scale_stored_grad(const Queue& queue, const StoredGradArgs& a) {
  if (a.numel == 0) return;
  with_dtype(a.dtype, [&](auto t) {
    using T = decltype(t);
    with_pack<T>(aligned(a.x, a.y), [&](auto n) {
      constexpr int N = decltype(n)::value;
      const int64_t per_block = int64_t{N} * kThreads * kUnroll;
      launch(queue, {static_cast<unsigned>(ceil_div(a.numel, per_block)), kThreads}, scale_stored_grad_kernel<T, N>, a);
    });
  });
}

}  // namespace dlkernels
