// Block-sparse products, written once for every vector width.
//
// product:  y tile [M batch rows, R vectors of outputs] stays in registers over a whole block row of W; each step
//           broadcasts one input and multiplies it with R vectors of weights. Weights are repacked to [k, outputs] once
//           per block row when their stored order or width needs it: that costs 1/batch of the arithmetic.
//           Batches of a few rows are another matter: dots.h.
// sampled:  a block [M outputs, R vectors of inputs] stays in registers over the batch.
//           Blocks that do not fill whole vectors are another matter, for both products: batch_lanes.h.
//
// One element is always summed by one thread in the same order (entries, then k; or batch rows), whatever the tile it
// falls in, so results do not depend on the number of threads.
#pragma once

#include "../activations.h"
#include "../kernels.h"
#include "../shuffle.h"
#include "batch_lanes.h"
#include "dots.h"

namespace {

using namespace compsparse;

// Registers one instruction set has: lanes of T in its widest vector, accumulators a tile may hold, vectors side by
// side.
template <typename T, int MaxLanes_, int Accumulators_, int MaxVectors_>
struct Target {
  static constexpr int MaxLanes = MaxLanes_;
  static constexpr int Accumulators = Accumulators_;
  static constexpr int MaxVectors = MaxVectors_;
  static constexpr int MinLanes = 16 / sizeof(T);
};

// Batch rows of a tile of the product: at least 12 sums in flight keep the multipliers busy. As they come, rows of x
// are often a multiple of 4 KB apart and compete for one set of 8 lines in the first-level cache: six rows fit beside
// W.
constexpr int product_rows_per_tile(int vectors) { return vectors == 1 ? 12 : 6; }

// Rows of a block in a sampled tile: a multiple of three where there is room, because x86 addresses base, base + s,
// base + 2 s.
template <int Accumulators, int Vectors>
constexpr int sampled_rows_per_tile() {
  return Accumulators / Vectors >= 3 ? Accumulators / Vectors / 3 * 3 : Accumulators / Vectors;
}

// Rows of the tile for what a tile of M rows leaves over: 12, 6, 4, 2, 1. A single row waits for its own sums.
constexpr int fewer_rows(int M) { return M == 6 ? 4 : M / 2; }

// acc[m][r] += x[m * x_stride + k] * w[k * w_stride + r * L ...], k = 0 .. depth
template <typename T, int L, int R, int M>
COMPSPARSE_INLINE void multiply_accumulate(const T* x, int64_t x_stride, const T* w, int64_t w_stride, int64_t depth,
                                           Vec<T, L> (&acc)[M][R]) {
  constexpr int Groups = (M + 2) / 3;
  const T* group[Groups];
  COMPSPARSE_UNROLL for (int g = 0; g < Groups; ++g) group[g] = x + 3 * g * x_stride;
  for (int64_t k = 0; k < depth; ++k) {
    Vec<T, L> weight[R];
    COMPSPARSE_UNROLL for (int r = 0; r < R; ++r) weight[r] = load<T, L>(w + r * L);
    COMPSPARSE_UNROLL for (int m = 0; m < M; ++m) {
      const T input = group[m / 3][(m % 3) * x_stride + k];
      COMPSPARSE_UNROLL for (int r = 0; r < R; ++r) acc[m][r] += weight[r] * input;
    }
    w += w_stride;
  }
}

// The narrowest vector that holds `width` values, or the widest there is.
template <typename T, int L, class Target>
int lanes_for(int64_t width) {
  if constexpr (L > Target::MinLanes) {
    if (width <= L / 2) return lanes_for<T, L / 2, Target>(width);
  }
  return L;
}

// Whole vectors first, then narrower ones.
template <typename T, int L>
COMPSPARSE_INLINE void copy(const T* from, int64_t count, T* to) {
  int64_t i = 0;
  for (; i + L <= count; i += L) store<T, L>(to + i, load<T, L>(from + i));
  if constexpr (L > 1) {
    if (i < count) copy<T, L / 2>(from + i, count - i, to + i);
  }
}

// Twelve rows at a time: each is read as a stream, and each panel gets one run of cache lines.
template <typename T, int L>
void pack_panels(const T* x, int64_t batch, int64_t in_features, int64_t block_in, int64_t width, Range rows,
                 T* panels) {
  constexpr int64_t together = 12;
  const int64_t columns = ceil_div(in_features, block_in);
  for (int64_t begin = rows.begin; begin < rows.end; begin += together) {
    const int64_t end = min64(begin + together, rows.end);
    for (int64_t c = 0; c < columns; ++c) {
      const int64_t valid = min64(block_in, in_features - c * block_in);
      for (int64_t n = begin; n < end; ++n) {
        const T* from = x + n * in_features + c * block_in;
        T* to = panels + (c * batch + n) * width;
        copy<T, L>(from, valid, to);
        for (int64_t i = valid; i < width; ++i) to[i] = 0;
      }
    }
  }
}

// One block row of W against one chunk of the batch, as the tiles read them.
template <typename T>
struct RowTask {
  const int32_t* idx;  // block columns of the row's entries
  int64_t entries;
  const T* x;  // row n of block column c begins at x + c * x_column_step + n * x_row_step
  int64_t x_column_step, x_row_step;
  const T* weights;     // [k, outputs] of entry e begins at weights + (slot ? slot[e] : e) * weights_size
  const int32_t* slot;  // null where the entries lie one after another
  int64_t weights_size, weights_stride;
  const T* bias;  // null where there is none
  T* y;           // [batch, outputs] of this block row, y_stride apart
  int64_t y_stride;
  int64_t batch, outputs, block_in, in_features;
  bool relu;
};

template <typename T, int L, int R, int M>
void product_tile(const RowTask<T>& t, int64_t n, int64_t panel) {
  const int64_t x_step = t.x_row_step, y_step = t.y_stride, outputs = t.outputs - panel;
  const bool whole = outputs >= R * L;
  const T* x = t.x + n * x_step;
  T* y = t.y + n * y_step + panel;
  Vec<T, L> acc[M][R];
  COMPSPARSE_UNROLL for (int r = 0; r < R; ++r) {
    Vec<T, L> bias = {};
    if (t.bias) {
      const T* from = t.bias + panel + r * L;
      bias = whole ? load<T, L>(from) : load_partial<T, L>(from, outputs - r * L);
    }
    COMPSPARSE_UNROLL for (int m = 0; m < M; ++m) acc[m][r] = bias;
  }
  for (int64_t e = 0; e < t.entries; ++e) {
    const T* weights = t.weights + (t.slot ? t.slot[e] : e) * t.weights_size + panel;
    const int64_t depth = min64(t.block_in, t.in_features - t.idx[e] * t.block_in);
    multiply_accumulate<T, L, R, M>(x + t.idx[e] * t.x_column_step, x_step, weights, t.weights_stride, depth, acc);
  }
  if (t.relu) {
    COMPSPARSE_UNROLL for (int m = 0; m < M; ++m) COMPSPARSE_UNROLL for (int r = 0; r < R; ++r) acc[m][r] =
        activate<T, L>(acc[m][r], Activation::relu);
  }
  if (whole) {
    COMPSPARSE_UNROLL for (int m = 0; m < M; ++m) COMPSPARSE_UNROLL for (int r = 0; r < R; ++r)
        store<T, L>(y + m * y_step + r * L, acc[m][r]);
    return;
  }
  COMPSPARSE_UNROLL for (int m = 0; m < M; ++m) COMPSPARSE_UNROLL for (int r = 0; r < R; ++r)
      store_partial<T, L>(y + m * y_step + r * L, acc[m][r], outputs - r * L);
}

// From batch row n on: as many tiles of M rows as fit, then narrower ones.
template <typename T, int L, int R, int M>
void product_rows(const RowTask<T>& t, int64_t n, int64_t panel) {
  for (; n + M <= t.batch; n += M) product_tile<T, L, R, M>(t, n, panel);
  if constexpr (M > 1) {
    if (n < t.batch) product_rows<T, L, R, fewer_rows(M)>(t, n, panel);
  }
}

// Panels of R vectors across the block row, then one narrower panel for what is left.
template <typename T, int L, int R, class Target>
void product_panels(const RowTask<T>& t, int64_t panel) {
  for (; panel + (R - 1) * L < t.outputs; panel += R * L) product_rows<T, L, R, product_rows_per_tile(R)>(t, 0, panel);
  if constexpr (R > 1) {
    if (panel < t.outputs) product_panels<T, L, R - 1, Target>(t, panel);
  }
}

// gelu and silu of one block row, while it is still in cache: in the tile they would need its registers.
template <typename T, int L>
__attribute__((noinline)) void epilogue(const RowTask<T>& t, Activation activation) {
  for (int64_t n = 0; n < t.batch; ++n) activate_row<T, L>(t.y + n * t.y_stride, t.outputs, activation);
}

// Should the inputs be copied into panels, where the rows of a tile lie side by side? Only where a tile has more rows
// than fit in a set of the first-level cache.
template <typename T, class Target>
bool packs_inputs(const BlockProduct<T>& p) {
  constexpr int64_t least_batch = 8;
  return p.batch >= least_batch && p.in_features > p.block_in && p.block_out <= Target::MaxLanes;
}

// Batch rows that go through all of W before the next ones do. One tile: its inputs and outputs stay in the first
// caches and are read and written as streams, while W streams past. More where W comes from memory each time.
template <typename T, class Target>
int64_t chunk_rows(const BlockProduct<T>& p) {
  constexpr int64_t last_cache = (int64_t(1) << 24) / sizeof(T), large = 24;
  const int64_t entries = p.ptr[ceil_div(p.out_features, p.block_out)];
  if (entries * p.block_out * p.block_in > last_cache) return large;
  return product_rows_per_tile(p.block_out <= Target::MaxLanes ? 1 : 2);
}

// Asks for one of `parts` shares of the next chunk's inputs, which lie too far apart for the processor to foresee.
template <typename T>
void prefetch_share(const T* next, int64_t size, int64_t part, int64_t parts) {
  constexpr int64_t line = 64 / sizeof(T);
  for (int64_t i = part * size / parts / line * line; i < (part + 1) * size / parts; i += line)
    __builtin_prefetch(next + i);
}

template <typename T, class Target>
int64_t product_scratch(const BlockProduct<T>& p) {
  if (uses_batch_lanes<T, Target>(p)) return batch_lanes_scratch<T, Target>(p);
  return packs_inputs<T, Target>(p) ? chunk_rows<T, Target>(p) * round_up(p.in_features, p.block_in) : 0;
}

// Elements of one entry as `pack_weights` stores it: [k, outputs], outputs rounded up to whole vectors. 0 where the
// stored blocks serve as they are.
template <typename T, class Target>
int64_t packed_entry_size(const BlockProduct<T>& p) {
  if (uses_dots<T, Target>(p) || uses_batch_lanes<T, Target>(p)) return 0;
  const int64_t stride = round_up(p.block_out, lanes_for<T, Target::MaxLanes, Target>(p.block_out));
  return p.transposed && stride == p.block_out ? 0 : p.block_in * stride;
}

// to[k, o] = from[o, k], in squares of L; both sides are multiples of L.
template <typename T, int L>
void transpose_block(const T* from, int64_t outputs, int64_t inputs, T* to) {
  for (int64_t o = 0; o < outputs; o += L)
    for (int64_t k = 0; k < inputs; k += L) {
      Vec<T, L> square[L];
      COMPSPARSE_UNROLL for (int i = 0; i < L; ++i) square[i] = load<T, L>(from + (o + i) * inputs + k);
      transpose<T, L>(square);
      COMPSPARSE_UNROLL for (int i = 0; i < L; ++i) store<T, L>(to + (k + i) * outputs + o, square[i]);
    }
}

template <typename T, class Target>
void pack_weights(const BlockProduct<T>& p, Range entries, T* packed) {
  constexpr int Square = Target::MaxLanes < 8 ? Target::MaxLanes : 8;
  const int64_t size = packed_entry_size<T, Target>(p), stride = size / p.block_in;
  const bool squares = !p.transposed && stride == p.block_out && p.block_out % Square == 0 && p.block_in % Square == 0;
  for (int64_t e = entries.begin; e < entries.end; ++e) {
    const T* block = p.values + p.slot[e] * p.block_out * p.block_in;
    T* to = packed + e * size;
    if (squares) {
      transpose_block<T, Square>(block, p.block_out, p.block_in, to);
      continue;
    }
    for (int64_t k = 0; k < p.block_in; ++k, to += stride)
      for (int64_t o = 0; o < stride; ++o)
        to[o] = o >= p.block_out ? T(0) : p.transposed ? block[k * p.block_out + o] : block[o * p.block_in + k];
  }
}

template <typename T, int L, class Target>
void product_with_lanes(const BlockProduct<T>& p, const T* packed, Range rows, Range batch, T* scratch) {
  if constexpr (L > Target::MinLanes) {
    if (p.block_out <= L / 2) return product_with_lanes<T, L / 2, Target>(p, packed, rows, batch, scratch);
  }
  const int64_t packed_size = packed_entry_size<T, Target>(p), step = chunk_rows<T, Target>(p);
  const bool packs = packs_inputs<T, Target>(p);
  RowTask<T> t = {.x_column_step = p.block_in,
                  .x_row_step = p.in_features,
                  .weights_size = p.block_out * p.block_in,
                  .weights_stride = round_up(p.block_out, L),
                  .y_stride = p.out_features,
                  .block_in = p.block_in,
                  .in_features = p.in_features,
                  .relu = p.activation == Activation::relu};
  for (int64_t n = batch.begin; n < batch.end; n += step) {
    t.batch = min64(step, batch.end - n);
    t.x = p.x + n * p.in_features;
    if (packs) {
      pack_panels<T, Target::MaxLanes>(t.x, t.batch, p.in_features, p.block_in, p.block_in, {0, t.batch}, scratch);
      t.x = scratch;
      t.x_column_step = t.batch * p.block_in;
      t.x_row_step = p.block_in;
    }
    const int64_t next_rows = packs ? 0 : min64(step, batch.end - n - t.batch);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      prefetch_share(t.x + t.batch * p.in_features, next_rows * p.in_features, row - rows.begin, rows.end - rows.begin);
      const int64_t first = p.ptr[row], out = row * p.block_out;
      t.idx = p.idx + first;
      t.entries = p.ptr[row + 1] - first;
      t.weights = packed_size ? packed + first * packed_size : p.values;
      t.slot = packed_size ? nullptr : p.slot + first;
      if (packed_size) t.weights_size = packed_size;
      t.bias = p.bias ? p.bias + out : nullptr;
      t.outputs = min64(p.block_out, p.out_features - out);
      t.y = p.y + n * p.out_features + out;
      product_panels<T, L, Target::MaxVectors, Target>(t, 0);
      if (p.activation != Activation::none && !t.relu) epilogue<T, Target::MaxLanes>(t, p.activation);
    }
  }
}

