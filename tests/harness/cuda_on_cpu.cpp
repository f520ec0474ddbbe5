// SPDX-License-Identifier: Apache-2.0
// Runs blocks of CUDA threads as fibers on one CPU thread. Compiled without sanitizers even where
// the kernels have them (L0K_ASAN, L0K_TSAN say so): it moves between stacks behind their backs and
// tells them what they must know.
//
// ThreadSanitizer sees each fiber as a thread. Threads are ordered by __syncthreads and __syncwarp,
// blocks by nothing but fences with atomics, as on a GPU: blocks have shared memory, barriers and
// (some of them) fibers of their own, so that races between blocks show as well.
#include "cuda_on_cpu.h"

#include <sys/mman.h>

#include <cstdlib>
#include <memory>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__x86_64__)
#define L0K_OWN_SWITCH 1
#else
#define L0K_OWN_SWITCH 0
#include <ucontext.h>
#endif

#if defined(L0K_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(L0K_TSAN)
#include <sanitizer/tsan_interface.h>
#endif

#if L0K_OWN_SWITCH
// Saves what a called function must preserve, stores the stack pointer in *from, continues at `to`.
extern "C" void l0k_switch_stack(void** from, void* to);
asm(".text\n"
    ".hidden l0k_switch_stack\n"
    ".globl l0k_switch_stack\n"
    ".type l0k_switch_stack,@function\n"
    "l0k_switch_stack:\n"
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp, (%rdi)\n"
    "  movq %rsi, %rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n"
    "  ret\n"
    ".size l0k_switch_stack,.-l0k_switch_stack\n");
#endif

