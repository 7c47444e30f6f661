// Launching a kernel: where, how many, and what is said when it fails. Torch-free.
//
//   launch(queue, {grid, kThreads, sizeof(FooShared)}, foo_kernel<T>, args);
#pragma once

#include <cstdint>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>

#include "cuda_math.h"
#include "cuda_platform.h"

namespace dlkernels {

// What a launch is planned for: one device.
struct Machine {
  int index = 0;
  int arch = 0;  // 75, 80, 90, ...
  int multiprocessors = 0;
  int shared_per_block = 0;  // bytes that a block may ask for
  int shared_per_multiprocessor = 0;
  int threads_per_multiprocessor = 0;
  int64_t l2 = 0;         // bytes
  bool compiled = false;  // whether this build holds code for it
  bool clusters() const { return arch >= 90; }
};

// Where the kernels of one operator call go, and what the call is named in an error.
struct Queue {
  const Machine* machine = nullptr;
  void* stream = nullptr;
  const char* op = "";
  int64_t shape[6] = {};  // of the main tensor
  int dims = 0;
};

struct LaunchShape {
  unsigned grid = 1;  // blocks, a multiple of `cluster`
  unsigned block = 256;
  unsigned shared = 0;   // bytes
  unsigned cluster = 1;  // sm_90 on. Up to 8 everywhere, 16 where the device allows it
  bool overlap = false;  // start while the kernel before ends: see wait_for_previous_kernel()
};

inline std::string describe(const Queue& queue) {
  std::string text = std::string(queue.op) + " on input (";
  for (int i = 0; i < queue.dims; ++i) text += (i == 0 ? "" : ", ") + std::to_string(queue.shape[i]);
  return text + ") on cuda:" + std::to_string(queue.machine->index) + " (sm_" + std::to_string(queue.machine->arch) +
         ")";
}

template <class I>
DL_HOST_DEVICE constexpr I ceil_div(I a, I b) {
  return (a + b - 1) / b;
}

namespace launching {

// What a kernel was allowed on a device: 48 KB of shared memory and clusters of 8, or more. Whoever allows more holds
// the lock meanwhile: another thread neither launches the kernel before nor allows less.
struct Allowance {
  std::unique_lock<std::mutex> lock;
  unsigned &shared, &cluster;
};
constexpr unsigned kFreeShared = 48 * 1024, kFreeCluster = 8;
Allowance allowance(const void* kernel, int device);

// What the driver answered about clusters of a kernel in this shape, or -1 where it was not asked; and its answer.
int known_clusters(const void* kernel, int device, const LaunchShape& shape);
void know_clusters(const void* kernel, int device, const LaunchShape& shape, int clusters);

}  // namespace launching

#if defined(__CUDACC__)

namespace launching {

inline void check(cudaError_t error, const Queue& queue, const LaunchShape& s) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // the next call is not to report it again
  throw std::runtime_error(describe(queue) + ": launching " + std::to_string(s.grid) + " blocks of " +
                           std::to_string(s.block) + " threads with " + std::to_string(s.shared) +
                           " bytes of shared memory in clusters of " + std::to_string(s.cluster) +
                           " failed: " + cudaGetErrorString(error));
}

inline cudaLaunchConfig_t configuration(const Queue& queue, const LaunchShape& s,
                                        cudaLaunchAttribute (&attributes)[2]) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(s.grid);
  config.blockDim = dim3(s.block);
  config.dynamicSmemBytes = s.shared;
  config.stream = static_cast<cudaStream_t>(queue.stream);
  config.attrs = attributes;
  if (s.cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs].val.clusterDim.x = s.cluster;
    attributes[config.numAttrs].val.clusterDim.y = 1;
    attributes[config.numAttrs++].val.clusterDim.z = 1;
  }
  if (s.overlap && queue.machine->arch >= 90) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  return config;
}

template <class... P>
void prepare(const Queue& queue, const LaunchShape& s, void (*kernel)(P...)) {
  if (s.shared <= kFreeShared && s.cluster <= kFreeCluster) return;
  const auto* pointer = reinterpret_cast<const void*>(kernel);
  const Allowance allowed = allowance(pointer, queue.machine->index);
  if (s.shared > allowed.shared) {
    check(cudaFuncSetAttribute(pointer, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(s.shared)), queue,
          s);
    allowed.shared = s.shared;
  }
  if (s.cluster > allowed.cluster) {
    check(cudaFuncSetAttribute(pointer, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), queue, s);
    allowed.cluster = s.cluster;
  }
}

}  // namespace launching

template <class... P, class... A>
void launch(const Queue& queue, const LaunchShape& s, void (*kernel)(P...), const A&... args) {
  launching::prepare(queue, s, kernel);
  cudaLaunchAttribute attributes[2];
  const cudaLaunchConfig_t config = launching::configuration(queue, s, attributes);
  launching::check(cudaLaunchKernelEx(&config, kernel, static_cast<const std::remove_reference_t<P>&>(args)...), queue,
                   s);
}

namespace launching {

template <class... P>
int ask_for_clusters(const Queue& queue, const LaunchShape& s, void (*kernel)(P...)) {
  if (s.cluster > kFreeCluster &&
      cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeNonPortableClusterSizeAllowed, 1) !=
          cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  launching::prepare(queue, s, kernel);
  cudaLaunchAttribute attributes[2];
  const cudaLaunchConfig_t config = launching::configuration(queue, s, attributes);
  int clusters = 0;
  if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return clusters;
}

}  // namespace launching

// Clusters of this shape that the device runs at a time; 0 where it cannot run one. The driver is asked once.
template <class... P>
int active_clusters(const Queue& queue, const LaunchShape& s, void (*kernel)(P...)) {
  if (queue.machine->arch < 90) return 0;
  const auto* pointer = reinterpret_cast<const void*>(kernel);
  int clusters = launching::known_clusters(pointer, queue.machine->index, s);
  if (clusters < 0) {
    clusters = launching::ask_for_clusters(queue, s, kernel);
    launching::know_clusters(pointer, queue.machine->index, s, clusters);
  }
  return clusters;
}

#elif defined(DL_CUDA_HOST)

template <class... P, class... A>
void launch(const Queue& queue, const LaunchShape& s, void (*kernel)(P...), const A&... args) {
  const shim::Shape shape = {{s.grid, 1, 1}, s.block, s.shared, s.cluster, s.overlap};
  if (shim::capturing()) {
    const auto run = [kernel](const auto&... kept) { kernel(static_cast<const std::remove_reference_t<P>&>(kept)...); };
    return shim::record(queue.op, shape, [run, kept = std::make_tuple(args...)] { std::apply(run, kept); });
  }
  try {
    shim::run(queue.op, shape, [&] { kernel(static_cast<const std::remove_reference_t<P>&>(args)...); });
  } catch (const std::exception& error) {
    throw std::runtime_error(describe(queue) + ": " + error.what());
  }
}

template <class... P>
int active_clusters(const Queue& queue, const LaunchShape& s, void (*)(P...)) {
  if (queue.machine->arch < 90 || static_cast<int>(s.shared) > queue.machine->shared_per_block) return 0;
  return queue.machine->multiprocessors / static_cast<int>(s.cluster);
}

#endif

}  // namespace dlkernels
