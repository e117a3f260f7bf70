// Products with an N:M weight, written once for every vector width. The batch is the vector axis: inputs are packed to
// panels [features][width], so a slot of the weight multiplies whole vectors. Every vector of inputs is read once for
// each vector of sums, so speed is that of loads from the first-level cache. As every row has the same number of slots
// in the same inputs, a chunk of the panel that fits there is used for many outputs before the next one comes.
//
// by_row:     the stored positions as columns of a chunk, a byte each.
// by_column:  the same of the transpose: no second order is kept, since sorting costs as little as copying.
// accumulate: one chunk's share of the sums.
// scatter:    the transposed product of one batch row.
// sampled:    one panel row of a stays in registers over its entries; L of them are summed across lanes at once.
//
// An output is summed in the order of its chunks, and in a chunk in the order of its entries; a sampled value in the
// order of panels, then lanes: nothing depends on threads.
#pragma once

#include "../panels.h"
#include "table.h"

#if defined(__AVX512F__)
#include "../intrinsics.h"
#endif

namespace {

using namespace compsparse;

// Lanes of T in the widest vector, and vectors across a full panel: the more, the fewer loads of entries in a product,
// and sums across lanes in a sampled one.
template <typename T, int MaxLanes_, int MaxVectors_>
struct Target {
  static constexpr int MaxLanes = MaxLanes_;
  static constexpr int MaxVectors = MaxVectors_;
  static constexpr int MinLanes = 16 / sizeof(T);
  static constexpr int64_t PanelRows = MaxLanes * MaxVectors;
};

// Whole vectors, or the narrowest vector that holds all rows. One row is a panel as it is.
template <typename T, class Target>
int64_t panel_width(int64_t rows) {
  if (rows == 1) return 1;
  int64_t lanes = Target::MaxLanes;
  while (lanes > Target::MinLanes && rows <= lanes / 2) lanes /= 2;
  return min64(round_up(rows, lanes), Target::PanelRows);
}

// Calls the body made for a panel of this width: visit.template operator()<L, R>() with R vectors of L lanes.
template <typename T, class Target, int L = Target::MaxLanes, int R = Target::MaxVectors, class Visit>
COMPSPARSE_INLINE void with_width(int64_t width, const Visit& visit) {
  if (width == L * R) return visit.template operator()<L, R>();
  if constexpr (R > 1)
    with_width<T, Target, L, R - 1>(width, visit);
  else if constexpr (L > Target::MinLanes)
    with_width<T, Target, L / 2, 1>(width, visit);
}

template <typename T, class Target>
void pack(const T* x, int64_t stride, int64_t rows, Range features, T* panel) {
  const int64_t width = panel_width<T, Target>(rows);
  with_width<T, Target>(width, [&]<int L, int R>() {
    pack_panel<T, L>(x + features.begin, stride, rows, features.end - features.begin, width,
                     panel + features.begin * width);
  });
}

template <int Bits>
COMPSPARSE_INLINE int64_t position_of(const uint8_t* row, int64_t slot) {
  return row[slot * Bits / 8] >> slot * Bits % 8 & ((1 << Bits) - 1);
}

// visit.template operator()<Bits>()
template <class Visit>
COMPSPARSE_INLINE void with_bits(int64_t m, const Visit& visit) {
  if (nm_bits(m) == 2) return visit.template operator()<2>();
  if (nm_bits(m) == 4) return visit.template operator()<4>();
  return visit.template operator()<8>();
}

// The positions in one byte, a byte each in a word, the first in its lowest (words are little-endian, as on every
// processor torch is built for): the shifted copies overlap, but not in the bits that are kept.
template <int Bits>
struct Spread;

template <>
struct Spread<2> {
  using Word = uint32_t;
  static COMPSPARSE_INLINE Word of(Word b) { return (b | b << 6 | b << 12 | b << 18) & 0x03030303; }
};

template <>
struct Spread<4> {
  using Word = uint16_t;
  static COMPSPARSE_INLINE Word of(Word b) { return (b | b << 4) & 0x0f0f; }
};

template <>
struct Spread<8> {
  using Word = uint8_t;
  static COMPSPARSE_INLINE Word of(Word b) { return b; }
};

// `slots` entries of a row; bases[s] is the first input of the group of slot s.
template <int Bits>
void spread_row(const uint8_t* bytes, const uint8_t* bases, int64_t slots, uint8_t* idx) {
  using Word = typename Spread<Bits>::Word;
  constexpr int64_t PerByte = sizeof(Word);
  const int64_t whole = slots / PerByte;
  for (int64_t i = 0; i < whole; ++i) {
    Word base;
    __builtin_memcpy(&base, bases + i * PerByte, PerByte);
    const Word word = base + Spread<Bits>::of(bytes[i]);
    __builtin_memcpy(idx + i * PerByte, &word, PerByte);
  }
  for (int64_t s = whole * PerByte; s < slots; ++s) idx[s] = bases[s] + position_of<Bits>(bytes, s);
}

// Where the positions of a row in some groups begin, and the next row's after them.
template <int Bits>
struct RowBytes {
  RowBytes(const NMPattern& p, int64_t row, Range groups)
      : stride(nm_row_bytes(p)), bytes(p.positions + row * stride + groups.begin * p.n * Bits / 8) {}
  int64_t stride;
  const uint8_t* bytes;
};

inline void make_bases(const NMPattern& p, Range groups, uint8_t* bases) {
  for (int64_t first = 0; first < (groups.end - groups.begin) * p.m; first += p.m)
    for (int64_t k = 0; k < p.n; ++k) *bases++ = first;
}

inline void by_row(const NMPattern& p, Range rows, Range groups, uint8_t* idx, int32_t* counts) {
  const int64_t slots = (groups.end - groups.begin) * p.n, inside = p.in_features - groups.begin * p.m;
  uint8_t bases[256];
  make_bases(p, groups, bases);
  with_bits(p.m, [&]<int Bits>() {
    RowBytes<Bits> row(p, rows.begin, groups);
    for (int64_t r = rows.begin; r < rows.end; ++r, idx += slots, row.bytes += row.stride) {
      spread_row<Bits>(row.bytes, bases, slots, idx);
      if (!counts) continue;
      int64_t count = slots;
      while (count > 0 && idx[count - 1] >= inside) --count;
      counts[r - rows.begin] = count;
    }
  });
}

template <typename T>
void by_column(const NMPattern& p, const T* values, Range groups, Range rows, uint8_t* idx, T* ordered,
               int32_t* counts) {
  const int64_t slots = (groups.end - groups.begin) * p.n, stride = rows.end - rows.begin, all = nm_groups(p) * p.n;
  const int64_t num_columns = (groups.end - groups.begin) * p.m;
  uint8_t bases[256], columns[256];
  uint32_t next[256];  // where the next entry of a column goes
  make_bases(p, groups, bases);
  for (int64_t c = 0; c < num_columns; ++c) next[c] = c * stride;
  with_bits(p.m, [&]<int Bits>() {
    RowBytes<Bits> positions(p, rows.begin, groups);
    const T* row_values = values + rows.begin * all + groups.begin * p.n;
    for (int64_t row = 0; row < stride; ++row, positions.bytes += positions.stride, row_values += all) {
      spread_row<Bits>(positions.bytes, bases, slots, columns);
      for (int64_t s = 0; s < slots; ++s) {
        const uint32_t place = next[columns[s]]++;
        idx[place] = row;
        ordered[place] = row_values[s];
      }
    }
  });
  for (int64_t c = 0; c < num_columns; ++c) counts[c] = next[c] - c * stride;
}

// For few batch rows, which do not pay for sorting: the rows of the weight as they lie, added to the columns.
template <typename T>
void scatter(const NMPattern& p, const T* values, const T* x, Range groups, T* y) {
  const int64_t all = nm_groups(p) * p.n, whole = 8 / nm_bits(p.m), fit = 256 / p.m;
  const int64_t at_once = max64(fit - fit % whole, 1);
  uint8_t bases[256], columns[256];
  make_bases(p, {0, at_once}, bases);
  with_bits(p.m, [&]<int Bits>() {
    for (int64_t row = 0; row < p.out_features; ++row)
      for (int64_t g = groups.begin; g < groups.end; g += at_once) {
        int64_t count = (min64(g + at_once, groups.end) - g) * p.n;
        spread_row<Bits>(RowBytes<Bits>(p, row, {g, g}).bytes, bases, count, columns);
        while (count > 0 && g * p.m + columns[count - 1] >= p.in_features) --count;
        const T* row_values = values + row * all + g * p.n;
        for (int64_t s = 0; s < count; ++s) y[g * p.m + columns[s]] += x[row] * row_values[s];
      }
  });
}

// sums[0 .. R L) = start + sum over the entries of value * panel row. Several at a time hide the FMA's latency.
template <typename T, int L, int R>
COMPSPARSE_INLINE void add_entries(const T* panel, const T* values, const uint8_t* idx, int64_t count,
                                   Vec<T, L> (&start)[R], T* sums) {
  constexpr int Ahead = R < 4 ? 4 : 2;
  Vec<T, L> sum[Ahead][R] = {};
  COMPSPARSE_UNROLL for (int r = 0; r < R; ++r) sum[0][r] = start[r];
  int64_t p = 0;
  for (; p + Ahead <= count; p += Ahead) COMPSPARSE_UNROLL for (int k = 0; k < Ahead; ++k) {
      const T* row = panel + int64_t{idx[p + k]} * (L * R);
      COMPSPARSE_UNROLL for (int r = 0; r < R; ++r) sum[k][r] += load<T, L>(row + r * L) * values[p + k];
    }
  for (; p < count; ++p) {
    const T* row = panel + int64_t{idx[p]} * (L * R);
    COMPSPARSE_UNROLL for (int r = 0; r < R; ++r) sum[0][r] += load<T, L>(row + r * L) * values[p];
  }
  COMPSPARSE_UNROLL for (int r = 0; r < R; ++r) {
    COMPSPARSE_UNROLL for (int k = 1; k < Ahead; ++k) sum[0][r] += sum[k][r];
    store<T, L>(sums + r * L, sum[0][r]);
  }
}

// sums += values * x[idx], one vector of entries for each of the sums. Loads lane by lane are faster than gathers.
template <typename T, int L, int Count>
COMPSPARSE_INLINE void multiply_gathered(const T* x, const T* values, const uint8_t* idx, Vec<T, L>* sums) {
  COMPSPARSE_UNROLL for (int s = 0; s < Count; ++s) {
    Vec<T, L> inputs;
    COMPSPARSE_UNROLL for (int i = 0; i < L; ++i) inputs[i] = x[idx[s * L + i]];
    sums[s] += inputs * load<T, L>(values + s * L);
  }
}

// Adds the products of the first entries to the sums, and says of how many.
template <typename T, int L>
COMPSPARSE_INLINE int64_t dot_windows(const T*, const T*, const uint8_t*, int64_t, Vec<T, L>&) {
  return 0;
}

#if defined(__AVX512F__)
// Inputs x[0 .. 32], of which the first `count` exist, by the lowest five bits of idx.
COMPSPARSE_INLINE __m512 pick(const float* x, int64_t count, __m512i idx) {
  const uint32_t lanes = count >= 32 ? ~0u : (1u << count) - 1;
  return _mm512_permutex2var_ps(_mm512_maskz_loadu_ps(lanes, x), idx, _mm512_maskz_loadu_ps(lanes >> 16, x + 16));
}

// Entries ascend, and in an N:M row they are dense: the inputs of 16 of them lie in a window of 32 or 64, out of which
// they are picked in registers. (Widening is masked, since GCC 12 warns of what the plain form leaves undefined.)
template <>
COMPSPARSE_INLINE int64_t dot_windows<float, 4>(const float* x, const float* values, const uint8_t* idx, int64_t count,
                                                Vec<float, 4>& sums) {
  Vec<float, 16> lanes = {};
  int64_t p = 0;
  for (; p + 16 <= count; p += 16) {
    const int64_t begin = idx[p], size = idx[p + 15] + 1 - begin;
    if (size > 64) break;
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(idx + p));
    const __m512i place =
        _mm512_sub_epi32(_mm512_maskz_cvtepu8_epi32(0xffff, bytes), _mm512_set1_epi32(static_cast<int>(begin)));
    __m512 inputs = pick(x + begin, size, place);
    if (size > 32) {
      const __mmask16 far = _mm512_cmpgt_epi32_mask(place, _mm512_set1_epi32(31));
      inputs = _mm512_mask_mov_ps(inputs, far, pick(x + begin + 32, size - 32, place));
    }
    lanes += (Vec<float, 16>)inputs * load<float, 16>(values + p);
  }
  const Vec<float, 8> half = __builtin_shufflevector(lanes, lanes, 0, 1, 2, 3, 4, 5, 6, 7) +
                             __builtin_shufflevector(lanes, lanes, 8, 9, 10, 11, 12, 13, 14, 15);
  sums += __builtin_shufflevector(half, half, 0, 1, 2, 3) + __builtin_shufflevector(half, half, 4, 5, 6, 7);
  return p;
}
#endif

