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

}  // namespace
