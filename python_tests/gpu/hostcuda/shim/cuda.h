// CUDA for a host compiler: csrc/cuda/portable.h includes this where nvcc does not compile. Kernels keep CUDA's names.
//
// It proves what a program means, not what a GPU does: one thread runs at a time, memory is sequentially consistent,
// and grids do not run beside each other.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "atomics.h"
#include "block.h"
#include "collectives.h"

// CUDA's headers define some of these for host compilers, with attributes.
#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#undef __launch_bounds__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

#define threadIdx (cs::thread->index)
#define blockIdx (cs::block->index)
#define blockDim (cs::block->size)
#define gridDim (cs::block->grid)

#define CS_SHARED(T, name, count) \
  static char cs_tag_##name;      \
  T* const name = cs::shared_array<T>(&cs_tag_##name, count)
#define CS_DYN_SHARED(T, name) T* const name = cs::dynamic_array<T>()
#define CS_LAUNCH(kernel, grid, block, bytes, stream, ...) \
  (static_cast<void>(stream), cs::launch(grid, block, bytes, [&] { kernel(__VA_ARGS__); }))

using std::max;
using std::min;

template <class T>
T __ldg(const T* address) {
  return *address;
}

inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __clz(int value) { return value == 0 ? 32 : __builtin_clz(static_cast<unsigned>(value)); }