namespace l0k::harness {

const Thread* thread = nullptr;
uint3 block_index;
dim3 block_size, grid_size;

namespace {

#if defined(L0K_ASAN) || defined(L0K_TSAN)
constexpr bool kSanitized = true;
#else
constexpr bool kSanitized = false;
#endif
#if defined(L0K_TSAN)
constexpr bool kTsan = true;
#else
constexpr bool kTsan = false;
#endif

constexpr unsigned kMaxThreads = 1024;
constexpr unsigned kMaxWarps = kMaxThreads / 32;
constexpr size_t kMaxStaticShared = 48 << 10;
constexpr size_t kMaxShared = 227 << 10;  // of a block on sm_90
constexpr size_t kStackBytes = 256 << 10;
constexpr size_t kPageBytes = 4096;
constexpr int kTeams = kTsan ? 4 : 1;  // a block's fibers; ThreadSanitizer has some 8000 threads

// ---- stacks ----

char* map_memory(size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  return static_cast<char*>(memory);
}

char* map_stack() {
  char* stack = map_memory(kStackBytes + kPageBytes);
  mprotect(stack, kPageBytes, PROT_NONE);  // what overruns the stack faults
  return stack + kPageBytes;
}

#if L0K_OWN_SWITCH

struct Context {
  void* stack_pointer = nullptr;
};

void prepare(Context& context, char* stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + kStackBytes - 64);
  *--top = nullptr;  // where `entry` would return to; it also aligns the stack
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context.stack_pointer = top;
}

void switch_stack(Context& from, const Context& to) {
  l0k_switch_stack(&from.stack_pointer, to.stack_pointer);
}

#else

struct Context {
  ucontext_t context;
};

void prepare(Context& context, char* stack, void (*entry)()) {
  getcontext(&context.context);
  context.context.uc_stack.ss_sp = stack;
  context.context.uc_stack.ss_size = kStackBytes;
  context.context.uc_link = nullptr;
  makecontext(&context.context, entry, 0);
}

void switch_stack(Context& from, const Context& to) {
  swapcontext(&from.context, &to.context);
}

#endif

// ---- what runs ----

enum class State : uint8_t { ready, at_block_barrier, in_warp, done };
enum class Operation : uint8_t { barrier, shuffle, ballot, exchange };

// A lane's part in an operation of its warp; on the lane's stack while it waits.
struct Call {
  Operation operation;
  unsigned mask;
  Place place;
  int source_lane = 0;
  bool vote = false;
  void (*change)(Words (&)[32]) = nullptr;
  Words words{};       // brought, then received
  unsigned votes = 0;  // received
};

struct PendingCopy {
  Copy copy;
  int group;
};

struct Fiber : Thread {
  Context context;
  char* stack = nullptr;
  State state = State::done;
  Place place{};  // where it waits
  Call* call = nullptr;
  unsigned warp_barriers = 0;  // how many it has passed
  std::vector<PendingCopy> copies;
  size_t complete_copies = 0;  // at the front of `copies`
  int committed_groups = 0;
  bool fenced = false;
  const void* last_atomic = nullptr;
  void* asan_stack = nullptr;
  void* tsan_fiber = nullptr;
};

struct Warp {
  unsigned ready = 0;    // lanes that can run
  unsigned waiting = 0;  // lanes in an operation
  unsigned alive = 0;
};

struct SharedArray {
  const char* name;
  const void* declaration;
  char* begin;
  size_t bytes;
  char* guard_end;  // the bytes from the array's end to here stay as they are
};

// One operation's order of events: a number for each block.
struct Tags {
  char block[2][8];
  char warp[kMaxWarps][2][8];
};

struct Random {
  uint64_t state = 0;
  uint64_t next() {  // splitmix64
    uint64_t z = state += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
  }
  unsigned below(unsigned limit) { return static_cast<unsigned>((next() >> 32) * limit >> 32); }
};

// One warp as far as it goes before the next, or any thread at any time.
enum class Schedule { in_order, warp_by_warp, interleaved };

constexpr size_t kArenaBytes = 512 << 10;
constexpr int kMaxSharedArrays = 64;

struct Machine {
  // The launch.
  void (*run)(const void*) = nullptr;
  const void* call = nullptr;
  std::string error;
  bool failed = false;
  // The block.
  std::vector<Fiber>* team = nullptr;
  unsigned threads = 0;
  unsigned live = 0;
  unsigned at_barrier = 0;
  unsigned barriers = 0;  // how many the block has passed
  Warp warps[kMaxWarps];
  unsigned ready_warps = 0;
  Schedule schedule = Schedule::in_order;
  unsigned current_warp = 0;
  char* arena = nullptr;
  char* arena_top = nullptr;
  SharedArray shared[kMaxSharedArrays];
  int shared_arrays = 0;
  size_t dynamic_bytes = 0;
  Tags* tags = nullptr;
  // For all launches.
  std::vector<Fiber> teams[kTeams];
  char* arenas = nullptr;  // one of each per block that must not share them
  Tags own_tags{};
  Fiber* running = nullptr;
  Context main;
  void* main_tsan_fiber = nullptr;
  void* main_asan_stack = nullptr;
  const void* main_stack = nullptr;
  size_t main_stack_bytes = 0;
  char started = 0, finished = 0;  // tags
  Random random;
  bool in_order = false;
  int64_t launches = 0;
};

Machine machine;
std::mutex one_launch;

void set_schedule(int64_t seed) {
  machine.in_order = seed < 0;
  machine.random.state = static_cast<uint64_t>(seed);
}

const bool schedule_set = [] {
  const char* seed = std::getenv("L0K_SCHEDULE_SEED");
  set_schedule(seed == nullptr ? 0 : std::atoll(seed));
  return true;
}();

// ---- what sanitizers must know ----

void release(void* tag) {
#if defined(L0K_TSAN)
  __tsan_release(tag);
#else
  (void)tag;
#endif
}

void acquire(void* tag) {
#if defined(L0K_TSAN)
  __tsan_acquire(tag);
#else
  (void)tag;
#endif
}

void poison(const char* begin, size_t bytes) {
#if defined(L0K_ASAN)
  __asan_poison_memory_region(begin, bytes);
#else
  (void)begin, (void)bytes;
#endif
}

void unpoison(const char* begin, size_t bytes) {
#if defined(L0K_ASAN)
  __asan_unpoison_memory_region(begin, bytes);
#else
  (void)begin, (void)bytes;
#endif
}

void to_fiber(Fiber& fiber) {
  machine.running = &fiber;
  thread = &fiber;
#if defined(L0K_TSAN)
  __tsan_switch_to_fiber(fiber.tsan_fiber, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(L0K_ASAN)
  __sanitizer_start_switch_fiber(&machine.main_asan_stack, fiber.stack, kStackBytes);
#endif
  switch_stack(machine.main, fiber.context);
#if defined(L0K_ASAN)
  __sanitizer_finish_switch_fiber(machine.main_asan_stack, nullptr, nullptr);
#endif
}

void to_main() {
  Fiber& fiber = *machine.running;
#if defined(L0K_TSAN)
  __tsan_switch_to_fiber(machine.main_tsan_fiber, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(L0K_ASAN)
  const bool last = fiber.state == State::done;
  __sanitizer_start_switch_fiber(last ? nullptr : &fiber.asan_stack, machine.main_stack,
                                 machine.main_stack_bytes);
#endif
  switch_stack(fiber.context, machine.main);
#if defined(L0K_ASAN)
  __sanitizer_finish_switch_fiber(fiber.asan_stack, &machine.main_stack,
                                  &machine.main_stack_bytes);
#endif
}

// ---- shared memory ----

// All bits set: NaN in every floating type, -1 in every integer. Not memset, whose writes
// ThreadSanitizer would see as the kernel's, and AddressSanitizer check.
void fill(char* begin, char* end) {
  if (!kSanitized) {
    std::memset(begin, 0xFF, end - begin);
    return;
  }
  for (volatile char* byte = begin; byte < end; ++byte) *byte = static_cast<char>(0xFF);
}

// Arrays start at 16 bytes and, so that nobody relies on more, never at 32.
void start_shared(char* arena, size_t dynamic_bytes) {
  machine.arena = arena;
  machine.arena_top = arena + 48;
  machine.shared_arrays = 0;
  machine.dynamic_bytes = dynamic_bytes;
  poison(arena, kArenaBytes);
}

char* add_shared(const char* name, const void* declaration, size_t bytes) {
  SharedArray array{name, declaration, machine.arena_top, bytes, nullptr};
  const size_t taken = (bytes + 31) / 32 * 32 + 64;
  array.guard_end = array.begin + taken;
  if (machine.shared_arrays == kMaxSharedArrays) stop("too many shared arrays");
  machine.arena_top = array.guard_end;
  unpoison(array.begin, taken);
  fill(array.begin, array.guard_end);
  poison(array.begin + bytes, taken - bytes);
  machine.shared[machine.shared_arrays++] = array;
  return array.begin;
}

void check_guards() {
  for (int i = 0; i < machine.shared_arrays; ++i) {
    const SharedArray& array = machine.shared[i];
    const char* byte = array.begin + array.bytes;
    while (byte < array.guard_end && *byte == static_cast<char>(0xFF)) ++byte;
    if (byte == array.guard_end) continue;
    machine.failed = true;
    machine.error = std::string("writes past the end of shared memory: '") + array.name + "', " +
                    std::to_string(array.bytes) + " bytes, at byte " +
                    std::to_string(byte - array.begin);
    return;
  }
}

// ---- warps ----

Fiber& lane_of(unsigned warp, unsigned lane) { return (*machine.team)[warp * 32 + lane]; }

void make_ready(Fiber& fiber) {
  const unsigned warp = fiber.rank / 32;
  fiber.state = State::ready;
  machine.warps[warp].ready |= 1u << fiber.rank % 32;
  machine.ready_warps |= 1u << warp;
}

std::string name_of(Place place) {
  const char* slash = std::strrchr(place.file, '/');
  return std::string(slash == nullptr ? place.file : slash + 1) + ":" + std::to_string(place.line);
}

template <typename Function>
void for_lanes(unsigned warp, unsigned lanes, const Function& function) {
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (lanes >> lane & 1) function(lane, *lane_of(warp, lane).call);
  }
}

void check_calls(unsigned warp, unsigned lanes) {
  const Call& first = *lane_of(warp, __builtin_ctz(lanes)).call;
  for_lanes(warp, lanes, [&](unsigned, const Call& call) {
    if (call.operation == first.operation && call.mask == first.mask &&
        call.change == first.change) {
      return;
    }
    const std::string why = "lanes of a warp meet in different operations or with different "
                            "masks: " +
                            name_of(first.place) + " and " + name_of(call.place);
    stop(why.c_str());
  });
  if (first.operation == Operation::exchange && lanes != 0xFFFFFFFFu) {
    stop((name_of(first.place) + ": expected all 32 lanes").c_str());
  }
}

void compute(unsigned warp, unsigned lanes) {
  Words words[32];
  unsigned votes = 0;
  for_lanes(warp, lanes, [&](unsigned lane, const Call& call) {
    words[lane] = call.words;
    votes |= static_cast<unsigned>(call.vote) << lane;
  });
  const Call& first = *lane_of(warp, __builtin_ctz(lanes)).call;
  if (first.operation == Operation::exchange) first.change(words);
  for_lanes(warp, lanes, [&](unsigned lane, Call& call) {
    call.votes = votes;
    if (call.operation == Operation::exchange) call.words = words[lane];
    if (call.operation != Operation::shuffle) return;
    if (call.source_lane < 0 || call.source_lane > 31 || !(lanes >> call.source_lane & 1)) {
      const std::string why = name_of(call.place) + ": lane " + std::to_string(lane) +
                              " reads from lane " + std::to_string(call.source_lane) +
                              ", which does not take part";
      stop(why.c_str());
    }
    call.words = words[call.source_lane];
  });
}

// Completes the operation with this mask if all of its lanes that still run have come.
bool complete(unsigned warp, unsigned mask) {
  Warp& w = machine.warps[warp];
  const unsigned lanes = mask & w.alive;
  if (lanes == 0 || (w.waiting & lanes) != lanes) return false;
  check_calls(warp, lanes);
  compute(warp, lanes);
  w.waiting &= ~lanes;
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (lanes >> lane & 1) make_ready(lane_of(warp, lane));
  }
  return true;
}

void meet(Call& call) {
  Fiber& me = *machine.running;
  const unsigned warp = me.rank / 32;
  const unsigned bit = 1u << me.rank % 32;
  if (!(call.mask & bit)) {
    stop((name_of(call.place) + ": the calling lane is not in the mask").c_str());
  }
  me.call = &call;
  me.place = call.place;
  me.state = State::in_warp;
  machine.warps[warp].waiting |= bit;
  complete(warp, call.mask);
  to_main();
}

// A lane that has returned is waited for no longer.
void leave(const Fiber& me) {
  const unsigned warp = me.rank / 32;
  Warp& w = machine.warps[warp];
  w.alive &= ~(1u << me.rank % 32);
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (w.waiting >> lane & 1) complete(warp, lane_of(warp, lane).call->mask);
  }
}

