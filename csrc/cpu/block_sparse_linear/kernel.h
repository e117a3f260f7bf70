// Block-sparse products, written once for every vector width.
//
// product:  y tile [M batch rows, R vectors of outputs] stays in registers over a whole block row of W; each step
//           broadcasts one element of x and multiplies it with R vectors of weights. Weights are repacked to
//           [k, outputs] once a call when their stored order, width or type needs it: that costs 1/batch of the
//           arithmetic.
//           Batches of a few rows are another matter: dots.h.
// sampled:  a block [M outputs, R vectors of inputs] stays in registers over the batch: sampled.h.
//           Blocks that do not fill whole vectors are another matter, for both products: batch_lanes.h.
//
// Both multiply elements (elements.h), which are float even where tensors are half precision. One element is always
// summed by one thread in the same order (entries, then k; or batch rows), whatever the tile it falls in, so results do
// not depend on the number of threads.
#pragma once

#include "../activations.h"
#include "../shuffle.h"
#include "activate.h"
#include "batch_lanes.h"
#include "dots.h"
#include "elements.h"
#include "sampled.h"
#include "table.h"

namespace {

using namespace compsparse;

// Batch rows of a tile of the product: at least 12 sums in flight keep the multipliers busy. As they come, rows of x
// are often a multiple of 4 KB apart and compete for one set of 8 lines in the first-level cache: six rows fit beside
// W.
template <class Target>
constexpr int product_rows_per_tile(int vectors) {
  return vectors == 1 ? Target::NarrowRows : 6;
}

// Where a multiplication and an addition are two roundings, sums of so many products are added up at the end: as much
// error as with fused ones.
#if defined(__FMA__) || defined(__aarch64__)
constexpr int64_t kChain = 0;
#else
constexpr int64_t kChain = 16;
#endif

template <class Target, int L, int R, int M, typename S>
COMPSPARSE_INLINE void multiply_chain(const S* x, int64_t x_stride, const S* w, int64_t w_stride, int64_t depth,
                                      Vec<S, L> (&acc)[M][R]) {
  constexpr int Groups = (M + 2) / 3;
  const S* group[Groups];
  COMPSPARSE_UNROLL for (int g = 0; g < Groups; ++g) group[g] = x + 3 * g * x_stride;
  for (int64_t k = 0; k < depth; ++k) {
    Vec<S, L> weight[R];
    COMPSPARSE_UNROLL for (int r = 0; r < R; ++r) weight[r] = load<S, L>(w + r * L);
    COMPSPARSE_UNROLL for (int m = 0; m < M; ++m) {
      const S* input = group[m / 3] + (m % 3) * x_stride + k;
      if constexpr (R == 1) {
        acc[m][0] = Target::template multiply_add_once<L>(weight[0], input, acc[m][0]);
      } else {
        const S element = *input;
        COMPSPARSE_UNROLL for (int r = 0; r < R; ++r) acc[m][r] =
            Target::template multiply_add<L>(weight[r], element, acc[m][r]);
      }
    }
    w += w_stride;
  }
}

// acc[m][r] += x[m * x_stride + k] * w[k * w_stride + r * L ...], k = 0 .. depth
template <class Target, int L, int R, int M, typename S>
COMPSPARSE_INLINE void multiply_accumulate(const S* x, int64_t x_stride, const S* w, int64_t w_stride, int64_t depth,
                                           Vec<S, L> (&acc)[M][R]) {
  if constexpr (kChain == 0) return multiply_chain<Target, L, R, M>(x, x_stride, w, w_stride, depth, acc);
  for (int64_t k = 0; kChain && k < depth; k += kChain) {
    Vec<S, L> chain[M][R] = {};
    multiply_chain<Target, L, R, M>(x + k, x_stride, w + k * w_stride, w_stride, min64(kChain, depth - k), chain);
    COMPSPARSE_UNROLL for (int m = 0; m < M; ++m) COMPSPARSE_UNROLL for (int r = 0; r < R; ++r) acc[m][r] +=
        chain[m][r];
  }
}

// One block row of W against one chunk of the batch, as the tiles read them.
template <typename T>
struct RowTask {
  const int32_t* idx;  // block columns of the row's entries
  int64_t entries;
  const Sum<T>* x;  // elements; row n of block column c begins at x + c * x_column_step + n * x_row_step
  int64_t x_column_step, x_row_step;
  const Sum<T>* weights;  // [k, outputs] of entry e begins at weights + (slot ? slot[e] : e) * weights_size
  const int32_t* slot;    // null where the entries lie one after another
  int64_t weights_size, weights_stride;
  const T* bias;  // null where there is none
  T* y;           // [batch, outputs] of this block row, y_stride apart
  int64_t y_stride;
  Sum<T>* sums;  // what goes there in place of y, not yet rounded: [batch, outputs], weights_stride apart; or null
  int64_t batch, outputs, block_in, in_features;
  bool relu;
};

template <class Target, int L, int R, int M, typename T>
void product_tile(const RowTask<T>& t, int64_t n, int64_t panel) {
  const int64_t x_step = t.x_row_step, y_step = t.y_stride, outputs = t.outputs - panel;
  const bool whole = outputs >= R * L;
  const Sum<T>* x = t.x + n * x_step;
  T* y = t.y + n * y_step + panel;
  Vec<Sum<T>, L> acc[M][R];
  COMPSPARSE_UNROLL for (int r = 0; r < R; ++r) {
    Vec<Sum<T>, L> bias = {};
    if (t.bias) {
      const T* from = t.bias + panel + r * L;
      bias = whole ? load_wide<T, L>(from) : load_wide_partial<T, L>(from, outputs - r * L);
    }
    COMPSPARSE_UNROLL for (int m = 0; m < M; ++m) acc[m][r] = bias;
  }
  for (int64_t e = 0; e < t.entries; ++e) {
    const Sum<T>* weights = t.weights + (t.slot ? t.slot[e] : e) * t.weights_size + panel;
    const int64_t inputs = min64(t.block_in, t.in_features - t.idx[e] * t.block_in);
    multiply_accumulate<Target, L, R, M>(x + t.idx[e] * t.x_column_step, x_step, weights, t.weights_stride,
                                         ceil_div(inputs, Target::Together), acc);
  }
  if (t.relu) {
    COMPSPARSE_UNROLL for (int m = 0; m < M; ++m) COMPSPARSE_UNROLL for (int r = 0; r < R; ++r) acc[m][r] =
        activate<Sum<T>, L>(acc[m][r], Activation::relu);
  }
  if (narrows<T> && t.sums) {
    Sum<T>* sums = t.sums + n * t.weights_stride + panel;
    COMPSPARSE_UNROLL for (int m = 0; m < M; ++m) COMPSPARSE_UNROLL for (int r = 0; r < R; ++r)
        store<Sum<T>, L>(sums + m * t.weights_stride + r * L, acc[m][r]);
    return;
  }
  if (whole) {
    COMPSPARSE_UNROLL for (int m = 0; m < M; ++m) COMPSPARSE_UNROLL for (int r = 0; r < R; ++r)
        store_narrow<T, L>(y + m * y_step + r * L, acc[m][r]);
    return;
  }
  COMPSPARSE_UNROLL for (int m = 0; m < M; ++m) COMPSPARSE_UNROLL for (int r = 0; r < R; ++r)
      store_narrow_partial<T, L>(y + m * y_step + r * L, acc[m][r], outputs - r * L);
}

// From batch row n on: as many tiles of M rows as fit, then narrower ones.
template <class Target, int L, int R, int M, typename T>
void product_rows(const RowTask<T>& t, int64_t n, int64_t panel) {
  for (; n + M <= t.batch; n += M) product_tile<Target, L, R, M>(t, n, panel);
  if constexpr (M > 1) {
    if (n < t.batch) product_rows<Target, L, R, fewer_rows(M)>(t, n, panel);
  }
}

// Panels of R vectors across the block row, then one narrower panel for what is left.
template <class Target, int L, int R, typename T>
void product_panels(const RowTask<T>& t, int64_t panel) {
  for (; panel + (R - 1) * L < t.outputs; panel += R * L)
    product_rows<Target, L, R, product_rows_per_tile<Target>(R)>(t, 0, panel);
  if constexpr (R > 1) {
    if (panel < t.outputs) product_panels<Target, L, R - 1>(t, panel);
  }
}

// gelu and silu of one block row, while it is still in cache: in the tile they would need its registers.
template <int L, typename T>
__attribute__((noinline)) void epilogue(const RowTask<T>& t, Activation activation) {
  for (int64_t n = 0; n < t.batch; ++n) {
    T* y = t.y + n * t.y_stride;
    if constexpr (!narrows<T>) {
      activate_row<T, L>(y, t.outputs, activation);
      continue;
    }
    for (int64_t o = 0; o < t.outputs; o += L) {
      const Vec<Sum<T>, L> z = load<Sum<T>, L>(t.sums + n * t.weights_stride + o);
      const Vec<Sum<T>, L> h = activate<Sum<T>, L>(z, activation);
      if (o + L <= t.outputs)
        store_narrow<T, L>(y + o, h);
      else
        store_narrow_partial<T, L>(y + o, h, t.outputs - o);
    }
  }
}

// Should the inputs be copied into panels, where the rows of a tile lie side by side? Where a tile has more rows than
// fit in a set of the first-level cache, and where what is stored is not elements, or a block would begin amid one.
template <typename T, class Target>
bool packs_inputs(const BlockProduct<T>& p) {
  constexpr int64_t least_batch = 8, lines_of_a_set = 8;
  if (!Target::AsStored || (p.block_in | p.in_features) % Target::Together != 0) return true;
  const bool many_rows = Target::NarrowRows > lines_of_a_set && p.block_out <= Target::MaxLanes;
  return many_rows && p.batch >= least_batch && p.in_features > p.block_in;
}

// Elements across a block of inputs.
template <typename T, class Target>
int64_t block_elements(const BlockProduct<T>& p) {
  return ceil_div(p.block_in, Target::Together);
}

// Batch rows that go through all of W before the next ones do. One tile: its inputs and outputs stay in the first
// caches and are read and written as streams, while W streams past. More where W comes from memory each time.
template <typename T, class Target>
int64_t chunk_rows(const BlockProduct<T>& p) {
  constexpr int64_t last_cache = (int64_t(1) << 24) / sizeof(Sum<T>), large = 24;
  const int64_t entries = p.ptr[ceil_div(p.out_features, p.block_out)];
  if (entries * p.block_out * block_elements<T, Target>(p) > last_cache) return large;
  return product_rows_per_tile<Target>(p.block_out <= Target::MaxLanes ? 1 : 2);
}

// Asks for one of `parts` shares of the next chunk's inputs, which lie too far apart for the processor to foresee.
template <typename T>
void prefetch_share(const T* next, int64_t size, int64_t part, int64_t parts) {
  constexpr int64_t line = 64 / sizeof(T);
  for (int64_t i = part * size / parts / line * line; i < (part + 1) * size / parts; i += line)
    __builtin_prefetch(next + i);
}

// gelu and silu take the sums of one block row and chunk from here, before they are rounded; unrounded ones from y.
template <typename T, class Target>
int64_t sums_scratch(const BlockProduct<T>& p) {
  const bool in_tile = p.activation == Activation::none || p.activation == Activation::relu;
  return in_tile || !narrows<T> ? 0 : chunk_rows<T, Target>(p) * round_up(p.block_out, Target::MaxLanes);
}

template <typename T, class Target>
int64_t product_scratch(const BlockProduct<T>& p) {
  if (uses_batch_lanes<T, Target>(p)) return batch_lanes_scratch<T, Target>(p);
  const int64_t width = ceil_div(p.in_features, p.block_in) * block_elements<T, Target>(p);
  return sums_scratch<T, Target>(p) + (packs_inputs<T, Target>(p) ? chunk_rows<T, Target>(p) * width : 0);
}

// Elements of one entry as `pack_weights` stores it: [k, outputs], outputs rounded up to whole vectors. 0 where the
// stored blocks serve as they are.
template <typename T, class Target>
int64_t packed_entry_size(const BlockProduct<T>& p) {
  if (uses_dots<T, Target>(p) || uses_batch_lanes<T, Target>(p)) return 0;
  const int64_t stride = round_up(p.block_out, lanes_for<Target>(p.block_out));
  constexpr bool serves = Target::AsStored && Target::Together == 1;
  return serves && p.transposed && stride == p.block_out ? 0 : block_elements<T, Target>(p) * stride;
}

// to[k, o] = elements of from[o, k], in squares of L; both sides are multiples of L.
template <class Target, int L, typename T>
void transpose_block(const T* from, int64_t outputs, int64_t inputs, Sum<T>* to) {
  for (int64_t o = 0; o < outputs; o += L)
    for (int64_t k = 0; k < inputs; k += L * Target::Together) {
      Vec<Sum<T>, L> square[L];
      COMPSPARSE_UNROLL for (int i = 0; i < L; ++i) square[i] = Target::template along<L>(from + (o + i) * inputs + k);
      transpose<Sum<T>, L>(square);
      COMPSPARSE_UNROLL for (int i = 0; i < L; ++i)
          store<Sum<T>, L>(to + (k / Target::Together + i) * outputs + o, square[i]);
    }
}

// Elements k of a block whose first `inputs` inputs count: what lies beyond may be NaN and must not be half of one.
template <class Target, typename T>
void pack_outputs(const BlockProduct<T>& p, const T* block, int64_t k, int64_t inputs, int64_t stride, Sum<T>* to) {
  const bool last = k + Target::Together > inputs;
  if (p.transposed) {
    const T* row = block + k * p.block_out;
    copy_across<Target, Target::MaxLanes>(row, last ? nullptr : row + p.block_out, p.block_out, to);
  } else {
    for (int64_t o = 0; o < p.block_out; ++o)
      copy_along<Target, 1>(block + o * p.block_in + k, last ? inputs - k : Target::Together, to + o);
  }
  for (int64_t o = p.block_out; o < stride; ++o) to[o] = 0;
}

template <typename T, class Target>
void pack_weights(const BlockProduct<T>& p, Range entries, Sum<T>* packed) {
  constexpr int Square = Target::MaxLanes < 8 ? Target::MaxLanes : 8;
  const int64_t size = packed_entry_size<T, Target>(p), stride = size / block_elements<T, Target>(p);
  const bool squares = !p.transposed && stride == p.block_out && p.block_out % Square == 0 &&
                       p.block_in % (Square * Target::Together) == 0;
  for (int64_t e = entries.begin; e < entries.end; ++e) {
    const T* block = p.values + p.slot[e] * p.block_out * p.block_in;
    const int64_t inputs = min64(p.block_in, p.in_features - p.idx[e] * p.block_in);
    Sum<T>* to = packed + e * size;
    if (squares && inputs % Target::Together == 0) {
      transpose_block<Target, Square>(block, p.block_out, p.block_in, to);
      continue;
    }
    for (int64_t k = 0; k < inputs; k += Target::Together, to += stride)
      pack_outputs<Target>(p, block, k, inputs, stride, to);
  }
}

template <typename T, int L, class Target>
void product_with_lanes(const BlockProduct<T>& p, const Sum<T>* packed, Range rows, Range batch, Sum<T>* scratch) {
  if constexpr (L > Target::MinLanes) {
    if (p.block_out <= L / 2) return product_with_lanes<T, L / 2, Target>(p, packed, rows, batch, scratch);
  }
  const int64_t packed_size = packed_entry_size<T, Target>(p), step = chunk_rows<T, Target>(p);
  const int64_t block = block_elements<T, Target>(p), row_elements = p.in_features / Target::Together;
  const int64_t sums_size = sums_scratch<T, Target>(p);
  const bool packs = packs_inputs<T, Target>(p);
  RowTask<T> t = {.x_column_step = block,
                  .x_row_step = row_elements,
                  .weights_size = packed_size ? packed_size : p.block_out * p.block_in,
                  .weights_stride = round_up(p.block_out, L),
                  .y_stride = p.out_features,
                  .sums = sums_size ? scratch : nullptr,
                  .block_in = p.block_in,
                  .in_features = p.in_features,
                  .relu = p.activation == Activation::relu};
  Sum<T>* inputs = scratch + sums_size;
  for (int64_t n = batch.begin; n < batch.end; n += step) {
    const T* x = p.x + n * p.in_features;
    t.batch = min64(step, batch.end - n);
    t.x = reinterpret_cast<const Sum<T>*>(x);
    if (packs) {
      pack_columns<Target, 1>(x, t.batch, p.in_features, p.block_in, block, {0, t.batch}, inputs);
      t.x = inputs;
      t.x_column_step = t.batch * block;
      t.x_row_step = block;
    }
    const int64_t next_rows = packs ? 0 : min64(step, batch.end - n - t.batch);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      prefetch_share(t.x + t.batch * row_elements, next_rows * row_elements, row - rows.begin, rows.end - rows.begin);
      const int64_t first = p.ptr[row], out = row * p.block_out;
      t.idx = p.idx + first;
      t.entries = p.ptr[row + 1] - first;
      t.weights = packed_size ? packed + first * packed_size : reinterpret_cast<const Sum<T>*>(p.values);
      t.slot = packed_size ? nullptr : p.slot + first;
      t.bias = p.bias ? p.bias + out : nullptr;
      t.outputs = min64(p.block_out, p.out_features - out);
      t.y = p.y + n * p.out_features + out;
      product_panels<Target, L, Target::MaxVectors>(t, 0);
      if (p.activation != Activation::none && !t.relu) epilogue<L>(t, p.activation);
    }
  }
}

template <typename T, class Target>
void product(const BlockProduct<T>& p, const Sum<T>* packed, Range rows, Range batch, Sum<T>* scratch) {
  if (uses_dots<T, Target>(p)) return product_by_dots<T, Target::MaxLanes, Target>(p, rows, batch);
  if constexpr (!narrows<T>) {
    if (uses_batch_lanes<T, Target>(p)) return product_by_batch_lanes<T, Target>(p, rows, batch, scratch);
  }
  product_with_lanes<T, Target::MaxLanes, Target>(p, packed, rows, batch, scratch);
}

template <class Target, typename T = typename Target::T>
constexpr BlockSparseKernels<T> block_sparse_kernels() {
  return {packed_entry_size<T, Target>, pack_weights<T, Target>,     product_scratch<T, Target>,
          product<T, Target>,           panel_size<Target>,          pack_panels<Target>,
          sampled_scratch<T, Target>,   sampled<T, Target>,          sampled_uses_lanes<T, Target>,
          pack_lanes<T, Target>,        sampled_by_lanes<T, Target>, activated<T, Target>};
}

}  // namespace
