// The boundary between torch and the arithmetic of nm_linear.
#pragma once

#include "../types.h"

namespace compsparse {

// An N:M pattern: row r has groups * n slots, and of each is stored which column of its group of m it lies in,
// ascending in the group: nm_bits(m) bits each, the first in the lowest bits of a byte, rows at whole bytes. Slots past
// the last column, in a ragged group, hold nothing.
struct NMPattern {
  const uint8_t* positions;  // [out_features, row_bytes]
  int64_t out_features;
  int64_t in_features;
  int64_t n;
  int64_t m;
};

constexpr int64_t nm_bits(int64_t m) { return m <= 4 ? 2 : m <= 16 ? 4 : 8; }
constexpr int64_t nm_groups(const NMPattern& p) { return (p.in_features + p.m - 1) / p.m; }
constexpr int64_t nm_row_bytes(const NMPattern& p) { return (nm_groups(p) * p.n * nm_bits(p.m) + 7) / 8; }

// What outputs read of a chunk of at most 256 inputs. Output r has entries p = 0 .. counts[r], or count where counts is
// null: the value values[r * value_stride + p], and the input idx[r * idx_stride + p] of the chunk.
template <typename Value>
struct NMEntries {
  Value* values;
  const uint8_t* idx;
  const int32_t* counts;
  int64_t count;
  int64_t value_stride;
  int64_t idx_stride;
};

// A panel holds up to `rows` batch rows of a matrix [batch, features] as [features][width(batch rows)]. A panel of
// width 1 is the batch row itself, and is not packed.
template <typename T>
struct NMPanels {
  int64_t rows;
  int64_t (*width)(int64_t batch_rows);
  void (*pack)(const T* x, int64_t stride, int64_t batch_rows, Range features, T* panel);
};

template <typename T>
struct NMKernels {
  NMPanels<T> product_panels;
  NMPanels<T> sampled_panels;
  // Of some rows the slots in some groups, which begin at a whole byte, as entries idx[rows][slots]. The slots before
  // `counts[row]` lie in the weight; counts may be null where all do.
  void (*by_row)(const NMPattern&, Range rows, Range groups, uint8_t* idx, int32_t* counts);
  // Of the at most 256 columns of such groups the slots in at most 256 rows, as entries idx and ordered
  // [columns][rows].
  void (*by_column)(const NMPattern&, const T* values, Range groups, Range rows, uint8_t* idx, T* ordered,
                    int32_t* counts);
  // sums[r][width] of outputs r = 0 .. rows: added to what is there, or where `first` to the bias or 0.
  void (*accumulate)(const NMEntries<const T>&, const T* panel, int64_t width, int64_t rows, bool first, const T* bias,
                     T* sums);
  // sums[outputs rounded up to batch_lanes][width] to y [batch_rows][outputs], rows `stride` apart.
  void (*store)(const T* sums, int64_t width, int64_t batch_rows, int64_t outputs, int64_t stride, T* y);
  // y[columns of some groups] += x W, of one batch row; the groups begin at a whole byte.
  void (*scatter)(const NMPattern&, const T* values, const T* x, Range groups, T* y);
  // One panel's share of the values, which are the sums over the batch of a[output] b[input]: stored, or added to what
  // is there. Panels of a begin at the first output, panels of b at the chunk.
  void (*sampled)(const NMEntries<T>&, const T* a_panel, const T* b_panel, int64_t width, int64_t rows, bool add);
};

struct NMTable {
  NMKernels<float> f32;
  NMKernels<double> f64;
};

extern const NMTable nm_scalar, nm_avx2, nm_avx512;

}  // namespace compsparse