// A chunk of one batch row: four sums hide the latency of the FMA.
template <typename T, int L>
COMPSPARSE_INLINE T dot_entries(const T* x, const T* values, const uint8_t* idx, int64_t count, T sum) {
  Vec<T, L> sums[4] = {};
  int64_t p = dot_windows<T, L>(x, values, idx, count, sums[0]);
  for (; p + 4 * L <= count; p += 4 * L) multiply_gathered<T, L, 4>(x, values + p, idx + p, sums);
  for (; p + L <= count; p += L) multiply_gathered<T, L, 1>(x, values + p, idx + p, sums);
  for (; p < count; ++p) sum += values[p] * x[idx[p]];
  const Vec<T, L> lanes = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  COMPSPARSE_UNROLL for (int i = 0; i < L; ++i) sum += lanes[i];
  return sum;
}

template <typename T, class Target>
void accumulate(const NMEntries<const T>& e, const T* panel, int64_t width, int64_t rows, bool first, const T* bias,
                T* sums) {
  if (width == 1) {
    for (int64_t row = 0; row < rows; ++row)
      sums[row] = dot_entries<T, Target::MinLanes>(panel, e.values + row * e.value_stride, e.idx + row * e.idx_stride,
                                                   e.counts ? e.counts[row] : e.count,
                                                   !first ? sums[row]
                                                   : bias ? bias[row]
                                                          : T(0));
    return;
  }
  with_width<T, Target>(width, [&]<int L, int R>() {
    for (int64_t row = 0; row < rows; ++row, sums += L * R) {
      Vec<T, L> start[R];
      COMPSPARSE_UNROLL for (int r = 0; r < R; ++r) start[r] =
          first ? Vec<T, L>{} + (bias ? bias[row] : T(0)) : load<T, L>(sums + r * L);
      add_entries<T, L, R>(panel, e.values + row * e.value_stride, e.idx + row * e.idx_stride,
                           e.counts ? e.counts[row] : e.count, start, sums);
    }
  });
}

