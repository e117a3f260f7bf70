// Epilogues: relu, gelu (exact, by erf) and silu.
#pragma once

#include "kernels.h"
#include "shuffle.h"
#include "vector_math.h"

namespace {

template <typename T, int L>
COMPSPARSE_INLINE Vec<T, L> activate(Vec<T, L> z, compsparse::Activation activation) {
  using compsparse::Activation;
  switch (activation) {
    case Activation::relu:
      return z < 0 ? Vec<T, L>{} : z;  // keeps NaN
    case Activation::gelu:
      return z * T(0.5) * (1 + vector_erf<L>(z * T(0.70710678118654752440)));
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

}  // namespace
