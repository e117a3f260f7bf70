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
// scales; each key has its own. What ALiBi takes adds 4 u of itself, as in bounds.h. A vector that is not finite has no
// error bound: NaN or infinity, with which every comparison fails, and so it drops nothing.
//
// What is kept of a score is the most that it may be, fl(x + error), the error in float and rounded up. That sum's own
// rounding, where a bias may cancel it later, is at most u (|x| + error): two u more of (|q| + |q - q^|) |k^| and
// 2^-20 of the error.
#pragma once

#include "bounds.h"
#include "table.h"
#include "vectors.h"

namespace {

using namespace compsparse;

constexpr int64_t kCodesTogether = 4;  // codes that one instruction multiplies and adds up
constexpr double kLargestCode = 127;
constexpr double kUp = 1 + 0x1p-40;  // more than a few thousand roundings in double

// What is known of a stored vector, or the largest of each over some of them.
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

// A float that is no less than x >= 0.
inline float float_above(double x) { return float(x * (1 + 0x1p-22) + 0x1p-126); }

// NaN has no part.
template <int L>
float largest_size(const float* x, int64_t width) {
  const auto size = [](Vec<float, L> v) { return v < 0 ? -v : v; };
  Vec<float, L> most = {};
  int64_t d = 0;
  for (; d + L <= width; d += L) most = larger<float, L>(size(load<float, L>(x + d)), most);
  if (d < width) most = larger<float, L>(size(load_first<float, L>(x + d, width - d)), most);
  return max_lanes<float, L>(most);
}

// Small integers as bytes.
template <int L>
COMPSPARSE_INLINE Vec<int8_t, L> to_bytes(Vec<float, L> x) {
#if defined(__AVX512F__)
  if constexpr (L == 16) {
    const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32((__m512)x));
    Vec<int8_t, 16> some;
    __builtin_memcpy(&some, &bytes, 16);
    return some;
  }
#endif
#if defined(__AVX2__)
  if constexpr (L == 8) {
    const __m256i words = _mm256_cvtps_epi32((__m256)x);
    const __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    const int64_t bytes = _mm_cvtsi128_si64(_mm_packs_epi16(halves, halves));
    return load<int8_t, 8>(reinterpret_cast<const int8_t*>(&bytes));
  }
#endif
  return __builtin_convertvector(__builtin_convertvector(x, Vec<int32_t, L>), Vec<int8_t, L>);
}

// Sums of squares, by lanes.
template <int L>
struct Squares {
  Vec<double, L> size = {}, error = {}, norm = {};

  COMPSPARSE_INLINE void add(Vec<float, L> x, Vec<float, L> codes, double step) {
    const Vec<double, L> exact = __builtin_convertvector(x, Vec<double, L>);
    const Vec<double, L> stored = __builtin_convertvector(codes, Vec<double, L>) * step, off = exact - stored;
    size += stored * stored;
    error += off * off;
    norm += exact * exact;
  }

  CodeBounds roots() const {
    const auto root_of = [](Vec<double, L> squares) { return root(sum_lanes<double, L>(squares)) * kUp; };
    return {root_of(size), root_of(error), root_of(norm)};
  }
};

// x -> codes times `step`; write(d, L codes) stores some, those beyond the width are 0. What no code can stand for is
// stored as 0, and the error is what it is.
template <int L, class Write>
CodeBounds encode(const float* x, int64_t width, float step, const Write& write) {
  constexpr float Rounder = 0x1.8p23f;  // added and taken away again, it rounds to an integer
  const float inverse = step >= Rounding<float>::smallest_normal && step < __builtin_inff() ? 1 / step : 0;
  Squares<L / 2> squares;
  for (int64_t d = 0; d < width; d += L) {
    const Vec<float, L> value = d + L <= width ? load<float, L>(x + d) : load_first<float, L>(x + d, width - d);
    const Vec<float, L> rounded = (value * inverse + Rounder) - Rounder;
    const auto stands = (rounded >= -float(kLargestCode)) & (rounded <= float(kLargestCode));
    const Vec<float, L> codes = stands ? rounded : Vec<float, L>{};
    write(d, to_bytes<L>(codes));
    squares.add(lower_half<float, L>(value), lower_half<float, L>(codes), double(step));
    squares.add(upper_half<float, L>(value), upper_half<float, L>(codes), double(step));
  }
  return squares.roots();
}

// A panel: codes [width / 4][keys][4] with 128 added to each; of each key the scale, and the size and the error of what
// is stored; then the bounds of all.
inline int64_t padded_width(int64_t width) { return round_up(width, kCodesTogether); }

