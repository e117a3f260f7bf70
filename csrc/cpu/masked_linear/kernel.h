// Unstructured sparse products, written once for every vector width. The batch is the vector axis: inputs are packed to
// panels [features][width], so that a non-zero of the weight multiplies whole vectors and nothing is gathered.
//
// product:  the output of one weight row over a panel stays in registers over the row's non-zeros; L rows make a tile
//           that is transposed back to [batch, outputs].
// blocked:  the product of wide inputs, whose panel is too large for the first-level cache.
// sampled:  one panel row of a stays in registers over the row's non-zeros; L of them are summed across lanes at once.
//
// Half precision is widened when it is packed, and sums are rounded once, when they are stored: what lies between is
// the same. A panel that is one batch row wide is that row itself. One element is always summed by one thread in the
// same order (the row's non-zeros; or panels, then lanes), so results do not depend on the number of threads.
#pragma once

#include "../panels.h"
#include "column_blocks.h"

namespace {

using namespace compsparse;

// Lanes of the widest vector of sums, and vectors across a full panel: few for the product, so that more features fit
// in the first-level cache; more for the sampled product, where each entry's sum across lanes is shared by them.
template <typename S, int MaxLanes_, int ProductVectors_, int SampledVectors_>
struct Target {
  static constexpr int MaxLanes = MaxLanes_;
  static constexpr int ProductVectors = ProductVectors_;
  static constexpr int SampledVectors = SampledVectors_;
  static_assert(SampledVectors >= ProductVectors);  // `pack` makes panels for both
  static constexpr int MinLanes = 16 / sizeof(S);
};

// Whole vectors, or the narrowest vector that holds all rows.
template <class Target>
int64_t panel_width(int64_t rows) {
  if (rows == 1) return 1;
  int64_t lanes = Target::MaxLanes;
  while (lanes > Target::MinLanes && rows <= lanes / 2) lanes /= 2;
  return round_up(rows, lanes);
}

// Calls the body made for a panel of this width: visit.template operator()<L, R>() with R vectors of L lanes, R at most
// `Vectors`.
template <class Target, int Vectors, int L = Target::MaxLanes, class Visit>
COMPSPARSE_INLINE void with_width(int64_t width, const Visit& visit) {
  if (width == L * Vectors) return visit.template operator()<L, Vectors>();
  if constexpr (Vectors > 1)
    with_width<Target, Vectors - 1, L>(width, visit);
  else if constexpr (L > Target::MinLanes)
    with_width<Target, 1, L / 2>(width, visit);
}

template <typename T, int L>
void widen_row(const T* x, int64_t count, Sum<T>* wide) {
  int64_t i = 0;
  for (; i + L <= count; i += L) store<Sum<T>, L>(wide + i, load_wide<T, L>(x + i));
  if (i < count) store_partial<Sum<T>, L>(wide + i, load_wide_partial<T, L>(x + i, count - i), count - i);
}

template <typename T, int L>
void round_row(const Sum<T>* sums, Range some, T* values) {
  int64_t i = some.begin;
  for (; i + L <= some.end; i += L) store_narrow<T, L>(values + i, load<Sum<T>, L>(sums + i));
  if (i < some.end)
    store_narrow_partial<T, L>(values + i, load_partial<Sum<T>, L>(sums + i, some.end - i), some.end - i);
}

// Features of `rows` batch rows of x, rows `stride` apart, to a panel; lanes without a batch row are zero.
template <typename T, class Target>
void pack(const T* x, int64_t stride, int64_t rows, Range features, Sum<T>* panel) {
  const int64_t width = panel_width<Target>(rows);
  if (width == 1)
    return widen_row<T, Target::MaxLanes>(x + features.begin, features.end - features.begin, panel + features.begin);
  with_width<Target, Target::SampledVectors>(width, [&]<int L, int R>() {
    for (int64_t f = features.begin; f < features.end; f += L)
      for (int64_t n = 0; n < R * L; n += L)
        pack_square<T, L>(x + n * stride + f, stride, rows - n, features.end - f, R * L, panel + f * R * L + n);
  });
}

// sum[0 .. R) += value * panel row over the entries, in `Ahead` sums that hide the latency of the FMA.
template <typename T, int L, int R, int Ahead, typename Index>
COMPSPARSE_INLINE void add_entries(const T* panel, const T* values, const Index* idx, int64_t count,
                                   Vec<T, L> (&sum)[R]) {
  constexpr int64_t Width = L * R;
  Vec<T, L> sums[Ahead][R] = {};
  COMPSPARSE_UNROLL for (int r = 0; r < R; ++r) sums[0][r] = sum[r];
  int64_t p = 0;
  for (; p + Ahead <= count; p += Ahead) COMPSPARSE_UNROLL for (int k = 0; k < Ahead; ++k) {
      const T* row = panel + int64_t{idx[p + k]} * Width;
      COMPSPARSE_UNROLL for (int r = 0; r < R; ++r) sums[k][r] += load<T, L>(row + r * L) * values[p + k];
    }
  for (; p < count; ++p) {
    const T* row = panel + int64_t{idx[p]} * Width;
    COMPSPARSE_UNROLL for (int r = 0; r < R; ++r) sums[0][r] += load<T, L>(row + r * L) * values[p];
  }
  COMPSPARSE_UNROLL for (int r = 0; r < R; ++r) {
    COMPSPARSE_UNROLL for (int k = 1; k < Ahead; ++k) sums[0][r] += sums[k][r];
    sum[r] = sums[0][r];
  }
}

// out[0 .. R L) = start + sum over the row's non-zeros of value * panel row.
template <typename T, int L, int R, typename Index>
COMPSPARSE_INLINE void sum_row(const T* panel, const T* values, const Index* idx, int64_t count, T start, T* out) {
  constexpr int Ahead = R < 4 ? 4 : 2;
  Vec<T, L> sum[R] = {};
  COMPSPARSE_UNROLL for (int r = 0; r < R; ++r) sum[r] += start;
  add_entries<T, L, R, Ahead>(panel, values, idx, count, sum);
  COMPSPARSE_UNROLL for (int r = 0; r < R; ++r) store<T, L>(out + r * L, sum[r]);
}

template <typename T, int L, int R, typename Index>
void product_panel(const MaskedProduct<T, Index>& p, const Sum<T>* panel, Range batch, Range rows) {
  alignas(64) Sum<T> tile[L * L * R] = {};
  for (int64_t row = rows.begin, end; row < rows.end; row = end) {
    end = min64(round_up(row + 1, L), rows.end);  // tiles begin at multiples of L, as cache lines of y do
    for (int64_t r = row; r < end; ++r)
      sum_row<Sum<T>, L, R>(panel, p.values + p.ptr[r], p.idx + p.ptr[r], p.ptr[r + 1] - p.ptr[r],
                            p.bias ? p.bias[r] : Sum<T>(0), tile + (r - row) * L * R);
    unpack_tile<T, L>(tile, L * R, batch.end - batch.begin, end - row, p.out_features,
                      p.y + batch.begin * p.out_features + row);
  }
}

// The same, a block of columns at a time: its part of the panel stays in the first-level cache while all rows read it,
// and their sums wait in memory.
template <typename T, int L, int R, typename Index>
void product_panel_blocked(const MaskedProduct<T, Index>& p, const ColumnBlocks<Sum<T>, Index>& blocks,
                           const Sum<T>* panel, Range batch, Sum<T>* sums) {
  using S = Sum<T>;
  constexpr int64_t Width = L * R;
  const int64_t rows = blocks.rows.end - blocks.rows.begin;
  for (int64_t row = 0; row < rows; ++row) {
    const Vec<S, L> start = Vec<S, L>{} + (p.bias ? p.bias[blocks.rows.begin + row] : S(0));
    COMPSPARSE_UNROLL for (int r = 0; r < R; ++r) store<S, L>(sums + row * Width + r * L, start);
  }
  const S* values = blocks.values;
  const Index* idx = blocks.idx;
  for (const Segment *s = blocks.segments, *end = s + blocks.count * rows; s < end; ++s) {
    S* const out = sums + s->row * Width;
    Vec<S, L> sum[R];
    COMPSPARSE_UNROLL for (int r = 0; r < R; ++r) sum[r] = load<S, L>(out + r * L);
    add_entries<S, L, R, R == 1 ? 4 : 2>(panel, values, idx, s->count, sum);
    COMPSPARSE_UNROLL for (int r = 0; r < R; ++r) store<S, L>(out + r * L, sum[r]);
    values += s->count, idx += s->count;
  }
  for (int64_t row = blocks.rows.begin, next; row < blocks.rows.end; row = next) {
    next = min64(round_up(row + 1, L), blocks.rows.end);
    unpack_tile<T, L>(sums + (row - blocks.rows.begin) * Width, Width, batch.end - batch.begin, next - row,
                      p.out_features, p.y + batch.begin * p.out_features + row);
  }
}

// sums += values * x[idx], one vector of entries for each of the sums. Loads lane by lane are faster than gathers, and
// two columns by one load faster still: loads are what this waits for.
template <typename T, int L, int Count, typename Index>
COMPSPARSE_INLINE void multiply_gathered(const T* x, const T* values, const Index* idx, Vec<T, L>* sums) {
  constexpr bool is_little = __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__;
  constexpr int width = 8 * sizeof(Index), first = is_little ? 0 : 64 - width,
                second = is_little ? width : first - width;
  constexpr uint64_t one_column = (uint64_t{1} << width) - 1;
  COMPSPARSE_UNROLL for (int s = 0; s < Count; ++s) {
    Vec<T, L> inputs;
    COMPSPARSE_UNROLL for (int i = 0; i < L; i += 2) {
      uint64_t columns = 0;
      __builtin_memcpy(&columns, idx + s * L + i, 2 * sizeof(Index));
      inputs[i] = x[columns >> first & one_column];
      inputs[i + 1] = x[columns >> second & one_column];
    }
    sums[s] += inputs * load<T, L>(values + s * L);
  }
}

// One output of the batch row x: four sums hide the latency of the FMA.
template <typename T, int L, typename Index>
COMPSPARSE_INLINE Sum<T> product_element(const MaskedProduct<T, Index>& p, const Sum<T>* x, int64_t r) {
  using S = Sum<T>;
  Vec<S, L> sums[4] = {};
  int64_t e = p.ptr[r];
  const int64_t end = p.ptr[r + 1];
  for (; e + 4 * L <= end; e += 4 * L) multiply_gathered<S, L, 4>(x, p.values + e, p.idx + e, sums);
  for (; e + L <= end; e += L) multiply_gathered<S, L, 1>(x, p.values + e, p.idx + e, sums);
  S sum = p.bias ? p.bias[r] : S(0);
  for (; e < end; ++e) sum += p.values[e] * x[p.idx[e]];
  const Vec<S, L> lanes = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  COMPSPARSE_UNROLL for (int i = 0; i < L; ++i) sum += lanes[i];
  return sum;
}

// Outputs together, so that they are rounded as vectors.
template <typename T, int L, typename Index>
void product_single(const MaskedProduct<T, Index>& p, const Sum<T>* x, int64_t n, Range rows) {
  constexpr int64_t together = 64;
  Sum<T> sums[together];
  for (int64_t row = rows.begin; row < rows.end; row += together) {
    const int64_t count = min64(together, rows.end - row);
    for (int64_t i = 0; i < count; ++i) sums[i] = product_element<T, L>(p, x, row + i);
    round_row<T, L>(sums, {0, count}, p.y + n * p.out_features + row);
  }
}

template <typename T, class Target, typename Index>
void product(const MaskedProduct<T, Index>& p, const Sum<T>* panel, Range batch, Range rows) {
  const int64_t width = panel_width<Target>(batch.end - batch.begin);
  if (width == 1) return product_single<T, Target::MinLanes>(p, panel, batch.begin, rows);
  with_width<Target, Target::ProductVectors>(width,
                                             [&]<int L, int R>() { product_panel<T, L, R>(p, panel, batch, rows); });
}

template <typename T, class Target, typename Index>
void product_blocked(const MaskedProduct<T, Index>& p, const ColumnBlocks<Sum<T>, Index>& blocks, const Sum<T>* panel,
                     Range batch, Sum<T>* sums) {
  const int64_t width = panel_width<Target>(batch.end - batch.begin);
  if (width == 1) return product<T, Target>(p, panel, batch, blocks.rows);
  with_width<Target, Target::ProductVectors>(
      width, [&]<int L, int R>() { product_panel_blocked<T, L, R>(p, blocks, panel, batch, sums); });
}

template <typename T, int L, int R, typename Index>
void sampled_panel(const SampledSums<T, Index>& s, const T* a_panel, const T* b_panel, bool add, Range rows) {
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    Vec<T, L> a[R];
    COMPSPARSE_UNROLL for (int r = 0; r < R; ++r) a[r] = load<T, L>(a_panel + (row * R + r) * L);
    const int64_t end = s.ptr[row + 1];
    int64_t p = s.ptr[row];
    for (; p + L <= end; p += L) {
      const Vec<T, L> sums = dots<T, L, R, L, false>(a, b_panel, s.idx + p, L);
      store<T, L>(s.sums + p, add ? load<T, L>(s.sums + p) + sums : sums);
    }
    if (p == end) continue;
    const Vec<T, L> sums = dots<T, L, R, L, true>(a, b_panel, s.idx + p, end - p);
    store_partial<T, L>(s.sums + p, add ? load_partial<T, L>(s.sums + p, end - p) + sums : sums, end - p);
  }
}

