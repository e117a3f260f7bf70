// The boundary between torch and the arithmetic of block_sparse_linear.
#pragma once

#include "../types.h"

namespace compsparse {

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

// For each entry p of block row r: blocks[slot[p]] = a[:, rows of r]^T b[:, columns of idx[p]]; or, where `sums` is not
// null, sums[p] is that, not yet rounded. Where `add`, it is added to what is there; only to what is not rounded.
template <typename T>
struct SampledBlocks {
  const T* a;              // [batch, out_features]
  const Sum<T>* b_panels;  // [block columns, panel_size(batch, block_in)], packed by `pack_panels`
  T* blocks;               // [num_entries, block_out * block_in]
  Sum<T>* sums;            // the same, or null
  const int32_t* slot;
  const int64_t* ptr;
  const int32_t* idx;
  int64_t batch;
  int64_t in_features;
  int64_t out_features;
  int64_t block_out;
  int64_t block_in;
  bool add;
};

// Packed operands are elements of the size of a sum: one input, widened, or two of half that size.
// out = act(z), or grad * act'(z) where there is a gradient; gelu and silu.
template <typename T>
struct ActivatedValues {
  const T* z;
  const T* grad;  // or null
  T* out;
  Activation activation;
};

template <typename T>
struct BlockSparseKernels {
  // Weights as the product reads them: `packed_entry_size` elements an entry, or 0 where it reads them as stored.
  int64_t (*packed_entry_size)(const BlockProduct<T>&);
  void (*pack_weights)(const BlockProduct<T>&, Range entries, Sum<T>* packed);
  // One call computes y[batch, rows]; its scratch has `product_scratch` elements.
  int64_t (*product_scratch)(const BlockProduct<T>&);
  void (*product)(const BlockProduct<T>&, const Sum<T>* packed, Range rows, Range batch, Sum<T>* scratch);
  // Columns of blocks of b, one after another, each of `panel_size` elements, zero-padded.
  int64_t (*panel_size)(int64_t batch, int64_t block_in);
  void (*pack_panels)(const T* b, int64_t batch, int64_t in_features, int64_t block_in, Range batch_rows,
                      Sum<T>* panels);
  int64_t (*sampled_scratch)(const SampledBlocks<T>&);
  void (*sampled)(const SampledBlocks<T>&, Range rows, Sum<T>* scratch);
  // Where `sampled_uses_lanes`, not `sampled` but this: a panel holds the given features of `batch_rows` rows of a or b
  // as [features][batch_rows rounded up to batch_lanes], and its share of the sums is stored, or added to what is
  // there.
  bool (*sampled_uses_lanes)(const SampledBlocks<T>&);
  void (*pack_lanes)(const T* x, int64_t stride, int64_t batch_rows, Range features, Sum<T>* panel);
  void (*sampled_by_lanes)(const SampledBlocks<T>&, const Sum<T>* a_panel, const Sum<T>* b_panel, int64_t batch_rows,
                           bool add, Range rows);
  void (*activated)(const ActivatedValues<T>&, Range elements);
};

struct BlockSparseTable {
  BlockSparseKernels<float> f32;
  BlockSparseKernels<double> f64;
  BlockSparseKernels<BFloat16> bf16;
  BlockSparseKernels<Float16> f16;
};

extern const BlockSparseTable block_sparse_scalar, block_sparse_avx2, block_sparse_avx512;
extern const BlockSparseKernels<BFloat16> block_sparse_avx512_bf16;

}  // namespace compsparse
