// Devices, streams and counters of operator calls on CUDA tensors.
#include "../common/cuda_call.h"

#include <ATen/ops/zeros.h>

#include <map>
#include <mutex>
#include <utility>
#include <vector>

#if !defined(DL_CUDA_HOST)
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <sstream>
#include <tuple>
#endif

namespace dlkernels {

#if defined(DL_CUDA_HOST)

const Machine& machine_of(const at::Tensor&) {
  static Machine machine;
  const auto& s = shim::settings;
  machine = {
      0,    s.arch, s.multiprocessors, s.shared_per_block, s.shared_per_multiprocessor, s.threads_per_multiprocessor,
      s.l2, true};
  return machine;
}

bool is_capturing(const Queue&) { return shim::capturing(); }

namespace {

at::Tensor& counters_before() {
  static at::Tensor counters;
  return counters;
}

}  // namespace

Counters zeroed_counters(const Queue& queue, int64_t count) {
  at::Tensor& before = counters_before();
  TORCH_CHECK(!before.defined() || !before.any().item<bool>(), queue.op, ": a kernel before this one left a counter");
  before = at::zeros({count}, at::kInt);
  static auto& of_graphs = *new std::vector<at::Tensor>();
  if (is_capturing(queue)) of_graphs.push_back(before);
  return {before, reinterpret_cast<unsigned*>(before.mutable_data_ptr<int>())};
}

void forget_counters() { counters_before().reset(); }

CudaCall::CudaCall(const char* op, const at::Tensor& x) {
  queue.machine = &machine_of(x);
  queue.op = op;
  for (int64_t d = 0; d < x.dim() && d < 6; ++d) queue.shape[queue.dims++] = x.size(d);
}

bool served(const at::Tensor& x) { return x.scalar_type() != at::kDouble; }

#else

namespace {

Machine look_up(int index) {
  const auto ask = [&](cudaDeviceAttr attribute) {
    int value = 0;
    TORCH_CHECK(cudaDeviceGetAttribute(&value, attribute, index) == cudaSuccess, "cuda:", index, " does not answer");
    return value;
  };
  Machine m;
  m.index = index;
  m.arch = 10 * ask(cudaDevAttrComputeCapabilityMajor) + ask(cudaDevAttrComputeCapabilityMinor);
  m.multiprocessors = ask(cudaDevAttrMultiProcessorCount);
  m.shared_per_block = ask(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  m.shared_per_multiprocessor = ask(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  m.threads_per_multiprocessor = ask(cudaDevAttrMaxThreadsPerMultiProcessor);
  m.l2 = ask(cudaDevAttrL2CacheSize);
  m.compiled = cuda_code_problem(m.arch).empty();
  return m;
}

}  // namespace

// A cubin runs on its own architecture and on later ones of the same generation, PTX on all later ones.
std::string cuda_code_problem(int arch) {
  std::istringstream list(DLKERNELS_CUDA_ARCHS);
  for (std::string entry; std::getline(list, entry, ';');) {
    const bool ptx = entry.find("+PTX") != std::string::npos;
    int major = 0, minor = 0;
    if (std::sscanf(entry.c_str(), "%d.%d", &major, &minor) != 2) continue;
    if (arch / 10 == major && arch % 10 >= minor) return "";
    if (ptx && arch >= 10 * major + minor) return "";
  }
  return "the CUDA C++ kernels were built for " DLKERNELS_CUDA_ARCHS ", not for sm_" + std::to_string(arch) +
         ": set TORCH_CUDA_ARCH_LIST and build again";
}

namespace launching {

Allowance allowance(const void* kernel, int device) {
  struct Allowed {
    unsigned shared = kFreeShared, cluster = kFreeCluster;
  };
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, Allowed> all;
  std::unique_lock<std::mutex> lock(mutex);
  Allowed& own = all[{kernel, device}];
  return {std::move(lock), own.shared, own.cluster};
}

namespace {

// kernel, device, block, shared memory, cluster
using ClusterKey = std::tuple<const void*, int, unsigned, unsigned, unsigned>;
std::mutex clusters_mutex;
std::map<ClusterKey, int>& known() {
  static std::map<ClusterKey, int> answers;
  return answers;
}
ClusterKey key_of(const void* kernel, int device, const LaunchShape& s) {
  return {kernel, device, s.block, s.shared, s.cluster};
}

}  // namespace

int known_clusters(const void* kernel, int device, const LaunchShape& shape) {
  const std::lock_guard<std::mutex> lock(clusters_mutex);
  const auto found = known().find(key_of(kernel, device, shape));
  return found == known().end() ? -1 : found->second;
}

void know_clusters(const void* kernel, int device, const LaunchShape& shape, int clusters) {
  const std::lock_guard<std::mutex> lock(clusters_mutex);
  known()[key_of(kernel, device, shape)] = clusters;
}

}  // namespace launching

const Machine& machine_of(const at::Tensor& x) {
  static std::mutex mutex;
  static std::map<int, Machine> machines;
  const std::lock_guard<std::mutex> lock(mutex);
  const int index = x.get_device();
  const auto found = machines.find(index);
  return found != machines.end() ? found->second : machines.emplace(index, look_up(index)).first->second;
}

bool is_capturing(const Queue& queue) {
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  if (cudaStreamIsCapturing(static_cast<cudaStream_t>(queue.stream), &capture) == cudaSuccess)
    return capture != cudaStreamCaptureStatusNone;
  cudaGetLastError();  // another stream is, as long as which this one is not to be used
  return true;
}

namespace {

// Zeros that stay, in memory that is not the allocator's: under a pool, as torch.compile's CUDA graphs have one for
// their warm-up, it would hand this memory out to others while a kernel counts in it.
unsigned* lasting_zeros(const Queue& queue, int64_t count) {
  const c10::cuda::CUDAStreamCaptureModeGuard allowed(cudaStreamCaptureModeRelaxed);  // while another thread captures
  const size_t bytes = static_cast<size_t>(count) * sizeof(unsigned);
  void* data = nullptr;
  if (cudaMalloc(&data, bytes) != cudaSuccess) {
    cudaGetLastError();
    c10::cuda::CUDACachingAllocator::emptyCache();
    C10_CUDA_CHECK(cudaMalloc(&data, bytes));
  }
  C10_CUDA_CHECK(cudaMemsetAsync(data, 0, bytes, static_cast<cudaStream_t>(queue.stream)));
  return static_cast<unsigned*>(data);
}

}  // namespace

Counters zeroed_counters(const Queue& queue, int64_t count) {
  if (is_capturing(queue)) {  // of the graph's own memory, cleared by each replay
    const at::Device device(at::kCUDA, static_cast<c10::DeviceIndex>(queue.machine->index));
    const at::Tensor zeros = at::zeros({count}, at::device(device).dtype(at::kInt));
    return {zeros, reinterpret_cast<unsigned*>(zeros.mutable_data_ptr<int>())};
  }
  struct Kept {
    unsigned* data = nullptr;
    int64_t count = 0;
  };
  static std::mutex mutex;
  static std::map<std::pair<int, void*>, Kept> kept;
  const std::lock_guard<std::mutex> lock(mutex);
  Kept& own = kept[{queue.machine->index, queue.stream}];
  if (own.count < count) {  // those before may be in use: they stay, and are fewer than these
    const int64_t more = std::max<int64_t>({count, 2 * own.count, 1024});
    own = {lasting_zeros(queue, more), more};
  }
  return {{}, own.data};
}

CudaCall::CudaCall(const char* op, const at::Tensor& x) : guard_(x.device()) {
  queue.machine = &machine_of(x);
  queue.stream = c10::cuda::getCurrentCUDAStream(x.get_device()).stream();
  queue.op = op;
  for (int64_t d = 0; d < x.dim() && d < 6; ++d) queue.shape[queue.dims++] = x.size(d);
}

bool served(const at::Tensor& x) { return x.scalar_type() != at::kDouble && machine_of(x).compiled; }

#endif

}  // namespace dlkernels
