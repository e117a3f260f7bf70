// Block-sparse products, written once for every vector width.
//
// product:  y tile [M batch rows, R vectors of outputs] stays in registers over a whole block row of W; each step
//           broadcasts one input and multiplies it with R vectors of weights. Weights are repacked to [k, outputs] once
//           per block row when their stored order or width needs it: that costs 1/batch of the arithmetic.
// sampled:  a block [M outputs, R vectors of inputs] stays in registers over the batch.
//
// One element is always summed by one thread in the same order (entries, then k; or batch rows), whatever the tile it
// falls in, so results do not depend on the number of threads.
#pragma once

#include "../activations.h"
#include "../kernels.h"
#include "../simd.h"

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

// Batch rows per tile: a multiple of three where there is room, because x86 addresses base, base + s, base + 2 s.
template <int Accumulators, int Vectors>
constexpr int tile_rows() {
  return Accumulators / Vectors >= 3 ? Accumulators / Vectors / 3 * 3 : Accumulators / Vectors;
}

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

// ---------------------------------------------------------------------------------------------------------- product

// One block row of W as the tiles read it: entry e's weights begin at base + offset(e), rows w_stride apart.
template <typename T>
struct PackedRow {
  const T* base;
  const int32_t* slot;  // null where entries lie one after another
  int64_t entry_size;
  int64_t w_stride;
  const T* entry(int64_t e) const { return base + (slot ? slot[e] : e) * entry_size; }
};

template <typename T, int L, int R, int M>
void product_tile(const BlockProduct<T>& p, const PackedRow<T>& w, int64_t row, int64_t panel, int64_t n,
                  int64_t valid) {
  Vec<T, L> acc[M][R] = {};
  const int64_t first = p.ptr[row], count = p.ptr[row + 1] - first;
  const T* x = p.x + n * p.x_row_step;
  T* y = p.y + n * p.out_features + row * p.block_out + panel;
  COMPSPARSE_UNROLL for (int m = 0; m < M; ++m) __builtin_prefetch(y + m * p.out_features, 1);
  for (int64_t e = 0; e < count; ++e) {
    const int64_t depth = min64(p.block_in, p.in_features - p.idx[first + e] * p.block_in);
    multiply_accumulate<T, L, R, M>(x + p.idx[first + e] * p.x_column_step, p.x_row_step, w.entry(e) + panel,
                                    w.w_stride, depth, acc);
  }
  COMPSPARSE_UNROLL for (int r = 0; r < R; ++r) {
    const int64_t lanes = min64(L, valid - r * L);
    if (lanes == L) {
      COMPSPARSE_UNROLL for (int m = 0; m < M; ++m) store<T, L>(y + m * p.out_features + r * L, acc[m][r]);
    } else {
      COMPSPARSE_UNROLL for (int m = 0; m < M; ++m)
          store_partial<T, L>(y + m * p.out_features + r * L, acc[m][r], lanes);
    }
  }
}

// Batch rows [n, end): as many tiles of M rows as fit, then narrower ones.
template <typename T, int L, int R, int M>
void product_rows(const BlockProduct<T>& p, const PackedRow<T>& w, int64_t row, int64_t panel, int64_t n, int64_t end,
                  int64_t valid) {
  for (; n + M <= end; n += M) product_tile<T, L, R, M>(p, w, row, panel, n, valid);
  if constexpr (M > 1) {
    if (n < end) product_rows<T, L, R, M / 2>(p, w, row, panel, n, end, valid);
  }
}

// Bias and activation of one block row, while it is still in cache.
template <typename T, int L>
__attribute__((noinline)) void epilogue(const BlockProduct<T>& p, int64_t row, Range batch) {
  if (!p.bias && p.activation == Activation::none) return;
  const int64_t first = row * p.block_out, outputs = min64(p.block_out, p.out_features - first);
  for (int64_t n = batch.begin; n < batch.end; ++n)
    add_bias_and_activate<T, L>(p.y + n * p.out_features + first, p.bias ? p.bias + first : nullptr, outputs,
                                p.activation);
}

// Panels of MaxVectors vectors across the block row, then one narrower panel for what is left.
template <typename T, int L, int R, class Target>
void product_panels(const BlockProduct<T>& p, const PackedRow<T>& w, int64_t row, int64_t panel, Range batch) {
  const int64_t outputs = min64(p.block_out, p.out_features - row * p.block_out);
  for (; panel + (R - 1) * L < outputs; panel += R * L)
    product_rows<T, L, R, tile_rows<Target::Accumulators, R>()>(p, w, row, panel, batch.begin, batch.end,
                                                                outputs - panel);
  if constexpr (R > 1) {
    if (panel < outputs) product_panels<T, L, R - 1, Target>(p, w, row, panel, batch);
  }
}

