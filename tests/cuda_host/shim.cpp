// The host twin of CUDA: fibers, their scheduler, shared memory, counted bytes. See shim.h.
#include "shim.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <exception>
#include <memory>
#include <random>
#include <set>
#include <unordered_set>
#include <utility>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define ASAN_UNPOISON_MEMORY_REGION(p, size) ((void)0)
#endif

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace dlkernels {
namespace shim {

Coordinates here{};
Settings settings{};

namespace {

constexpr size_t kStack = 256 << 10;  // reserved; touched as far as it is used
constexpr int kLanes = 32;

// Switching between stacks
// ---------------------------------------------------------------------------------------------

#if defined(__x86_64__)
using Context = void*;
extern "C" void dl_shim_switch(void** from, void* to);
asm(R"(
.text
.globl dl_shim_switch
.hidden dl_shim_switch
.type dl_shim_switch,@function
dl_shim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size dl_shim_switch,.-dl_shim_switch
)");
void switch_stacks(Context& from, Context& to) { dl_shim_switch(&from, to); }
void prepare(Context& context, char* stack, void (*entry)()) {
  auto* top = reinterpret_cast<void**>(stack + kStack - 64);  // 16-byte aligned
  *--top = nullptr;                                           // the return address of entry, which never returns
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context = top;
}
#else
using Context = ucontext_t;
void switch_stacks(Context& from, Context& to) { swapcontext(&from, &to); }
void prepare(Context& context, char* stack, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStack;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}
#endif

// Threads, blocks, clusters
// --------------------------------------------------------------------------------------------

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

enum class Waits { kNothing, kWarp, kBlock, kCluster, kDone };

struct Warp {
  alignas(8) uint64_t slots[2][kLanes];  // of this collective and of the one before
  int arrived = 0;
  uint64_t generation = 0;
  Collective kind{};
};

struct Block {
  uint3 index{};
  unsigned rank = 0;
  std::unique_ptr<unsigned char, void (*)(void*)> shared{nullptr, std::free};
  unsigned arrived = 0, done = 0;
  uint64_t generation = 0;
  std::vector<Warp> warps;
};

struct Fiber {
  Context context{};
  char* stack = nullptr;
  void* fake_stack = nullptr;
  unsigned thread = 0;
  Block* block = nullptr;
  Waits waits = Waits::kNothing;
  uint64_t until = 0;  // the generation that ends the wait
  uint64_t cluster_arrived = 0;
  bool waited = false;                    // for the kernel before
  std::vector<std::vector<Copy>> copies;  // groups under way; the last one is open
};

std::vector<char*> stacks;  // of fibers that ended
Context scheduler;
[[maybe_unused]] void* scheduler_fake_stack = nullptr;
[[maybe_unused]] const void* scheduler_stack = nullptr;
[[maybe_unused]] size_t scheduler_size = 0;

Fiber* current = nullptr;
const std::function<void()>* kernel = nullptr;
const Shape* shape = nullptr;
const char* operation = "";
std::vector<Block> blocks;  // of the cluster that runs
unsigned cluster_arrived = 0;
uint64_t cluster_generation = 0;
std::exception_ptr failure;
std::mt19937_64 draw(0);
std::vector<Launched> launches;
std::set<std::string> barriers;
struct Recorded {
  std::string op;
  Shape shape;
  std::function<void()> body;
};
std::vector<std::vector<Recorded>> graphs;
bool in_capture = false, dry = false;
std::string left_out;

[[noreturn]] void fail(const std::string& what) {
  throw std::runtime_error(std::string(operation) + ": block " + std::to_string(here.block.x) + ", thread " +
                           std::to_string(here.thread.x) + ": " + what);
}

void to_fiber(Fiber& f) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, f.stack, kStack);
#endif
  switch_stacks(scheduler, f.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
#endif
}
void to_scheduler(bool ends) {
  Fiber& f = *current;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(ends ? nullptr : &f.fake_stack, scheduler_stack, scheduler_size);
#endif
  switch_stacks(f.context, scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(f.fake_stack, &scheduler_stack, &scheduler_size);
#endif
  if (failure) throw std::runtime_error("another thread failed");
}

void entry() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_size);
#endif
  try {
    if (!failure) (*kernel)();
    if (!current->copies.empty() && !(current->copies.size() == 1 && current->copies[0].empty()) && !failure)
      fail("ends with copies to shared memory under way");
  } catch (...) {
    if (!failure) failure = std::current_exception();
  }
  current->waits = Waits::kDone;
  ++current->block->done;
  to_scheduler(true);
}

void wait(Waits what, uint64_t until) {
  current->waits = what;
  current->until = until;
  to_scheduler(false);
  current->waits = Waits::kNothing;
}

Warp& own_warp() { return current->block->warps[current->thread / kLanes]; }

bool runnable(const Fiber& f) {
  if (failure) return f.waits != Waits::kDone;
  switch (f.waits) {
    case Waits::kNothing: return true;
    case Waits::kWarp: return f.block->warps[f.thread / kLanes].generation >= f.until;
    case Waits::kBlock: return f.block->generation >= f.until;
    case Waits::kCluster: return cluster_generation >= f.until;
    case Waits::kDone: return false;
  }
  return false;
}

char* take_stack() {
  if (!stacks.empty()) {
    char* stack = stacks.back();
    stacks.pop_back();
    ASAN_UNPOISON_MEMORY_REGION(stack, kStack);
    return stack;
  }
  void* p = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::runtime_error("no memory for another fiber");
  return static_cast<char*>(p);
}

void run_cluster(uint64_t first) {
  blocks.clear();
  blocks.resize(shape->cluster);
  cluster_arrived = 0;
  cluster_generation = 0;
  std::vector<Fiber> fibers(size_t{shape->cluster} * shape->block);
  for (unsigned rank = 0; rank < shape->cluster; ++rank) {
    Block& b = blocks[rank];
    const uint64_t index = first + rank;
    b.index = {static_cast<unsigned>(index % shape->grid[0]),
               static_cast<unsigned>(index / shape->grid[0] % shape->grid[1]),
               static_cast<unsigned>(index / shape->grid[0] / shape->grid[1])};
    b.rank = rank;
    void* memory = nullptr;  // of exactly this size: what lies behind it is guarded
    if (posix_memalign(&memory, 128, std::max(shape->shared, 1u)) != 0) throw std::bad_alloc();
    b.shared.reset(static_cast<unsigned char*>(memory));
    std::memset(b.shared.get(), 0xff, shape->shared);
    b.warps.resize(shape->block / kLanes);
    for (unsigned t = 0; t < shape->block; ++t) {
      Fiber& f = fibers[size_t{rank} * shape->block + t];
      f.thread = t;
      f.block = &b;
      f.stack = take_stack();
      prepare(f.context, f.stack, entry);
    }
  }
  std::vector<Fiber*> order(fibers.size());
  for (size_t i = 0; i < fibers.size(); ++i) order[i] = &fibers[i];
  for (bool moved = true; moved;) {
    moved = false;
    std::shuffle(order.begin(), order.end(), draw);
    for (Fiber* f : order) {
      if (!runnable(*f)) continue;
      moved = true;
      current = f;
      here.thread = {f->thread, 0, 0};
      here.block = f->block->index;
      here.rank = f->block->rank;
      to_fiber(*f);
    }
    order.erase(std::remove_if(order.begin(), order.end(), [](Fiber* f) { return f->waits == Waits::kDone; }),
                order.end());
  }
  for (Fiber& f : fibers) stacks.push_back(f.stack);
  if (failure) return;
  if (!order.empty()) {
    const Fiber& f = *order.front();
    const char* at = f.waits == Waits::kWarp    ? "a collective of its warp"
                     : f.waits == Waits::kBlock ? "__syncthreads"
                                                : "a barrier of its cluster";
    throw std::runtime_error(std::string(operation) + ": " + std::to_string(order.size()) +
                             " threads wait for ever, one of them (block " + std::to_string(f.block->index.x) +
                             ", thread " + std::to_string(f.thread) + ") at " + at);
  }
}

// Counted bytes
// --------------------------------------------------------------------------------------------------------

struct Range {
  uintptr_t begin, end;
  int64_t loaded = 0, stored = 0, again = 0;  // again: loads of sectors that were loaded before
  std::vector<bool> seen;
};
std::vector<Range> ranges;
int64_t loaded = 0, stored = 0;
bool counting = false;
// Words of 4 bytes that this launch wrote, and that those wrote which it may overlap.
std::unordered_set<uintptr_t> written, written_before;

template <class F>
void for_words(const void* p, size_t bytes, F f) {
  const auto at = reinterpret_cast<uintptr_t>(p);
  for (uintptr_t word = at / 4; word <= (at + bytes - 1) / 4; ++word) f(word);
}

template <class F>
void in_range(const void* p, F f) {
  const auto at = reinterpret_cast<uintptr_t>(p);
  for (Range& r : ranges)
    if (at >= r.begin && at < r.end) {
      f(r, at - r.begin);
      return;
    }
}

void check_alignment(const void* p, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0)
    fail("an access of " + std::to_string(bytes) + " bytes that is not aligned");
}

}  // namespace

