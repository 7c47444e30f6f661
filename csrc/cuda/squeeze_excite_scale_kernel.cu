// Squeeze-and-excitation in two sweeps: the scale of both passes, and the functions between matrix products.
#include "squeeze_excite_parts.h"

namespace dlkernels {
namespace squeeze_excite {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 2;  // packs of a thread that are on their way at a time

// f(first element of a thread in its sample, sample): blocks go from the last sample to the first, since what was
// summed last is what L2 still holds.
template <int N, class F>
DL_DEVICE void in_sample(const SqueezeExciteArgs& a, F f) {
  const int64_t size = a.c * a.s;
  const unsigned blocks = static_cast<unsigned>(ceil_div(size, int64_t{N} * kThreads * kUnroll));
  const unsigned block = gridDim.x - 1 - blockIdx.x, sample = block / blocks;
  wait_for_previous_kernel();
  f((int64_t{block - sample * blocks} * kUnroll * kThreads + threadIdx.x) * N, a.first_n + sample);
}

// Values of the channels at an element: 32-bit divisions where a sample allows it.
template <int N>
DL_DEVICE Floats<N> at_element(const SqueezeExciteArgs& a, const float* of_sample, int64_t at) {
  const GlobalValues<Use::kHanded> values{of_sample};
  const int64_t inner = a.last ? a.c : a.s;
  const bool whole = N == 1 || inner % N == 0;
  if (a.c * a.s <= 0x7fffffff)
    return of_channels<N>(a.last, whole, static_cast<unsigned>(inner), static_cast<unsigned>(at), values);
  return of_channels<N>(a.last, whole, inner, at, values);
}

// Math      y = act(x e + r).
// Traffic   per element: read x, from L2 as far as it holds it, and r; write y.
// Grid      samples x blocks of kThreads * kUnroll packs of N elements.
// Requires  with N > 1: multiples of 16 bytes, samples of a multiple of N elements.
// Result    bitwise reproducible.
template <class T, int N>
DL_KERNEL(kThreads, 4)
scale_kernel(const SqueezeExciteArgs a) {
  const int64_t size = a.c * a.s;
  in_sample<N>(a, [&](int64_t first, int64_t n) {
    const T* x = static_cast<const T*>(a.x) + n * size;
    const T* residual = a.residual != nullptr ? static_cast<const T*>(a.residual) + n * size : nullptr;
    T* y = static_cast<T*>(a.y) + n * size;
    const float* e = a.gate_value + n * a.c;
    Pack<T, N> values[kUnroll], more[kUnroll];
    DL_UNROLL
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t at = first + int64_t{u} * kThreads * N;
      if (at < size) values[u] = load_pack<N>(x + at);
      if (at < size && residual != nullptr) more[u] = load_pack<N>(residual + at);
    }
    DL_UNROLL
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t at = first + int64_t{u} * kThreads * N;
      if (at >= size) continue;
      Floats<N> v = to_floats(values[u]);
      const Floats<N> gate = at_element<N>(a, e, at);
      DL_UNROLL
      for (int j = 0; j < N; ++j) v[j] *= gate[j];
      if (residual != nullptr) {
        const Floats<N> r = to_floats(more[u]);
        with_activation(static_cast<Activation>(a.residual_activation), [&](auto kind) {
          DL_UNROLL
          for (int j = 0; j < N; ++j) v[j] = activate<decltype(kind)::value>(v[j] + r[j]);
        });
      }
      store<N>(y + at, v);
    }
  });
}

// Math      dx = dz e + ds, ds divided by S already.
// Traffic   per element: read dz, from L2 as far as it holds it; write dx.
// Grid      as scale_kernel.
// Requires  as scale_kernel.
// Result    bitwise reproducible.
template <class T, int N>
DL_KERNEL(kThreads, 4)
scale_grad_kernel(const SqueezeExciteArgs a) {
  const int64_t size = a.c * a.s;
  in_sample<N>(a, [&](int64_t first, int64_t n) {
    const T* dz = static_cast<const T*>(a.dresidual != nullptr ? a.dresidual : a.dy) + n * size;
    T* dx = static_cast<T*>(a.dx) + n * size;
    Pack<T, N> values[kUnroll];
    DL_UNROLL
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t at = first + int64_t{u} * kThreads * N;
      if (at < size) values[u] = load_pack<N>(dz + at);
    }
    DL_UNROLL
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t at = first + int64_t{u} * kThreads * N;
      if (at >= size) continue;
      Floats<N> v = to_floats(values[u]);
      const Floats<N> gate = at_element<N>(a, a.gate_value + n * a.c, at), ds = at_element<N>(a, a.ds + n * a.c, at);
      DL_UNROLL
      for (int j = 0; j < N; ++j) v[j] = v[j] * gate[j] + ds[j];
      store<N>(dx + at, v);
    }
  });
}

DL_DEVICE float activated(int code, float z) {
  with_activation(static_cast<Activation>(code), [&](auto kind) { z = activate<decltype(kind)::value>(z); });
  return z;
}
DL_DEVICE float slope_of(int code, float z) {
  with_activation(static_cast<Activation>(code), [&](auto kind) { z = slope<decltype(kind)::value>(z); });
  return z;
}

// Math      act(a), gate(a), a act'(b) or a gate'(b).
// Traffic   read a (and b), write out: numbers per channel, not per element.
// Grid      one thread per number.
// Requires  nothing.
// Result    bitwise reproducible.
DL_KERNEL(kThreads, 1)
point_kernel(SqueezeExcitePoint point, int code, const float* a, const float* b, float* out, int64_t numel) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= numel) return;
  float v = load_one<Use::kAgain>(a + i);
  switch (point) {
    case SqueezeExcitePoint::kGate: v = gate(static_cast<Gate>(code), v); break;
    case SqueezeExcitePoint::kGateGrad: v *= gate_slope(static_cast<Gate>(code), load_one(b + i)); break;
    case SqueezeExcitePoint::kActivate: v = activated(code, v); break;
    default: v *= slope_of(code, load_one(b + i));
  }
  store_one<Use::kAgain>(out + i, v);
}

template <bool kGrad>
void launch_scale(const Queue& queue, const SqueezeExciteArgs& a) {
  with_dtype(a.dtype, [&](auto t) {
    using T = decltype(t);
    with_pack<T>(a.plan.packs, [&](auto width) {
      constexpr int N = decltype(width)::value;
      const int64_t blocks = a.samples * ceil_div(a.c * a.s, int64_t{N} * kThreads * kUnroll);
      const auto kernel = kGrad ? scale_grad_kernel<T, N> : scale_kernel<T, N>;
      launch(queue, {static_cast<unsigned>(blocks), kThreads, 0, 1, /*overlap=*/true}, kernel, a);
    });
  });
}

}  // namespace
}  // namespace squeeze_excite

void launch_squeeze_excite_scale(const Queue& queue, const SqueezeExciteArgs& a) {
  squeeze_excite::launch_scale<false>(queue, a);
}
void launch_squeeze_excite_scale_grad(const Queue& queue, const SqueezeExciteArgs& a) {
  squeeze_excite::launch_scale<true>(queue, a);
}

void launch_squeeze_excite_point(const Queue& queue, SqueezeExcitePoint kind, int code, const float* a, const float* b,
                                 float* out, int64_t numel) {
  using namespace squeeze_excite;
  launch(queue, {static_cast<unsigned>(ceil_div<int64_t>(numel, kThreads)), kThreads}, point_kernel, kind, code, a, b,
         out, numel);
}

}  // namespace dlkernels