// Weights of one entry as [k, outputs], zero-padded to w_stride outputs.
template <typename T>
void pack_entry(const BlockProduct<T>& p, const T* values, int64_t w_stride, T* packed) {
  for (int64_t k = 0; k < p.block_in; ++k, packed += w_stride) {
    int64_t o = 0;
    if (p.transposed)
      for (; o < p.block_out; ++o) packed[o] = values[k * p.block_out + o];
    else
      for (; o < p.block_out; ++o) packed[o] = values[o * p.block_in + k];
    for (; o < w_stride; ++o) packed[o] = 0;
  }
}

template <typename T, int L, class Target>
void product_with_lanes(const BlockProduct<T>& p, Range rows, Range batch, T* scratch) {
  const bool direct = p.transposed && p.block_out % L == 0;
  const int64_t w_stride = round_up(p.block_out, L), entry_size = p.block_in * w_stride;
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const int64_t first = p.ptr[row], count = p.ptr[row + 1] - first;
    PackedRow<T> w = {scratch, nullptr, entry_size, w_stride};
    if (direct) {
      w.base = p.values;
      w.slot = p.slot + first;
    } else {
      for (int64_t e = 0; e < count; ++e)
        pack_entry(p, p.values + p.slot[first + e] * p.block_out * p.block_in, w_stride, scratch + e * entry_size);
    }
    product_panels<T, L, Target::MaxVectors, Target>(p, w, row, 0, batch);
    epilogue<T, Target::MaxLanes>(p, row, batch);
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

template <typename T, int L, class Target>
void product_dispatch(const BlockProduct<T>& p, Range rows, Range batch, T* scratch) {
  if constexpr (L > Target::MinLanes) {
    if (p.block_out <= L / 2) return product_dispatch<T, L / 2, Target>(p, rows, batch, scratch);
  }
  product_with_lanes<T, L, Target>(p, rows, batch, scratch);
}

template <typename T, class Target>
void product(const BlockProduct<T>& p, Range rows, Range batch, T* scratch) {
  product_dispatch<T, Target::MaxLanes, Target>(p, rows, batch, scratch);
}

template <typename T, class Target>
int64_t product_scratch(const BlockProduct<T>& p, Range rows) {
  int64_t longest = 0;
  for (int64_t row = rows.begin; row < rows.end; ++row) longest = max64(longest, p.ptr[row + 1] - p.ptr[row]);
  return longest * p.block_in * round_up(p.block_out, lanes_for<T, Target::MaxLanes, Target>(p.block_out));
}

// ---------------------------------------------------------------------------------------------------------- sampled

template <typename T, class Target>
int64_t panel_width(int64_t block_in) {
  return round_up(block_in, lanes_for<T, Target::MaxLanes, Target>(block_in));
}

// Eight rows at a time: each is read as a stream, and each panel gets one run of cache lines.
template <typename T, int L>
void pack_panels(const T* x, int64_t batch, int64_t in_features, int64_t block_in, int64_t width, Range rows,
                 T* panels) {
  const int64_t columns = ceil_div(in_features, block_in);
  for (int64_t begin = rows.begin; begin < rows.end; begin += 8) {
    const int64_t end = min64(begin + 8, rows.end);
    for (int64_t c = 0; c < columns; ++c) {
      const int64_t valid = min64(block_in, in_features - c * block_in);
      for (int64_t n = begin; n < end; ++n) {
        const T* from = x + n * in_features + c * block_in;
        T* to = panels + (c * batch + n) * width;
        int64_t i = 0;
        for (; i + L <= valid; i += L) store<T, L>(to + i, load<T, L>(from + i));
        for (; i < valid; ++i) to[i] = from[i];
        for (; i < width; ++i) to[i] = 0;
      }
    }
  }
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
    if (o < s.block_out) sampled_rows<T, L, R, M / 2>(s, a_panel, b_panel, width, o, panel, entry);
  }
}

template <typename T, int L, int R, class Target>
void sampled_panels(const SampledBlocks<T>& s, const T* a_panel, const T* b_panel, int64_t width, int64_t panel,
                    T* entry) {
  for (; panel + (R - 1) * L < s.block_in; panel += R * L)
    sampled_rows<T, L, R, tile_rows<Target::Accumulators, R>()>(s, a_panel, b_panel, width, 0, panel, entry);
  if constexpr (R > 1) {
    if (panel < s.block_in) sampled_panels<T, L, R - 1, Target>(s, a_panel, b_panel, width, panel, entry);
  }
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
    for (int64_t e = s.ptr[row]; e < s.ptr[row + 1]; ++e)
      sampled_panels<T, L, Target::MaxVectors, Target>(s, scratch, s.b_panels + s.idx[e] * s.batch * width, width, 0,
                                                       s.entries + e * s.block_out * s.block_in);
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
  return {product_scratch<T, Target>, product<T, Target>, pack_panels<T, Target::MinLanes>,
          panel_width<T, Target>,     sampled_scratch<T>, sampled<T, Target>};
}

}  // namespace
