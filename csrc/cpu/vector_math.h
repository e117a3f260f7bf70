// exp and erf on vectors, within two units in the last place. erf in float64 is libm's, lane by lane.
#pragma once

#include "simd.h"

namespace {

template <int L>
COMPSPARSE_INLINE Vec<float, L> polynomial(Vec<float, L> x, const float* coefficients, int degree) {
  Vec<float, L> sum = x * 0 + coefficients[degree];
  COMPSPARSE_UNROLL for (int i = degree - 1; i >= 0; --i) sum = sum * x + coefficients[i];
  return sum;
}

template <typename T>
struct ExpConstants;

// ln2_high has so few bits that its product with an exponent is exact; `shifter` rounds to an integer by being added;
// the Taylor polynomial of |r| <= log(2) / 2 ends below half a unit in the last place.
template <>
struct ExpConstants<float> {
  using Int = int32_t;
  static constexpr int terms = 7, mantissa_bits = 23, exponent_bias = 127;
  static constexpr float lowest = -104.0f, highest = 88.7228394f, shifter = 12582912.0f;
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
};

template <>
struct ExpConstants<double> {
  using Int = int64_t;
  static constexpr int terms = 13, mantissa_bits = 52, exponent_bias = 1023;
  static constexpr double lowest = -746.0, highest = 709.78271289338397, shifter = 6755399441055744.0;
  static constexpr double ln2_high = 6.93147180369123816490e-01, ln2_low = 1.90821492927058770002e-10;
};

// e^x = 2^n e^r, for x up to where it overflows; gradual underflow and NaN included.
template <typename T, int L>
COMPSPARSE_INLINE Vec<T, L> exp_below_overflow(Vec<T, L> x) {
  using C = ExpConstants<T>;
  using Ints = Vec<typename C::Int, L>;
  x = x < C::lowest ? Vec<T, L>{} + C::lowest : x;
  const Vec<T, L> shifted = x * T(1.44269504088896340736) + C::shifter, n = shifted - C::shifter;
  const Vec<T, L> r = x - n * C::ln2_high - n * C::ln2_low;
  T factorial = 1;
  T inverse[C::terms + 1] = {1};
  COMPSPARSE_UNROLL for (int k = 1; k <= C::terms; ++k) inverse[k] = 1 / (factorial *= T(k));
  Vec<T, L> p = Vec<T, L>{} + inverse[C::terms];
  COMPSPARSE_UNROLL for (int k = C::terms - 1; k >= 0; --k) p = p * r + inverse[k];
  // Two factors, since neither 2^128 nor the least subnormal is a power the exponent bits can hold.
  const Ints exponent = (Ints)shifted - (Ints)(Vec<T, L>{} + C::shifter), half = exponent >> 1;
  const auto power_of_two = [](Ints e) { return (Vec<T, L>)((e + C::exponent_bias) << C::mantissa_bits); };
  return p * power_of_two(half) * power_of_two(exponent - half);
}

template <typename T, int L>
COMPSPARSE_INLINE Vec<T, L> vector_exp(Vec<T, L> x) {
  using C = ExpConstants<T>;
  const Vec<T, L> e = exp_below_overflow<T, L>(x > C::highest ? Vec<T, L>{} : x);
  return x > C::highest ? Vec<T, L>{} + T(__builtin_inf()) : e;
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
  const Vec<float, L> outer = 1 - vector_exp<float, L>(polynomial<L>(bounded, far, 8));
  const Vec<float, L> result = size <= 1 ? inner : (x < 0 ? -outer : outer);
  return x == x ? result : x;
}

template <int L>
COMPSPARSE_INLINE Vec<double, L> vector_erf(Vec<double, L> x) {
  for (int i = 0; i < L; ++i) x[i] = __builtin_erf(x[i]);
  return x;
}

}  // namespace
