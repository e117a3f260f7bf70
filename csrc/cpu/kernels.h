// The boundary between torch and arithmetic: plain structs and tables of function pointers.
//
// bind.cpp files unpack tensors into these structs; kernel files (scalar.cpp, avx2.cpp, avx512.cpp) fill the tables.
// Kernel files include this header and csrc/cpu/simd.h only: no torch, no STL, nothing with external linkage but the
// one table they define. All sizes are in elements, all index arithmetic is int64.
#pragma once

#include <stdint.h>

namespace compsparse {

enum class Activation : int32_t { none, relu, gelu, silu };

struct Range {
  int64_t begin;
  int64_t end;
};

// ---------------------------------------------------------------------------------------------- block_sparse_linear

// y = act(x W^T + b). Block row r of W holds entries ptr[r]..ptr[r+1]; entry p sits in block column idx[p] and its
// values are values[slot[p]], stored [block_out, block_in], or [block_in, block_out] where `transposed`.
// Row n of block column c of x begins at x + c * x_column_step + n * x_row_step: as it came, or packed by
// `pack_panels`.
template <typename T>
struct BlockProduct {
  const T* x;
  int64_t x_column_step;
  int64_t x_row_step;
  const T* values;  // [num_slots, block_out * block_in]
  const T* bias;    // [out_features] or null
  T* y;             // [batch, out_features]
  const int64_t* ptr;
  const int32_t* idx;
  const int32_t* slot;
  int64_t batch;
  int64_t in_features;
  int64_t out_features;
  int64_t block_out;
  int64_t block_in;
  bool transposed;
  Activation activation;
};

// entries[p] = a[:, rows of block row r]^T b[:, columns of block column idx[p]], one block per entry, [block_out,
// block_in].
template <typename T>
struct SampledBlocks {
  const T* a;         // [batch, out_features]
  const T* b_panels;  // [block columns, batch, panel_width(block_in)], packed by `pack_panels`
  T* entries;         // [num_entries, block_out * block_in]
  const int64_t* ptr;
  const int32_t* idx;
  int64_t batch;
  int64_t in_features;
  int64_t out_features;
  int64_t block_out;
  int64_t block_in;
};

template <typename T>
struct BlockSparseKernels {
  // Elements of scratch one call of `product` (`sampled`) over these block rows needs.
  int64_t (*product_scratch)(const BlockProduct<T>&, Range rows);
  void (*product)(const BlockProduct<T>&, Range rows, Range batch, T* scratch);
  // Columns of blocks of x [batch, in_features], one after another: [block columns, batch, width], zero-padded.
  void (*pack_panels)(const T* x, int64_t batch, int64_t in_features, int64_t block_in, int64_t width, Range rows,
                      T* panels);
  int64_t (*panel_width)(int64_t block_in);  // what `sampled` wants: block_in rounded up to whole vectors
  int64_t (*sampled_scratch)(const SampledBlocks<T>&);
  void (*sampled)(const SampledBlocks<T>&, Range rows, T* scratch);
};

struct BlockSparseTable {
  BlockSparseKernels<float> f32;
  BlockSparseKernels<double> f64;
};

extern const BlockSparseTable block_sparse_scalar, block_sparse_avx2, block_sparse_avx512;

// ------------------------------------------------------------------------------------------------------- dispatch

// Chosen once from cpuid, capped by the environment variable COMPSPARSE_CPU=scalar|avx2|avx512.
struct Kernels {
  const char* isa;
  const BlockSparseTable* block_sparse;
};

const Kernels& kernels();

template <typename T>
inline const T& by_dtype(const T* f32, const T* f64, bool is_double) {
  return is_double ? *f64 : *f32;
}

}  // namespace compsparse
