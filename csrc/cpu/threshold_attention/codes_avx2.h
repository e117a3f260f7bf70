// Products of codes by AVX2: pairs of them are multiplied and added up in 16 bits, which must not overflow.
#pragma once

#include "code_bounds.h"

namespace {

constexpr int kIndexLanes = 8, kIndexRows = 3;
constexpr double kMostByIndex = 0.3;

// Products of pairs are added up in 16 bits, two steps of four codes at a time, and a key's code is 255 at most: so the
// sizes of the codes that meet there may sum up to no more than 128, two of them rounding's.
constexpr float kMostTogether = 125.5f;

inline float query_step(const float* query, int64_t width) {
  __m256 most = _mm256_setzero_ps();
  for (int64_t d = 0; d < width; d += kIndexLanes) {
    const bool whole = d + kIndexLanes <= width;
    const auto some = whole ? load<float, 8>(query + d) : load_first<float, 8>(query + d, width - d);
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
                                      const uint8_t* panel, const float* scales, int64_t key, const Reach* reach,
                                      float* scores, uint64_t (&bits)[M], Vec<float, kIndexLanes> (&reached)[M]) {
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
  COMPSPARSE_UNROLL for (int m = 0; m < M; ++m) COMPSPARSE_UNROLL for (int r = 0; r < R; ++r) {
    const int64_t at = key + r * kIndexLanes;
    bits[m] |= bound_scores<kIndexLanes>((Vec<int32_t, kIndexLanes>)acc[m][r], scales + at, queries[m], reach[m].least,
                                         scores + m * kPanelStride + at, reached[m])
               << at;
  }
}

// M queries against one panel of codes.
template <int M>
__attribute__((noinline)) void code_tile(const int8_t* codes, const CodedQuery* queries, int64_t padded,
                                         const uint8_t* panel, const Reach* reach, float* scores, PanelScreen* found) {
  constexpr int Vectors = 2;
  const auto* scales = reinterpret_cast<const float*>(panel + index_panel_keys * padded);
  Vec<float, kIndexLanes> reached[M];
  uint64_t bits[M] = {};
  COMPSPARSE_UNROLL for (int m = 0; m < M; ++m) reached[m] = lowest<kIndexLanes>();
  for (int64_t key = 0; key < index_panel_keys; key += Vectors * kIndexLanes)
    code_tile_part<M, Vectors>(codes, queries, padded, panel + kCodesTogether * key, scales, key, reach, scores, bits,
                               reached);
  COMPSPARSE_UNROLL for (int m = 0; m < M; ++m) found[m].note<kIndexLanes>(bits[m], reached[m], reach[m]);
}

}  // namespace
