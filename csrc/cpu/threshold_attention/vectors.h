// What threshold attention needs beyond csrc/cpu/simd.h: horizontal sums, comparison to bits, compaction, and sums over
// gathered rows.
#pragma once

#if defined(__x86_64__)
#include "../intrinsics.h"
#endif

#include "../vector_math.h"

namespace {

template <typename T, int L>
COMPSPARSE_INLINE Vec<T, L / 2> lower_half(Vec<T, L> v) {
  if constexpr (L == 16) return __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7);
  if constexpr (L == 8) return __builtin_shufflevector(v, v, 0, 1, 2, 3);
  if constexpr (L == 4) return __builtin_shufflevector(v, v, 0, 1);
  if constexpr (L == 2) return __builtin_shufflevector(v, v, 0);
}

template <typename T, int L>
COMPSPARSE_INLINE Vec<T, L / 2> upper_half(Vec<T, L> v) {
  if constexpr (L == 16) return __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  if constexpr (L == 8) return __builtin_shufflevector(v, v, 4, 5, 6, 7);
  if constexpr (L == 4) return __builtin_shufflevector(v, v, 2, 3);
  if constexpr (L == 2) return __builtin_shufflevector(v, v, 1);
}

COMPSPARSE_INLINE int count_bits(uint32_t bits) {
#if defined(__POPCNT__)
  return __builtin_popcount(bits);
#else
  int number = 0;
  for (; bits; bits &= bits - 1) ++number;
  return number;
#endif
}

// A fixed tree: lane i is added to lane i + L / 2.
template <typename T, int L>
COMPSPARSE_INLINE T sum_lanes(Vec<T, L> v) {
  if constexpr (L == 1)
    return v[0];
  else
    return sum_lanes<T, L / 2>(lower_half<T, L>(v) + upper_half<T, L>(v));
}

// The second where one of the two is no number. The compiler makes two instructions of what is one.
template <typename T, int L>
COMPSPARSE_INLINE Vec<T, L> larger(Vec<T, L> a, Vec<T, L> b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4 && L == 16) return (Vec<T, L>)_mm512_max_ps((__m512)a, (__m512)b);
#endif
#if defined(__AVX__)
  if constexpr (sizeof(T) == 4 && L == 8) return (Vec<T, L>)_mm256_max_ps((__m256)a, (__m256)b);
#endif
  return a > b ? a : b;
}

template <typename T, int L>
COMPSPARSE_INLINE T max_lanes(Vec<T, L> v) {
  if constexpr (L == 1)
    return v[0];
  else
    return max_lanes<T, L / 2>(larger<T, L / 2>(lower_half<T, L>(v), upper_half<T, L>(v)));
}

// Bit i is set unless v[i] < bound: so for NaN it is.
template <typename T, int L>
COMPSPARSE_INLINE uint32_t not_below(Vec<T, L> v, T bound) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) * L == 64 && sizeof(T) == 4)
    return _mm512_cmp_ps_mask((__m512)v, _mm512_set1_ps(bound), _CMP_NLT_UQ);
  if constexpr (sizeof(T) * L == 64 && sizeof(T) == 8)
    return _mm512_cmp_pd_mask((__m512d)v, _mm512_set1_pd(bound), _CMP_NLT_UQ);
#endif
#if defined(__AVX__)
  if constexpr (sizeof(T) * L == 32 && sizeof(T) == 4)
    return _mm256_movemask_ps(_mm256_cmp_ps((__m256)v, _mm256_set1_ps(bound), _CMP_NLT_UQ));
  if constexpr (sizeof(T) * L == 32 && sizeof(T) == 8)
    return _mm256_movemask_pd(_mm256_cmp_pd((__m256d)v, _mm256_set1_pd(bound), _CMP_NLT_UQ));
#endif
  uint32_t bits = 0;
  for (int i = 0; i < L; ++i) bits |= uint32_t(!(v[i] < bound)) << i;
  return bits;
}

// A bit for each of the first `count` lanes.
template <int L>
COMPSPARSE_INLINE uint32_t lanes_there(int64_t count) {
  return count >= L ? uint32_t((uint64_t{1} << L) - 1) : (1u << count) - 1;
}