template <typename T, typename Index>
void sampled_single(const SampledSums<T, Index>& s, const T* a, const T* b, bool add, Range rows) {
  for (int64_t row = rows.begin; row < rows.end; ++row)
    for (int64_t p = s.ptr[row]; p < s.ptr[row + 1]; ++p) s.sums[p] = (add ? s.sums[p] : T(0)) + a[row] * b[s.idx[p]];
}

template <typename T, class Target, typename Index>
void sampled(const SampledSums<T, Index>& s, const T* a_panel, const T* b_panel, int64_t batch_rows, bool add,
             Range rows) {
  const int64_t width = panel_width<Target>(batch_rows);
  if (width == 1) return sampled_single<T>(s, a_panel, b_panel, add, rows);
  with_width<Target, Target::SampledVectors>(
      width, [&]<int L, int R>() { sampled_panel<T, L, R>(s, a_panel, b_panel, add, rows); });
}

template <typename T, class Target, typename Index>
constexpr IndexedKernels<T, Index> indexed_kernels() {
  return {product<T, Target, Index>, cut_rows<T, Target::MaxLanes, Index>, product_blocked<T, Target, Index>,
          sampled<Sum<T>, Target, Index>};
}

template <typename T, class Target>
constexpr MaskedKernels<T> masked_kernels() {
  return {indexed_kernels<T, Target, int16_t>(),
          indexed_kernels<T, Target, int32_t>(),
          Target::MaxLanes * Target::ProductVectors,
          Target::MaxLanes * Target::SampledVectors,
          panel_width<Target>,
          pack<T, Target>,
          round_row<T, Target::MaxLanes>};
}

}  // namespace