// ---- blocks ----

void fail_with(const std::string& why) {
  if (machine.failed) return;
  machine.failed = true;
  machine.error = why;
}

void run_thread() {
#if defined(L0K_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, &machine.main_stack, &machine.main_stack_bytes);
#endif
  Fiber& me = *machine.running;
  acquire(&machine.started);
  try {
    machine.run(machine.call);
    leave(me);
  } catch (const std::exception& error) {
    fail_with(std::string(error.what()) + " (thread " + std::to_string(me.index.x) + ", " +
              std::to_string(me.index.y) + ", " + std::to_string(me.index.z) + ")");
  }
  release(&machine.finished);
  --machine.live;
  me.state = State::done;
  to_main();
  std::abort();  // nobody continues a thread that is done
}

void make_team(std::vector<Fiber>& team, unsigned threads) {
  while (team.size() < threads) {
    team.emplace_back();
    team.back().stack = map_stack();
#if defined(L0K_TSAN)
    team.back().tsan_fiber = __tsan_create_fiber(0);
#endif
  }
}

// After an error threads are left in the middle, with marks of sanitizers on their stacks.
void drop_teams() {
  for (std::vector<Fiber>& team : machine.teams) {
    for (Fiber& fiber : team) {
      unpoison(fiber.stack, kStackBytes);
      munmap(fiber.stack - kPageBytes, kStackBytes + kPageBytes);
#if defined(L0K_TSAN)
      __tsan_destroy_fiber(fiber.tsan_fiber);
#endif
    }
    team.clear();
  }
}

