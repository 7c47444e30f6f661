// Squeeze-and-excitation with a sample in the shared memory of a cluster of blocks, both passes.
#include "squeeze_excite_layers.h"

namespace dlkernels {
namespace squeeze_excite {
namespace {

constexpr int kMostThreads = 512;

// Math      forward: y = act(x e + r) with e the gate of both layers of the mean of x.
//           backward: dz = dy act'(x e + r),  de = sum dz x,  dx = dz e + ds / S with ds from both layers' backward.
// Traffic   per element: read x (r), write y; backward read dy, x (r), write dx (dz). x or dz stays in shared memory
//           between its sum and its product. Per sample the weights once (from L2), mean, hidden and gate.
// Grid      one cluster a sample, of 1 to 16 blocks. A block takes plan.slab rows: channels or, with channels last,
//           positions; and the layers of plan.own channels.
// Requires  with N > 1: multiples of 16 bytes, samples of a multiple of N elements, parts that begin at one.
// Result    bitwise reproducible: fixed trees, blocks in the order of their rank.
template <class T, int N, Pass P>
DL_KERNEL(kMostThreads, P == Pass::kGradAct ? 1 : 2)
cluster_kernel(const SqueezeExciteArgs a) {
  const SqueezeExcitePlan& plan = a.plan;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int s = static_cast<int>(a.s), rank = static_cast<int>(cluster_rank());
  const int64_t n = blockIdx.x / cluster_size();
  const Room<T> room = squeeze_excite::room<T>(plan.shared);
  const Share share{cluster_size(), cluster_rank(), vmin(a.c, rank * plan.own),
                    vmax(0, vmin(plan.own, a.c - rank * plan.own))};
  const int rows = a.last ? s : a.c, width = a.last ? a.c : s, first = vmin(rows, rank * plan.slab);
  const Tile tile{int64_t{first} * width, width, vmin(plan.slab, rows - first), width, a.last ? 0 : first};
  float* own = a.last ? room.sums + share.first : room.sums;

  channel_sums<T, N, P, Use::kOnce, true>(a, n, tile, room, [&](int i, float sum) { room.sums[i] = sum; });
  if (a.last) meet(share);
  else __syncthreads();
  for (int i = thread; i < share.count; i += threads) {
    if (a.last) own[i] = gathered(own + i, share);
    if constexpr (P == Pass::kForward) {
      own[i] /= static_cast<float>(s);
      store_one(a.mean + n * a.c + share.first + i, own[i]);
    }
  }
  if constexpr (P != Pass::kForward) {  // what the scale wants besides ds
    const int visible = a.last ? a.c : share.count;
    for (int i = thread; i < visible; i += threads)
      room.gate[i] = load_one(a.gate_value + n * a.c + (a.last ? 0 : share.first) + i);
  }
  __syncthreads();
  if constexpr (P == Pass::kForward) layers_forward<T>(a, n, share, own, room);
  else layers_backward<T>(a, n, share, own, room);
  if (a.last && share.cluster > 1) {
    meet(share);
    for (int c = thread; c < a.c; c += threads) {
      const int owner = c / plan.own;
      if (owner != rank) room.sums[c] = *in_block_of_cluster(room.sums + c, owner);
    }
  }
  __syncthreads();
  if (share.cluster > 1) cluster_arrive();  // nothing is read in other blocks from here on

  const int length = tile.rows * width;
  const int64_t start = n * a.c * a.s + tile.begin;
  const bool whole = N == 1 || width % N == 0;
  const auto of = [&](const float* v, int i) { return of_channels<N>(a.last, whole, width, i, SharedValues{v}); };
  if constexpr (P == Pass::kForward) {
    T* y = static_cast<T*>(a.y) + start;
    if (a.residual == nullptr) {
      for (int i = thread * N; i < length; i += threads * N) {
        Floats<N> x = to_floats(*reinterpret_cast<const Pack<T, N>*>(room.slab + i));
        const Floats<N> e = of(room.sums, i);
        DL_UNROLL
        for (int j = 0; j < N; ++j) x[j] *= e[j];
        store<N>(y + i, x);
      }
    } else {
      const T* residual = static_cast<const T*>(a.residual) + start;
      with_activation(static_cast<Activation>(a.residual_activation), [&](auto kind) {
        for (int i = thread * N; i < length; i += threads * N) {
          const Floats<N> r = load<N>(residual + i);
          Floats<N> x = to_floats(*reinterpret_cast<const Pack<T, N>*>(room.slab + i));
          const Floats<N> e = of(room.sums, i);
          DL_UNROLL
          for (int j = 0; j < N; ++j) x[j] = squeeze_excite_output<decltype(kind)::value>(x[j], e[j], r[j]);
          store<N>(y + i, x);
        }
      });
    }
  } else {
    T* dx = static_cast<T*>(a.dx) + start;
    for (int i = thread * N; i < length; i += threads * N) {
      Floats<N> dz = to_floats(*reinterpret_cast<const Pack<T, N>*>(room.slab + i));
      const Floats<N> e = of(room.gate, i), ds = of(room.sums, i);
      DL_UNROLL
      for (int j = 0; j < N; ++j) dz[j] = dz[j] * e[j] + ds[j];
      store<N>(dx + i, dz);
    }
  }
  if (share.cluster > 1) cluster_wait();
}

template <Pass P>
bool launch_cluster(const Queue& queue, const SqueezeExciteArgs& a) {
  const SqueezeExcitePlan& plan = a.plan;
  const LaunchShape shape{static_cast<unsigned>(a.n * plan.cluster), plan.threads, plan.shared.bytes(), plan.cluster};
  bool runs = true;
  with_dtype(a.dtype, [&](auto t) {
    using T = decltype(t);
    with_pack<T>(plan.packs, [&](auto width) {
      const auto kernel = cluster_kernel<T, decltype(width)::value, P>;
      runs = plan.cluster <= 8 || active_clusters(queue, shape, kernel) > 0;
      if (runs) launch(queue, shape, kernel, a);
    });
  });
  return runs;
}

}  // namespace
}  // namespace squeeze_excite

bool launch_squeeze_excite_cluster(const Queue& queue, const SqueezeExciteArgs& a) {
  return squeeze_excite::launch_cluster<squeeze_excite::Pass::kForward>(queue, a);
}

bool launch_squeeze_excite_cluster_grad(const Queue& queue, const SqueezeExciteArgs& a) {
  using squeeze_excite::Pass;
  if (a.dresidual != nullptr) return squeeze_excite::launch_cluster<Pass::kGradAct>(queue, a);
  return squeeze_excite::launch_cluster<Pass::kGrad>(queue, a);
}

}  // namespace dlkernels
