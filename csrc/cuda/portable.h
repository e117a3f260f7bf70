// CUDA C++ that also builds with a host compiler: kernels use CUDA's own names, and these three macros.
//
//   CS_SHARED(T, name, count)                           T name[count] in shared memory
//   CS_DYN_SHARED(T, name)                              the shared memory of the launch, as T*
//   CS_LAUNCH(kernel, grid, block, bytes, stream, ...)  kernel<<<grid, block, bytes, stream>>>(...)
//
// Under nvcc they are plain CUDA. Any other compiler takes the rest from "shim/cuda.h", which runs each CUDA thread as
// a fiber: python_tests/gpu/hostcuda, where the tests build the kernels under sanitizers.
#pragma once

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define CS_SHARED(T, name, count) __shared__ T name[count]
#define CS_DYN_SHARED(T, name)                                 \
  extern __shared__ __align__(16) unsigned char cs_dynamic_[]; \
  T* const name = reinterpret_cast<T*>(cs_dynamic_)
#define CS_LAUNCH(kernel, grid, block, bytes, stream, ...) kernel<<<grid, block, bytes, stream>>>(__VA_ARGS__)

#else

#include "shim/cuda.h"

#endif