// Is any lane more than `bound`?
template <int L>
COMPSPARSE_INLINE bool any_above(Vec<float, L> v, float bound) {
#if defined(__AVX512F__)
  if constexpr (L == 16) return _mm512_cmp_ps_mask((__m512)v, _mm512_set1_ps(bound), _CMP_GT_OQ) != 0;
#endif
#if defined(__AVX__)
  if constexpr (L == 8) return _mm256_movemask_ps(_mm256_cmp_ps((__m256)v, _mm256_set1_ps(bound), _CMP_GT_OQ)) != 0;
#endif
  return max_lanes<float, L>(v) > bound;
}

// Bit i is set where v[i] is not a number.
template <typename T, int L>
COMPSPARSE_INLINE uint32_t unordered(Vec<T, L> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) * L == 64 && sizeof(T) == 4) return _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
  if constexpr (sizeof(T) * L == 64 && sizeof(T) == 8) return _mm512_cmp_pd_mask((__m512d)v, (__m512d)v, _CMP_UNORD_Q);
#endif
#if defined(__AVX__)
  if constexpr (sizeof(T) * L == 32 && sizeof(T) == 4)
    return _mm256_movemask_ps(_mm256_cmp_ps((__m256)v, (__m256)v, _CMP_UNORD_Q));
  if constexpr (sizeof(T) * L == 32 && sizeof(T) == 8)
    return _mm256_movemask_pd(_mm256_cmp_pd((__m256d)v, (__m256d)v, _CMP_UNORD_Q));
#endif
  uint32_t bits = 0;
  for (int i = 0; i < L; ++i) bits |= uint32_t(v[i] != v[i]) << i;
  return bits;
}

// The lanes whose bit is set; `other` elsewhere.
template <typename T, int L>
COMPSPARSE_INLINE Vec<T, L> keep_lanes(Vec<T, L> v, uint32_t bits, T other) {
  const Vec<T, L> others = Vec<T, L>{} + other;
#if defined(__AVX512F__)
  if constexpr (sizeof(T) * L == 64 && sizeof(T) == 4)
    return (Vec<T, L>)_mm512_mask_mov_ps((__m512)others, bits, (__m512)v);
  if constexpr (sizeof(T) * L == 64 && sizeof(T) == 8)
    return (Vec<T, L>)_mm512_mask_mov_pd((__m512d)others, bits, (__m512d)v);
#endif
  using Int = typename ExpConstants<T>::Int;
  Vec<Int, L> bit;
  COMPSPARSE_UNROLL for (int i = 0; i < L; ++i) bit[i] = Int(1) << i;
  return (bit & Int(bits)) != 0 ? v : others;
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// Of eight lanes those whose bit is set, in order, then the others.
struct CompressOrders {
  uint8_t lanes[256][8] = {};

  constexpr CompressOrders() {
    for (int bits = 0; bits < 256; ++bits) {
      int at = 0;
      for (int set = 1; set >= 0; --set)
        for (int lane = 0; lane < 8; ++lane)
          if ((bits >> lane & 1) == set) lanes[bits][at++] = uint8_t(lane);
    }
  }
};

alignas(64) constexpr CompressOrders kCompressOrders;

COMPSPARSE_INLINE __m256i compress_order(uint32_t bits) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kCompressOrders.lanes[bits])));
}

// Each of four bits twice.
COMPSPARSE_INLINE uint32_t doubled_bits(uint32_t bits) {
  bits = (bits | bits << 2) & 0x33;
  return ((bits | bits << 1) & 0x55) * 3;
}
#endif

// Writes the lanes whose bit is set, and returns how many; up to L elements of `to` are overwritten.
template <typename T, int L>
COMPSPARSE_INLINE int64_t compress(Vec<T, L> v, uint32_t bits, T* to) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) * L == 64) {
    if constexpr (sizeof(T) == 4)
      _mm512_storeu_ps(reinterpret_cast<float*>(to), _mm512_maskz_compress_ps(bits, (__m512)v));
    else
      _mm512_storeu_pd(to, _mm512_maskz_compress_pd(bits, (__m512d)v));
    return __builtin_popcount(bits);
  }
  if constexpr (sizeof(T) == 4 && L == 8) {
    _mm256_storeu_ps(reinterpret_cast<float*>(to), _mm256_maskz_compress_ps(bits, (__m256)v));
    return __builtin_popcount(bits);
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(T) * L == 32) {
    const __m256i order = compress_order(sizeof(T) == 4 ? bits : doubled_bits(bits));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permutevar8x32_epi32((__m256i)v, order));
    return __builtin_popcount(bits);
  }
