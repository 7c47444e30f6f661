// What GroupNorm's kernels share: teams of threads, parts of tiles in shared memory, sums over teams and clusters.
#pragma once

#include "../common/cuda_dtype.h"
#include "../common/cuda_reduce.h"
#include "../math/group_norm.h"
#include "group_norm_kernel.h"

// All threads of a team have come here. A macro, so that tests see each use as a barrier of its own.
#define GROUP_NORM_TEAM_BARRIER(team) \
  do {                                \
    if ((team).threads > kWarp) {     \
      __syncthreads();                \
    } else {                          \
      warp_barrier();                 \
    }                                 \
  } while (0)

namespace dlkernels {

DL_DEVICE unsigned quotient(unsigned x, const GroupNormDivisor& by) {
  return (__umulhi(x, by.multiplier) + x) >> by.shift;
}

// Threads that share a tile: part of a warp, or whole warps. A block's teams do the same thing at the same time.
struct Team {
  unsigned index, thread;
  int threads;
  DL_DEVICE int width() const { return threads < kWarp ? threads : kWarp; }
};

DL_DEVICE Team own_team(const GroupNormPlan& p) {
  return {threadIdx.x / p.team, threadIdx.x & (p.team - 1), static_cast<int>(p.team)};
}

DL_DEVICE unsigned char* room_of(const GroupNormPlan& p, GroupNormShared& shared, const Team& team) {
  return reinterpret_cast<unsigned char*>(&shared + 1) + team.index * p.room;
}

// Each value becomes its sum over the team, in every thread of it. One barrier; each use has a scratch of its own.
template <int K>
DL_DEVICE void team_sum(float (&value)[K], const Team& team, float (&scratch)[2][kWarp]) {
  DL_UNROLL
  for (int k = 0; k < K; ++k) value[k] = warp_sum(value[k], team.width());
  if (team.threads <= kWarp) return;
  if (lane() == 0) {
    DL_UNROLL
    for (int k = 0; k < K; ++k) scratch[k][warp()] = value[k];
  }
  __syncthreads();
  const int count = team.threads / kWarp, first = static_cast<int>(team.index) * count;
  DL_UNROLL
  for (int k = 0; k < K; ++k) value[k] = warp_sum(lane() < count ? scratch[k][first + lane()] : 0.0f);
}

// Rows of `cols` elements, `stride` apart in global memory; of `runs` packs each.
struct Rectangle {
  unsigned rows, cols, runs;
  int64_t stride;
  GroupNormDivisor by_runs;
  DL_DEVICE bool flat() const { return cols == stride || rows == 1; }
  // Where pack i of the rectangle lies.
  template <int N>
  DL_DEVICE int64_t offset_of(unsigned i) const {
    const unsigned row = quotient(i, by_runs);
    return row * stride + (i - row * runs) * N;
  }
};

// N elements in shared memory.
template <int N, class T>
DL_DEVICE Pack<T, N> held_pack(const T* p) {
  return bit_cast<Pack<T, N>>(*reinterpret_cast<const typename memory::Word<N * sizeof(T)>::type*>(p));
}
template <int N, class T>
DL_DEVICE Floats<N> held(const T* p) {
  return to_floats(held_pack<N>(p));
}

template <class T>
DL_DEVICE unsigned elements_past_16_bytes(const T* p) {
  return static_cast<unsigned>(reinterpret_cast<uintptr_t>(p) % kPackBytes / sizeof(T));
}

// Begins to bring a rectangle into shared memory, its rows one behind the other; gives back where the first element
// will be. It is there behind copies_done() and a barrier of the team. N = 1: of any alignment, also in packs where
// the rectangle is one piece of memory; it lies as far past a multiple of 16 bytes here as there.
template <int N, class T>
DL_DEVICE T* fetch(T* room, const T* from, const Rectangle& r, const Team& team) {
  if constexpr (N > 1) {
    for (unsigned i = team.thread; i < r.rows * r.runs; i += team.threads)
      copy_16_bytes(room + i * N, from + r.offset_of<N>(i));
    return room;
  } else {
    const unsigned count = r.rows * r.cols;
    if (!r.flat()) {
      for (unsigned i = team.thread; i < count; i += team.threads)
        room[i] = load_pack<1>(from + r.offset_of<1>(i)).v[0];
      return room;
    }
    const unsigned past = elements_past_16_bytes(from), before = past == 0 ? 0 : kPack<T> - past;
    const unsigned head = before < count ? before : count, packs = (count - head) / kPack<T>;
    T* to = room + past;
    for (unsigned i = team.thread; i < packs; i += team.threads)
      copy_16_bytes(to + head + i * kPack<T>, from + head + i * kPack<T>);
    for (unsigned i = team.thread; i < count - packs * kPack<T>; i += team.threads) {
      const unsigned at = i < head ? i : i + packs * kPack<T>;
      to[at] = load_pack<1>(from + at).v[0];
    }
    return to;
  }
}

// The way back for what fetch<1> brought and the team has written over.
template <class T>
DL_DEVICE void put_back(T* to, const T* held, const Rectangle& r, const Team& team) {
  const unsigned count = r.rows * r.cols, past = elements_past_16_bytes(to);
  unsigned head = count, packs = 0;
  if (r.flat() && past == elements_past_16_bytes(held)) {
    const unsigned before = past == 0 ? 0 : kPack<T> - past;
    head = before < count ? before : count;
    packs = (count - head) / kPack<T>;
  }
  for (unsigned i = team.thread; i < packs; i += team.threads)
    store_pack<kPack<T>>(to + head + i * kPack<T>, held_pack<kPack<T>>(held + head + i * kPack<T>));
  for (unsigned i = team.thread; i < count - packs * kPack<T>; i += team.threads) {
    const unsigned at = i < head ? i : i + packs * kPack<T>;
    store_pack<1>(to + r.offset_of<1>(at), held_pack<1>(held + at));
  }
}

// What a channel of a sample is multiplied by, and what is added: a = weight (1 + scale), b = bias (1 + scale) + shift.
struct AffineTerms {
  float a, b;
};

DL_DEVICE float parameter_at(const GroupNormParameter& p, int64_t i, float otherwise) {
  if (p.data == nullptr) return otherwise;
  switch (p.dtype) {
    case Float::kFloat16: return load_one(static_cast<const float16*>(p.data) + i);
    case Float::kBFloat16: return load_one(static_cast<const bfloat16*>(p.data) + i);
    default: return load_one(static_cast<const float*>(p.data) + i);
  }
}

DL_DEVICE AffineTerms affine_of(const GroupNormCall& a, unsigned n, unsigned c) {
  const int64_t nc = n * a.c + c;
  const float factor = 1.0f + parameter_at(a.scale, nc, 0.0f);
  return {parameter_at(a.weight, c, 1.0f) * factor,
          parameter_at(a.bias, c, 0.0f) * factor + parameter_at(a.shift, nc, 0.0f)};
}

// f(kind, i) for N values. The switch is the same for all threads; it stands around four values, which have something
// to do for each other while one waits, and registers for that.
template <int N, class F>
DL_DEVICE void for_values(int activation, F f) {
  constexpr int kStep = N < 4 ? N : 4;
  DL_UNROLL
  for (int first = 0; first < N; first += kStep) {
    opaque(activation);  // or one switch would be made for all of them
    with_activation(static_cast<Activation>(activation), [&](auto kind) {
      DL_UNROLL
      for (int i = first; i < first + kStep; ++i) f(kind, i);
    });
  }
}

template <int N>
DL_DEVICE void activate_all(int activation, Floats<N>& z) {
  for_values<N>(activation, [&](auto kind, int i) { z[i] = activate<decltype(kind)::value>(z[i]); });
}

// dy becomes dz = dy act'(z).
template <int N>
DL_DEVICE void times_slope(int activation, Floats<N>& dy, const Floats<N>& z) {
  for_values<N>(activation, [&](auto kind, int i) { dy[i] *= slope<decltype(kind)::value>(z[i]); });
}

template <int N>
DL_DEVICE float sum_of(const Floats<N>& x) {
  float part[N];
  DL_UNROLL
  for (int i = 0; i < N; ++i) part[i] = x[i];
  DL_UNROLL
  for (int half = N / 2; half > 0; half /= 2) {
    DL_UNROLL
    for (int i = 0; i < half; ++i) part[i] += part[i + half];
  }
  return part[0];
}

DL_DEVICE float not_below_zero(float x) { return x < 0.0f ? 0.0f : x; }  // NaN stays NaN

DL_DEVICE float reciprocal_std(float m2, float count, float eps) { return 1.0f / sqrtf(m2 / count + eps); }

// dx = dz p + (x - mean) q + r: what is left of it when the sums over the group are known.
DL_DEVICE GradientMap<float> gradient_map(float mean, float rstd, float sum_dz_x_hat, float sum_dz, float count) {
  return {mean, rstd, -rstd * rstd * sum_dz_x_hat / count, -rstd * sum_dz / count};
}

// Launching -----------------------------------------------------------------------------------------------------------

inline LaunchShape launch_shape(const GroupNormPlan& p, unsigned tiles) {
  LaunchShape s;
  s.grid = ceil_div(tiles, p.teams) * p.parts;
  s.block = p.block();
  s.shared = p.shared;
  s.cluster = p.cluster;
  return s;
}

// f(kernel) with the one that serves the call: Kernels::forward<T, N>() or Kernels::backward<T, N>().
template <class Kernels, class F>
void with_kernel(const GroupNormCall& a, F f) {
  with_dtype(a.dtype, [&](auto t) {
    using T = decltype(t);
    with_pack<T>(a.plan.packs, [&](auto n) {
      constexpr int N = decltype(n)::value;
      if (a.backward) f(Kernels::template backward<T, N>());
      else f(Kernels::template forward<T, N>());
    });
  });
}

template <class Kernels>
bool clusters_run(const Queue& queue, const GroupNormCall& a) {
  bool run = false;
  with_kernel<Kernels>(
      a, [&](auto kernel) { run = active_clusters(queue, launch_shape(a.plan, a.plan.tiles), kernel) > 0; });
  return run;
}

// The kernel over all tiles; split, its two halves over one batch of tiles after another.
template <class Kernels>
void launch_in_batches(const Queue& queue, GroupNormCall a) {
  with_kernel<Kernels>(a, [&](auto kernel) {
    for (a.first_tile = 0; a.first_tile < a.plan.tiles; a.first_tile += a.plan.batch) {
      a.tiles = std::min(a.plan.batch, a.plan.tiles - a.first_tile);
      LaunchShape s = launch_shape(a.plan, a.tiles);
      a.stage = a.plan.split ? GroupNormStage::kSums : GroupNormStage::kBoth;
      launch(queue, s, kernel, a);
      if (!a.plan.split) continue;
      a.stage = GroupNormStage::kRest;
      s.overlap = true;
      launch(queue, s, kernel, a);
    }
  });
}

}  // namespace dlkernels
