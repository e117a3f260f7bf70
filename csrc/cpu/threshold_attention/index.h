// The index of a screen in 8 bits: keys and queries as integers of -127 .. 127 times a scale of their own, and how far
// the product of two such vectors may lie from the score.
//
// With k^ = scale_k k8 in place of k and q^ in place of q,
//   |q.k - q^.k^| = |(q - q^).k^ + q.(k - k^)|  <=  |q - q^| |k^| + |q| |k - k^|.
// The screen computes x = fl(fl(fl(fl(q8.k8) scale_k) fl(scale scale_q)) + bias). q8.k8 is exact as an integer; each of
// the four roundings in float costs at most u |scale| |q^| |k^|, or where it underflows one smallest normal number
// times what it is multiplied with later. So, before the bias is added,
//   |x - s| <= |scale| (|q - q^| |k^| + |q| |k - k^| + 6 u (|q| + |q - q^|) |k^|) + 2^-125 (1 + |factor| + |q8| |k^|).
// Errors and norms are those of the vectors as they were stored, computed in double and rounded up, whatever the
// scales. What ALiBi takes adds 4 u of itself, as in bounds.h. A vector that is not finite has no error bound: NaN,
// with which every comparison fails, and so it drops nothing.
#pragma once

#include <immintrin.h>

#include "bounds.h"
#include "table.h"
#include "vectors.h"

namespace {

using namespace compsparse;

constexpr int64_t kCodesTogether = 4;  // codes that one instruction multiplies and adds up
constexpr double kLargestCode = 127;
constexpr double kUp = 1 + 0x1p-40;  // more than a few thousand roundings in double

// What is known of a stored vector, or the largest of each over a panel of them.
struct CodeBounds {
  double size = 0;   // |x^|
  double error = 0;  // |x - x^|
  double norm = 0;   // |x|

