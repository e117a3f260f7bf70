// Epilogues on vectors: relu, gelu (exact, by erf), silu.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace {

COMPSPARSE_INLINE float erf_of(float x) { return __builtin_erff(x); }
COMPSPARSE_INLINE double erf_of(double x) { return __builtin_erf(x); }
COMPSPARSE_INLINE float exp_of(float x) { return __builtin_expf(x); }
COMPSPARSE_INLINE double exp_of(double x) { return __builtin_exp(x); }

template <typename T, int L>
COMPSPARSE_INLINE Vec<T, L> activate(Vec<T, L> z, compsparse::Activation activation) {
  using compsparse::Activation;
  if (activation == Activation::none) return z;
  if (activation == Activation::relu) return z < 0 ? Vec<T, L>{} : z;  // keeps NaN
  for (int i = 0; i < L; ++i)
    z[i] = activation == Activation::gelu ? z[i] * T(0.5) * (1 + erf_of(z[i] * T(0.70710678118654752440)))
                                          : z[i] / (1 + exp_of(-z[i]));
  return z;
}

// One row of outputs: y = act(y + bias), bias perhaps null.
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