template <typename T, class Target>
void product(const BlockProduct<T>& p, const T* packed, Range rows, Range batch, T* scratch) {
  if (uses_dots<T, Target>(p)) return product_by_dots<T, Target::MaxLanes, Target>(p, rows, batch);
  if (uses_batch_lanes<T, Target>(p)) return product_by_batch_lanes<T, Target>(p, rows, batch, scratch);
  product_with_lanes<T, Target::MaxLanes, Target>(p, packed, rows, batch, scratch);
}

template <typename T, class Target>
int64_t panel_width(int64_t block_in) {
  return round_up(block_in, lanes_for<T, Target::MaxLanes, Target>(block_in));
}

// Block rows [o, o + M), inputs [panel, panel + R L) of one entry, summed over the batch.
template <typename T, int L, int R, int M>
void sampled_tile(const SampledBlocks<T>& s, const T* a_panel, const T* b_panel, int64_t width, int64_t o,
                  int64_t panel, T* entry) {
  Vec<T, L> acc[M][R] = {};
  const T* a = a_panel + o;
  const T* b = b_panel + panel;
  for (int64_t n = 0; n < s.batch; ++n, a += s.block_out, b += width) {
    Vec<T, L> input[R];
    COMPSPARSE_UNROLL for (int r = 0; r < R; ++r) input[r] = load<T, L>(b + r * L);
    COMPSPARSE_UNROLL for (int m = 0; m < M; ++m) {
      const T gradient = a[m];
      COMPSPARSE_UNROLL for (int r = 0; r < R; ++r) acc[m][r] += input[r] * gradient;
    }
  }
  COMPSPARSE_UNROLL for (int r = 0; r < R; ++r) {
    const int64_t lanes = min64(L, s.block_in - panel - r * L);
    COMPSPARSE_UNROLL for (int m = 0; m < M; ++m) {
      T* out = entry + (o + m) * s.block_in + panel + r * L;
      if (lanes == L)
        store<T, L>(out, acc[m][r]);
      else
        store_partial<T, L>(out, acc[m][r], lanes);
    }
  }
}