#endif
  int64_t n = 0;
  for (; bits; bits &= bits - 1) to[n++] = v[__builtin_ctz(bits)];
  return n;
}

// The same for column numbers first + lane.
template <int L>
COMPSPARSE_INLINE void compress_columns(int32_t first, uint32_t bits, int32_t* to) {
#if defined(__AVX512F__)
  if constexpr (L <= 16) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(bits, _mm512_add_epi32(lane, _mm512_set1_epi32(first))));
    return;
  }
#elif defined(__AVX2__)
  if constexpr (L <= 8) {
    const __m256i columns = _mm256_add_epi32(compress_order(bits), _mm256_set1_epi32(first));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), columns);
    return;
  }
#endif
  for (; bits; bits &= bits - 1) *to++ = first + __builtin_ctz(bits);
}

// to[0..width) = factor * sum over e of weights[e] * rows[columns[e]], added in the order of e: so many at a time, then
// their sums, for less rounding.
constexpr int64_t kSumChain = 128;

template <typename T, int L, int C>
COMPSPARSE_INLINE void gather_sum_chunk(const T* rows, int64_t stride, const int32_t* columns, const T* weights,
                                        int64_t count, T factor, T* to) {
  Vec<T, L> total[C] = {};
  for (int64_t begin = 0; begin < count; begin += kSumChain) {
    const int64_t end = begin + kSumChain < count ? begin + kSumChain : count;
    Vec<T, L> acc[C] = {};
    for (int64_t e = begin; e < end; ++e) {
      const T* row = rows + columns[e] * stride;
      COMPSPARSE_UNROLL for (int c = 0; c < C; ++c) acc[c] += load<T, L>(row + c * L) * weights[e];
    }
    COMPSPARSE_UNROLL for (int c = 0; c < C; ++c) total[c] += acc[c];
  }
  COMPSPARSE_UNROLL for (int c = 0; c < C; ++c) store<T, L>(to + c * L, total[c] * factor);
}

template <typename T, int L, int C>
void gather_sum(const T* rows, int64_t stride, int64_t width, const int32_t* columns, const T* weights, int64_t count,
                T factor, T* to) {
  int64_t d = 0;
  for (; d + C * L <= width; d += C * L)
    gather_sum_chunk<T, L, C>(rows + d, stride, columns, weights, count, factor, to + d);
  if (d == width) return;
  if constexpr (C > 1)
    gather_sum<T, L, C / 2>(rows + d, stride, width - d, columns, weights, count, factor, to + d);
  else if constexpr (L > 1)
    gather_sum<T, L / 2, 1>(rows + d, stride, width - d, columns, weights, count, factor, to + d);
}

// rows[columns[e]][0..width) += factor * weights[e] * x[0..width) for each e, in order.
template <typename T, int L, int C>
COMPSPARSE_INLINE void scatter_chunk(const T* x, const int32_t* columns, const T* weights, int64_t count, T factor,
                                     T* rows, int64_t stride) {
  Vec<T, L> part[C];
  COMPSPARSE_UNROLL for (int c = 0; c < C; ++c) part[c] = load<T, L>(x + c * L) * factor;
  for (int64_t e = 0; e < count; ++e) {
    T* row = rows + columns[e] * stride;
    COMPSPARSE_UNROLL for (int c = 0; c < C; ++c)
        store<T, L>(row + c * L, load<T, L>(row + c * L) + part[c] * weights[e]);
  }
}

template <typename T, int L, int C>
void scatter(const T* x, int64_t width, const int32_t* columns, const T* weights, int64_t count, T factor, T* rows,
             int64_t stride) {
  int64_t d = 0;
  for (; d + C * L <= width; d += C * L)
    scatter_chunk<T, L, C>(x + d, columns, weights, count, factor, rows + d, stride);
  if (d == width) return;
  if constexpr (C > 1)
    scatter<T, L, C / 2>(x + d, width - d, columns, weights, count, factor, rows + d, stride);
  else if constexpr (L > 1)
    scatter<T, L / 2, 1>(x + d, width - d, columns, weights, count, factor, rows + d, stride);
}

