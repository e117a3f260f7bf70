// A block of CUDA threads, each a fiber, and the launch that runs a grid of them one after the other.
//
// The order of the blocks, and of the threads in every round, is random from a seed: code that relies on lock step, or
// on an order that CUDA does not promise, meets a counterexample.
#pragma once

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

#include "fiber.h"
#include "memory.h"

namespace cs {

constexpr int WarpSize = 32;

struct Thread {
  Stack stack;
  dim3 index;
  int lane = 0;
  int warp = 0;
  bool done = false;
};

struct Barrier {
  size_t waiting = 0;
  uint64_t generation = 0;
  char tags[2];  // of even and odd generations: a late leaver must not acquire what an early one released next
};

// A shuffle, vote or __syncwarp in progress among the lanes of one mask.
struct Collective {
  unsigned arrived = 0;
  unsigned leaving = 0;
  unsigned present = 0;  // when the last one arrived
  uint64_t generation = 0;
  uint64_t values[WarpSize];
  const void* kind = nullptr;
  char tags[2];
};

struct Block {
  dim3 index;
  dim3 size;
  dim3 grid;
  std::function<void()> kernel;
  size_t dynamic_bytes = 0;
  std::vector<Thread> threads;
  size_t alive = 0;
  Barrier barrier;
  std::map<std::pair<int, unsigned>, Collective> collectives;  // by warp and mask
  SharedMemory shared;
};

inline Block* block;
inline Thread* thread;
inline Stack scheduler;
inline std::mt19937 random_order;
inline uint64_t progress;  // of any thread: without it a round was in vain

inline void seed(unsigned value) { random_order.seed(value); }

[[noreturn]] inline void fail(const char* what) {
  fprintf(stderr, "CUDA shim: %s\n", what);
  abort();
}

CS_UNCHECKED inline void pause() { switch_stacks(thread->stack, scheduler); }

// Lets the other threads run until the condition holds.
template <class Condition>
CS_UNCHECKED void wait_until(const Condition& holds) {
  while (!holds()) pause();
  ++progress;
}

CS_UNCHECKED inline void run_thread() {
  arrive(thread->stack.checked, scheduler.checked);
  block->kernel();
  release(&progress);  // a kernel that ended comes before what the host does next
  thread->done = true;
  --block->alive;
  ++progress;
  switch_stacks(thread->stack, scheduler, true);
  abort();
}

inline size_t volume(const dim3& size) { return size_t{size.x} * size.y * size.z; }

inline dim3 position(size_t i, const dim3& size) {
  return dim3(i % size.x, i / size.x % size.y, i / (size_t{size.x} * size.y));
}

inline std::vector<size_t> shuffled(size_t count) {
  std::vector<size_t> order(count);
  std::iota(order.begin(), order.end(), size_t{0});
  std::shuffle(order.begin(), order.end(), random_order);
  return order;
}

inline void start_threads(Block& starting, const StackPool& stacks) {
  starting.alive = volume(starting.size);
  starting.threads.resize(starting.alive);
  for (size_t i = 0; i < starting.alive; ++i) {
    Thread& starter = starting.threads[i];
    starter.index = position(i, starting.size);
    starter.lane = static_cast<int>(i % WarpSize);
    starter.warp = static_cast<int>(i / WarpSize);
    stacks.start(i, starter.stack, run_thread);
    create_fiber(starter.stack.checked);
  }
}

// Which warps sit out, and for how many rounds. The others come to a stop sooner or later, and wake them.
class Pauses {
 public:
  explicit Pauses(size_t threads) : rounds_((threads + WarpSize - 1) / WarpSize) {}

  void next_round() {
    constexpr unsigned one_in = 8, longest = 32;
    for (unsigned& rounds : rounds_) {
      if (rounds > 0)
        --rounds;
      else if (random_order() % one_in == 0)
        rounds = random_order() % longest;
    }
  }
  bool has(int warp) const { return rounds_[warp] > 0; }
  void end() { std::fill(rounds_.begin(), rounds_.end(), 0u); }

 private:
  std::vector<unsigned> rounds_;
};

// Each thread that is neither done nor pausing runs until it waits or ends, once a round. Returns whether any got on.
CS_UNCHECKED inline bool run_round(Block& running, const Pauses& pauses) {
  const uint64_t before = progress;
  for (const size_t i : shuffled(running.threads.size())) {
    thread = &running.threads[i];
    if (!thread->done && !pauses.has(thread->warp)) switch_stacks(scheduler, thread->stack);
  }
  return progress != before;
}

inline void run_rounds(Block& running) {
  constexpr int patience = 3;
  Pauses pauses(running.threads.size());
  while (running.alive > 0) {
    pauses.next_round();
    if (run_round(running, pauses)) continue;
    pauses.end();
    int in_vain = 0;
    while (running.alive > 0 && !run_round(running, pauses))
      if (++in_vain > patience) fail("deadlock: a barrier or warp collective is not reached by all of its threads");
  }
}

// The stacks of blocks of so many threads, kept from launch to launch.
inline const StackPool& stacks_for(size_t threads) {
  static std::map<size_t, std::unique_ptr<StackPool>> pools;
  std::unique_ptr<StackPool>& pool = pools[threads];
  if (!pool) pool = std::make_unique<StackPool>(threads);
  return *pool;
}

inline void launch(dim3 grid, dim3 size, size_t dynamic_bytes, const std::function<void()>& kernel) {
  const Quiet quiet;
  constexpr size_t most_threads = 1024;
  if (volume(grid) == 0 || volume(size) == 0) throw std::invalid_argument("launch: a grid or block without threads");
  if (volume(size) > most_threads) throw std::invalid_argument("launch: more than 1024 threads in a block");
  const StackPool& stacks = stacks_for(volume(size));
  adopt_running_thread(scheduler.checked);
  for (const size_t i : shuffled(volume(grid))) {
    Block running;
    running.index = position(i, grid);
    running.size = size;
    running.grid = grid;
    running.kernel = kernel;
    running.dynamic_bytes = dynamic_bytes;
    block = &running;
    start_threads(running, stacks);
    run_rounds(running);
    for (Thread& ended : running.threads) destroy_fiber(ended.stack.checked);
  }
  acquire(&progress);
}

template <class T>
T* shared_array(const void* tag, size_t count) {
  const Quiet quiet;
  return static_cast<T*>(block->shared.array(tag, count * sizeof(T)));
}

template <class T>
T* dynamic_array() {
  const Quiet quiet;
  return static_cast<T*>(block->shared.array(&block->dynamic_bytes, block->dynamic_bytes));
}

}  // namespace cs
