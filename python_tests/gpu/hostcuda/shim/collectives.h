// Barriers, votes and shuffles: the functions by which CUDA threads wait for each other.
#pragma once

#include <cstring>

#include "block.h"

namespace cs {

// As on a GPU, threads that have ended are not waited for.
inline void barrier() {
  const Quiet quiet;
  Barrier& barrier = block->barrier;
  const uint64_t generation = barrier.generation;
  release(&barrier.tags[generation % 2]);
  ++barrier.waiting;
  wait_until([&] {
    if (barrier.generation == generation && barrier.waiting >= block->alive) {
      barrier.waiting = 0;
      ++barrier.generation;
    }
    return barrier.generation != generation;
  });
  acquire(&barrier.tags[generation % 2]);
}

inline unsigned bit(int lane) { return 1u << lane; }

// Lanes of the thread's warp that exist, have not ended and are in the mask.
inline unsigned expected_lanes(unsigned mask) {
  unsigned lanes = 0;
  const size_t first = size_t(thread->warp) * WarpSize;
  for (int lane = 0; lane < WarpSize && first + lane < block->threads.size(); ++lane)
    if (!block->threads[first + lane].done) lanes |= bit(lane);
  return lanes & mask;
}

// The values that the lanes of a mask brought.
struct Lanes {
  const uint64_t* values;
  unsigned present;

  uint64_t operator[](int lane) const {
    if (!(present & bit(lane))) fail("a shuffle reads a lane that does not take part in it");
    return values[lane];
  }
};

template <class Read>
constexpr char kind_of = 0;

// Waits until the lanes of the mask have brought their values, then returns read(Lanes, own lane).
template <class Read>
auto collective(unsigned mask, uint64_t value, const Read& read) {
  const Quiet quiet;
  const int lane = thread->lane;
  if (!(mask & bit(lane))) fail("a thread calls a warp collective without being in its mask");
  Collective& shared = block->collectives[{thread->warp, mask}];
  wait_until([&] { return shared.leaving == 0; });
  if (shared.arrived == 0) shared.kind = &kind_of<Read>;
  if (shared.kind != &kind_of<Read>) fail("the lanes of a mask call different warp collectives");
  const uint64_t generation = shared.generation;
  release(&shared.tags[generation % 2]);
  shared.values[lane] = value;
  shared.arrived |= bit(lane);
  wait_until([&] {
    if (shared.leaving == 0 && shared.arrived == (shared.arrived | expected_lanes(mask))) {
      shared.leaving = shared.arrived;
      shared.arrived = 0;
      shared.present = shared.leaving;
    }
    return (shared.leaving & bit(lane)) != 0;
  });
  const auto result = read(Lanes{shared.values, shared.present}, lane);
  shared.leaving &= ~bit(lane);
  if (shared.leaving == 0) ++shared.generation;
  acquire(&shared.tags[generation % 2]);
  return result;
}

template <class T>
uint64_t to_bits(const T& value) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  return bits;
}

// A shuffle that reads from source(own lane).
template <class T, class Source>
T shuffle(unsigned mask, const T& value, const Source& source) {
  const uint64_t bits =
      collective(mask, to_bits(value), [&](const Lanes& lanes, int lane) { return lanes[source(lane)]; });
  T result;
  memcpy(&result, &bits, sizeof result);
  return result;
}

}  // namespace cs

inline void __syncthreads() { cs::barrier(); }

inline void __syncwarp(unsigned mask = ~0u) {
  cs::collective(mask, 0, [](const cs::Lanes&, int) { return 0; });
}

// The lanes are cut into segments of `width`, a power of two; a source outside of the own segment is the own lane.

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = cs::WarpSize) {
  return cs::shuffle(mask, value, [=](int lane) { return (lane & ~(width - 1)) | (source & (width - 1)); });
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = cs::WarpSize) {
  return cs::shuffle(mask, value, [=](int lane) {
    const int in_segment = (lane & (width - 1)) + static_cast<int>(distance);
    return in_segment < width ? lane + static_cast<int>(distance) : lane;
  });
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = cs::WarpSize) {
  return cs::shuffle(mask, value, [=](int lane) {
    const int in_segment = (lane & (width - 1)) - static_cast<int>(distance);
    return in_segment >= 0 ? lane - static_cast<int>(distance) : lane;
  });
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = cs::WarpSize) {
  return cs::shuffle(mask, value, [=](int lane) {
    const int source = lane ^ lane_mask;
    return source <= (lane | (width - 1)) ? source : lane;
  });
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return cs::collective(mask, predicate != 0, [](const cs::Lanes& lanes, int) {
    unsigned votes = 0;
    for (int lane = 0; lane < cs::WarpSize; ++lane)
      if ((lanes.present & cs::bit(lane)) && lanes[lane]) votes |= cs::bit(lane);
    return votes;
  });
}

inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }
