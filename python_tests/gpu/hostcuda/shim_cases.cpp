// Small kernels for the shim itself.  shim_cases <case> [seed]
//
// "correct" computes what CUDA defines and ends with 0. Every other case is a kernel with one fault, which the
// sanitizers, the shim or the result must show.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "../../../csrc/cuda/portable.h"
#include "buffer.h"

namespace {

constexpr unsigned WholeWarp = 0xffffffffu;
constexpr int Threads = 96;

enum class Fault {
  none,
  missing_barrier,
  beyond_shared,
  beyond_global,
  misaligned,
  overflow,
  unwritten_shared,
  barrier_in_a_branch,
  unreached_vote,
  lane_outside_its_mask,
  shuffle_from_an_absent_lane,
  race_between_blocks,
};

struct Case {
  const char* name;
  Fault fault;
};

const Case cases[] = {
    {"correct", Fault::none},
    {"missing_barrier", Fault::missing_barrier},
    {"beyond_shared", Fault::beyond_shared},
    {"beyond_global", Fault::beyond_global},
    {"misaligned", Fault::misaligned},
    {"overflow", Fault::overflow},
    {"unwritten_shared", Fault::unwritten_shared},
    {"barrier_in_a_branch", Fault::barrier_in_a_branch},
    {"unreached_vote", Fault::unreached_vote},
    {"lane_outside_its_mask", Fault::lane_outside_its_mask},
    {"shuffle_from_an_absent_lane", Fault::shuffle_from_an_absent_lane},
    {"race_between_blocks", Fault::race_between_blocks},
};

int failures = 0;

void expect(bool holds, const char* what) {
  if (holds) return;
  ++failures;
  fprintf(stderr, "wrong result: %s\n", what);
}

// to[t] = the sum of the block's numbers up to t, by doubling distances.
__global__ void prefix_sum(const float* from, float* to, Fault fault) {
  CS_SHARED(float, sums, Threads);
  const int t = threadIdx.x, i = blockIdx.x * Threads + t;
  if (fault != Fault::unwritten_shared || t > 0) sums[t] = from[i];
  if (fault == Fault::beyond_shared) sums[t + 1] = from[i];
  __syncthreads();
  for (int distance = 1; distance < Threads; distance *= 2) {
    const float before = t >= distance ? sums[t - distance] : 0;
    if (fault != Fault::missing_barrier) __syncthreads();
    sums[t] += before;
    if (fault != Fault::barrier_in_a_branch || t < Threads / 2) __syncthreads();
  }
  to[i + (fault == Fault::beyond_global ? 1 : 0)] = sums[t];
}

void check_prefix_sum(Fault fault) {
  constexpr int blocks = 3;
  const Buffer<float> from(blocks * Threads), to(blocks * Threads);
  for (int i = 0; i < from.size(); ++i) from[i] = static_cast<float>(i % 7);
  CS_LAUNCH(prefix_sum, dim3(blocks), dim3(Threads), 0, 0, from.data(), to.data(), fault);
  float sum = 0;
  for (int i = 0; i < to.size(); ++i) {
    sum = i % Threads == 0 ? from[i] : sum + from[i];
    if (to[i] != sum) return expect(false, "prefix_sum");
  }
}

struct alignas(16) FourFloats {
  float at[4];
};

// Each thread moves 16 bytes, from `offset` floats on.
__global__ void copy_vectors(const float* from, float* to, int offset) {
  const float* const source = from + offset + 4 * threadIdx.x;
  reinterpret_cast<FourFloats*>(to)[threadIdx.x] = *reinterpret_cast<const FourFloats*>(source);
}

void check_copy(Fault fault) {
  const int offset = fault == Fault::misaligned ? 1 : 4;
  const Buffer<float> from(4 * Threads + 8), to(4 * Threads);
  for (int i = 0; i < from.size(); ++i) from[i] = static_cast<float>(i);
  CS_LAUNCH(copy_vectors, dim3(1), dim3(Threads), 0, 0, from.data(), to.data(), offset);
  expect(memcmp(to.data(), from.data() + offset, to.size() * sizeof(float)) == 0, "copy_vectors");
}

// offsets[r] = row * pitch, in 32 bits.
__global__ void row_offsets(int pitch, int* offsets) { offsets[threadIdx.x] = static_cast<int>(threadIdx.x) * pitch; }

void check_offsets(Fault fault) {
  const int pitch = fault == Fault::overflow ? 1 << 26 : 1 << 20;
  const Buffer<int> offsets(Threads);
  CS_LAUNCH(row_offsets, dim3(1), dim3(Threads), 0, 0, pitch, offsets.data());
  for (int64_t row = 0; row < Threads; ++row) expect(offsets[row] == row * pitch, "row_offsets");
}

// A block of a whole warp and a half one, of which `ended` lanes leave before the vote.
__global__ void votes(unsigned* result, int ended, Fault fault) {
  const int lane = threadIdx.x % 32;
  if (lane < ended) {
    if (fault == Fault::unreached_vote) __syncthreads();
    return;
  }
  const unsigned mask = fault == Fault::lane_outside_its_mask ? WholeWarp - 0x10 : WholeWarp;
  const unsigned odd = __ballot_sync(mask, lane % 2);
  const bool any = __any_sync(mask, lane == 13), all = __all_sync(mask, lane < 16);
  result[threadIdx.x] = odd + (any ? 1 : 0) + (all ? 4 : 0);
}

void check_votes(Fault fault) {
  constexpr int threads = 48, ended = 3;
  const Buffer<unsigned> result(threads);
  CS_LAUNCH(votes, dim3(1), dim3(threads), 0, 0, result.data(), ended, fault);
  for (int t = 0; t < threads; ++t) {
    if (t % 32 < ended) continue;
    const bool whole = t < 32;
    const unsigned odd = 0xaaaaaaa8u & (whole ? WholeWarp : 0xffffu);
    expect(result[t] == odd + 1 + (whole ? 0 : 4), "votes");
  }
}

// Four kinds of shuffle of the lane's number, in segments of eight lanes.
__global__ void shuffles(double* result, Fault fault) {
  const int lane = threadIdx.x % 32;
  if (fault == Fault::shuffle_from_an_absent_lane && lane == 30) return;
  const double mine = lane + 0.25;
  const double kinds[] = {__shfl_sync(WholeWarp, mine, 11, 8), __shfl_up_sync(WholeWarp, mine, 3u, 8),
                          __shfl_down_sync(WholeWarp, mine, 3u, 8), __shfl_xor_sync(WholeWarp, mine, 5)};
  for (int kind = 0; kind < 4; ++kind) result[threadIdx.x * 4 + kind] = kinds[kind];
}

void check_shuffles(Fault fault) {
  const Buffer<double> result(4 * Threads);
  CS_LAUNCH(shuffles, dim3(1), dim3(Threads), 0, 0, result.data(), fault);
  for (int t = 0; t < Threads; ++t) {
    const int lane = t % 32, segment = lane / 8 * 8;
    const int sources[] = {segment + 3, lane % 8 < 3 ? lane : lane - 3, lane % 8 > 4 ? lane : lane + 3, lane ^ 5};
    for (int kind = 0; kind < 4; ++kind) expect(result[t * 4 + kind] == sources[kind] + 0.25, "shuffles");
  }
}

// A count, a sum of floats, extremes and a lock-free maximum, over all threads of all blocks.
__global__ void atomics(int* count, float* sum, int* extremes, int* by_exchange) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  atomicAdd(count, 1);
  atomicAdd(sum, 0.5f);
  atomicMin(&extremes[0], i);
  atomicMax(&extremes[1], i);
  int seen = 0;
  for (int before = -1; before != seen && seen < i;) {
    before = seen;
    seen = atomicCAS(by_exchange, before, i);
  }
}

