// What a CUDA kernel is written with, twice: as CUDA C++, and as C++ for the host, where tests run kernel bodies under
// sanitizers with a fiber per thread (tests/cuda_host/shim.h). Kernels use nothing of CUDA that is not here, in
// cuda_memory.h or in cuda_math.h; all PTX is behind these functions.
//
//   template <class T>
//   DL_KERNEL(256, 2) foo_kernel(const FooArgs a) {      // threads of a block, blocks per multiprocessor at least
//     FooShared& shared = *shared_memory<FooShared>();   // the one array of shared memory, of the launch's size
//     ... threadIdx.x, blockIdx.x, blockDim.x, gridDim.x; __syncthreads(); ...
//   }
//
// Collectives of a warp want all of its 32 threads, barriers all threads of the block or cluster: no thread returns
// before the last of them.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)

#include <cuda_runtime.h>

#define DL_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define DL_DEVICE __device__ __forceinline__
#define DL_CONSTANT __grid_constant__ const  // a parameter of kilobytes, read where it lies
#define DL_UNROLL _Pragma("unroll")
#define DL_LOOPED _Pragma("unroll 1")

// Whether the code at hand is compiled for an architecture with thread block clusters.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define DL_HAS_CLUSTERS 1
#else
#define DL_HAS_CLUSTERS 0
#endif

namespace dlkernels {

template <class T>
DL_DEVICE T* shared_memory() {
  extern __shared__ __align__(128) unsigned char dl_shared_memory[];
  return reinterpret_cast<T*>(dl_shared_memory);
}

// Collectives of a warp -----------------------------------------------------------------------------------------------

template <class T>
DL_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
template <class T>
DL_DEVICE T shuffle(T value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}
// Of the lane `distance` below; the lowest lanes keep their own.
template <class T>
DL_DEVICE T shuffle_up(T value, int distance) {
  return __shfl_up_sync(0xffffffffu, value, distance);
}
template <class T>
DL_DEVICE T shuffle_down(T value, int distance) {
  return __shfl_down_sync(0xffffffffu, value, distance);
}
DL_DEVICE unsigned ballot(bool predicate) { return __ballot_sync(0xffffffffu, predicate); }
DL_DEVICE void warp_barrier() { __syncwarp(); }

// Clusters (sm_90 on) -------------------------------------------------------------------------------------------------

DL_DEVICE unsigned cluster_rank() {
  unsigned rank = 0;
#if DL_HAS_CLUSTERS
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}
DL_DEVICE unsigned cluster_size() {
  unsigned size = 1;
#if DL_HAS_CLUSTERS
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
#endif
  return size;
}
// The two halves of a barrier of all threads of the cluster; what was written before the first, to shared memory of any
// of its blocks, is seen behind the second.
DL_DEVICE void cluster_arrive() {
#if DL_HAS_CLUSTERS
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
DL_DEVICE void cluster_wait() {
#if DL_HAS_CLUSTERS
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
// Where `own`, in this block's shared memory, lies in that of another block of the cluster. No block may exit while
// another one reads there: a barrier of the cluster comes last.
template <class T>
DL_DEVICE T* in_block_of_cluster(T* own, unsigned rank) {
#if DL_HAS_CLUSTERS
  uint64_t address = 0;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(reinterpret_cast<uint64_t>(own)), "r"(rank));
  return reinterpret_cast<T*>(address);
#else
  return own;
#endif
}

// A kernel launched with `overlap` starts while the one before it ends: it reads what that one wrote only behind this.
DL_DEVICE void wait_for_previous_kernel() {
#if DL_HAS_CLUSTERS
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// From here on the next kernel may start, if it was launched with `overlap`.
DL_DEVICE void allow_next_kernel() {
#if DL_HAS_CLUSTERS
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Between blocks ------------------------------------------------------------------------------------------------------

// Counts one more; gives back the number before. Everything this thread wrote before is seen by who counts after it.
DL_DEVICE unsigned take_ticket(unsigned* counter) {
  __threadfence();
  const unsigned before = atomicAdd(counter, 1u);
  __threadfence();
  return before;
}

DL_DEVICE int atomic_add_shared(int* counter, int value) { return atomicAdd(counter, value); }

}  // namespace dlkernels

#elif defined(DL_CUDA_HOST)

#include "shim.h"  // tests/cuda_host; nothing else puts that folder on the include path

#endif

namespace dlkernels {

constexpr int kWarp = 32;

#if defined(__CUDACC__) || defined(DL_CUDA_HOST)  // not in the host sides, which only launch

DL_DEVICE int lane() { return static_cast<int>(threadIdx.x) % kWarp; }
DL_DEVICE int warp() { return static_cast<int>(threadIdx.x) / kWarp; }
DL_DEVICE int warps() { return static_cast<int>(blockDim.x) / kWarp; }

DL_DEVICE void cluster_barrier() {
  cluster_arrive();
  cluster_wait();
}

#endif

}  // namespace dlkernels