void* shared_memory() { return current->block->shared.get(); }

// Whether a barrier is there: it is noted, and compared with the one that is to be left out.
bool present(const std::string& barrier) {
  barriers.insert(barrier);
  return barrier != left_out;
}

void block_barrier(const char* file, int line) {
  Block& b = *current->block;
  const char* name = std::strrchr(file, '/');
  if (!present(std::string(name == nullptr ? file : name + 1) + ":" + std::to_string(line))) return;
  if (b.done != 0) fail("__syncthreads, and a thread of the block has returned");
  const uint64_t until = b.generation + 1;
  if (++b.arrived == shape->block) {
    b.arrived = 0;
    ++b.generation;
  }
  wait(Waits::kBlock, until);
}

void cluster_arrive() {
  if (!present("cluster")) return;
  if (current->cluster_arrived > cluster_generation) fail("cluster_arrive twice without cluster_wait");
  current->cluster_arrived = cluster_generation + 1;
  if (++cluster_arrived == shape->block * shape->cluster) {
    cluster_arrived = 0;
    ++cluster_generation;
  }
}
void cluster_wait() {
  if (!present("cluster")) return;
  if (current->cluster_arrived == 0) fail("cluster_wait without cluster_arrive");
  wait(Waits::kCluster, current->cluster_arrived);
}