  void include(const CodeBounds& other) {
    size = larger_or_nan(size, other.size);
    error = larger_or_nan(error, other.error);
    norm = larger_or_nan(norm, other.norm);
  }
};

// x -> codes times the scale that is returned; write(d, sixteen codes) stores some, those beyond the width are 0.
template <class Write>
float encode(const float* x, int64_t width, CodeBounds& bounds, const Write& write) {
  const auto some = [&](int64_t d) {
    const int64_t left = width - d;
    return _mm512_maskz_loadu_ps(left >= 16 ? 0xffff : (1u << left) - 1, x + d);
  };
  __m512 most = _mm512_setzero_ps();
  for (int64_t d = 0; d < width; d += 16) most = _mm512_max_ps(_mm512_abs_ps(some(d)), most);  // NaN has no part
  const float largest = _mm512_reduce_max_ps(most);
  const float scale = largest < __builtin_inff() ? largest / float(kLargestCode) : 0;
  const float inverse = scale >= Rounding<float>::smallest_normal ? 1 / scale : 0;
  const __m512d step = _mm512_set1_pd(scale);
  __m512d size = _mm512_setzero_pd(), error = size, norm = size;
  for (int64_t d = 0; d < width; d += 16) {
    const __m512 value = some(d);
    const __mmask16 finite = _mm512_cmp_ps_mask(_mm512_abs_ps(value), _mm512_set1_ps(largest), _CMP_LE_OQ);
    const __m512i code = _mm512_maskz_cvtps_epi32(finite, _mm512_mul_ps(value, _mm512_set1_ps(inverse)));
    write(d, _mm512_cvtsepi32_epi8(code));
    COMPSPARSE_UNROLL for (int half = 0; half < 2; ++half) {
      const __m512d exact = _mm512_cvtps_pd(half ? _mm512_extractf32x8_ps(value, 1) : _mm512_castps512_ps256(value));
      const __m256i codes8 = half ? _mm512_extracti32x8_epi32(code, 1) : _mm512_castsi512_si256(code);
      const __m512d stored = _mm512_mul_pd(_mm512_cvtepi32_pd(codes8), step), off = _mm512_sub_pd(exact, stored);
      size = _mm512_fmadd_pd(stored, stored, size);
      error = _mm512_fmadd_pd(off, off, error);
      norm = _mm512_fmadd_pd(exact, exact, norm);
    }
  }
  const auto root = [](__m512d squares) { return __builtin_sqrt(_mm512_reduce_add_pd(squares)) * kUp; };
  bounds = {root(size), root(error), root(norm)};
  return scale;
}

// A panel: codes [width / 4][keys][4] with 128 added to each, then a scale for each key, then the bounds of all.
inline int64_t padded_width(int64_t width) { return round_up(width, kCodesTogether); }

inline const float* scales_of(const uint8_t* panel, int64_t width) {
  return reinterpret_cast<const float*>(panel + index_panel_keys * padded_width(width));
}

inline const CodeBounds& bounds_of(const uint8_t* panel, int64_t width) {
  return *reinterpret_cast<const CodeBounds*>(scales_of(panel, width) + index_panel_keys);
}

inline void start_panel(uint8_t* panel, int64_t width) {
  const int64_t codes = index_panel_keys * padded_width(width);
  for (int64_t i = 0; i < codes; ++i) panel[i] = 128;
  for (int64_t i = codes; i < index_panel_bytes(width); ++i) panel[i] = 0;
}

// Keys `which` of an index, one after another from `keys` on. The first of a panel makes it new.
inline void pack_index(const float* keys, int64_t stride, int64_t width, Range which, uint8_t* index) {
  const int64_t padded = padded_width(width);
  for (int64_t key = which.begin; key < which.end; ++key, keys += stride) {
    const int64_t lane = key % index_panel_keys;
    uint8_t* panel = index + key / index_panel_keys * index_panel_bytes(width);
    if (lane == 0) start_panel(panel, width);
    CodeBounds bound;
    const float scale = encode(keys, width, bound, [&](int64_t d, __m128i codes) {
      int32_t fours[4];
      _mm_storeu_si128(reinterpret_cast<__m128i*>(fours), _mm_xor_si128(codes, _mm_set1_epi8(-128)));
      for (int64_t i = 0; i < 4 && d + 4 * i < padded; ++i)
        __builtin_memcpy(panel + (d + 4 * i) * index_panel_keys + 4 * lane, fours + i, 4);
    });
    const_cast<float*>(scales_of(panel, width))[lane] = scale;
    const_cast<CodeBounds&>(bounds_of(panel, width)).include(bound);
  }
}

// A query of the screen: its codes lie elsewhere.
struct CodedQuery {
  float factor;        // of a product of codes, beside the key's scale
  int32_t correction;  // what the 128 added to the key's codes adds to a product
  double per_size, per_error, constant;

  // How far x may lie from the score of a key of the panel, before the bias is added.
  double error(const CodeBounds& keys) const { return per_size * keys.size + (per_error * keys.error + constant); }
};

// `largest` are the bounds over all keys. A query whose scores might overflow is stored as 0, an error like any other.
inline CodedQuery encode_query(const float* query, int64_t width, double scale, double alibi, const CodeBounds& largest,
                               int8_t* codes) {
  const int64_t padded = padded_width(width);
  CodeBounds bounds;
  const float unit = encode(query, width, bounds, [&](int64_t d, __m128i some) {
    const int64_t left = padded - d;
    _mm_mask_storeu_epi8(codes + d, left >= 16 ? 0xffff : (1u << left) - 1, some);
  });
  float factor = float(scale * unit);
  const double most = __builtin_fabs(scale) * (bounds.norm + bounds.error) * largest.size;
  if (!(most < 1e37 && __builtin_fabsf(factor) < 1e37f && largest.size < 1e37)) {
    for (int64_t d = 0; d < padded; ++d) codes[d] = 0;
    factor = 0;
    bounds.error = bounds.norm;
  }
  int32_t sum = 0, squares = 0;
  for (int64_t d = 0; d < padded; ++d) sum += codes[d], squares += codes[d] * codes[d];
  const double size = __builtin_fabs(scale) * kUp, underflow = 0x1p-125 * kUp;
  return {factor, -128 * sum,
          size * (bounds.error + 6 * Rounding<float>::unit * (bounds.norm + bounds.error)) +
              underflow * __builtin_sqrt(double(squares)),
          size * bounds.norm, underflow * (1 + __builtin_fabs(double(factor))) + 4 * Rounding<float>::unit * alibi};
}

}  // namespace
