// Products of codes by AVX-512 VNNI: four of them are multiplied and added up in 32 bits by one instruction.
#pragma once

#include "code_bounds.h"

namespace {

constexpr int kIndexLanes = 16, kIndexRows = 6;
constexpr double kMostByIndex = 0.2;

inline float query_step(const float* query, int64_t width) {
  return largest_size<kIndexLanes>(query, width) / float(kLargestCode);
}

// sum += four products of bytes, unsigned and signed, in each lane. By the intrinsic gcc 12 copies the sum back and
// forth, and takes twice the time.
COMPSPARSE_INLINE void add_products(__m512i& sum, __m512i key, __m512i query) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(key), "v"(query));
}

// M queries against one panel of codes.
template <int M>
__attribute__((noinline)) void code_tile(const int8_t* codes, const CodedQuery* queries, int64_t padded,
                                         const uint8_t* panel, const Reach* reach, float* scores, PanelScreen* found) {
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
    Vec<float, kIndexLanes> reached = lowest<kIndexLanes>();
    uint64_t bits = 0;
    COMPSPARSE_UNROLL for (int r = 0; r < Vectors; ++r) bits |=
        bound_scores<kIndexLanes>((Vec<int32_t, kIndexLanes>)acc[m][r], scales + r * kIndexLanes, queries[m],
                                  reach[m].least, scores + m * kPanelStride + r * kIndexLanes, reached)
        << (r * kIndexLanes);
    found[m].note<kIndexLanes>(bits, reached, reach[m]);
  }
}

}  // namespace