// The first `count` lanes, 0 < count < L; the others are 0.
template <typename T, int L>
COMPSPARSE_INLINE Vec<T, L> load_first(const T* p, int64_t count) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) * L == 64 && sizeof(T) == 4) return (Vec<T, L>)_mm512_maskz_loadu_ps((1u << count) - 1, p);
  if constexpr (sizeof(T) * L == 64 && sizeof(T) == 8) return (Vec<T, L>)_mm512_maskz_loadu_pd((1u << count) - 1, p);
#endif
  Vec<T, L> v = {};
  for (int64_t i = 0; i < count; ++i) v[i] = p[i];
  return v;
}

template <typename T, int L>
COMPSPARSE_INLINE T dot(const T* a, const T* b, int64_t width) {
  Vec<T, L> acc = {};
  int64_t d = 0;
  for (; d + L <= width; d += L) acc += load<T, L>(a + d) * load<T, L>(b + d);
  if (d < width) acc += load_first<T, L>(a + d, width - d) * load_first<T, L>(b + d, width - d);
  return sum_lanes<T, L>(acc);
}

// to[i] = the sum over the lanes of v[i], i < 4, each in the same order.
template <typename T, int L>
COMPSPARSE_INLINE void sums_of_four(const Vec<T, L>* v, T* to) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
  if constexpr (sizeof(T) == 4 && L == 16) {
    const auto pairs = [](__m512 a, __m512 b) {
      return _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
    };
    const __m512d ab = pairs((__m512)v[0], (__m512)v[1]), cd = pairs((__m512)v[2], (__m512)v[3]);
    const __m512 low = _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)),
                 high = _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd));
    const __m512 quarters = _mm512_add_ps(low, high);  // of v[0] v[1] v[2] v[3], in each 128 bits
    const __m256 halves = _mm256_add_ps(_mm512_castps512_ps256(quarters), _mm512_extractf32x8_ps(quarters, 1));
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
    return;
  }
#endif
#if defined(__AVX__)
  if constexpr (sizeof(T) == 4 && L == 8) {  // in the order of sum_lanes
    const auto halves = [](__m256 a, __m256 b) {
      return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
    };
    const __m256 ab = halves((__m256)v[0], (__m256)v[1]), cd = halves((__m256)v[2], (__m256)v[3]);
    const __m256 pairs = _mm256_add_ps(_mm256_unpacklo_ps(ab, cd), _mm256_unpackhi_ps(ab, cd));
    const __m256 sums = _mm256_add_ps(pairs, _mm256_permute_ps(pairs, 0x4e));  // of v[0] v[2], v[1] v[3]
    _mm_storeu_ps(to, _mm_unpacklo_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1)));
    return;
  }
#endif
  COMPSPARSE_UNROLL for (int i = 0; i < 4; ++i) to[i] = sum_lanes<T, L>(v[i]);
}

// dots[e] = x . row_of(e), all in the same order: four at a time, so that their chains of additions overlap, the last
// few together with repeats of one of them.
template <typename T, int L, class RowOf>
COMPSPARSE_INLINE void dots_by_fours(int64_t width, int64_t count, const T* x, T* dots, const RowOf& row_of) {
  for (int64_t e = 0; e < count; e += 4) {
    const T* row[4];
    COMPSPARSE_UNROLL for (int i = 0; i < 4; ++i) row[i] = row_of(e + i < count ? e + i : count - 1);
    Vec<T, L> acc[4] = {};
    int64_t d = 0;
    for (; d + L <= width; d += L) {
      const Vec<T, L> some = load<T, L>(x + d);
      COMPSPARSE_UNROLL for (int i = 0; i < 4; ++i) acc[i] += some * load<T, L>(row[i] + d);
    }
    if (d < width) {
      const Vec<T, L> some = load_first<T, L>(x + d, width - d);
      COMPSPARSE_UNROLL for (int i = 0; i < 4; ++i) acc[i] += some * load_first<T, L>(row[i] + d, width - d);
    }
    if (e + 4 <= count) {
      sums_of_four<T, L>(acc, dots + e);
    } else {
      T last[4];
      sums_of_four<T, L>(acc, last);
      for (int64_t i = 0; e + i < count; ++i) dots[e + i] = last[i];
    }
  }
}

// dots[e] = x . rows[columns[e]]
template <typename T, int L>
void gather_dots(const T* rows, int64_t stride, int64_t width, const int32_t* columns, int64_t count, const T* x,
                 T* dots) {
  dots_by_fours<T, L>(width, count, x, dots, [&](int64_t e) { return rows + columns[e] * stride; });
}

}  // namespace
