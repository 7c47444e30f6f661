// The host twin of CUDA: what csrc/common/cuda_platform.h is where no CUDA compiler reads the kernels.
//
// A launch runs its clusters one after another, in an order drawn from a seed; the threads of a cluster are fibers,
// each of which runs until it waits for others; who goes on is drawn too. Shared memory is allocated for each block at
// the size that the launch asked for, filled with NaN, and guarded by AddressSanitizer. Bytes of global memory are
// counted.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#define DL_KERNEL(threads, blocks) void
#define DL_DEVICE inline
#define DL_CONSTANT const
#define DL_UNROLL
#define DL_LOOPED
#define DL_HAS_CLUSTERS 1

struct uint3 {
  unsigned x, y, z;
};

namespace dlkernels {
namespace shim {

// Of the fiber that runs.
struct Coordinates {
  uint3 thread, block, block_size, grid;
  unsigned rank, cluster;
};
extern Coordinates here;

void* shared_memory();
void block_barrier(const char* file, int line);
void cluster_arrive();
void cluster_wait();
void* in_block_of_cluster(void* own, unsigned rank);

// Each lane of the warp gives `bytes` (at most 8) and gets all 32 values behind each other; `kind` must agree.
enum class Collective { kShuffle, kBallot, kBarrier };
const void* exchange(Collective kind, const void* value, size_t bytes);

void on_load(const void* p, size_t bytes);
void on_store(const void* p, size_t bytes);
void on_load_of_constant(const void* p, size_t bytes);  // besides on_load(): of what the kernel takes for constant
void wait_for_previous_kernel();
void copy_later(void* shared, const void* global, size_t bytes);
void close_copies();
void copies_done(int groups_under_way);

template <int N>
struct alignas(N) Bytes {
  unsigned char bytes[N];
};

template <class T>
T of_lane(T value, int lane) {
  static_assert(sizeof(T) <= 8, "at most 8 bytes");
  T got;
  std::memcpy(&got, static_cast<const char*>(exchange(Collective::kShuffle, &value, sizeof(T))) + 8 * lane, sizeof(T));
  return got;
}

// The machine that launches are planned for; see csrc/common/cuda_launch.h, Machine.
struct Settings {
  int arch = 90, multiprocessors = 132, shared_per_block = 232448, shared_per_multiprocessor = 233472;
  int threads_per_multiprocessor = 2048;
  int64_t l2 = 50 << 20;
};
extern Settings settings;

struct Shape {
  unsigned grid[3], block, shared, cluster;
  bool overlap;
};
// Throws what a thread threw, or what is wrong with the launch.
void run(const char* op, const Shape& shape, const std::function<void()>& body);

// A graph of launches: they do not run while it is captured, but whenever it is replayed, with the arguments of then.
bool capturing();
void record(const char* op, const Shape& shape, std::function<void()> body);

// What tests ask for.
void begin_capture();
int end_capture();  // the number of the graph
void replay(int graph);
void dry_run(bool value);  // launches are only counted: for the time of the host side
struct Launched {
  std::string op;
  Shape shape;
};
void seed(uint64_t value);
std::vector<Launched> take_launches();
// Barriers passed since the last call, as "file:line" or "cluster". One of them may be left out from now on, to see
// whether a test notices.
std::vector<std::string> take_barriers();
void leave_out(const std::string& barrier);
void count_bytes(const std::vector<std::pair<uintptr_t, size_t>>& spans);
std::vector<int64_t> counted_bytes();  // loaded, stored in all; of each span loaded, stored, loaded again

}  // namespace shim

template <class T>
T* shared_memory() {
  return static_cast<T*>(shim::shared_memory());
}
template <class T>
T shuffle_xor(T value, int mask) {
  return shim::of_lane(value, static_cast<int>(shim::here.thread.x % 32) ^ mask);
}
template <class T>
T shuffle(T value, int lane) {
  return shim::of_lane(value, lane & 31);
}
template <class T>
T shuffle_up(T value, int distance) {
  const int own = static_cast<int>(shim::here.thread.x % 32);
  return shim::of_lane(value, own >= distance ? own - distance : own);
}
template <class T>
T shuffle_down(T value, int distance) {
  const int own = static_cast<int>(shim::here.thread.x % 32);
  return shim::of_lane(value, own + distance < 32 ? own + distance : own);
}
inline unsigned ballot(bool predicate) {
  const uint64_t value = predicate;
  const auto* all = static_cast<const uint64_t*>(shim::exchange(shim::Collective::kBallot, &value, 8));
  unsigned bits = 0;
  for (int i = 0; i < 32; ++i) bits |= static_cast<unsigned>(all[i] & 1) << i;
  return bits;
}
inline void warp_barrier() { shim::exchange(shim::Collective::kBarrier, nullptr, 0); }

inline unsigned cluster_rank() { return shim::here.rank; }
inline unsigned cluster_size() { return shim::here.cluster; }
inline void cluster_arrive() { shim::cluster_arrive(); }
inline void cluster_wait() { shim::cluster_wait(); }
template <class T>
T* in_block_of_cluster(T* own, unsigned rank) {
  return static_cast<T*>(shim::in_block_of_cluster(own, rank));
}
inline void wait_for_previous_kernel() { shim::wait_for_previous_kernel(); }
inline void allow_next_kernel() {}

inline unsigned take_ticket(unsigned* counter) { return (*counter)++; }
inline int atomic_add_shared(int* counter, int value) {
  const int before = *counter;
  *counter += value;
  return before;
}

}  // namespace dlkernels

#define __syncthreads() (::dlkernels::shim::block_barrier(__FILE__, __LINE__))
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((uint64_t{a} * b) >> 32); }

#define threadIdx (::dlkernels::shim::here.thread)
#define blockIdx (::dlkernels::shim::here.block)
#define blockDim (::dlkernels::shim::here.block_size)
#define gridDim (::dlkernels::shim::here.grid)
