// What every boundary between torch and arithmetic is made of (csrc/cpu/<op>/table.h).
//
// bind.cpp files unpack tensors into plain structs; kernel files (scalar.cpp, avx2.cpp, avx512*.cpp) fill one table of
// function pointers. Kernel files include their op's table.h, csrc/cpu/simd.h and headers made of the same: no torch,
// no STL, nothing with external linkage but the one table they define. All sizes are in elements, all index arithmetic
// is int64.
#pragma once

#include <stdint.h>

namespace compsparse {

enum class Activation : int32_t { none, relu, gelu, silu };

struct Range {
  int64_t begin;
  int64_t end;
};

// Half precision, by its bits.
struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

// What numbers of a type are summed in.
template <typename T>
struct SumOf {
  using type = T;
};

template <>
struct SumOf<BFloat16> {
  using type = float;
};

template <>
struct SumOf<Float16> {
  using type = float;
};

template <typename T>
using Sum = typename SumOf<T>::type;

// Is a sum rounded when it is stored as T?
template <typename T>
constexpr bool narrows = sizeof(T) < sizeof(Sum<T>);

// Lanes of the widest vector of any table: panels whose vector axis is the batch have a multiple of it in rows.
constexpr int64_t batch_lanes = 16;

}  // namespace compsparse
