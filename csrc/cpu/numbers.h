// Numbers as they lie in memory and as they are summed: half precision is widened to float when it is loaded, and
// rounded once, to nearest even, when it is stored.
#pragma once

#include "simd.h"
#include "types.h"

#if defined(__F16C__)
#include "intrinsics.h"
#endif

namespace {

using namespace compsparse;

template <int L>
using Words = Vec<uint32_t, L>;
template <int L>
using Halves = Vec<uint16_t, L>;

// bfloat16 is the upper half of a float.
template <int L>
COMPSPARSE_INLINE Vec<float, L> widen(Halves<L> bits, BFloat16) {
  return (Vec<float, L>)(__builtin_convertvector(bits, Words<L>) << 16);
}

// Half a unit in the last place, less what breaks a tie to even, carries into the upper half; a NaN keeps its upper
// half and is made quiet, since what is left of its payload may be nothing.
template <int L>
COMPSPARSE_INLINE Halves<L> narrow(Vec<float, L> v, BFloat16) {
#if defined(__AVX512BF16__)  // one instruction; what is subnormal becomes 0, as it does in its products
  if constexpr (L == 16) return (Halves<L>)_mm512_cvtneps_pbh((__m512)v);
  if constexpr (L == 8) return (Halves<L>)_mm256_cvtneps_pbh((__m256)v);
#endif
  const Words<L> bits = (Words<L>)v, rounded = bits + 0x7fff + (bits >> 16 & 1);
  return __builtin_convertvector((v == v ? rounded : bits | 0x400000) >> 16, Halves<L>);
}

// float16 has 5 bits of exponent, biased by 15, and 10 of mantissa: both move 13 bits up, and the bias grows by 112.
template <int L>
COMPSPARSE_INLINE Vec<float, L> widen(Halves<L> bits, Float16) {
#if defined(__AVX512F__)  // masked, since GCC 12 warns of what the plain form leaves undefined
  if constexpr (L == 16) return (Vec<float, L>)_mm512_maskz_cvtph_ps(0xffff, (__m256i)bits);
#endif
#if defined(__F16C__)
  if constexpr (L == 8) return (Vec<float, L>)_mm256_cvtph_ps((__m128i)bits);
#endif
  const Words<L> half = __builtin_convertvector(bits, Words<L>), size = half & 0x7fff;
  const Words<L> normal = (size << 13) + (112u << 23), infinite = normal + (112u << 23);
  // Read with the least normal exponent, a subnormal is too large by the one bit that is implied there.
  const Words<L> subnormal = (Words<L>)((Vec<float, L>)(normal + (1u << 23)) - 0x1p-14f);
  const Words<L> wide = size < 0x400 ? subnormal : size < 0x7c00 ? normal : infinite;
  return (Vec<float, L>)(wide | (half & 0x8000) << 16);
}

template <int L>
COMPSPARSE_INLINE Halves<L> narrow(Vec<float, L> v, Float16) {
#if defined(__AVX512F__)
  if constexpr (L == 16) return (Halves<L>)_mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT);
#endif
#if defined(__F16C__)
  if constexpr (L == 8) return (Halves<L>)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#endif
  const Words<L> bits = (Words<L>)v, size = bits & 0x7fffffff;
  const Words<L> normal = (size - (112u << 23) + 0xfff + (size >> 13 & 1)) >> 13;
  // The last bit of 0.5 is the least float16, so adding it rounds to whole multiples of that.
  const Words<L> subnormal = (Words<L>)((Vec<float, L>)size + 0.5f) - 0x3f000000;
  const Words<L> special = Words<L>{} + 0x7c00 + (v == v ? Words<L>{} : Words<L>{} + 0x200);
  const Words<L> half = size < (113u << 23) ? subnormal : size < (143u << 23) ? normal : special;
  return __builtin_convertvector(half | (bits >> 16 & 0x8000), Halves<L>);
}

template <typename T, int L>
COMPSPARSE_INLINE Vec<Sum<T>, L> load_wide(const T* p) {
  if constexpr (sizeof(T) == sizeof(uint16_t))
    return widen<L>(load<uint16_t, L>(reinterpret_cast<const uint16_t*>(p)), T{});
  else
    return load<T, L>(p);
}

template <typename T, int L>
COMPSPARSE_INLINE void store_narrow(T* p, Vec<Sum<T>, L> v) {
  if constexpr (sizeof(T) == sizeof(uint16_t))
    store<uint16_t, L>(reinterpret_cast<uint16_t*>(p), narrow<L>(v, T{}));
  else
    store<T, L>(p, v);
}

// The first `count` lanes only, zero in the others: for ragged edges, never on a hot path. Out of line and through
// memory: as a part of every tile they would be most of its code and of the compiler's time, and a call with vectors in
// registers would cost the tile's own.
template <typename T, int L>
__attribute__((noinline)) void copy_partial(const T* from, int64_t count, T* to) {
  for (int64_t i = 0; i < min64(count, L); ++i) to[i] = from[i];
}

template <typename T, int L>
COMPSPARSE_INLINE Vec<Sum<T>, L> load_wide_partial(const T* p, int64_t count) {
  T lanes[L] = {};
  copy_partial<T, L>(p, count, lanes);
  return load_wide<T, L>(lanes);
}

template <typename T, int L>
COMPSPARSE_INLINE void store_narrow_partial(T* p, Vec<Sum<T>, L> v, int64_t count) {
  T lanes[L];
  store_narrow<T, L>(lanes, v);
  copy_partial<T, L>(lanes, count, p);
}

}  // namespace