void start_threads(std::vector<Fiber>& team) {
  const dim3 size = block_size;
  machine.team = &team;
  machine.live = machine.threads;
  machine.at_barrier = machine.barriers = machine.ready_warps = 0;
  for (unsigned w = 0; w * 32 < machine.threads; ++w) {
    const unsigned lanes = std::min(32u, machine.threads - w * 32);
    const unsigned all = lanes == 32 ? 0xFFFFFFFFu : (1u << lanes) - 1;
    machine.warps[w] = {all, 0, all};
    machine.ready_warps |= 1u << w;
  }
  for (unsigned rank = 0; rank < machine.threads; ++rank) {
    Fiber& fiber = team[rank];
    fiber.rank = rank;
    fiber.index = {rank % size.x, rank / size.x % size.y, rank / (size.x * size.y)};
    fiber.state = State::ready;
    fiber.warp_barriers = 0;
    fiber.copies.clear();
    fiber.complete_copies = 0;
    fiber.committed_groups = 0;
    fiber.fenced = false;
    fiber.last_atomic = nullptr;
    prepare(fiber.context, fiber.stack, run_thread);
  }
}

unsigned random_bit(unsigned bits) {
  for (unsigned skip = machine.random.below(__builtin_popcount(bits)); skip > 0; --skip) {
    bits &= bits - 1;
  }
  return __builtin_ctz(bits);
}

