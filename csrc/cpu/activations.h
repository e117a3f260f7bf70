// Epilogues: y = act(y + bias), with relu, gelu (exact, by erf) or silu.
#pragma once

#include "kernels.h"
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
      return z / (1 + vector_exp<L>(-z));
    default:
      return z;
  }
}

// One row of outputs; bias perhaps null.
template <typename T, int L>
COMPSPARSE_INLINE void add_bias_and_activate(T* y, const T* bias, int64_t count, compsparse::Activation activation) {
  int64_t i = 0;
  for (; i + L <= count; i += L) {
    Vec<T, L> z = load<T, L>(y + i);
    if (bias) z += load<T, L>(bias + i);
    store<T, L>(y + i, activate<T, L>(z, activation));
  }
  if (i == count) return;
  Vec<T, L> z = {};
  for (int64_t k = 0; k < count - i; ++k) z[k] = y[i + k] + (bias ? bias[i + k] : T(0));
  store_partial<T, L>(y + i, activate<T, L>(z, activation), count - i);
}

}  // namespace
