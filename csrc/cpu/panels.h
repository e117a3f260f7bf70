// Panels: a tile of the batch with the batch as the vector axis, [features][rows], in the type of sums. Moves to and
// from [batch, features], and the product that reads weights one by one, so that blocks of any width fill whole
// vectors.
#pragma once

#include "numbers.h"
#include "shuffle.h"

namespace {

// A square of L batch rows and L features: rows [0, rows) of x become columns of the panel.
template <typename T, int L>
COMPSPARSE_INLINE void pack_square(const T* x, int64_t stride, int64_t rows, int64_t features, int64_t width,
                                   Sum<T>* panel) {
  Vec<Sum<T>, L> v[L];
  if (rows >= L && features >= L) {
    COMPSPARSE_UNROLL for (int i = 0; i < L; ++i) v[i] = load_wide<T, L>(x + i * stride);
  } else {
    for (int i = 0; i < L; ++i) {
      const T* row = x + i * stride;
      v[i] = i >= rows       ? Vec<Sum<T>, L>{}
             : features >= L ? load_wide<T, L>(row)
                             : load_wide_partial<T, L>(row, features);
    }
  }
  transpose<Sum<T>, L>(v);
  COMPSPARSE_UNROLL for (int i = 0; i < L; ++i) if (i < features) store<Sum<T>, L>(panel + i * width, v[i]);
}

// x [rows][features], rows `stride` apart, to a panel of `width` rows; lanes without a batch row are zero.
template <typename T, int L>
void pack_panel(const T* x, int64_t stride, int64_t rows, int64_t features, int64_t width, Sum<T>* panel) {
  for (int64_t n = 0; n < width; n += L)
    for (int64_t f = 0; f < features; f += L)
      pack_square<T, L>(x + n * stride + f, stride, rows - n, features - f, width, panel + f * width + n);
}

// tile [L outputs][width] -> y [valid batch rows][outputs]
template <typename T, int L>
void unpack_tile(const Sum<T>* tile, int64_t width, int64_t valid, int64_t outputs, int64_t stride, T* y) {
  for (int64_t n = 0; n < valid; n += L) {
    Vec<Sum<T>, L> v[L];
    COMPSPARSE_UNROLL for (int i = 0; i < L; ++i) v[i] = load<Sum<T>, L>(tile + i * width + n);
    transpose<Sum<T>, L>(v);
    T* rows = y + n * stride;
    if (valid - n >= L && outputs == L) {
      COMPSPARSE_UNROLL for (int i = 0; i < L; ++i) store_narrow<T, L>(rows + i * stride, v[i]);
    } else {
      for (int64_t i = 0; i < L && i < valid - n; ++i) store_narrow_partial<T, L>(rows + i * stride, v[i], outputs);
    }
  }
}

// A panel of `features` features to y [valid batch rows][features], rows `stride` apart.
template <typename T, int L>
void unpack_panel(const Sum<T>* panel, int64_t width, int64_t valid, int64_t features, int64_t stride, T* y) {
  int64_t f = 0;
  for (; f + L <= features; f += L) unpack_tile<T, L>(panel + f * width, width, valid, L, stride, y + f);
  for (; f < features; ++f)
    for (int64_t n = 0; n < valid; ++n) store_narrow<T, 1>(y + n * stride + f, load<Sum<T>, 1>(panel + f * width + n));
}

// acc[o][b] += w[o * w_out + k * w_in] * panel[k][b], k = 0 .. depth, for B vectors of batch rows.
template <typename T, int L, int B, int O>
COMPSPARSE_INLINE void multiply_panel(const T* w, int64_t w_out, int64_t w_in, const T* panel, int64_t depth,
                                      Vec<T, L> (&acc)[O][B]) {
  constexpr int Groups = (O + 2) / 3;  // x86 addresses base, base + s, base + 2 s
  const T* group[Groups];
  COMPSPARSE_UNROLL for (int g = 0; g < Groups; ++g) group[g] = w + 3 * g * w_out;
  for (int64_t k = 0; k < depth; ++k, panel += B * L) {
    Vec<T, L> input[B];
    COMPSPARSE_UNROLL for (int b = 0; b < B; ++b) input[b] = load<T, L>(panel + b * L);
    COMPSPARSE_UNROLL for (int o = 0; o < O; ++o) {
      const T weight = group[o / 3][(o % 3) * w_out + k * w_in];
      COMPSPARSE_UNROLL for (int b = 0; b < B; ++b) acc[o][b] += input[b] * weight;
    }
  }
}

template <typename T, int L, int R>
COMPSPARSE_INLINE Vec<T, L> multiply_lanes(const Vec<T, L> (&a)[R], const T* b) {
  Vec<T, L> sum = a[0] * load<T, L>(b);
  COMPSPARSE_UNROLL for (int r = 1; r < R; ++r) sum += a[r] * load<T, L>(b + r * L);
  return sum;
}

// Products of a, R vectors of batch rows, with `Count` panel rows, summed to L / Count lanes each. With `Ragged` only
// the first `count` exist.
template <typename T, int L, int R, int Count, bool Ragged, typename Index>
COMPSPARSE_INLINE Vec<T, L> dots(const Vec<T, L> (&a)[R], const T* panel, const Index* idx, int64_t count) {
  if constexpr (Count == 1) {
    return multiply_lanes<T, L, R>(a, panel + int64_t{idx[0]} * (L * R));
  } else {
    constexpr int Half = Count / 2;
    const Vec<T, L> first = dots<T, L, R, Half, Ragged>(a, panel, idx, count);
    Vec<T, L> second = {};
    if (!Ragged || count > Half) second = dots<T, L, R, Half, Ragged>(a, panel, idx + Half, count - Half);
    return fold<T, L, L / Half>(first, second);
  }
}

}  // namespace
