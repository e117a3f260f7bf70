// The sampled product: a block [M outputs, R vectors of inputs] stays in registers over the batch.
#pragma once

#include "elements.h"
#include "table.h"

namespace {

// Rows of a block in a sampled tile: a multiple of three where there is room, because x86 addresses base, base + s,
// base + 2 s.
template <int Accumulators, int Vectors>
constexpr int sampled_rows_per_tile() {
  return Accumulators / Vectors >= 3 ? Accumulators / Vectors / 3 * 3 : Accumulators / Vectors;
}

template <class Target>
int64_t panel_width(int64_t block_in) {
  return round_up(block_in, lanes_for<Target>(block_in));
}

template <class Target>
int64_t panel_size(int64_t batch, int64_t block_in) {
  return ceil_div(batch, Target::Together) * panel_width<Target>(block_in);
}

// Elements run along the batch here: it is what sums run over.
template <class Target, typename T = typename Target::T>
void pack_panels(const T* b, int64_t batch, int64_t in_features, int64_t block_in, Range batch_rows, Sum<T>* panels) {
  pack_columns<Target, Target::Together>(b, batch, in_features, block_in, panel_width<Target>(block_in), batch_rows,
                                         panels);
}

// Block rows [o, o + M), inputs [panel, panel + R L) of one entry, summed over the batch. `Out` is T, or its sums, to
// which a later share of the batch is added.
template <class Target, int L, int R, int M, typename T, typename Out>
void sampled_tile(const SampledBlocks<T>& s, const Sum<T>* a_panel, const Sum<T>* b_panel, int64_t width, int64_t o,
                  int64_t panel, Out* entry) {
  Vec<Sum<T>, L> acc[M][R] = {};
  const Sum<T>* a = a_panel + o;
  const Sum<T>* b = b_panel + panel;
  for (int64_t n = 0; n < s.batch; n += Target::Together, a += s.block_out, b += width) {
    Vec<Sum<T>, L> input[R];
    COMPSPARSE_UNROLL for (int r = 0; r < R; ++r) input[r] = load<Sum<T>, L>(b + r * L);
    COMPSPARSE_UNROLL for (int m = 0; m < M; ++m) {
      if constexpr (R == 1) {
        acc[m][0] = Target::template multiply_add_once<L>(input[0], a + m, acc[m][0]);
      } else {
        const Sum<T> gradient = a[m];
        COMPSPARSE_UNROLL for (int r = 0; r < R; ++r) acc[m][r] =
            Target::template multiply_add<L>(input[r], gradient, acc[m][r]);
      }
    }
  }
  COMPSPARSE_UNROLL for (int r = 0; r < R; ++r) {
    const int64_t lanes = min64(L, s.block_in - panel - r * L);
    COMPSPARSE_UNROLL for (int m = 0; m < M; ++m) {
      Out* out = entry + (o + m) * s.block_in + panel + r * L;
      if (lanes == L) {
        if (s.add) acc[m][r] += load_wide<Out, L>(out);
        store_narrow<Out, L>(out, acc[m][r]);
      } else {
        if (s.add) acc[m][r] += load_wide_partial<Out, L>(out, lanes);
        store_narrow_partial<Out, L>(out, acc[m][r], lanes);
      }
    }
  }
}

template <class Target, int L, int R, int M, typename T, typename Out>
void sampled_rows(const SampledBlocks<T>& s, const Sum<T>* a_panel, const Sum<T>* b_panel, int64_t width, int64_t o,
                  int64_t panel, Out* entry) {
  for (; o + M <= s.block_out; o += M) sampled_tile<Target, L, R, M>(s, a_panel, b_panel, width, o, panel, entry);
  if constexpr (M > 1) {
    if (o < s.block_out) sampled_rows<Target, L, R, fewer_rows(M)>(s, a_panel, b_panel, width, o, panel, entry);
  }
}

template <class Target, int L, int R, typename T, typename Out>
void sampled_panels(const SampledBlocks<T>& s, const Sum<T>* a_panel, const Sum<T>* b_panel, int64_t width,
                    int64_t panel, Out* entry) {
  constexpr int M = sampled_rows_per_tile<Target::Accumulators, R>();
  for (; panel + (R - 1) * L < s.block_in; panel += R * L)
    sampled_rows<Target, L, R, M>(s, a_panel, b_panel, width, 0, panel, entry);
  if constexpr (R > 1) {
    if (panel < s.block_in) sampled_panels<Target, L, R - 1>(s, a_panel, b_panel, width, panel, entry);
  }
}

// What reaches past the edge of the weight is 0, even where it was NaN times 0.
template <typename T, typename Out>
void clear_outside(const SampledBlocks<T>& s, int64_t row, int64_t column, Out* entry) {
  const int64_t rows = min64(s.block_out, s.out_features - row * s.block_out);
  const int64_t columns = min64(s.block_in, s.in_features - column * s.block_in);
  if (rows == s.block_out && columns == s.block_in) return;
  for (int64_t o = 0; o < s.block_out; ++o)
    for (int64_t k = o < rows ? columns : 0; k < s.block_in; ++k) entry[o * s.block_in + k] = Out{};
}

template <class Target, int L, typename T, typename Out>
void sampled_with_lanes(const SampledBlocks<T>& s, Range rows, Sum<T>* scratch, Out* blocks) {
  if constexpr (L > Target::MinLanes) {
    if (s.block_in <= L / 2) return sampled_with_lanes<Target, L / 2>(s, rows, scratch, blocks);
  }
  const int64_t width = panel_width<Target>(s.block_in), size = s.block_out * s.block_in;
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    if (s.ptr[row] == s.ptr[row + 1]) continue;
    const int64_t valid = min64(s.block_out, s.out_features - row * s.block_out);
    for (int64_t n = 0; n < s.batch; n += Target::Together) {
      const T* from = s.a + n * s.out_features + row * s.block_out;
      Sum<T>* to = scratch + n / Target::Together * s.block_out;
      copy_across<Target, Target::MaxLanes>(from, n + 1 < s.batch ? from + s.out_features : nullptr, valid, to);
      for (int64_t o = valid; o < s.block_out; ++o) to[o] = 0;
    }
    for (int64_t e = s.ptr[row]; e < s.ptr[row + 1]; ++e) {
      Out* entry = blocks + (s.sums ? e : s.slot[e]) * size;
      const Sum<T>* b_panel = s.b_panels + s.idx[e] * panel_size<Target>(s.batch, s.block_in);
      sampled_panels<Target, L, Target::MaxVectors>(s, scratch, b_panel, width, 0, entry);
      clear_outside(s, row, s.idx[e], entry);
    }
  }
}

template <typename T, class Target>
void sampled(const SampledBlocks<T>& s, Range rows, Sum<T>* scratch) {
  if (s.sums) return sampled_with_lanes<Target, Target::MaxLanes>(s, rows, scratch, s.sums);
  sampled_with_lanes<Target, Target::MaxLanes>(s, rows, scratch, s.blocks);
}

template <typename T, class Target>
int64_t sampled_scratch(const SampledBlocks<T>& s) {
  return ceil_div(s.batch, Target::Together) * s.block_out;
}

}  // namespace