Fiber& take_ready() {
  unsigned warp = machine.current_warp;
  const bool stay =
      machine.schedule == Schedule::warp_by_warp && (machine.ready_warps >> warp & 1) != 0;
  if (machine.schedule == Schedule::in_order) {
    warp = __builtin_ctz(machine.ready_warps);
  } else if (!stay) {
    warp = random_bit(machine.ready_warps);
  }
  machine.current_warp = warp;
  unsigned& ready = machine.warps[warp].ready;
  const unsigned lane =
      machine.schedule == Schedule::in_order ? __builtin_ctz(ready) : random_bit(ready);
  ready &= ~(1u << lane);
  if (ready == 0) machine.ready_warps &= ~(1u << warp);
  return lane_of(warp, lane);
}

// "3 at norm.cu:12, 29 at norm.cu:20": where threads wait.
std::string waiting_threads(State state) {
  struct Count {
    Place place;
    int threads;
  };
  std::vector<Count> counts;
  for (unsigned rank = 0; rank < machine.threads; ++rank) {
    const Fiber& fiber = (*machine.team)[rank];
    if (fiber.state != state) continue;
    size_t i = 0;
    while (i < counts.size() && (counts[i].place.line != fiber.place.line ||
                                 std::strcmp(counts[i].place.file, fiber.place.file) != 0)) {
      ++i;
    }
    if (i == counts.size()) counts.push_back({fiber.place, 0});
    ++counts[i].threads;
  }
  std::string text;
  for (const Count& count : counts) {
    text += (text.empty() ? "" : ", ") + std::to_string(count.threads) + " at " +
            name_of(count.place);
  }
  return text.empty() ? "none" : text;
}

void open_barrier() {
  const Place first = [] {
    for (unsigned rank = 0;; ++rank) {
      if ((*machine.team)[rank].state == State::at_block_barrier) return (*machine.team)[rank].place;
    }
  }();
  machine.at_barrier = 0;
  ++machine.barriers;
  for (unsigned rank = 0; rank < machine.threads; ++rank) {
    Fiber& fiber = (*machine.team)[rank];
    if (fiber.state != State::at_block_barrier) continue;
    if (fiber.place.line != first.line || std::strcmp(fiber.place.file, first.file) != 0) {
      fail_with("threads of a block meet at different __syncthreads: " +
                waiting_threads(State::at_block_barrier));
      return;
    }
  }
  for (unsigned rank = 0; rank < machine.threads; ++rank) {
    Fiber& fiber = (*machine.team)[rank];
    if (fiber.state == State::at_block_barrier) make_ready(fiber);
  }
}

