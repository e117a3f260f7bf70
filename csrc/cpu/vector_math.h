// exp and the normal distribution function on vectors, within two units in the last place (of 1, for the latter). In
// float64 erf is libm's, lane by lane. Square roots are correctly rounded.
#pragma once

#include "simd.h"

#if defined(__SSE2__)
#include "intrinsics.h"
#endif

namespace {

template <int L>
COMPSPARSE_INLINE Vec<float, L> polynomial(Vec<float, L> x, const float* coefficients, int degree) {
  Vec<float, L> sum = Vec<float, L>{} + coefficients[degree];
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

// e^x = 2^n e^r -> e^r; `shifted` has n in its lowest bits.
template <typename T, int L>
COMPSPARSE_INLINE Vec<T, L> reduced_exp(Vec<T, L> x, Vec<T, L>& shifted) {
  using C = ExpConstants<T>;
  shifted = x * T(1.44269504088896340736) + C::shifter;
  const Vec<T, L> n = shifted - C::shifter;
  const Vec<T, L> r = x - n * C::ln2_high - n * C::ln2_low;
  T factorial = 1;
  T inverse[C::terms + 1] = {1};
  COMPSPARSE_UNROLL for (int k = 1; k <= C::terms; ++k) inverse[k] = 1 / (factorial *= T(k));
  Vec<T, L> p = Vec<T, L>{} + inverse[C::terms];
  COMPSPARSE_UNROLL for (int k = C::terms - 1; k >= 0; --k) p = p * r + inverse[k];
  return p;
}

// For x up to where it overflows; gradual underflow and NaN included.
template <typename T, int L>
COMPSPARSE_INLINE Vec<T, L> exp_below_overflow(Vec<T, L> x) {
  using C = ExpConstants<T>;
  using Ints = Vec<typename C::Int, L>;
  Vec<T, L> shifted;
  const Vec<T, L> p = reduced_exp<T, L>(x < C::lowest ? Vec<T, L>{} + C::lowest : x, shifted);
  // Two factors, since neither 2^128 nor the least subnormal is a power the exponent bits can hold.
  const Ints exponent = (Ints)shifted - (Ints)(Vec<T, L>{} + C::shifter), half = exponent >> 1;
  const auto power_of_two = [](Ints e) { return (Vec<T, L>)((e + C::exponent_bias) << C::mantissa_bits); };
  return p * power_of_two(half) * power_of_two(exponent - half);
}

// For x <= 0; gradual underflow and NaN included. What is 0 is made so without arithmetic that underflows: that takes
// many processors a hundred steps.
template <typename T, int L>
COMPSPARSE_INLINE Vec<T, L> exp_of_negative(Vec<T, L> x) {
  using C = ExpConstants<T>;
  using Ints = Vec<typename C::Int, L>;
  const auto nothing = x < C::lowest;
  Vec<T, L> shifted;
  const Vec<T, L> p = reduced_exp<T, L>(nothing ? Vec<T, L>{} : x, shifted);
  // 2^(n + bias / 2), an ordinary number for any n here; only n is left of the lowest bits of `shifted`.
  constexpr int more = C::exponent_bias / 2;
  constexpr typename C::Int base = typename C::Int(C::exponent_bias + more) << C::mantissa_bits;
  const Vec<T, L> power = (Vec<T, L>)(((Ints)shifted << C::mantissa_bits) + base);
  constexpr T back = sizeof(T) == 4 ? T(0x1p-63) : T(0x1p-511);
  return nothing ? Vec<T, L>{} : p * power * back;
}

template <typename T, int L>
COMPSPARSE_INLINE Vec<T, L> vector_exp(Vec<T, L> x) {
  using C = ExpConstants<T>;
  const Vec<T, L> e = exp_below_overflow<T, L>(x > C::highest ? Vec<T, L>{} : x);
  return x > C::highest ? Vec<T, L>{} + T(__builtin_inf()) : e;
}

// The standard normal distribution function of z, and e^(-z^2/2), which serves both: Phi(-|z|) = e^(-z^2/2) P(|z|), P
// fitted on [0, 5.6] to an error of 2e-8 in Phi. Beyond 6.4 Phi is 0 or 1, and z e^(-z^2/2) is 0, to within 1e-8.
template <int L>
COMPSPARSE_INLINE Vec<float, L> normal_cdf(Vec<float, L> z, Vec<float, L>& e) {
  using C = ExpConstants<float>;
  using Words = Vec<uint32_t, L>;
  constexpr float rate = -0.72134752044448170368f;  // e^(-z^2/2) = 2^(rate z^2)
  constexpr float tail[] = {0.5f,
                            -0.39894112944602966f,
                            0.24997738003730774f,
                            -0.13282491266727448f,
                            0.06196511164307594f,
                            -0.025524765253067017f,
                            0.00904662162065506f,
                            -0.0026122669223695993f,
                            0.000570996489841491f,
                            -8.626776252640411e-05f,
                            7.879319127823692e-06f,
                            -3.238330634758313e-07f};
  // 2^f for |f| <= 1/2, to a relative error of 2e-9.
  constexpr float power[] = {1,
                             0.6931471824645996f,
                             0.24022647738456726f,
                             0.055503323674201965f,
                             0.00961843691766262f,
                             0.0013398875016719103f,
                             0.00015353361959569156f};
  const Vec<float, L> size = (Vec<float, L>)((Words)z & 0x7fffffff), square = z * z;
  const Words matters = (Words)(size < 6.4f);
  const Vec<float, L> shifted = square * rate + C::shifter, f = square * rate - (shifted - C::shifter);
  // The shifter's own bits leave at the upper end: what is added to the exponent is the integer.
  const Words bits = (Words)polynomial<L>(f, power, 6) + ((Words)shifted << C::mantissa_bits);
  e = (Vec<float, L>)(bits & matters);
  const Vec<float, L> product = e * polynomial<L>(size, tail, 11), lower = size < 6.4f ? product : Vec<float, L>{};
  return z < 0 ? lower : 1 - lower;
}

template <int L>
COMPSPARSE_INLINE Vec<double, L> normal_cdf(Vec<double, L> z, Vec<double, L>& e) {
  Vec<double, L> result;
  for (int i = 0; i < L; ++i) result[i] = 0.5 * (1 + __builtin_erf(z[i] * 0.70710678118654752440));
  e = vector_exp<double, L>(z * z * -0.5);
  return result;
}

// The compiler's own square root calls the C library for the errno of negative numbers, so lanes stay single.
template <typename T, int L>
COMPSPARSE_INLINE Vec<T, L> vector_sqrt(Vec<T, L> x) {
  constexpr bool is_float = sizeof(T) == sizeof(float);
#if defined(__AVX512F__)
  if constexpr (is_float && L == 16) return (Vec<T, L>)_mm512_maskz_sqrt_ps(0xffff, (__m512)x);
  if constexpr (!is_float && L == 8) return (Vec<T, L>)_mm512_maskz_sqrt_pd(0xff, (__m512d)x);
#endif
#if defined(__AVX__)
  if constexpr (is_float && L == 8) return (Vec<T, L>)_mm256_sqrt_ps((__m256)x);
  if constexpr (!is_float && L == 4) return (Vec<T, L>)_mm256_sqrt_pd((__m256d)x);
#endif
#if defined(__SSE2__)
  if constexpr (is_float && L == 4) return (Vec<T, L>)_mm_sqrt_ps((__m128)x);
  if constexpr (!is_float && L == 2) return (Vec<T, L>)_mm_sqrt_pd((__m128d)x);
#endif
  Vec<T, L> roots;
  for (int i = 0; i < L; ++i) roots[i] = is_float ? T(__builtin_sqrtf(float(x[i]))) : T(__builtin_sqrt(double(x[i])));
  return roots;
}

COMPSPARSE_INLINE double root(double x) { return vector_sqrt<double, 2>(Vec<double, 2>{x, x})[0]; }

}  // namespace
