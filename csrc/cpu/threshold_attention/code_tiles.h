// Products of a few queries' codes with a panel of 64 keys' codes, exact in 32-bit integers, and what they tell of the
// scores.
#pragma once

#include <immintrin.h>

#include "index.h"
#include "tiles.h"

namespace {

// scores[0 .. L): the most that the scores may be whose codes have these products; least: the largest of what they
// certainly are, lane by lane. What is not a number has no part in that. `scales` are those of the keys in a panel.
template <int L>
COMPSPARSE_INLINE void bound_scores(Vec<int32_t, L> products, const float* scales, const CodedQuery& query,
                                    float* scores, Vec<float, L>& least) {
  const Vec<float, L> scale = load<float, L>(scales), size = load<float, L>(scales + index_panel_keys),
                      error = load<float, L>(scales + 2 * index_panel_keys);
  const Vec<float, L> x = __builtin_convertvector(products, Vec<float, L>) * scale * query.factor;
  const Vec<float, L> off = size * query.per_size + (error * query.per_error + query.constant);
  store<float, L>(scores, x + off);
  least = larger<float, L>(x - off, least);
}

template <int L>
COMPSPARSE_INLINE Vec<float, L> lowest() {
  return Vec<float, L>{} - __builtin_inff();
}

#if defined(__AVX512VNNI__)

constexpr int kIndexLanes = 16, kIndexRows = 6;
constexpr double kMostByIndex = 0.5;

inline float query_step(const float* query, int64_t width) {
  return largest_size<kIndexLanes>(query, width) / float(kLargestCode);
}

// sum += four products of bytes, unsigned and signed, in each lane. By the intrinsic gcc 12 copies the sum back and
// forth, and takes twice the time.
COMPSPARSE_INLINE void add_products(__m512i& sum, __m512i key, __m512i query) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(key), "v"(query));
}

// M queries against one panel of codes: bounds of their scores, scores[m][0 .. 64) and reached[m].
template <int M>
__attribute__((noinline)) void code_tile(const int8_t* codes, const CodedQuery* queries, int64_t padded,
                                         const uint8_t* panel, float* scores, float* reached, int64_t stride) {
  constexpr int Vectors = index_panel_keys / kIndexLanes;
  __m512i acc[M][Vectors];
  COMPSPARSE_UNROLL for (int m = 0; m < M; ++m) COMPSPARSE_UNROLL for (int r = 0; r < Vectors; ++r) acc[m][r] =
      _mm512_set1_epi32(queries[m].correction);
  for (int64_t d = 0; d < padded; d += kCodesTogether, panel += index_panel_keys * kCodesTogether) {
    __m512i key[Vectors];
    COMPSPARSE_UNROLL for (int r = 0; r < Vectors; ++r) key[r] = _mm512_loadu_si512(panel + 64 * r);
    COMPSPARSE_UNROLL for (int m = 0; m < M; ++m) {
      int32_t four;
      __builtin_memcpy(&four, codes + m * padded + d, 4);
      const __m512i query = _mm512_set1_epi32(four);
      COMPSPARSE_UNROLL for (int r = 0; r < Vectors; ++r) add_products(acc[m][r], key[r], query);
    }
  }
  const auto* scales = reinterpret_cast<const float*>(panel);
  COMPSPARSE_UNROLL for (int m = 0; m < M; ++m) {
    Vec<float, kIndexLanes> least = lowest<kIndexLanes>();
    COMPSPARSE_UNROLL for (int r = 0; r < Vectors; ++r)
        bound_scores<kIndexLanes>((Vec<int32_t, kIndexLanes>)acc[m][r], scales + r * kIndexLanes, queries[m],
                                  scores + m * score_stride<float>() + r * kIndexLanes, least);
    reached[m * stride] = max_lanes<float, kIndexLanes>(least);
  }
}

#elif defined(__AVX2__)

constexpr int kIndexLanes = 8, kIndexRows = 3;
constexpr double kMostByIndex = 0.3;

// Products of pairs are added up in 16 bits, two steps of four codes at a time, and a key's code is 255 at most: so the
// sizes of the codes that meet there may sum up to no more than 128, two of them rounding's.
constexpr float kMostTogether = 125.5f;