void check_atomics() {
  constexpr int blocks = 2, threads = blocks * Threads;
  int count = 0, extremes[] = {1000, -1000}, by_exchange = 0;
  float sum = 0;
  CS_LAUNCH(atomics, dim3(blocks), dim3(Threads), 0, 0, &count, &sum, extremes, &by_exchange);
  expect(count == threads && sum == threads * 0.5f, "atomicAdd");
  expect(extremes[0] == 0 && extremes[1] == threads - 1, "atomicMin, atomicMax");
  expect(by_exchange == threads - 1, "atomicCAS");
}

// Places in blocks and grids of three dimensions; dynamic shared memory reverses a block's numbers.
__global__ void places(unsigned* result) {
  CS_DYN_SHARED(unsigned, numbers);
  const unsigned t = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const unsigned b = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
  numbers[t] = b * threads + t;
  __syncthreads();
  result[b * threads + t] = numbers[threads - 1 - t];
}

void check_places() {
  const dim3 grid(2, 3, 2), size(5, 3, 2);
  constexpr unsigned blocks = 12, threads = 30;
  const Buffer<unsigned> result(blocks * threads);
  CS_LAUNCH(places, grid, size, threads * sizeof(unsigned), 0, result.data());
  for (unsigned i = 0; i < blocks * threads; ++i)
    expect(result[i] == i / threads * threads + threads - 1 - i % threads, "places");
}

// Each block writes its own element, or all write the same.
__global__ void write_own(int* result, Fault fault) {
  if (threadIdx.x == 0) result[fault == Fault::race_between_blocks ? 0 : blockIdx.x] = static_cast<int>(blockIdx.x);
}

void check_blocks(Fault fault) {
  const Buffer<int> result(8);
  CS_LAUNCH(write_own, dim3(8), dim3(32), 0, 0, result.data(), fault);
  for (int b = 0; b < result.size(); ++b) expect(result[b] == b, "write_own");
}

}  // namespace

int main(int count, char** arguments) {
  const std::string wanted = count > 1 ? arguments[1] : "";
  if (count > 2) cs::seed(static_cast<unsigned>(std::stoul(arguments[2])));
  for (const Case& each : cases) {
    if (wanted != each.name) continue;
    check_prefix_sum(each.fault);
    check_copy(each.fault);
    check_offsets(each.fault);
    check_votes(each.fault);
    check_shuffles(each.fault);
    check_blocks(each.fault);
    check_atomics();
    check_places();
    if (failures == 0) puts("as CUDA defines it");
    return failures ? 1 : 0;
  }
  fprintf(stderr, "case: expected one of those in shim_cases.cpp, got \"%s\"\n", wanted.c_str());
  return 2;
}
