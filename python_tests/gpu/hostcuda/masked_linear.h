// masked_linear's CUDA launches on the CPU, as plain C functions for drivers in C++ and, through ctypes, Python.
#pragma once

#include <cstdint>

enum ElementType : int { Float32, Float64, Float16, BFloat16 };

extern "C" {

// Seed of the order in which the shim runs blocks and threads.
void hostcuda_seed(unsigned seed);

// y = x W^T + b. Entry p has the value values[perm[p]], or values[p] where perm is null. idx is int32 where `wide_idx`,
// else int16; perm is int64 where `wide_perm`, else int32.
void hostcuda_masked_linear(int element_type, const void* x, const void* values, const void* bias, void* y,
                            const int64_t* ptr, const void* idx, int wide_idx, const void* perm, int wide_perm,
                            int64_t batch, int64_t in_features, int64_t out_features, int64_t entries);

void hostcuda_sampled_matmul(int element_type, const void* a, const void* b, void* values, const int64_t* ptr,
                             const void* idx, int wide_idx, int64_t batch, int64_t in_features, int64_t out_features,
                             int64_t entries);
}