inline const float* scales_of(const uint8_t* panel, int64_t width) {
  return reinterpret_cast<const float*>(panel + index_panel_keys * padded_width(width));
}

inline const CodeBounds& bounds_of(const uint8_t* panel, int64_t width) {
  return *reinterpret_cast<const CodeBounds*>(scales_of(panel, width) + 3 * index_panel_keys);
}

inline void start_panel(uint8_t* panel, int64_t width) {
  const int64_t codes = index_panel_keys * padded_width(width);
  for (int64_t i = 0; i < codes; ++i) panel[i] = 128;
  for (int64_t i = codes; i < index_panel_bytes(width); ++i) panel[i] = 0;
}

// Keys `which` of an index, one after another from `keys` on. The first of a panel makes it new.
template <int L>
void pack_index(const float* keys, int64_t stride, int64_t width, Range which, uint8_t* index) {
  const int64_t padded = padded_width(width);
  for (int64_t key = which.begin; key < which.end; ++key, keys += stride) {
    const int64_t lane = key % index_panel_keys;
    uint8_t* panel = index + key / index_panel_keys * index_panel_bytes(width);
    if (lane == 0) start_panel(panel, width);
    const float step = largest_size<L>(keys, width) / float(kLargestCode);
    const CodeBounds bounds = encode<L>(keys, width, step, [&](int64_t d, Vec<int8_t, L> codes) {
      const Vec<uint8_t, L> shifted = (Vec<uint8_t, L>)codes ^ uint8_t(128);
      COMPSPARSE_UNROLL for (int i = 0; i < L; i += 4) if (d + i < padded) __builtin_memcpy(
          panel + (d + i) * index_panel_keys + 4 * lane, reinterpret_cast<const uint8_t*>(&shifted) + i, 4);
    });
    float* of_key = const_cast<float*>(scales_of(panel, width)) + lane;
    of_key[0] = step;
    of_key[index_panel_keys] = float_above(bounds.size);
    of_key[2 * index_panel_keys] = float_above(bounds.error);
    const_cast<CodeBounds&>(bounds_of(panel, width)).include(bounds);
  }
}

// A query of the screen: its codes lie elsewhere. x may lie from a key's score by
// per_size * size + (per_error * error + constant).
struct CodedQuery {
  float factor;        // of a product of codes, beside the key's scale
  int32_t correction;  // what the 128 added to the key's codes adds to a product
  float per_size, per_error, constant;
  double norm;  // of the query, rounded up

  // No less than that of any key within the bounds, as computed in float.
  double error(const CodeBounds& keys) const {
    const double size = float_above(keys.size), error = float_above(keys.error);
    return (per_size * size + (per_error * error + constant)) * (1 + 0x1p-20);
  }
};

// In units of `step`; `largest` are the bounds over all keys. A query whose scores might overflow is stored as 0, an
// error like any other.
template <int L>
CodedQuery encode_query(const float* query, int64_t width, float step, double scale, double alibi,
                        const CodeBounds& largest, int8_t* codes) {
  const int64_t padded = padded_width(width);
  CodeBounds bounds = encode<L>(query, width, step, [&](int64_t d, Vec<int8_t, L> some) {
    if (d + L <= padded)
      store<int8_t, L>(codes + d, some);
    else
      store_partial<int8_t, L>(codes + d, some, padded - d);
  });
  float factor = float(scale * step);
  const double most = __builtin_fabs(scale) * (bounds.norm + bounds.error) * largest.size;
  if (!(most < 1e37 && __builtin_fabsf(factor) < 1e37f && largest.size < 1e37)) {
    for (int64_t d = 0; d < padded; ++d) codes[d] = 0;
    factor = 0;
    bounds.error = bounds.norm;
  }
  int32_t sum = 0, squares = 0;
  for (int64_t d = 0; d < padded; ++d) sum += codes[d], squares += codes[d] * codes[d];
  const double size = __builtin_fabs(scale) * (1 + 0x1p-19), underflow = 0x1p-125 * kUp;
  return {factor,
          -128 * sum,
          float_above(size * (bounds.error + 8 * Rounding<float>::unit * (bounds.norm + bounds.error)) +
                      underflow * __builtin_sqrt(double(squares))),
          float_above(size * bounds.norm),
          float_above(underflow * (1 + __builtin_fabs(double(factor))) + 4 * Rounding<float>::unit * alibi),
          bounds.norm};
}

}  // namespace