template <typename T, int L, int R, int M>
void sampled_rows(const SampledBlocks<T>& s, const T* a_panel, const T* b_panel, int64_t width, int64_t o,
                  int64_t panel, T* entry) {
  for (; o + M <= s.block_out; o += M) sampled_tile<T, L, R, M>(s, a_panel, b_panel, width, o, panel, entry);
  if constexpr (M > 1) {
    if (o < s.block_out) sampled_rows<T, L, R, fewer_rows(M)>(s, a_panel, b_panel, width, o, panel, entry);
  }
}

template <typename T, int L, int R, class Target>
void sampled_panels(const SampledBlocks<T>& s, const T* a_panel, const T* b_panel, int64_t width, int64_t panel,
                    T* entry) {
  for (; panel + (R - 1) * L < s.block_in; panel += R * L)
    sampled_rows<T, L, R, sampled_rows_per_tile<Target::Accumulators, R>()>(s, a_panel, b_panel, width, 0, panel,
                                                                            entry);
  if constexpr (R > 1) {
    if (panel < s.block_in) sampled_panels<T, L, R - 1, Target>(s, a_panel, b_panel, width, panel, entry);
  }
}

// What reaches past the edge of the weight is 0, even where it was NaN times 0.
template <typename T>
void clear_outside(const SampledBlocks<T>& s, int64_t row, int64_t column, T* entry) {
  const int64_t rows = min64(s.block_out, s.out_features - row * s.block_out);
  const int64_t columns = min64(s.block_in, s.in_features - column * s.block_in);
  if (rows == s.block_out && columns == s.block_in) return;
  for (int64_t o = 0; o < s.block_out; ++o)
    for (int64_t k = o < rows ? columns : 0; k < s.block_in; ++k) entry[o * s.block_in + k] = 0;
}

