// Both products for blocks that do not fill whole vectors: the batch is the vector axis (panels.h) instead, so blocks
// of any width do. Not for half precision, which would have to be widened first.
//
// product:  a tile of B vectors of batch rows goes through all block rows while its inputs stay in cache. The outputs
//           of a block row, O at a time, stay in registers over all of its entries. Weights are read one by one, as
//           they are stored.
// sampled:  O outputs by K inputs of a block, each a vector of sums over every L-th batch row, stay in registers over a
//           panel of the batch; then each vector is summed.
#pragma once

#include "../activations.h"
#include "../panels.h"
#include "dots.h"
#include "table.h"

namespace {

using namespace compsparse;

constexpr int most_tile_vectors = 3;

// A power of two, since blocks usually are multiples of one.
template <class Target>
constexpr int outputs_together(int vectors) {
  int fit = 1;
  while (2 * fit * vectors <= Target::Accumulators) fit *= 2;
  return fit;
}

template <typename T, class Target>
bool uses_batch_lanes(const BlockProduct<T>& p) {
  return !narrows<T> && !uses_dots<T, Target>(p) && p.block_out % Target::MaxLanes != 0 &&
         2 * p.batch >= Target::MaxLanes;
}

// Block rows whose outputs leave the tile together: they fill whole vectors, or are so many that a rest costs little.
template <typename T, class Target>
int64_t rows_together(const BlockProduct<T>& p) {
  constexpr int64_t many = 16 * Target::MaxLanes;
  int64_t rows = 1;
  while (rows * p.block_out % Target::MaxLanes != 0 && rows * p.block_out < many) ++rows;
  return rows;
}

// The inputs of a tile, and the outputs of `rows_together` block rows.
template <typename T, class Target>
int64_t batch_lanes_scratch(const BlockProduct<T>& p) {
  return most_tile_vectors * Target::MaxLanes * (p.in_features + rows_together<T, Target>(p) * p.block_out);
}

// Outputs o .. o + O of a block row, to out [O][B L]. Inlined, its sums and pointers would compete with the caller's
// for registers: a sixth of the speed of blocks of four.
template <typename T, int L, int B, int O>
__attribute__((noinline)) void lane_outputs(const BlockProduct<T>& p, const T* inputs, int64_t row, int64_t o, T* out) {
  const int64_t w_out = p.transposed ? 1 : p.block_in, w_in = p.transposed ? p.block_out : 1;
  const int64_t block_in = p.block_in, size = p.block_out * block_in, last = p.ptr[row + 1];
  const T* values = p.values + o * w_out;
  Vec<T, L> acc[O][B] = {};
  if (p.bias) {
    const T* bias = p.bias + row * p.block_out + o;
    COMPSPARSE_UNROLL for (int j = 0; j < O; ++j) COMPSPARSE_UNROLL for (int b = 0; b < B; ++b) acc[j][b] += bias[j];
  }
  for (int64_t e = p.ptr[row]; e < last; ++e) {
    const int64_t column = p.idx[e] * block_in;
    multiply_panel<T, L, B, O>(values + p.slot[e] * size, w_out, w_in, inputs + column * B * L,
                               min64(block_in, p.in_features - column), acc);
  }
  const bool relu = p.activation == Activation::relu;
  COMPSPARSE_UNROLL for (int j = 0; j < O; ++j) COMPSPARSE_UNROLL for (int b = 0; b < B; ++b) {
    if (relu) acc[j][b] = activate<T, L>(acc[j][b], Activation::relu);
    store<T, L>(out + (j * B + b) * L, acc[j][b]);
  }
}

template <typename T, int L, int B, int O>
void lane_row(const BlockProduct<T>& p, const T* inputs, int64_t row, int64_t o, int64_t outputs, T* out) {
  for (; o + O <= outputs; o += O) lane_outputs<T, L, B, O>(p, inputs, row, o, out + o * B * L);
  if constexpr (O > 1) {
    if (o < outputs) lane_row<T, L, B, O / 2>(p, inputs, row, o, outputs, out);
  }
}

// Batch rows n .. n + valid, at most B L, through the given block rows.
template <typename T, int L, int B, class Target>
void lane_tile(const BlockProduct<T>& p, Range rows, int64_t n, int64_t valid, T* scratch) {
  T *inputs = scratch, *outputs = scratch + p.in_features * B * L;
  pack_panel<T, L>(p.x + n * p.in_features, p.in_features, valid, p.in_features, B * L, inputs);
  const int64_t together = rows_together<T, Target>(p);
  for (int64_t first = rows.begin; first < rows.end; first += together) {
    const int64_t end = min64(first + together, rows.end), begin = first * p.block_out;
    const int64_t count = min64(end * p.block_out, p.out_features) - begin;
    for (int64_t row = first; row < end; ++row) {
      const int64_t o = row * p.block_out;
      lane_row<T, L, B, outputs_together<Target>(B)>(p, inputs, row, 0, min64(p.block_out, p.out_features - o),
                                                     outputs + (o - begin) * B * L);
    }
    if (p.activation == Activation::gelu || p.activation == Activation::silu)
      activate_row<T, L>(outputs, count * B * L, p.activation);
    unpack_panel<T, L>(outputs, B * L, valid, count, p.out_features, p.y + n * p.out_features + begin);
  }
}

// As many tiles of B vectors as are needed or fit, then narrower ones.
template <typename T, int L, int B, class Target>
void lane_tiles(const BlockProduct<T>& p, Range rows, Range batch, T* scratch) {
  int64_t n = batch.begin;
  for (; n + (B - 1) * L < batch.end; n += B * L)
    lane_tile<T, L, B, Target>(p, rows, n, min64(B * L, batch.end - n), scratch);
  if constexpr (B > 1) {
    if (n < batch.end) lane_tiles<T, L, B - 1, Target>(p, rows, {n, batch.end}, scratch);
  }
}

template <typename T, class Target>
void product_by_batch_lanes(const BlockProduct<T>& p, Range rows, Range batch, T* scratch) {
  lane_tiles<T, Target::MaxLanes, most_tile_vectors, Target>(p, rows, batch, scratch);
}

// To sum a vector takes about as long as a few steps of the batch.
template <typename T, class Target>
bool sampled_uses_lanes(const SampledBlocks<T>& s) {
  return !narrows<T> && s.block_in % Target::MaxLanes != 0 && s.batch >= 2 * Target::MaxLanes;
}

template <typename T, class Target>
void pack_lanes(const T* x, int64_t stride, int64_t rows, Range features, Sum<T>* panel) {
  const int64_t width = round_up(rows, batch_lanes);
  if constexpr (!narrows<T>)
    pack_panel<T, Target::MaxLanes>(x + features.begin, stride, rows, features.end - features.begin, width,
                                    panel + features.begin * width);
}

// out[o][k] = sums of acc[o][k], or added to what is there.
template <typename T, int L, int O, int K>
COMPSPARSE_INLINE void store_sums(const Vec<T, L> (&acc)[O * K], bool add, int64_t stride, T* out) {
  constexpr int Count = O * K < L ? O * K : L, Lanes = L / Count;
  T sums[O * K * Lanes];  // each one in `Lanes` parts
  COMPSPARSE_UNROLL for (int i = 0; i < O * K; i += Count)
      store<T, L>(sums + i * Lanes, sum_each<T, L, Count>(acc + i));
  COMPSPARSE_UNROLL for (int i = 0; i < O * K; ++i) {
    T sum = sums[i * Lanes];
    for (int part = 1; part < Lanes; ++part) sum += sums[i * Lanes + part];
    T* to = out + i / K * stride + i % K;
    *to = add ? *to + sum : sum;
  }
}

// a [O][width], b [K][width] -> out [O][K]
template <typename T, int L, int O, int K>
void lane_sums(const T* a, const T* b, int64_t width, bool add, int64_t stride, T* out) {
  Vec<T, L> acc[O * K] = {};
  for (int64_t n = 0; n < width; n += L) {
    Vec<T, L> input[K];
    COMPSPARSE_UNROLL for (int k = 0; k < K; ++k) input[k] = load<T, L>(b + k * width + n);
    COMPSPARSE_UNROLL for (int o = 0; o < O; ++o) {
      const Vec<T, L> gradient = load<T, L>(a + o * width + n);
      COMPSPARSE_UNROLL for (int k = 0; k < K; ++k) acc[o * K + k] += input[k] * gradient;
    }
  }
  store_sums<T, L, O, K>(acc, add, stride, out);
}

template <typename T, int L, int O, int K>
void lane_sums_of_rows(const T* a, const T* b, int64_t width, bool add, int64_t k, int64_t columns, int64_t stride,
                       T* out) {
  for (; k + K <= columns; k += K) lane_sums<T, L, O, K>(a, b + k * width, width, add, stride, out + k);
  if constexpr (K > 1) {
    if (k < columns) lane_sums_of_rows<T, L, O, K / 2>(a, b, width, add, k, columns, stride, out);
  }
}

template <typename T, int L, int O>
void lane_sums_of_block(const T* a, const T* b, int64_t width, bool add, int64_t o, int64_t rows, int64_t columns,
                        int64_t stride, T* out) {
  for (; o + O <= rows; o += O)
    lane_sums_of_rows<T, L, O, 4>(a + o * width, b, width, add, 0, columns, stride, out + o * stride);
  if constexpr (O > 1) {
    if (o < rows) lane_sums_of_block<T, L, O / 2>(a, b, width, add, o, rows, columns, stride, out);
  }
}

template <typename T, class Target>
void sampled_by_lanes(const SampledBlocks<T>& s, const Sum<T>* a_panel, const Sum<T>* b_panel, int64_t batch_rows,
                      bool add, Range block_rows) {
  if constexpr (narrows<T>) return;
  constexpr int O = outputs_together<Target>(4);
  const int64_t width = round_up(batch_rows, batch_lanes), size = s.block_out * s.block_in;
  for (int64_t row = block_rows.begin; row < block_rows.end; ++row)
    for (int64_t e = s.ptr[row]; e < s.ptr[row + 1]; ++e) {
      Sum<T>* block = s.sums ? s.sums + e * size : reinterpret_cast<Sum<T>*>(s.blocks) + s.slot[e] * size;
      const int64_t o = row * s.block_out, k = s.idx[e] * s.block_in;
      const int64_t rows = min64(s.block_out, s.out_features - o), columns = min64(s.block_in, s.in_features - k);
      if (!add && rows * columns < size)  // what reaches past the edge of the weight
        for (int64_t i = 0; i < size; ++i) block[i] = 0;
      lane_sums_of_block<Sum<T>, Target::MaxLanes, O>(a_panel + o * width, b_panel + k * width, width, add, 0, rows,
                                                      columns, s.block_in, block);
    }
}

}  // namespace