void run_block(std::vector<Fiber>& team) {
  start_threads(team);
  machine.schedule = machine.in_order ? Schedule::in_order
                     : machine.random.below(2) == 0 ? Schedule::warp_by_warp
                                                    : Schedule::interleaved;
  while (machine.live > 0 && !machine.failed) {
    if (machine.ready_warps != 0) {
      to_fiber(take_ready());
    } else if (machine.at_barrier == machine.live) {
      open_barrier();
    } else {
      fail_with("deadlock: of " + std::to_string(machine.live) +
                " threads wait at __syncthreads: " + waiting_threads(State::at_block_barrier) +
                "; in operations of a warp: " + waiting_threads(State::in_warp));
    }
  }
  thread = nullptr;
}

// ---- launches ----

void check_launch(const std::string& kernel, dim3 grid, dim3 block, size_t shared_bytes) {
  const auto text = [](dim3 d) {
    return std::to_string(d.x) + " x " + std::to_string(d.y) + " x " + std::to_string(d.z);
  };
  const uint64_t threads = static_cast<uint64_t>(block.x) * block.y * block.z;
  if (block.x > kMaxThreads || block.y > kMaxThreads || block.z > 64 || threads > kMaxThreads ||
      threads == 0) {
    throw std::runtime_error(kernel + ": invalid block of " + text(block) + " threads");
  }
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7FFFFFFFu || grid.y > 0xFFFFu ||
      grid.z > 0xFFFFu) {
    throw std::runtime_error(kernel + ": invalid grid of " + text(grid) + " blocks");
  }
  if (shared_bytes > kMaxShared) {
    throw std::runtime_error(kernel + ": expected at most " + std::to_string(kMaxShared) +
                             " bytes of shared memory; got " + std::to_string(shared_bytes));
  }
}

// Every block once: first, first + step, ... modulo their number.
struct BlockOrder {
  uint64_t blocks, first, step;
  explicit BlockOrder(uint64_t count) : blocks(count), first(0), step(1) {
    if (machine.in_order || count == 1) return;
    first = machine.random.next() % count;
    do {
      step = 1 + machine.random.next() % count;
    } while (std::gcd(step, count) != 1);
  }
  uint64_t operator[](uint64_t i) const { return (first + i * step) % blocks; }
};

void run_blocks(size_t shared_bytes, Tags* tags) {
  const uint64_t blocks = static_cast<uint64_t>(grid_size.x) * grid_size.y * grid_size.z;
  const BlockOrder order(blocks);
  for (uint64_t i = 0; i < blocks && !machine.failed; ++i) {
    const uint64_t b = order[i];
    block_index = {static_cast<unsigned>(b % grid_size.x),
                   static_cast<unsigned>(b / grid_size.x % grid_size.y),
                   static_cast<unsigned>(b / grid_size.x / grid_size.y)};
    start_shared(machine.arenas + (kTsan ? i * kArenaBytes : 0), shared_bytes);
    add_shared("dynamic shared memory", nullptr, shared_bytes);
    machine.tags = tags + (kTsan ? i : 0);
    std::vector<Fiber>& team = machine.teams[i % kTeams];
    make_team(team, machine.threads);
    release(&machine.started);
    run_block(team);
    if (!machine.failed) check_guards();
  }
}

}  // namespace

void stop(const char* why) { throw std::runtime_error(why); }

void launch(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes,
            void (*run)(const void*), const void* call) {
  const std::lock_guard<std::mutex> lock(one_launch);
  check_launch(kernel, grid, block, shared_bytes);
  ++machine.launches;
  machine.run = run;
  machine.call = call;
  machine.failed = false;
  machine.threads = block.x * block.y * block.z;
  grid_size = grid;
  block_size = block;
#if defined(L0K_TSAN)
  machine.main_tsan_fiber = __tsan_get_current_fiber();
  const size_t blocks = static_cast<size_t>(grid.x) * grid.y * grid.z;
  machine.arenas = map_memory(blocks * kArenaBytes);
  Tags* tags = reinterpret_cast<Tags*>(map_memory(blocks * sizeof(Tags)));
  run_blocks(shared_bytes, tags);
  acquire(&machine.finished);
  munmap(tags, blocks * sizeof(Tags));
  munmap(machine.arenas, blocks * kArenaBytes);
#else
  if (machine.arenas == nullptr) machine.arenas = map_memory(kArenaBytes);
  run_blocks(shared_bytes, &machine.own_tags);
#endif
  if (!machine.failed) return;
  drop_teams();
  throw std::runtime_error(std::string(kernel) + ": " + machine.error + " (block " +
                           std::to_string(block_index.x) + ", " + std::to_string(block_index.y) +
                           ", " + std::to_string(block_index.z) + ")");
}