template <typename T, int L, class Target>
void sampled_with_lanes(const SampledBlocks<T>& s, Range rows, T* scratch) {
  if constexpr (L > Target::MinLanes) {
    if (s.block_in <= L / 2) return sampled_with_lanes<T, L / 2, Target>(s, rows, scratch);
  }
  const int64_t width = panel_width<T, Target>(s.block_in);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    if (s.ptr[row] == s.ptr[row + 1]) continue;
    const int64_t valid = min64(s.block_out, s.out_features - row * s.block_out);
    for (int64_t n = 0; n < s.batch; ++n) {
      const T* from = s.a + n * s.out_features + row * s.block_out;
      T* to = scratch + n * s.block_out;
      int64_t o = 0;
      for (; o < valid; ++o) to[o] = from[o];
      for (; o < s.block_out; ++o) to[o] = 0;
    }
    for (int64_t e = s.ptr[row]; e < s.ptr[row + 1]; ++e) {
      T* entry = s.blocks + (s.slot ? s.slot[e] : e) * s.block_out * s.block_in;
      const T* b_panel = s.b_panels + s.idx[e] * s.batch * width;
      sampled_panels<T, L, Target::MaxVectors, Target>(s, scratch, b_panel, width, 0, entry);
      clear_outside(s, row, s.idx[e], entry);
    }
  }
}

template <typename T, class Target>
void sampled(const SampledBlocks<T>& s, Range rows, T* scratch) {
  sampled_with_lanes<T, Target::MaxLanes, Target>(s, rows, scratch);
}

template <typename T>
int64_t sampled_scratch(const SampledBlocks<T>& s) {
  return s.batch * s.block_out;
}

template <typename T, class Target>
constexpr BlockSparseKernels<T> block_sparse_kernels() {
  return {
      packed_entry_size<T, Target>,  pack_weights<T, Target>,          product_scratch<T, Target>, product<T, Target>,
      panel_width<T, Target>,        pack_panels<T, Target::MaxLanes>, sampled_scratch<T>,         sampled<T, Target>,
      sampled_uses_lanes<T, Target>, pack_lanes<T, Target::MaxLanes>,  sampled_by_lanes<T, Target>};
}

}  // namespace