void* in_block_of_cluster(void* own, unsigned rank) {
  if (rank >= shape->cluster)
    fail("block " + std::to_string(rank) + " of a cluster of " + std::to_string(shape->cluster));
  const auto offset = static_cast<unsigned char*>(own) - current->block->shared.get();
  if (offset < 0 || offset >= static_cast<int64_t>(shape->shared))
    fail("in_block_of_cluster of what is not in shared memory");
  if (rank != current->block->rank && blocks[rank].done == shape->block)
    fail("reads shared memory of a block that has ended");
  return blocks[rank].shared.get() + offset;
}

const void* exchange(Collective kind, const void* value, size_t bytes) {
  Warp& w = own_warp();
  if (w.arrived != 0 && w.kind != kind) fail("threads of one warp are in different collectives");
  w.kind = kind;
  uint64_t* slots = w.slots[w.generation % 2];
  if (bytes != 0) std::memcpy(&slots[current->thread % kLanes], value, bytes);
  const uint64_t until = w.generation + 1;
  if (++w.arrived == kLanes) {
    w.arrived = 0;
    ++w.generation;
  }
  wait(Waits::kWarp, until);
  return slots;
}

void on_load(const void* p, size_t bytes) {
  check_alignment(p, bytes);
  if (shape->overlap && !current->waited) {
    for_words(p, bytes, [](uintptr_t word) {
      if (written_before.count(word) != 0) fail("reads what the kernel before writes, and has not waited for it");
    });
  }
  if (!counting) return;
  loaded += static_cast<int64_t>(bytes);
  in_range(p, [&](Range& r, size_t offset) {
    r.loaded += static_cast<int64_t>(bytes);
    for (size_t i = offset; i < offset + bytes; ++i) {
      if (r.seen[i]) ++r.again;
      r.seen[i] = true;
    }
  });
}
void on_load_of_constant(const void* p, size_t bytes) {
  for_words(p, bytes, [](uintptr_t word) {
    if (written.count(word) + written_before.count(word) != 0)
      fail("takes for constant what this kernel, or the one it overlaps, writes");
  });
}
void on_store(const void* p, size_t bytes) {
  check_alignment(p, bytes);
  if (shape->overlap && !current->waited) fail("writes before it has waited for the kernel before");
  for_words(p, bytes, [](uintptr_t word) { written.insert(word); });
  if (!counting) return;
  stored += static_cast<int64_t>(bytes);
  in_range(p, [&](Range& r, size_t) { r.stored += static_cast<int64_t>(bytes); });
}

