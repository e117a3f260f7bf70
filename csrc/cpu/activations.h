// Epilogues: relu, gelu (exact, by erf) and silu.
#pragma once

#include "shuffle.h"
#include "types.h"
#include "vector_math.h"

namespace {

template <typename T, int L>
COMPSPARSE_INLINE Vec<T, L> activate(Vec<T, L> z, compsparse::Activation activation) {
  using compsparse::Activation;
  switch (activation) {
    case Activation::relu:
      return z < 0 ? Vec<T, L>{} : z;  // keeps NaN
    case Activation::gelu: {
      Vec<T, L> unused;
      return z * normal_cdf<L>(z, unused);
    }
    case Activation::silu:
      return z / (1 + vector_exp<T, L>(-z));
    default:
      return z;
  }
}

template <typename T, int L>
COMPSPARSE_INLINE void activate_row(T* y, int64_t count, compsparse::Activation activation) {
  int64_t i = 0;
  for (; i + L <= count; i += L) store<T, L>(y + i, activate<T, L>(load<T, L>(y + i), activation));
  if (i < count)
    store_partial<T, L>(y + i, activate<T, L>(load_partial<T, L>(y + i, count - i), activation), count - i);
}

// act(z) and its derivative.
template <typename T, int L>
COMPSPARSE_INLINE Vec<T, L> activate_with_slope(Vec<T, L> z, Vec<T, L>& slope, compsparse::Activation activation) {
  if (activation == compsparse::Activation::gelu) {
    Vec<T, L> e;
    const Vec<T, L> share = normal_cdf<L>(z, e);
    slope = share + z * T(0.39894228040143267794) * e;
    return z * share;
  }
  const Vec<T, L> share = 1 / (1 + vector_exp<T, L>(-z));  // silu
  slope = share * (1 + z * (1 - share));
  return z * share;
}

template <typename T, int L>
COMPSPARSE_INLINE void activate_with_slope(T* y, T* slopes, int64_t count, compsparse::Activation activation) {
  for (int64_t i = 0; i < count; i += L) {
    Vec<T, L> slope;
    store<T, L>(y + i, activate_with_slope<T, L>(load<T, L>(y + i), slope, activation));
    store<T, L>(slopes + i, slope);
  }
}

}  // namespace
