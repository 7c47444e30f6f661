// The two small layers of the squeeze-and-excitation kernels: weights times the sums of a sample, and their gradients.
#pragma once

#include "squeeze_excite_parts.h"

namespace dlkernels {
namespace squeeze_excite {

template <class T>
DL_DEVICE float weight(const SqueezeExciteWeight& w, int64_t i) {
  return w.single ? load_one(static_cast<const float*>(w.data) + i) : load_one(static_cast<const T*>(w.data) + i);
}

// done(o, sum_i w[o ld + i] v[i]), in one thread: v in shared memory. Of U rows at a time: a row is a few loads, and a
// block has nothing else to do while they are on their way.
template <class W, class F>
DL_DEVICE void rows_times(const W* w, int64_t ld, int rows, int length, const float* v, F done) {
  constexpr int U = 4;
  int lanes = kWarp;
  while (lanes > U && lanes / 2 >= length) lanes /= 2;
  const int inside = lane() % lanes, groups = static_cast<int>(blockDim.x) / lanes;
  DL_LOOPED
  for (int base = warp() * (kWarp / lanes); base < rows; base += U * groups) {
    const int first = base + lane() / lanes;
    float sum[U] = {};
    DL_LOOPED
    for (int i = inside; i < length; i += lanes) {
      float of_row[U];
      DL_UNROLL
      for (int u = 0; u < U; ++u) {
        const int row = first + u * groups;
        of_row[u] = row < rows ? load_one(w + row * ld + i) : 0.0f;
      }
      DL_UNROLL
      for (int u = 0; u < U; ++u) sum[u] += of_row[u] * v[i];
    }
    float own = 0;  // each of the first U lanes finishes a row
    DL_UNROLL
    for (int u = 0; u < U; ++u) {
      const float total = warp_sum(sum[u], lanes);
      if (inside == u) own = total;
    }
    const int row = first + inside * groups;
    if (inside < U && row < rows) done(row, own);
  }
}

// Rows of weights, each times a number in shared memory.
template <class W>
struct Weighted {
  static constexpr int kWidth = 1, kUnroll = 4;
  const W* w;
  int64_t ld;
  const float* v;

  using Raw = float;
  DL_DEVICE Raw get(int row, int col) const { return load_one(w + row * ld + col); }
  DL_DEVICE Floats<1> term(Raw raw, int row, int) const { return {{raw * v[row]}}; }
};

// done(i, sum_o w[o ld + i] v[o]), in one thread.
template <class W, class F>
DL_DEVICE void columns_times(const W* w, int64_t ld, int rows, int length, const float* v, float* scratch, F done) {
  column_sums(Weighted<W>{w, ld, v}, rows, length, scratch, done);
}

// f(the weights of their dtype, from element `first` on).
template <class T, class F>
DL_DEVICE void with_weight(const SqueezeExciteWeight& w, int64_t first, F f) {
  if (std::is_same<T, float>::value || w.single) f(static_cast<const float*>(w.data) + first);
  else f(static_cast<const T*>(w.data) + first);
}

// The channels that a block of a cluster owns.
struct Share {
  unsigned cluster, rank;
  int first, count;
};

DL_DEVICE void meet(const Share& share) {
  if (share.cluster > 1) cluster_barrier();
  else __syncthreads();
}

// The sum of one number of each block, in their order.
DL_DEVICE float gathered(float* own, const Share& share) {
  float sum = *in_block_of_cluster(own, 0);
  for (unsigned rank = 1; rank < share.cluster; ++rank) sum += *in_block_of_cluster(own, rank);
  return sum;
}

// own: the means of the share's channels, seen by all threads; afterwards their gates, behind the next barrier. The
// first layer is split by its inputs, so that the blocks of a cluster meet once.
template <class T>
DL_DEVICE void layers_forward(const SqueezeExciteArgs& a, int64_t n, const Share& share, float* own,
                              const Room<T>& room) {
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const bool two = a.r > 0;
  with_weight<T>(two ? a.w1 : a.w2, share.first, [&](const auto* w) {
    rows_times(w, a.c, two ? a.r : a.c, share.count, own, [&](int o, float sum) { room.part[o] = sum; });
  });
  meet(share);
  const auto finish = [&](int i, float z) {
    if (a.b2.data != nullptr) z += weight<T>(a.b2, share.first + i);
    own[i] = gate(static_cast<Gate>(a.gate), z);
    store_one<Use::kAgain>(a.gate_value + n * a.c + share.first + i, own[i]);
  };
  if (two) {
    for (int r = thread; r < a.r; r += threads) {
      float z = gathered(room.part + r, share);
      if (a.b1.data != nullptr) z += weight<T>(a.b1, r);
      if (share.rank == 0) store_one(a.hidden + n * a.r + r, z);
      with_activation(static_cast<Activation>(a.activation),
                      [&](auto kind) { room.hidden[r] = activate<decltype(kind)::value>(z); });
    }
    __syncthreads();
    with_weight<T>(a.w2, int64_t{share.first} * a.r,
                   [&](const auto* w) { rows_times(w, a.r, share.count, a.r, room.hidden, finish); });
  } else {
    for (int i = thread; i < share.count; i += threads) finish(i, gathered(room.part + share.first + i, share));
  }
}

// own: de of the share's channels, seen by all threads; afterwards ds, divided by S, behind the next barrier.
template <class T>
DL_DEVICE void layers_backward(const SqueezeExciteArgs& a, int64_t n, const Share& share, float* own,
                               const Room<T>& room) {
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const float positions = static_cast<float>(a.s);
  const bool two = a.r > 0;
  for (int i = thread; i < share.count; i += threads) {
    const int64_t at = n * a.c + share.first + i;
    own[i] *= gate_slope(static_cast<Gate>(a.gate), load_one(a.gate_value + at));
    store_one(a.dz2 + at, own[i]);
  }
  __syncthreads();
  const int wide = two ? a.r : a.c;
  with_weight<T>(a.w2, int64_t{share.first} * wide, [&](const auto* w) {
    columns_times(w, wide, share.count, wide, own, room.scratch, [&](int i, float sum) { room.part[i] = sum; });
  });
  meet(share);
  const auto finish = [&](int i, float sum) {
    own[i] = sum / positions;
    if (a.ds != nullptr) store_one<Use::kAgain>(a.ds + n * a.c + share.first + i, own[i]);
  };
  if (two) {
    for (int r = thread; r < a.r; r += threads) {
      const float da = gathered(room.part + r, share), z = load_one(a.hidden + n * a.r + r);
      with_activation(static_cast<Activation>(a.activation), [&](auto kind) {
        room.hidden[r] = da * slope<decltype(kind)::value>(z);
        if (share.rank == 0) store_one(a.activated + n * a.r + r, activate<decltype(kind)::value>(z));
      });
      if (share.rank == 0) store_one(a.dz1 + n * a.r + r, room.hidden[r]);
    }
    __syncthreads();
    with_weight<T>(a.w1, share.first,
                   [&](const auto* w) { columns_times(w, a.c, a.r, share.count, room.hidden, room.scratch, finish); });
  } else {
    for (int i = thread; i < share.count; i += threads) finish(i, gathered(room.part + share.first + i, share));
  }
}

}  // namespace squeeze_excite
}  // namespace dlkernels