void* static_shared(const char* name, const void* declaration, size_t bytes) {
  size_t static_bytes = 0;
  for (int i = 0; i < machine.shared_arrays; ++i) {
    const SharedArray& array = machine.shared[i];
    if (array.declaration == declaration) return array.begin;
    if (array.declaration != nullptr) static_bytes += array.bytes;
  }
  static_bytes += bytes;
  if (static_bytes > kMaxStaticShared || static_bytes + machine.dynamic_bytes > kMaxShared) {
    stop("expected at most 48 KiB of static and 227 KiB of all shared memory");
  }
  return add_shared(name, declaration, bytes);
}

void* dynamic_shared() { return machine.shared[0].begin; }

void block_barrier(Place place) {
  Fiber& me = *machine.running;
  char* tag = machine.tags->block[machine.barriers % 2];
  release(tag);
  me.place = place;
  me.state = State::at_block_barrier;
  ++machine.at_barrier;
  to_main();
  acquire(tag);
}

void warp_barrier(unsigned mask, Place place) {
  Fiber& me = *machine.running;
  char* tag = machine.tags->warp[me.rank / 32][me.warp_barriers++ % 2];
  Call call{Operation::barrier, mask, place};
  release(tag);
  meet(call);
  acquire(tag);
}

Words shuffle(unsigned mask, const Words& mine, int source_lane, Place place) {
  Call call{Operation::shuffle, mask, place};
  call.source_lane = source_lane;
  call.words = mine;
  meet(call);
  return call.words;
}

unsigned ballot(unsigned mask, bool vote, Place place) {
  Call call{Operation::ballot, mask, place};
  call.vote = vote;
  meet(call);
  return call.votes;
}

Words exchange(const Words& mine, void (*change)(Words (&)[32]), Place place) {
  Call call{Operation::exchange, 0xFFFFFFFFu, place};
  call.change = change;
  call.words = mine;
  meet(call);
  return call.words;
}

void pause() {
  if (machine.schedule == Schedule::in_order) return;
  make_ready(*machine.running);
  to_main();
}

// An atomic orders memory only with a fence: before it for what it publishes, behind it for what
// it has seen.
void fence() {
  Fiber& me = *machine.running;
  me.fenced = true;
  if (me.last_atomic != nullptr) acquire(const_cast<void*>(me.last_atomic));
}

void before_atomic(const void* address) {
  if (machine.running->fenced) release(const_cast<void*>(address));
}

void after_atomic(const void* address) { machine.running->last_atomic = address; }

void add_copy(const Copy& copy) {
  Fiber& me = *machine.running;
  me.copies.push_back({copy, me.committed_groups});
}

void commit_copies() { ++machine.running->committed_groups; }

bool next_complete_copy(int youngest_groups, Copy& copy) {
  Fiber& me = *machine.running;
  if (me.complete_copies == me.copies.size() ||
      me.copies[me.complete_copies].group >= me.committed_groups - youngest_groups) {
    return false;
  }
  copy = me.copies[me.complete_copies++].copy;
  return true;
}

}  // namespace l0k::harness

#define L0K_EXPORT extern "C" __attribute__((visibility("default")))

// Launches since the last reset.
L0K_EXPORT int64_t l0k_launches(int reset) {
  const int64_t launches = l0k::harness::machine.launches;
  if (reset != 0) l0k::harness::machine.launches = 0;
  return launches;
}

// Restarts the random schedules from a seed; negative: threads and blocks in order.
L0K_EXPORT void l0k_schedule(int64_t seed) { l0k::harness::set_schedule(seed); }
