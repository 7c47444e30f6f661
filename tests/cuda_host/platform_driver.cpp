// Checks of what all CUDA kernels are written with (csrc/common/cuda_*.h), as the host twin runs it, and of what the
// twin must notice. `platform_driver --list` names the checks; `platform_driver NAME` runs one.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "../../csrc/common/cuda_launch.h"
#include "../../csrc/common/cuda_memory.h"
#include "../../csrc/common/cuda_reduce.h"
#include "shim.h"

using namespace dlkernels;

namespace {

constexpr int kSeeds = 5;
Machine machine;
const Queue queue = [] {
  Queue q;
  q.machine = &machine;
  q.op = "check";
  return q;
}();

void expect(bool right, const std::string& what) {
  if (!right) throw std::runtime_error("wrong: " + what);
}

// The call fails, and its message has these words.
void expect_error(const std::string& words, const std::function<void()>& call) {
  try {
    call();
  } catch (const std::exception& error) {
    return expect(std::string(error.what()).find(words) != std::string::npos,
                  std::string(error.what()) + " for " + words);
  }
  throw std::runtime_error("nobody noticed: " + words);
}

// Exactly as many elements as asked for, at a multiple of 16 bytes: AddressSanitizer sees the first one too many.
template <class T>
struct Array {
  explicit Array(size_t n) : size(n), data(static_cast<T*>(std::aligned_alloc(16, (n * sizeof(T) + 15) / 16 * 16))) {
    for (size_t i = 0; i < n; ++i) data[i] = T{};
  }
  ~Array() { std::free(data); }
  T& operator[](size_t i) { return data[i]; }
  size_t size;
  T* data;
};

// Sums ----------------------------------------------------------------------------------------------------------------

struct WarpArgs {
  int64_t* sums;
  float *floats, *maxima;
  int width;
};
DL_KERNEL(64, 1) warp_kernel(const WarpArgs a) {
  const int i = static_cast<int>(threadIdx.x);
  a.sums[i] = warp_sum(int64_t{1} << (i % 32), a.width);
  a.floats[i] = warp_sum(1.0f / static_cast<float>(i + 3));
  a.maxima[i] = warp_max(static_cast<float>((i * 37) % 64));
}
void check_warp_sum() {
  for (int width = 1; width <= 32; width *= 2) {
    Array<int64_t> sums(64);
    Array<float> floats(64), maxima(64);
    launch(queue, {1, 64}, warp_kernel, WarpArgs{sums.data, floats.data, maxima.data, width});
    for (int i = 0; i < 64; ++i) {
      const int first = i % 32 / width * width;
      expect(sums[i] == ((int64_t{1} << width) - 1) << first, "the sum of " + std::to_string(width) + " lanes");
      expect(floats[i] == floats[i / 32 * 32], "the same bits in all lanes");
      float largest = 0;
      for (int j = i / 32 * 32; j < i / 32 * 32 + 32; ++j) largest = std::max(largest, static_cast<float>(j * 37 % 64));
      expect(maxima[i] == largest, "the largest of a warp");
    }
  }
}

struct BlockShared {
  BlockSums<int64_t, 1> one;
  BlockSums<float, 3> three;
};
struct BlockArgs {
  int64_t* one;
  float* three;
};
DL_KERNEL(1024, 1) block_kernel(const BlockArgs a) {
  BlockShared& shared = *shared_memory<BlockShared>();
  const unsigned i = threadIdx.x;
  a.one[i] = block_sum(int64_t{1} << (i % 50), shared.one);
  float values[3] = {1.0f, static_cast<float>(i), static_cast<float>(i % 7)};
  block_sum(values, shared.three);
  for (int k = 0; k < 3; ++k) a.three[3 * i + static_cast<unsigned>(k)] = values[k];
}
void check_block_sum() {
  for (unsigned threads = 32; threads <= 1024; threads += threads < 128 ? 32 : 224) {
    Array<int64_t> one(threads);
    Array<float> three(3 * threads);
    launch(queue, {1, threads, sizeof(BlockShared)}, block_kernel, BlockArgs{one.data, three.data});
    int64_t sum = 0;
    float sums[3] = {0, 0, 0};
    for (unsigned i = 0; i < threads; ++i) {
      sum += int64_t{1} << (i % 50);
      sums[0] += 1, sums[1] += static_cast<float>(i), sums[2] += static_cast<float>(i % 7);
    }
    for (unsigned i = 0; i < threads; ++i) {
      expect(one[i] == sum, "the sum of a block");
      for (int k = 0; k < 3; ++k) expect(three[3 * i + k] == sums[k], "three sums of a block");
    }
  }
}

struct ClusterShared {
  BlockSums<int64_t, 2> sums;
  int64_t slot[2];
};
DL_KERNEL(64, 1) cluster_kernel(int64_t* out) {
  ClusterShared& shared = *shared_memory<ClusterShared>();
  int64_t values[2] = {int64_t{1} << (2 * cluster_rank()), threadIdx.x + blockIdx.x / cluster_size() * 1000};
  cluster_sum(values, shared.sums, shared.slot);
  for (int k = 0; k < 2; ++k) out[2 * (blockIdx.x * blockDim.x + threadIdx.x) + static_cast<unsigned>(k)] = values[k];
  cluster_barrier();
}
void check_cluster_sum() {
  for (unsigned cluster = 1; cluster <= 16; ++cluster) {
    const unsigned grid = 2 * cluster;
    Array<int64_t> out(size_t{2} * grid * 64);
    launch(queue, {grid, 64, sizeof(ClusterShared), cluster}, cluster_kernel, out.data);
    for (unsigned i = 0; i < grid * 64; ++i) {
      const unsigned c = i / 64 / cluster;
      int64_t first = 0;
      for (unsigned rank = 0; rank < cluster; ++rank) first += int64_t{64} << (2 * rank);
      expect(out[2 * i] == first, "the sum over a cluster of " + std::to_string(cluster));
      expect(out[2 * i + 1] == int64_t{cluster} * (64 * 63 / 2 + 64 * 1000 * int64_t{c}), "each cluster's own sum");
    }
  }
}

struct LastArgs {
  float *partial, *total;
  unsigned *counter, *times;
};
DL_KERNEL(64, 1) last_kernel(const LastArgs a) {
  bool& flag = *shared_memory<bool>();
  a.partial[blockIdx.x * blockDim.x + threadIdx.x] = static_cast<float>(blockIdx.x + threadIdx.x);
  if (!last_block(a.counter, gridDim.x, flag)) return;
  float total = 0;
  for (unsigned i = 0; i < gridDim.x; ++i) total += a.partial[i * blockDim.x + (threadIdx.x + 32) % 64];
  a.total[threadIdx.x] = total;
  if (threadIdx.x == 0) ++*a.times;
}
void check_last_block() {
  for (unsigned grid = 1; grid <= 9; grid += 4) {
    Array<float> partial(size_t{grid} * 64), total(64);
    Array<unsigned> counter(1), times(1);
    for (unsigned seed = 0; seed < kSeeds; ++seed) {
      shim::seed(seed);
      launch(queue, {grid, 64, 1}, last_kernel, LastArgs{partial.data, total.data, counter.data, times.data});
      expect(counter[0] == 0, "the counter is 0 again");
      expect(times[0] == seed + 1, "one block is the last");
      for (unsigned i = 0; i < 64; ++i)
        expect(total[i] == static_cast<float>(grid * (grid - 1) / 2 + grid * ((i + 32) % 64)),
               "all blocks have written");
    }
  }
}

// Warps ---------------------------------------------------------------------------------------------------------------

DL_KERNEL(64, 1) exchange_kernel(int* out) {
  const int i = static_cast<int>(threadIdx.x), value = 100 + i;
  int* own = out + 6 * i;
  own[0] = shuffle_xor(value, 5);
  own[1] = shuffle(value, 35);  // of 32 lanes
  own[2] = shuffle_up(value, 3);
  own[3] = shuffle_down(value, 3);
  own[4] = static_cast<int>(ballot(i % 3 == 0));
  own[5] = lane() + 1000 * warp() + 100000 * warps();
}
void check_exchanges() {
  Array<int> out(64 * 6);
  launch(queue, {1, 64}, exchange_kernel, out.data);
  for (int i = 0; i < 64; ++i) {
    const int w = i / 32 * 32, l = i % 32;
    unsigned bits = 0;
    for (int j = 0; j < 32; ++j) bits |= static_cast<unsigned>((w + j) % 3 == 0) << j;
    const int right[6] = {100 + w + (l ^ 5),          100 + w + 3,
                          100 + (l >= 3 ? i - 3 : i), 100 + (l < 29 ? i + 3 : i),
                          static_cast<int>(bits),     l + 1000 * (i / 32) + 200000};
    for (int k = 0; k < 6; ++k) expect(out[6 * i + k] == right[k], "exchange " + std::to_string(k));
  }
}

DL_KERNEL(32, 1) half_a_warp_kernel(float* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = warp_sum(1.0f);
}
DL_KERNEL(32, 1) two_collectives_kernel(float* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = warp_sum(1.0f);
  else out[threadIdx.x] = ballot(true) != 0 ? 1.0f : 0.0f;
}
DL_KERNEL(64, 1) one_returns_kernel(float* out) {
  if (threadIdx.x == 7) return;
  __syncthreads();
  out[threadIdx.x] = 1;
}
DL_KERNEL(64, 1) one_stays_kernel(float* out) {
  if (threadIdx.x != 7) __syncthreads();
  else warp_barrier();
  out[threadIdx.x] = 1;
}
DL_KERNEL(32, 1) cluster_without_one_kernel(float* out) {
  if (cluster_rank() != 1) cluster_barrier();
  out[blockIdx.x] = 1;
}
DL_KERNEL(32, 1) wait_without_arrive_kernel(float*) { cluster_wait(); }
DL_KERNEL(32, 1) arrive_twice_kernel(float*) {
  cluster_arrive();
  cluster_arrive();
}
void check_deadlocks() {
  Array<float> out(64);
  expect_error("wait for ever", [&] { launch(queue, {1, 32}, half_a_warp_kernel, out.data); });
  expect_error("different collectives", [&] { launch(queue, {1, 32}, two_collectives_kernel, out.data); });
  for (unsigned seed = 0; seed < kSeeds; ++seed) {
    shim::seed(seed);
    try {
      launch(queue, {1, 64}, one_returns_kernel, out.data);
      expect(false, "a thread that returns before a barrier is noticed");
    } catch (const std::exception& error) {
      const std::string text = error.what();
      expect(text.find("has returned") != std::string::npos || text.find("wait for ever") != std::string::npos, text);
    }
  }
  expect_error("wait for ever", [&] { launch(queue, {1, 64}, one_stays_kernel, out.data); });
  expect_error("wait for ever", [&] { launch(queue, {4, 32, 0, 4}, cluster_without_one_kernel, out.data); });
  expect_error("without cluster_arrive", [&] { launch(queue, {2, 32, 0, 2}, wait_without_arrive_kernel, out.data); });
  expect_error("cluster_arrive twice", [&] { launch(queue, {2, 32, 0, 2}, arrive_twice_kernel, out.data); });
  // What failed leaves nothing behind.
  check_warp_sum();
  check_cluster_sum();
}

// Barriers ------------------------------------------------------------------------------------------------------------

DL_KERNEL(128, 1) reverse_kernel(int* out) {
  int* shared = shared_memory<int>();
  shared[threadIdx.x] = static_cast<int>(threadIdx.x) + 1;
  __syncthreads();
  out[threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];
}
DL_KERNEL(32, 1) neighbour_kernel(int* out) {
  int* shared = shared_memory<int>();
  if (threadIdx.x == 0) *shared = static_cast<int>(blockIdx.x) + 1;
  cluster_barrier();
  out[blockIdx.x * 32 + threadIdx.x] = *in_block_of_cluster(shared, (cluster_rank() + 1) % cluster_size());
  cluster_barrier();
}
bool reversed() {
  Array<int> out(128);
  launch(queue, {1, 128, 128 * sizeof(int)}, reverse_kernel, out.data);
  bool right = true;
  for (int i = 0; i < 128; ++i) right = right && out[i] == 128 - i;
  return right;
}
bool from_neighbours() {
  Array<int> out(4 * 32);
  launch(queue, {4, 32, sizeof(int), 4}, neighbour_kernel, out.data);
  bool right = true;
  for (int i = 0; i < 128; ++i) right = right && out[i] == (i / 32 + 1) % 4 + 1;
  return right;
}
void check_missing_barriers() {
  shim::take_barriers();
  expect(reversed() && from_neighbours(), "with all barriers");
  const std::vector<std::string> barriers = shim::take_barriers();
  expect(barriers.size() == 2 && barriers[0] == "cluster", "two barriers are known");
  expect(barriers[1].rfind("platform_driver.cpp:", 0) == 0, "a barrier's name is where it stands");
  for (int k = 0; k < 2; ++k) {
    shim::leave_out(barriers[static_cast<size_t>(k)]);
    bool noticed = false;
    for (unsigned seed = 0; seed < kSeeds && !noticed; ++seed) {
      shim::seed(seed);
      try {
        noticed = !(k == 0 ? from_neighbours() : reversed());
      } catch (const std::exception&) {
        noticed = true;  // a block has ended, and its neighbour reads there
      }
    }
    shim::leave_out("");
    expect(noticed, "results are wrong without " + barriers[static_cast<size_t>(k)]);
  }
  expect(reversed() && from_neighbours(), "with all barriers again");
}

// Memory --------------------------------------------------------------------------------------------------------------

// As words: in a missing copy lies what was there before, and that is no number.
DL_KERNEL(32, 1) copy_kernel(const uint32_t* x, uint32_t* seen) {
  uint32_t* shared = shared_memory<uint32_t>();
  const unsigned i = threadIdx.x;
  for (unsigned group = 0; group < 3; ++group) {
    copy_16_bytes(shared + 4 * (32 * group + i), x + 4 * (32 * group + i));
    close_copies();
  }
  const auto note = [&](unsigned when) {
    for (unsigned group = 0; group < 3; ++group) seen[32 * (3 * when + group) + i] = shared[4 * (32 * group + i) + 3];
  };
  note(0);
  copies_done<2>();
  note(1);
  copies_done<1>();
  note(2);
  copies_done();
  note(3);
}
DL_KERNEL(32, 1) unfinished_copy_kernel(const uint32_t* x) {
  copy_16_bytes(shared_memory<uint32_t>() + 4 * threadIdx.x, x + 4 * threadIdx.x);
  close_copies();
}
DL_KERNEL(32, 1) unaligned_copy_kernel(const uint32_t* x) {
  copy_16_bytes(shared_memory<uint32_t>() + 4 * threadIdx.x, x + 1);
  close_copies();
  copies_done();
}
void check_copies() {
  constexpr unsigned kWords = 3 * 32 * 4;
  Array<uint32_t> x(kWords), seen(4 * 3 * 32);
  for (unsigned i = 0; i < kWords; ++i) x[i] = i + 1;
  launch(queue, {1, 32, kWords * 4}, copy_kernel, x.data, seen.data);
  for (unsigned when = 0; when < 4; ++when)
    for (unsigned group = 0; group < 3; ++group)
      for (unsigned i = 0; i < 32; ++i)
        expect(seen[32 * (3 * when + group) + i] == (group < when ? 4 * (32 * group + i) + 4 : 0xffffffffu),
               "group " + std::to_string(group) + " after " + std::to_string(when) + " waits");
  expect_error("copies to shared memory under way",
               [&] { launch(queue, {1, 32, 512}, unfinished_copy_kernel, x.data); });
  expect_error("not aligned", [&] { launch(queue, {1, 32, 512}, unaligned_copy_kernel, x.data); });
}

struct PackArgs {
  const float* x;
  void* y;
  int skew;
};
template <int N>
DL_KERNEL(32, 1)
pack_kernel(const PackArgs a) {
  const float* x = a.x + a.skew + N * threadIdx.x;
  store<N>(static_cast<float*>(a.y) + N * threadIdx.x, load<N>(x));
}
void check_alignment() {
  Array<float> x(8 * 32 + 4), y(8 * 32 + 4);
  for (size_t i = 0; i < x.size; ++i) x[i] = static_cast<float>(i);
  for (const int skew : {0, 4}) {
    launch(queue, {1, 32}, pack_kernel<8>, PackArgs{x.data, y.data, skew});
    for (int i = 0; i < 256; ++i) expect(y[i] == static_cast<float>(i + skew), "two packs a thread");
  }
  for (const int skew : {1, 2, 3}) {
    launch(queue, {1, 32}, pack_kernel<1>, PackArgs{x.data, y.data, skew});
    expect(y[31] == static_cast<float>(31 + skew), "one element");
    expect_error("not aligned", [&] { launch(queue, {1, 32}, pack_kernel<4>, PackArgs{x.data, y.data, skew}); });
    expect_error("not aligned", [&] { launch(queue, {1, 32}, pack_kernel<4>, PackArgs{x.data, y.data + skew, 0}); });
  }
  launch(queue, {1, 32}, pack_kernel<2>, PackArgs{x.data, y.data, 2});
  expect_error("not aligned", [&] { launch(queue, {1, 32}, pack_kernel<2>, PackArgs{x.data, y.data, 1}); });
}

template <class T>
DL_KERNEL(32, 1)
round_kernel(const float* x, T* pairs, T* ones) {
  const unsigned i = 2 * threadIdx.x;
  store<2>(pairs + i, load<2>(x + i));
  for (unsigned k = i; k < i + 2; ++k) store_one(ones + k, x[k]);
}
template <class T>
void check_rounding(double step) {
  Array<float> x(64);
  Array<T> pairs(64), ones(64);
  // At and around the middle between two neighbours, 1 + n step and the next, where the even one has it.
  for (int i = 0; i < 60; ++i) x[i] = static_cast<float>((1 + (i / 3 + 0.5) * step) * (1 + (i % 3 - 1) * 1e-7));
  x[60] = 0.0f, x[61] = -0.0f, x[62] = INFINITY, x[63] = NAN;
  launch(queue, {1, 32}, round_kernel<T>, x.data, pairs.data, ones.data);
  for (int i = 0; i < 64; ++i) expect(pairs[i].bits == ones[i].bits, "pairs are rounded like single numbers");
  for (int i = 0; i < 60; ++i) {
    const int n = i / 3 + (i % 3 == 0 ? 0 : i % 3 == 2 ? 1 : i / 3 % 2);
    expect(to_float(ones[i]) == static_cast<float>(1 + n * step), "rounding of number " + std::to_string(i));
  }
  expect(ones[60].bits == 0 && ones[61].bits == 0x8000, "zeros keep their sign");
  expect(std::isinf(to_float(ones[62])) && std::isnan(to_float(ones[63])), "infinity and NaN");
}
void check_half_precision() {
  check_rounding<bfloat16>(1.0 / 128);
  check_rounding<float16>(1.0 / 1024);
}

// Unwritten shared memory is no number, and AddressSanitizer guards its end.
DL_KERNEL(32, 1) unwritten_kernel(float* out) { out[threadIdx.x] = shared_memory<float>()[threadIdx.x]; }
void check_unwritten_shared_memory() {
  Array<float> out(32);
  launch(queue, {1, 32, 128}, unwritten_kernel, out.data);
  for (int i = 0; i < 32; ++i) expect(std::isnan(out[i]), "shared memory that nobody wrote is NaN");
}
void fault_shared_memory() {
  Array<float> out(32);
  launch(queue, {1, 32, 124}, unwritten_kernel, out.data);
}
void fault_global_memory() {
  Array<float> x(128), y(124);
  launch(queue, {1, 32}, pack_kernel<4>, PackArgs{x.data, y.data, 0});
}
DL_KERNEL(32, 1) stack_kernel(float* out, int beyond) {
  float local[4] = {1, 2, 3, 4};
  out[threadIdx.x] = local[(static_cast<int>(threadIdx.x) + beyond) % (4 + beyond)];
}
void fault_local_memory() {
  Array<float> out(32);
  launch(queue, {1, 32}, stack_kernel, out.data, 3);
}
DL_KERNEL(32, 1) overflow_kernel(int* out, int x) { out[threadIdx.x] = x + static_cast<int>(threadIdx.x); }
void fault_overflow() {
  Array<int> out(32);
  launch(queue, {1, 32}, overflow_kernel, out.data, 0x7ffffff0);
}

DL_KERNEL(32, 1) count_kernel(const float* x, float* y) {
  load<4>(x + 4 * (threadIdx.x / 2));
  store_one(y + threadIdx.x, load_one(x + threadIdx.x));
}
void check_counted_bytes() {
  Array<float> x(64), y(32);
  const auto span = [](Array<float>& a) { return std::make_pair(reinterpret_cast<uintptr_t>(a.data), a.size * 4); };
  shim::count_bytes({span(x), span(y)});
  launch(queue, {1, 32}, count_kernel, x.data, y.data);
  const std::vector<int64_t> right = {32 * 16 + 32 * 4, 32 * 4, 32 * 16 + 32 * 4, 0, 32 * 16 + 32 * 4 - 256, 0, 128, 0};
  expect(shim::counted_bytes() == right, "bytes in all, and loaded, stored, loaded again of each span");
}

// Kernels that start while the one before ends ---------------------------------------------------------------------

DL_KERNEL(32, 1) hand_over_kernel(float* x) { store_one(x + threadIdx.x, 1.0f); }
template <Use U, bool kWaits>
DL_KERNEL(32, 1)
take_over_kernel(const float* x, float* y) {
  if (kWaits) wait_for_previous_kernel();
  const float value = load_one<U>(x + threadIdx.x);
  wait_for_previous_kernel();
  store_one(y + threadIdx.x, value);
}
DL_KERNEL(32, 1) hasty_kernel(const float*, float* y) { store_one(y + threadIdx.x, 1.0f); }
DL_KERNEL(32, 1) own_constant_kernel(const float*, float* y) {
  store_one(y + threadIdx.x, 1.0f);
  load_one(y + threadIdx.x);
}
void check_overlap() {
  Array<float> x(32), y(32);
  const auto run = [&](void (*kernel)(const float*, float*), bool overlap) {
    launch(queue, {1, 32}, hand_over_kernel, x.data);
    launch(queue, {1, 32, 0, 1, overlap}, kernel, x.data, y.data);
  };
  run(take_over_kernel<Use::kShared, true>, false);
  run(take_over_kernel<Use::kHanded, true>, true);
  run(take_over_kernel<Use::kAgain, true>, true);
  expect_error("takes for constant", [&] { run(take_over_kernel<Use::kShared, true>, true); });
  expect_error("takes for constant", [&] { run(own_constant_kernel, false); });
  expect_error("has not waited for it", [&] { run(take_over_kernel<Use::kAgain, false>, true); });
  expect_error("before it has waited", [&] { run(hasty_kernel, true); });
}

// Clusters ------------------------------------------------------------------------------------------------------------

DL_KERNEL(32, 1) too_high_rank_kernel(float*) { in_block_of_cluster(shared_memory<float>(), cluster_size()); }
DL_KERNEL(32, 1) not_shared_kernel(float* out) { in_block_of_cluster(out, 0); }
DL_KERNEL(32, 1) behind_shared_kernel(float*) { in_block_of_cluster(shared_memory<float>() + 32, 0); }
DL_KERNEL(32, 1) block_that_ended_kernel(float* out) {
  float* shared = shared_memory<float>();
  shared[threadIdx.x] = 1;
  cluster_barrier();
  if (cluster_rank() == 0) return;
  for (int i = 0; i < 8; ++i) warp_barrier();
  out[threadIdx.x] = *in_block_of_cluster(shared, 0);
}
void check_clusters_memory() {
  Array<float> out(32);
  const auto run = [&](void (*kernel)(float*)) { launch(queue, {2, 32, 128, 2}, kernel, out.data); };
  expect_error("block 2 of a cluster of 2", [&] { run(too_high_rank_kernel); });
  expect_error("not in shared memory", [&] { run(not_shared_kernel); });
  expect_error("not in shared memory", [&] { run(behind_shared_kernel); });
  expect_error("a block that has ended", [&] { run(block_that_ended_kernel); });
}

// Launches ------------------------------------------------------------------------------------------------------------

DL_KERNEL(1024, 1) empty_kernel() {}
void check_refused_launches() {
  const auto run = [](const LaunchShape& shape) { launch(queue, shape, empty_kernel); };
  expect_error("grid", [&] { run({0, 32}); });
  expect_error("48 threads", [&] { run({1, 48}); });
  expect_error("0 threads", [&] { run({1, 0}); });
  expect_error("1056 threads", [&] { run({1, 1056}); });
  expect_error("shared memory", [&] { run({1, 32, 300 << 10}); });
  expect_error("divide the grid", [&] { run({6, 32, 0, 4}); });
  expect_error("divide the grid", [&] { run({17, 32, 0, 17}); });
  shim::take_launches();
  run({32, 32, 64, 16, true});
  const auto made = shim::take_launches();
  expect(made.size() == 1 && made[0].op == "check", "one launch, by its name");
  const shim::Shape& s = made[0].shape;
  expect(s.grid[0] == 32 && s.block == 32 && s.shared == 64 && s.cluster == 16 && s.overlap, "its shape");
  shim::settings.arch = 80;
  expect_error("clusters before sm_90", [&] { run({2, 32, 0, 2}); });
  run({2, 32});
}

const std::map<std::string, void (*)()> kChecks = {
    {"warp_sum", check_warp_sum},
    {"block_sum", check_block_sum},
    {"cluster_sum", check_cluster_sum},
    {"last_block", check_last_block},
    {"exchanges", check_exchanges},
    {"deadlocks", check_deadlocks},
    {"missing_barriers", check_missing_barriers},
    {"copies", check_copies},
    {"alignment", check_alignment},
    {"half_precision", check_half_precision},
    {"unwritten_shared_memory", check_unwritten_shared_memory},
    {"counted_bytes", check_counted_bytes},
    {"clusters_memory", check_clusters_memory},
    {"overlap", check_overlap},
    {"refused_launches", check_refused_launches},
    // What a sanitizer ends the process for.
    {"fault_shared_memory", fault_shared_memory},
    {"fault_global_memory", fault_global_memory},
    {"fault_local_memory", fault_local_memory},
    {"fault_overflow", fault_overflow},
};

}  // namespace

int main(int count, char** arguments) {
  if (count == 2 && std::string(arguments[1]) == "--list") {
    for (const auto& [name, check] : kChecks) std::printf("%s\n", name.c_str());
    return 0;
  }
  if (count < 2 || kChecks.count(arguments[1]) == 0) return std::fprintf(stderr, "which check?\n"), 2;
  machine.arch = 90;
  if (count > 2) shim::seed(std::strtoull(arguments[2], nullptr, 10));
  try {
    kChecks.at(arguments[1])();
  } catch (const std::exception& error) {
    return std::fprintf(stderr, "%s\n", error.what()), 1;
  }
  return 0;
}
