// Devices, streams and counters of operator calls on CUDA tensors.
#include "../common/cuda_call.h"

#include <ATen/ops/zeros.h>

#include <map>
#include <mutex>
#include <utility>
#include <vector>

#if !defined(DL_CUDA_HOST)
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

bool remember(const void* kernel, int device, unsigned shared, unsigned cluster) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, std::pair<unsigned, unsigned> > largest;
  const std::lock_guard<std::mutex> lock(mutex);
  auto& known = largest[{kernel, device}];
  if (shared <= known.first && cluster <= known.second) return true;
  known = {std::max(shared, known.first), std::max(cluster, known.second)};
  return false;
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
  return cudaStreamIsCapturing(static_cast<cudaStream_t>(queue.stream), &capture) != cudaSuccess ||
         capture != cudaStreamCaptureStatusNone;
}

Counters zeroed_counters(const Queue& queue, int64_t count) {
  const at::Device device(at::kCUDA, static_cast<c10::DeviceIndex>(queue.machine->index));
  const auto with_pointer = [](const at::Tensor& t) {
    return Counters{t, reinterpret_cast<unsigned*>(t.mutable_data_ptr<int>())};
  };
  const auto fresh = [&] { return at::zeros({count}, at::device(device).dtype(at::kInt)); };
  if (is_capturing(queue)) return with_pointer(fresh());  // of the graph's own memory, cleared by each replay
  static std::mutex mutex;
  static auto& kept = *new std::map<std::pair<int, void*>, at::Tensor>();  // outlives the driver's shutdown
  const std::lock_guard<std::mutex> lock(mutex);
  at::Tensor& counters = kept[{queue.machine->index, queue.stream}];
  if (!counters.defined() || counters.numel() < count) counters = fresh();
  return with_pointer(counters);
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
