// exp and erf on vectors. In float32 by polynomials fitted to mpmath (Chebyshev nodes), within 2 units in the last
// place; in float64 lane by lane from libm.
#pragma once

#include "simd.h"

namespace {

template <int L>
COMPSPARSE_INLINE Vec<float, L> polynomial(Vec<float, L> x, const float* coefficients, int degree) {
  Vec<float, L> sum = x * 0 + coefficients[degree];
  COMPSPARSE_UNROLL for (int i = degree - 1; i >= 0; --i) sum = sum * x + coefficients[i];
  return sum;
}

// e^x = 2^n e^r, |r| <= log(2) / 2. Overflows to infinity, underflows to zero, keeps NaN.
template <int L>
COMPSPARSE_INLINE Vec<float, L> vector_exp(Vec<float, L> x) {
  constexpr float coefficients[] = {1.f, 1.f, 0.5f, 0.166664153f, 0.0416662171f, 0.00837513525f, 0.00139485905f};
  constexpr float round_to_int = 12582912.f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  constexpr float largest = 88.7228394f, smallest = -87.3365479f;
  const Vec<float, L> clamped = x > largest ? x * 0 + largest : (x < smallest ? x * 0 + smallest : x);
  const Vec<float, L> shifted = clamped * 1.44269504f + round_to_int;
  const Vec<float, L> n = shifted - round_to_int;
  const Vec<float, L> r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  // Two factors, since 2^128 is no float: n / 2 rounded down, and the rest.
  const Vec<int32_t, L> bits = (Vec<int32_t, L>)shifted - 0x4b400000, half = bits >> 1;
  const Vec<float, L> scale = (Vec<float, L>)((half + 127) << 23), rest = (Vec<float, L>)((bits - half + 127) << 23);
  const Vec<float, L> e = polynomial<L>(r, coefficients, 6) * scale * rest;
  const Vec<float, L> zero = {}, infinity = zero + __builtin_inff();
  const Vec<float, L> result = x > largest ? infinity : (x < smallest ? zero : e);
  return x == x ? result : x;
}

// |x| <= 1: x P(x^2); beyond: 1 - e^Q(|x|) with Q = log erfc, up to where erf rounds to 1.
template <int L>
COMPSPARSE_INLINE Vec<float, L> vector_erf(Vec<float, L> x) {
  constexpr float near[] = {0.12837916710f, -0.37612626f,     0.112835974f,   -0.0268543288f,
                            0.00518931216f, -0.000801885501f, 7.88249745e-05f};  // of erf(x) / x - 1
  constexpr float far[] = {0.000303212961f, -1.13016665f,    -0.631937087f,    -0.109978244f, 0.0263647176f,
                           -0.00474022236f, 0.000592769531f, -4.55906229e-05f, 1.6140616e-06f};
  const Vec<float, L> zero = {}, size = x < 0 ? -x : x, bounded = size > 4 ? zero + 4 : size;
  const Vec<float, L> inner = x + x * polynomial<L>(x * x, near, 6);
  const Vec<float, L> outer = 1 - vector_exp<L>(polynomial<L>(bounded, far, 8));
  const Vec<float, L> result = size <= 1 ? inner : (x < 0 ? -outer : outer);
  return x == x ? result : x;
}

template <int L>
COMPSPARSE_INLINE Vec<double, L> vector_exp(Vec<double, L> x) {
  for (int i = 0; i < L; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

template <int L>
COMPSPARSE_INLINE Vec<double, L> vector_erf(Vec<double, L> x) {
  for (int i = 0; i < L; ++i) x[i] = __builtin_erf(x[i]);
  return x;
}

}  // namespace
