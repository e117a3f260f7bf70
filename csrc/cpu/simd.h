// Fixed-width vectors on the compiler's vector extension: one kernel source serves every instruction set, and each
// file that includes it is compiled with the flags of its own set. Everything has internal linkage.
#pragma once

#include <stdint.h>

#define COMPSPARSE_INLINE inline __attribute__((always_inline))
#define COMPSPARSE_UNROLL _Pragma("GCC unroll 32")

namespace {

template <typename T, int Lanes>
struct VecType {
  typedef T type __attribute__((vector_size(sizeof(T) * Lanes)));
};

template <typename T, int Lanes>
using Vec = typename VecType<T, Lanes>::type;

template <typename T, int Lanes>
COMPSPARSE_INLINE Vec<T, Lanes> load(const T* p) {
  Vec<T, Lanes> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

template <typename T, int Lanes>
COMPSPARSE_INLINE void store(T* p, Vec<T, Lanes> v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

// The first `count` lanes only: for ragged edges, never on a hot path.
template <typename T, int Lanes>
COMPSPARSE_INLINE void store_partial(T* p, Vec<T, Lanes> v, int64_t count) {
  for (int64_t i = 0; i < count && i < Lanes; ++i) p[i] = v[i];
}

COMPSPARSE_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
COMPSPARSE_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
COMPSPARSE_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
COMPSPARSE_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace
