// Products of 24 queries with packed keys, of rows of weights with values, and of keys one by one.
#pragma once

#include "../panels.h"
#include "query.h"

namespace {

constexpr int64_t kStripBytes =
    8192;                       // of scores of one query; with all queries of a block, a fraction of the L2 cache
constexpr int64_t kChain = 64;  // products added up one after another, then the chains: less rounding
constexpr int64_t kCandidateSlack = 16;  // `compress` writes whole vectors

// Lanes of T in the widest vector; registers for accumulators; vectors of keys side by side in a tile.
template <int Lanes_, int Accumulators, int Vectors_>
struct Target {
  static constexpr int Lanes = Lanes_;
  static constexpr int Vectors = Vectors_;
  static constexpr int Rows = Accumulators / Vectors;
  static constexpr int PanelKeys = Lanes * Vectors;
};

template <typename T>
constexpr int64_t strip_keys() {
  return kStripBytes / sizeof(T);
}

// Strips of different queries start in different cache sets.
template <typename T>
constexpr int64_t score_stride() {
  return strip_keys<T>() + 64 / sizeof(T);
}

// packed[panel][d][lane] = keys[panel * PanelKeys + lane][d], zero past the last key
template <typename T, class Target>
void pack_keys(const T* keys, int64_t stride, int64_t number, int64_t width, T* packed, double* norms) {
  constexpr int64_t P = Target::PanelKeys;
  for (int64_t first = 0; first < number; first += P, packed += width * P) {
    const int64_t valid = min64(P, number - first);
    const T* some = keys + first * stride;
    pack_panel<T, Target::Lanes>(some, stride, valid, width, P, packed);
    if (!norms) continue;
    double largest = 0;
    for (int64_t lane = 0; lane < valid; ++lane)
      largest = larger_or_nan(largest, norm_above(some + lane * stride, width));
    norms[first / P] = largest;
  }
}

// scores[m][0 .. R L) = queries[m] . packed, M queries against one panel
template <typename T, int L, int R, int M>
void score_tile(const T* queries, int64_t width, const T* packed, T* scores, int64_t stride) {
  constexpr int Groups = (M + 2) / 3;  // x86 addresses base, base + s, base + 2 s
  const T* group[Groups];
  COMPSPARSE_UNROLL for (int g = 0; g < Groups; ++g) group[g] = queries + 3 * g * width;
  for (int64_t begin = 0; begin < width; begin += kChain) {
    const int64_t end = min64(begin + kChain, width);
    Vec<T, L> acc[M][R] = {};
    for (int64_t d = begin; d < end; ++d, packed += R * L) {
      Vec<T, L> key[R];
      COMPSPARSE_UNROLL for (int r = 0; r < R; ++r) key[r] = load<T, L>(packed + r * L);
      COMPSPARSE_UNROLL for (int m = 0; m < M; ++m) {
        const T query = group[m / 3][(m % 3) * width + d];
        COMPSPARSE_UNROLL for (int r = 0; r < R; ++r) acc[m][r] += key[r] * query;
      }
    }
    COMPSPARSE_UNROLL for (int m = 0; m < M; ++m) COMPSPARSE_UNROLL for (int r = 0; r < R; ++r) {
      T* to = scores + m * stride + r * L;
      store<T, L>(to, begin == 0 ? acc[m][r] : load<T, L>(to) + acc[m][r]);
    }
  }
}

template <typename T, int L, int R, int M>
void score_rows(const T* queries, int64_t count, int64_t width, const T* packed, T* scores, int64_t stride) {
  for (; count >= M; count -= M, queries += M * width, scores += M * stride)
    score_tile<T, L, R, M>(queries, width, packed, scores, stride);
  if constexpr (M > 1) {
    if (count > 0) score_rows<T, L, R, M / 2>(queries, count, width, packed, scores, stride);
  }
}

// to[m][0 .. C L) += sum over keys of weights[m][key] * values[key], in the order of keys; `Across`: weights[key][m]
template <typename T, int L, int C, int M, bool Across>
void value_tile(const T* weights, int64_t stride, int64_t keys, const T* values, int64_t value_stride, T* to,
                int64_t to_stride) {
  Vec<T, L> acc[M][C] = {};
  for (int64_t key = 0; key < keys; ++key, values += value_stride) {
    Vec<T, L> value[C];
    COMPSPARSE_UNROLL for (int c = 0; c < C; ++c) value[c] = load<T, L>(values + c * L);
    COMPSPARSE_UNROLL for (int m = 0; m < M; ++m) {
      const T weight = Across ? weights[key * stride + m] : weights[m * stride + key];
      COMPSPARSE_UNROLL for (int c = 0; c < C; ++c) acc[m][c] += value[c] * weight;
    }
  }
  COMPSPARSE_UNROLL for (int m = 0; m < M; ++m) COMPSPARSE_UNROLL for (int c = 0; c < C; ++c) {
    T* at = to + m * to_stride + c * L;
    store<T, L>(at, load<T, L>(at) + acc[m][c]);
  }
}

template <typename T, int L, int C, int M, bool Across>
void value_rows(const T* weights, int64_t stride, int64_t count, int64_t keys, const T* values, int64_t value_stride,
                T* to, int64_t to_stride) {
  for (; count >= M; count -= M, weights += Across ? M : M * stride, to += M * to_stride)
    value_tile<T, L, C, M, Across>(weights, stride, keys, values, value_stride, to, to_stride);
  if constexpr (M > 1) {
    if (count > 0)
      value_rows<T, L, C, M / 2, Across>(weights, stride, count, keys, values, value_stride, to, to_stride);
  }
}

// to [rows, width] += weights [rows, keys], or their transpose [keys, rows], times values [keys, width]
template <typename T, int L, int C, int M, bool Across = false>
void add_products(const T* weights, int64_t stride, int64_t rows, int64_t keys, const T* values, int64_t value_stride,
                  int64_t width, T* to, int64_t to_stride) {
  int64_t d = 0;
  for (; d + C * L <= width; d += C * L)
    value_rows<T, L, C, M, Across>(weights, stride, rows, keys, values + d, value_stride, to + d, to_stride);
  if (d == width) return;
  if constexpr (C > 1)
    add_products<T, L, C / 2, M, Across>(weights, stride, rows, keys, values + d, value_stride, width - d, to + d,
                                         to_stride);
  else if constexpr (L > 1)
    add_products<T, L / 2, 1, M, Across>(weights, stride, rows, keys, values + d, value_stride, width - d, to + d,
                                         to_stride);
}

template <typename T>
void clear(T* rows, int64_t stride, int64_t width, Range which) {
  for (int64_t j = which.begin; j < which.end; ++j)
    for (int64_t d = 0; d < width; ++d) rows[j * stride + d] = 0;
}

// scores[j] = query . rows[j] for rows side by side
template <typename T, int L>
void direct_scores(const T* query, int64_t width, const T* rows, int64_t stride, int64_t count, T* scores) {
  dots_by_fours<T, L>(width, count, query, scores, [&](int64_t j) { return rows + j * stride; });
}

// scores[r][0 ..) of the keys [first, end) by tiles; first lies at the beginning of a panel
template <typename T, class Target>
void score_panels(const Attention<T>& a, const T* packed, int64_t num_rows, int64_t first, int64_t end,
                  const AttentionScratch<T>& scratch, T* scores, int64_t stride) {
  for (int64_t key = first; key < end; key += Target::PanelKeys)
    score_rows<T, Target::Lanes, Target::Vectors, Target::Rows>(
        scratch.queries, num_rows, a.size.width, packed + key * a.size.width, scores + key - first, stride);
}

}  // namespace
