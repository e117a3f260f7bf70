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
template <typename T>
struct BlockProduct {
  const T* x;       // [batch, in_features]
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

// entries[p] = a[:, rows of block row r]^T b[:, columns of block column idx[p]], one block per entry, [block_out, block_in].
template <typename T>
struct SampledBlocks {
  const T* a;         // [batch, out_features]
  const T* b_panels;  // [block columns, batch, b_panel_width]: b packed by `pack_panels`, zero-padded
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
  // Width of one packed row of a panel: block_in rounded up to whole vectors.
  int64_t (*panel_width)(int64_t block_in);
  void (*pack_panels)(const T* b, int64_t batch, int64_t in_features, int64_t block_in, Range columns, T* panels);
  int64_t (*sampled_scratch)(const SampledBlocks<T>&);
  void (*sampled)(const SampledBlocks<T>&, Range rows, T* scratch);
};

struct BlockSparseTable {
  BlockSparseKernels<float> f32;
  BlockSparseKernels<double> f64;
};

extern const BlockSparseTable block_sparse_scalar, block_sparse_avx2, block_sparse_avx512;

// --------------------------------------------------------------------------------------------------- masked_linear

// A panel holds up to `panel_rows` batch rows of a matrix [batch, features] as [features][panel_width(rows)], so that the
// batch is the vector axis. A panel of width 1 is the batch row itself, and is not packed.

// y = x W^T + b. Row r of W (CSR) holds entries ptr[r]..ptr[r+1]; entry p sits in column idx[p].
template <typename T>
struct MaskedProduct {
  const T* values;  // [nnz], in the order of the entries
  const T* bias;    // [out_features] or null
  T* y;             // [batch, out_features]
  const int64_t* ptr;
  const int32_t* idx;
  int64_t batch;
  int64_t in_features;
  int64_t out_features;
};

// values[p] = sum over n of a[n, r] b[n, idx[p]], for the entries p of each row r.
template <typename T>
struct SampledValues {
  T* values;  // [nnz]
  const int64_t* ptr;
  const int32_t* idx;
  int64_t batch;
  int64_t in_features;
  int64_t out_features;
};

template <typename T>
struct MaskedKernels {
  int64_t panel_rows;  // batch rows of a full panel
  int64_t (*panel_width)(int64_t rows);
  // The given features of `rows` batch rows of x, which are `stride` apart.
  void (*pack)(const T* x, int64_t stride, int64_t rows, Range features, T* panel);
  // Outputs `rows` of the batch rows that the panel holds.
  void (*product)(const MaskedProduct<T>&, const T* panel, Range batch, Range rows);
  // One panel's share of the sums: stored, or added to what is there.
  void (*sampled)(const SampledValues<T>&, const T* a_panel, const T* b_panel, int64_t batch_rows, bool add, Range rows);
};

struct MaskedTable {
  MaskedKernels<float> f32;
  MaskedKernels<double> f64;
};

extern const MaskedTable masked_scalar, masked_avx2, masked_avx512;

// ------------------------------------------------------------------------------------------------------- dispatch

// Chosen once from cpuid, capped by the environment variable COMPSPARSE_CPU=scalar|avx2|avx512.
struct Kernels {
  const char* isa;
  const BlockSparseTable* block_sparse;
  const MaskedTable* masked;
};

const Kernels& kernels();

template <typename T>
inline const T& by_dtype(const T* f32, const T* f64, bool is_double) {
  return is_double ? *f64 : *f32;
}

}  // namespace compsparse
