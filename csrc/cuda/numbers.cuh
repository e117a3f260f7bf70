// Element types of the CUDA kernels: what they are summed in, and 16-byte vectors of them. Sizes of grids.
#pragma once

#include <cstdint>
#include <stdexcept>

#include "portable.h"

namespace compsparse::cuda {

constexpr int WarpSize = 32;
constexpr unsigned WholeWarp = 0xffffffffu;

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A grid of one dimension, the only one that CUDA lets grow to 2^31 blocks.
inline dim3 grid_of(int64_t blocks) {
  if (blocks > INT32_MAX) throw std::length_error("matrices too large for one launch: more than 2^31 blocks");
  return dim3(static_cast<unsigned>(blocks));
}

// Half precision and float32 are summed in float32, float64 in itself.
template <typename T>
struct SumOf {
  using Type = float;
};
template <>
struct SumOf<double> {
  using Type = double;
};
template <typename T>
using Sum = typename SumOf<T>::Type;

// PyTorch's builds switch off the implicit conversions of __half, hence the intrinsics.
__device__ inline float widen(float value) { return value; }
__device__ inline double widen(double value) { return value; }
__device__ inline float widen(__half value) { return __half2float(value); }
__device__ inline float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
__device__ inline T narrow(Sum<T> value) {
  return value;
}
template <>
__device__ inline __half narrow<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

// V elements that one instruction loads or stores; their address is a multiple of their size.
template <typename T, int V>
struct alignas(V * sizeof(T)) Vector {
  T at[V];
};

// Elements in the widest load of a thread, 16 bytes.
template <typename T>
constexpr int WidestVector = 16 / sizeof(T);

template <int V, typename T>
__device__ inline Vector<T, V> load(const T* from) {
  return *reinterpret_cast<const Vector<T, V>*>(from);
}

template <int V, typename T>
__device__ inline void store(T* to, const Sum<T> (&values)[V]) {
  Vector<T, V> narrowed;
#pragma unroll
  for (int i = 0; i < V; ++i) narrowed.at[i] = narrow<T>(values[i]);
  *reinterpret_cast<Vector<T, V>*>(to) = narrowed;
}

}  // namespace compsparse::cuda