template <typename T, class Target>
void store(const T* sums, int64_t width, int64_t batch_rows, int64_t outputs, int64_t stride, T* y) {
  if (width == 1) {
    for (int64_t o = 0; o < outputs; ++o) y[o] = sums[o];
    return;
  }
  with_width<T, Target>(width, [&]<int L, int R>() {
    for (int64_t o = 0; o < outputs; o += L)
      unpack_tile<T, L>(sums + o * width, width, batch_rows, min64(outputs - o, L), stride, y + o);
  });
}

template <typename T>
void sampled_single(const NMEntries<T>& e, const T* a, const T* b, int64_t rows, bool add) {
  for (int64_t row = 0; row < rows; ++row) {
    T* values = e.values + row * e.value_stride;
    const int64_t count = e.counts ? e.counts[row] : e.count;
    for (int64_t p = 0; p < count; ++p)
      values[p] = (add ? values[p] : T(0)) + a[row] * b[e.idx[row * e.idx_stride + p]];
  }
}

template <typename T, class Target>
void sampled(const NMEntries<T>& e, const T* a_panel, const T* b_panel, int64_t width, int64_t rows, bool add) {
  if (width == 1) return sampled_single(e, a_panel, b_panel, rows, add);
  with_width<T, Target>(width, [&]<int L, int R>() {
    for (int64_t row = 0; row < rows; ++row) {
      Vec<T, L> a[R];
      COMPSPARSE_UNROLL for (int r = 0; r < R; ++r) a[r] = load<T, L>(a_panel + (row * R + r) * L);
      const uint8_t* idx = e.idx + row * e.idx_stride;
      T* values = e.values + row * e.value_stride;
      const int64_t count = e.counts ? e.counts[row] : e.count;
      int64_t p = 0;
      for (; p + L <= count; p += L) {
        const Vec<T, L> sums = dots<T, L, R, L, false>(a, b_panel, idx + p, L);
        store<T, L>(values + p, add ? load<T, L>(values + p) + sums : sums);
      }
      if (p == count) continue;
      const Vec<T, L> sums = dots<T, L, R, L, true>(a, b_panel, idx + p, count - p);
      store_partial<T, L>(values + p, add ? load_partial<T, L>(values + p, count - p) + sums : sums, count - p);
    }
  });
}

template <typename T, class Target>
constexpr NMPanels<T> nm_panels() {
  return {Target::PanelRows, panel_width<T, Target>, pack<T, Target>};
}

template <typename T, class Product, class Sampled>
constexpr NMKernels<T> nm_kernels() {
  return {
      nm_panels<T, Product>(), nm_panels<T, Sampled>(), by_row,     by_column<T>,
      accumulate<T, Product>,  store<T, Product>,       scatter<T>, sampled<T, Sampled>,
  };
}

}  // namespace
