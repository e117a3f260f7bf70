// Moves between the lanes of vectors: transposition of a square of vectors, and sums across lanes of many at once.
#pragma once

#include "simd.h"

namespace {

template <int... Index>
struct Lanes {};

template <int Count, int... Index>
struct CountTo : CountTo<Count - 1, Count - 1, Index...> {};

template <int... Index>
struct CountTo<0, Index...> {
  using type = Lanes<Index...>;
};

// (a0 b0 a1 b1 ..): its first L lanes, or its last L.
template <typename T, int L, bool Upper, int... I>
COMPSPARSE_INLINE Vec<T, L> interleave(Vec<T, L> a, Vec<T, L> b, Lanes<I...>) {
  return __builtin_shufflevector(a, b, ((Upper ? L / 2 : 0) + I / 2 + I % 2 * L)...);
}

// L vectors of L lanes become their transpose: log2(L) perfect shuffles.
template <typename T, int L>
COMPSPARSE_INLINE void transpose(Vec<T, L> (&v)[L]) {
  constexpr typename CountTo<L>::type lanes;
  COMPSPARSE_UNROLL for (int step = 1; step < L; step *= 2) {
    Vec<T, L> next[L];
    COMPSPARSE_UNROLL for (int i = 0; i < L / 2; ++i) {
      next[2 * i] = interleave<T, L, false>(v[i], v[i + L / 2], lanes);
      next[2 * i + 1] = interleave<T, L, true>(v[i], v[i + L / 2], lanes);
    }
    COMPSPARSE_UNROLL for (int i = 0; i < L; ++i) v[i] = next[i];
  }
}

// Of each group of `Group` lanes of (a, b) the first half, or the second.
template <typename T, int L, int Group, bool Upper, int... I>
COMPSPARSE_INLINE Vec<T, L> half_groups(Vec<T, L> a, Vec<T, L> b, Lanes<I...>) {
  constexpr int Half = Group / 2;
  return __builtin_shufflevector(a, b, (I / Half * Group + (Upper ? Half : 0) + I % Half)...);
}

// a and b hold partial sums in groups of `Group` lanes; the result holds both, in groups of half that size.
template <typename T, int L, int Group>
COMPSPARSE_INLINE Vec<T, L> fold(Vec<T, L> a, Vec<T, L> b) {
  constexpr typename CountTo<L>::type lanes;
  return half_groups<T, L, Group, false>(a, b, lanes) + half_groups<T, L, Group, true>(a, b, lanes);
}

// The first `count` lanes, zero in the others: for ragged edges, never on a hot path.
template <typename T, int L>
COMPSPARSE_INLINE Vec<T, L> load_partial(const T* p, int64_t count) {
  Vec<T, L> v = {};
  for (int64_t i = 0; i < L; ++i)
    if (i < count) v[i] = p[i];
  return v;
}

}  // namespace