inline float query_step(const float* query, int64_t width) {
  __m256 most = _mm256_setzero_ps();
  for (int64_t d = 0; d < width; d += kIndexLanes) {
    const bool whole = d + kIndexLanes <= width;
    const auto some = whole ? load<float, 8>(query + d) : load_partial<float, 8>(query + d, width - d);
    const __m256 sizes = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), (__m256)some);
    const __m256 pairs = _mm256_add_ps(sizes, _mm256_permute_ps(sizes, 0xb1));  // each with its neighbour
    most = _mm256_max_ps(_mm256_add_ps(pairs, _mm256_permute2f128_ps(pairs, pairs, 1)), most);
  }
  return max_lanes<float, 8>((Vec<float, 8>)most) / kMostTogether;
}

// Sums of pairs of products in 16 bits.
COMPSPARSE_INLINE __m256i pair_products(__m256i key, const int8_t* codes) {
  int32_t four;
  __builtin_memcpy(&four, codes, 4);
  return _mm256_maddubs_epi16(key, _mm256_set1_epi32(four));
}

// M queries against R vectors of keys of a panel of codes
template <int M, int R>
COMPSPARSE_INLINE void code_tile_part(const int8_t* codes, const CodedQuery* queries, int64_t padded,
                                      const uint8_t* panel, const float* scales, float* scores,
                                      Vec<float, kIndexLanes> (&least)[M]) {
  constexpr int64_t Step = index_panel_keys * kCodesTogether;
  const __m256i ones = _mm256_set1_epi16(1);
  const auto keys = [](const uint8_t* at) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)); };
  __m256i acc[M][R];
  COMPSPARSE_UNROLL for (int m = 0; m < M; ++m) COMPSPARSE_UNROLL for (int r = 0; r < R; ++r) acc[m][r] =
      _mm256_set1_epi32(queries[m].correction);
  int64_t d = 0;
  for (; d + 2 * kCodesTogether <= padded; d += 2 * kCodesTogether, panel += 2 * Step) {
    COMPSPARSE_UNROLL for (int m = 0; m < M; ++m) COMPSPARSE_UNROLL for (int r = 0; r < R; ++r) {
      const __m256i first = pair_products(keys(panel + 32 * r), codes + m * padded + d);
      const __m256i second = pair_products(keys(panel + Step + 32 * r), codes + m * padded + d + kCodesTogether);
      acc[m][r] = _mm256_add_epi32(acc[m][r], _mm256_madd_epi16(_mm256_add_epi16(first, second), ones));
    }
  }
  if (d < padded) COMPSPARSE_UNROLL for (int m = 0; m < M; ++m) COMPSPARSE_UNROLL for (int r = 0; r < R; ++r) {
      const __m256i last = pair_products(keys(panel + 32 * r), codes + m * padded + d);
      acc[m][r] = _mm256_add_epi32(acc[m][r], _mm256_madd_epi16(last, ones));
    }
  COMPSPARSE_UNROLL for (int m = 0; m < M; ++m) COMPSPARSE_UNROLL for (int r = 0; r < R; ++r)
      bound_scores<kIndexLanes>((Vec<int32_t, kIndexLanes>)acc[m][r], scales + r * kIndexLanes, queries[m],
                                scores + m * score_stride<float>() + r * kIndexLanes, least[m]);
}

// M queries against one panel of codes: bounds of their scores, scores[m][0 .. 64) and reached[m].
template <int M>
__attribute__((noinline)) void code_tile(const int8_t* codes, const CodedQuery* queries, int64_t padded,
                                         const uint8_t* panel, float* scores, float* reached, int64_t stride) {
  constexpr int Vectors = 2;
  const auto* scales = reinterpret_cast<const float*>(panel + index_panel_keys * padded);
  Vec<float, kIndexLanes> least[M];
  COMPSPARSE_UNROLL for (int m = 0; m < M; ++m) least[m] = lowest<kIndexLanes>();
  for (int64_t key = 0; key < index_panel_keys; key += Vectors * kIndexLanes)
    code_tile_part<M, Vectors>(codes, queries, padded, panel + kCodesTogether * key, scales + key, scores + key, least);
  COMPSPARSE_UNROLL for (int m = 0; m < M; ++m) reached[m * stride] = max_lanes<float, kIndexLanes>(least[m]);
}

#endif

template <int M>
void code_rows(const int8_t* codes, const CodedQuery* queries, int64_t count, int64_t padded, const uint8_t* panel,
               float* scores, float* reached, int64_t stride) {
  for (; count >= M; count -= M) {
    code_tile<M>(codes, queries, padded, panel, scores, reached, stride);
    codes += M * padded, queries += M, scores += M * score_stride<float>(), reached += M * stride;
  }
  if constexpr (M > 1) {
    if (count > 0) code_rows<M / 2>(codes, queries, count, padded, panel, scores, reached, stride);
  }
}

}  // namespace
