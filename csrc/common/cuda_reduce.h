// Sums and maxima over a warp, a block, a cluster: fixed trees, the result in every thread, bitwise equal between runs.
#pragma once

#include "cuda_memory.h"

namespace dlkernels {

constexpr int kMaxWarps = 32;
constexpr int kMaxCluster = 16;

// The same bits in every lane: a butterfly adds equal pairs in both of their lanes. `width` lanes side by side, a power
// of two, sum among themselves.
template <class T>
DL_DEVICE T warp_sum(T value, int width = kWarp) {
  DL_UNROLL
  for (int mask = kWarp / 2; mask > 0; mask /= 2)
    if (mask < width) value += shuffle_xor(value, mask);
  return value;
}
template <class T>
DL_DEVICE T warp_max(T value) {
  DL_UNROLL
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    const T other = shuffle_xor(value, mask);
    value = other > value ? other : value;
  }
  return value;
}

// Room in shared memory for sums of N values over a block. One barrier of the block must lie between two uses.
template <class T, int N>
struct BlockSums {
  T of_warp[N][kMaxWarps];
};

// value[i] becomes its sum over the block, in every thread. One barrier; the scratch may be used again behind the next.
template <int N, class T>
DL_DEVICE void block_sum(T (&value)[N], BlockSums<T, N>& scratch) {
  DL_UNROLL
  for (int i = 0; i < N; ++i) value[i] = warp_sum(value[i]);
  if (lane() == 0) {
    DL_UNROLL
    for (int i = 0; i < N; ++i) scratch.of_warp[i][warp()] = value[i];
  }
  __syncthreads();
  DL_UNROLL
  for (int i = 0; i < N; ++i) value[i] = warp_sum(lane() < warps() ? scratch.of_warp[i][lane()] : T(0));
}
template <class T>
DL_DEVICE T block_sum(T value, BlockSums<T, 1>& scratch) {
  T values[1] = {value};
  block_sum(values, scratch);
  return values[0];
}

// The sum of what the blocks of the cluster have where `own` lies, in their order. Four loads are on their way at a
// time: each takes as long as ten from one's own block.
template <class T>
DL_DEVICE T sum_over_cluster(T* own) {
  constexpr unsigned kUnroll = 4;
  const unsigned blocks = cluster_size();
  T sum = T(0);
  DL_LOOPED
  for (unsigned first = 0; first < blocks; first += kUnroll) {
    T of_block[kUnroll];
    DL_UNROLL
    for (unsigned u = 0; u < kUnroll; ++u)
      of_block[u] = first + u < blocks ? *in_block_of_cluster(own, first + u) : T(0);
    DL_UNROLL
    for (unsigned u = 0; u < kUnroll; ++u) sum += of_block[u];
  }
  return sum;
}

// What a block's threads all have becomes its sum over the blocks of the cluster: a lane asks one of them. `slot` lies
// in shared memory, is of N values, and used once: the caller has a barrier of the cluster before its blocks exit or
// write to it again.
template <int N, class T>
DL_DEVICE void cluster_sum_of_blocks(T (&value)[N], T* slot) {
  const unsigned blocks = cluster_size();
  if (blocks == 1) return;
  if (threadIdx.x == 0) {
    DL_UNROLL
    for (int i = 0; i < N; ++i) slot[i] = value[i];
  }
  cluster_barrier();
  DL_UNROLL
  for (int i = 0; i < N; ++i) {
    const unsigned rank = static_cast<unsigned>(lane()) % kMaxCluster;
    value[i] = warp_sum(rank < blocks ? *in_block_of_cluster(&slot[i], rank) : T(0), kMaxCluster);
  }
}

// The sum over all threads of a cluster.
template <int N, class T>
DL_DEVICE void cluster_sum(T (&value)[N], BlockSums<T, N>& scratch, T (&slot)[N]) {
  block_sum(value, scratch);
  cluster_sum_of_blocks(value, slot);
}

// True, in every thread, for the last of `parts` blocks that came here: all that they wrote to global memory is there
// to be read, with Use::kAgain. The counter is 0 again behind it. `flag` lies in shared memory.
DL_DEVICE bool last_block(unsigned* counter, unsigned parts, bool& flag) {
  __syncthreads();
  if (threadIdx.x == 0) {
    flag = take_ticket(counter) == parts - 1;
    if (flag) store_integer(counter, 0u);
  }
  __syncthreads();
  return bit_cast<unsigned char>(flag) == 1;  // as a byte: a test leaves the barrier out, and nobody has written it
}

}  // namespace dlkernels