void wait_for_previous_kernel() { current->waited = true; }

void copy_later(void* to, const void* from, size_t bytes) {
  check_alignment(to, bytes);
  if (current->copies.empty()) current->copies.emplace_back();
  current->copies.back().push_back({to, from, bytes});
}
void close_copies() { current->copies.emplace_back(); }
void copies_done(int under_way) {
  auto& groups = current->copies;  // the last one is open, and not waited for
  while (static_cast<int>(groups.size()) - 1 > under_way) {
    for (const Copy& c : groups.front()) std::memcpy(c.to, c.from, c.bytes);
    groups.erase(groups.begin());
  }
}

void run(const char* op, const Shape& s, const std::function<void()>& body) {
  operation = op;
  const uint64_t count = uint64_t{s.grid[0]} * s.grid[1] * s.grid[2];
  const auto refuse = [&](const std::string& what) { throw std::runtime_error(what); };
  if (count == 0 || s.grid[0] > 0x7fffffffu || s.grid[1] > 65535 || s.grid[2] > 65535)
    refuse("a grid that cannot be launched");
  if (s.block == 0 || s.block > 1024 || s.block % kLanes != 0)
    refuse("blocks of " + std::to_string(s.block) + " threads");
  if (static_cast<int>(s.shared) > settings.shared_per_block)
    refuse(std::to_string(s.shared) + " bytes of shared memory");
  if (s.cluster == 0 || s.cluster > 16 || s.grid[0] % s.cluster != 0) refuse("a cluster that does not divide the grid");
  if (s.cluster > 1 && settings.arch < 90) refuse("clusters before sm_90");
  launches.push_back({op, s});
  if (dry) return;
  if (!s.overlap) written_before.clear();
  else written_before.insert(written.begin(), written.end());
  written.clear();
  kernel = &body;
  shape = &s;
  here = {};
  here.block_size = {s.block, 1, 1};
  here.grid = {s.grid[0], s.grid[1], s.grid[2]};
  here.cluster = s.cluster;
  failure = nullptr;
  std::vector<uint64_t> order(count / s.cluster);
  for (uint64_t i = 0; i < order.size(); ++i) order[i] = i * s.cluster;
  std::shuffle(order.begin(), order.end(), draw);
  for (const uint64_t first : order) {
    run_cluster(first);
    if (failure) std::rethrow_exception(std::exchange(failure, nullptr));
  }
}

bool capturing() { return in_capture; }
void record(const char* op, const Shape& s, std::function<void()> body) {
  graphs.back().push_back({op, s, std::move(body)});
}

// For tests -----------------------------------------------------------------------------------------------------------

void seed(uint64_t value) { draw.seed(value); }

std::vector<Launched> take_launches() { return std::exchange(launches, {}); }

std::vector<std::string> take_barriers() {
  const std::set<std::string> passed = std::exchange(barriers, {});
  return {passed.begin(), passed.end()};
}
void leave_out(const std::string& barrier) { left_out = barrier; }

void begin_capture() { graphs.emplace_back(), in_capture = true; }
int end_capture() {
  in_capture = false;
  return static_cast<int>(graphs.size()) - 1;
}
void replay(int graph) {
  for (const Recorded& r : graphs.at(graph)) run(r.op.c_str(), r.shape, r.body);
}
void dry_run(bool value) { dry = value; }

void count_bytes(const std::vector<std::pair<uintptr_t, size_t>>& spans) {
  ranges.clear();
  loaded = stored = 0;
  counting = true;
  for (const auto& [begin, size] : spans) {
    ranges.push_back({begin, begin + size});
    ranges.back().seen.resize(size);
  }
}
std::vector<int64_t> counted_bytes() {
  counting = false;
  std::vector<int64_t> out{loaded, stored};
  for (const Range& r : ranges) out.insert(out.end(), {r.loaded, r.stored, r.again});
  return out;
}

}  // namespace shim
}  // namespace dlkernels
