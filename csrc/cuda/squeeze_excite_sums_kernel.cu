// Squeeze-and-excitation in two sweeps over global memory: the sums of both passes, and the layers in between.
#include "squeeze_excite_layers.h"

namespace dlkernels {
namespace squeeze_excite {
namespace {

constexpr int kSumThreads = 256;

// Math      forward: mean = sum x / S;  backward: dz = dy act'(x e + r),  de = sum dz x. When walking, the layers too.
// Traffic   per element: read x; backward read dy, x (r), write dz where there is an activation: x or dz stays in L2
//           for the scale. Per sample, when walking, the weights once.
// Grid      samples x tiles of plan.tile_channels x plan.tile_positions. The last block of a sample adds the sums of
//           its chunks, in order, and runs the layers.
// Requires  with N > 1: multiples of 16 bytes, rows of a multiple of N elements, or tiles of whole rows that begin at
//           one. Counters that are 0.
// Result    bitwise reproducible: fixed trees, chunks in the order of their index.
template <class T, int N, Pass P>
DL_KERNEL(kSumThreads, P == Pass::kGradAct ? 2 : 4)
sums_kernel(const SqueezeExciteArgs a) {
  const SqueezeExcitePlan& plan = a.plan;
  const unsigned chunks = static_cast<unsigned>(plan.chunks), tiles = plan.channel_tiles * chunks;
  const unsigned sample = blockIdx.x / tiles, in_sample = blockIdx.x - sample * tiles;
  const unsigned channel_tile = in_sample / chunks, chunk = in_sample - channel_tile * chunks;
  const int64_t n = a.first_n + sample, first_s = chunk * plan.tile_positions;
  const int first_c = static_cast<int>(channel_tile) * plan.tile_channels;
  const int count_c = vmin(plan.tile_channels, a.c - first_c);
  const int count_s = static_cast<int>(vmin(plan.tile_positions, a.s - first_s));
  const Room<T> room = squeeze_excite::room<T>(plan.shared);
  const Tile tile = a.last ? Tile{first_s * a.c + first_c, a.c, count_s, count_c, first_c}
                           : Tile{first_c * a.s + first_s, a.s, count_c, count_s, first_c};
  const float divisor = P == Pass::kForward ? static_cast<float>(a.s) : 1.0f;
  const bool walks = plan.regime == SqueezeExcitePlan::Regime::kWalk, merges = walks || chunks > 1;
  float* out = merges ? a.partial + (int64_t{sample} * chunks + chunk) * a.c : a.pooled + n * a.c;
  channel_sums<T, N, P, Use::kAgain, false>(a, n, tile, room, [&](int i, float sum) {
    store_one<Use::kAgain>(out + first_c + i, merges ? sum : sum / divisor);
  });
  allow_next_kernel();
  if (!merges || !last_block(a.counters + sample, tiles, *room.flag)) return;
  column_sums(Partial{a.partial + int64_t{sample} * chunks * a.c, a.c}, static_cast<int>(chunks), a.c, room.scratch,
              [&](int c, float sum) {
                if (walks) room.sums[c] = sum / divisor;
                if (!walks || P == Pass::kForward)
                  store_one<Use::kAgain>((walks ? a.mean : a.pooled) + n * a.c + c, sum / divisor);
              });
  if (!walks) return;
  __syncthreads();
  const Share all{1, 0, 0, a.c};
  if constexpr (P == Pass::kForward) layers_forward<T>(a, n, all, room.sums, room);
  else layers_backward<T>(a, n, all, room.sums, room);
}

template <Pass P>
void launch_sums(const Queue& queue, const SqueezeExciteArgs& a) {
  const SqueezeExcitePlan& plan = a.plan;
  with_dtype(a.dtype, [&](auto t) {
    using T = decltype(t);
    with_pack<T>(plan.sum_packs, [&](auto width) {
      launch(queue,
             {static_cast<unsigned>(a.samples * plan.channel_tiles * plan.chunks), plan.threads, plan.shared.bytes()},
             sums_kernel<T, decltype(width)::value, P>, a);
    });
  });
}

}  // namespace
}  // namespace squeeze_excite

void launch_squeeze_excite_sums(const Queue& queue, const SqueezeExciteArgs& a) {
  squeeze_excite::launch_sums<squeeze_excite::Pass::kForward>(queue, a);
}

void launch_squeeze_excite_sums_grad(const Queue& queue, const SqueezeExciteArgs& a) {
  using squeeze_excite::Pass;
  if (a.dresidual != nullptr) return squeeze_excite::launch_sums<Pass::kGradAct>(queue, a);
  squeeze_excite::launch_sums<Pass::kGrad>(queue, a);
}

}  // namespace dlkernels
