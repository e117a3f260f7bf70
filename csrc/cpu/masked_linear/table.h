// The boundary between torch and the arithmetic of masked_linear.
#pragma once

#include "../types.h"

namespace compsparse {

// A panel holds some batch rows of a matrix [batch, features] as [features][panel_width(rows)], so that the batch is
// the vector axis, in the type of their sums. A panel of width 1 is the batch row itself, packed only to widen it.

// y = x W^T + b. Row r of W (CSR) holds entries ptr[r]..ptr[r+1]; entry p sits in column idx[p], int16 or int32.
template <typename T, typename Index>
struct MaskedProduct {
  const Sum<T>* values;  // [nnz], in the order of the entries
  const Sum<T>* bias;    // [out_features] or null
  T* y;                  // [batch, out_features]
  const int64_t* ptr;
  const Index* idx;
  int64_t batch;
  int64_t in_features;
  int64_t out_features;
};

// Some entries of a row: those in one block of columns.
struct Segment {
  int32_t row;
  int32_t count;
};

// The entries of `rows` again, block of columns by block of columns, and in each the rows by how many they have there.
template <typename S, typename Index>
struct ColumnBlocks {
  Range rows;
  int64_t columns;    // of a block
  int64_t count;      // of blocks
  S* values;          // [entries of rows] and a vector
  Index* idx;         // [entries of rows] and a vector
  Segment* segments;  // [count][rows], `row` counted from rows.begin
  // Used while these are made:
  int64_t* next;    // [rows]
  int32_t* counts;  // [count][rows]
  int32_t* places;  // [count][columns + 1]
};

// sums[p] = sum over n of a[n, r] b[n, idx[p]], for the entries p of each row r.
template <typename S, typename Index>
struct SampledSums {
  S* sums;  // [nnz]
  const int64_t* ptr;
  const Index* idx;
  int64_t batch;
  int64_t in_features;
  int64_t out_features;
};

template <typename T, typename Index>
struct IndexedKernels {
  // Outputs `rows` of the batch rows that the panel holds.
  void (*product)(const MaskedProduct<T, Index>&, const Sum<T>* panel, Range batch, Range rows);
  // Makes blocks of columns, and multiplies a panel by their rows. `sums` holds a panel of as many rows and a vector.
  void (*cut)(const MaskedProduct<T, Index>&, const ColumnBlocks<Sum<T>, Index>&);
  void (*product_blocked)(const MaskedProduct<T, Index>&, const ColumnBlocks<Sum<T>, Index>&, const Sum<T>* panel,
                          Range batch, Sum<T>* sums);
  // One panel's share of the sums: stored, or added to what is there.
  void (*sampled)(const SampledSums<Sum<T>, Index>&, const Sum<T>* a_panel, const Sum<T>* b_panel, int64_t batch_rows,
                  bool add, Range rows);
};

// A reference to one of the bases chooses the width of columns.
template <typename T>
struct MaskedKernels : IndexedKernels<T, int16_t>, IndexedKernels<T, int32_t> {
  int64_t product_rows;  // batch rows of a full panel of the product
  int64_t sampled_rows;  // and of the sampled product
  int64_t (*panel_width)(int64_t rows);
  // The given features of `rows` batch rows of x, which are `stride` apart.
  void (*pack)(const T* x, int64_t stride, int64_t rows, Range features, Sum<T>* panel);
  void (*round)(const Sum<T>* sums, Range entries, T* values);
};

// What kind dense needs beside a dense product, on elements of the width of Bits; `mask` has a byte, 0 or 1, for each.
template <typename Bits>
struct MaskingKernels {
  // Is any element but 0 and -0 where the mask has a 0?
  bool (*any_outside)(const Bits* values, const uint8_t* mask, Range);
  // Makes them 0.
  void (*zero_outside)(Bits* values, const uint8_t* mask, Range);
};

struct MaskedTable {
  MaskedKernels<float> f32;
  MaskedKernels<double> f64;
  MaskedKernels<BFloat16> bf16;
  MaskedKernels<Float16> f16;
  MaskingKernels<uint16_t> masking16;
  MaskingKernels<uint32_t> masking32;
  MaskingKernels<uint64_t> masking64;
};

extern const MaskedTable masked_scalar, masked_avx2, masked_avx512;

}  // namespace compsparse
