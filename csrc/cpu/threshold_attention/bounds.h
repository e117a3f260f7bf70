// How far a screened score may lie from the score in exact arithmetic.
//
// The screen computes x = fl(fl(sum_k fl(scale q_k) k_k) + bias) in T with unit roundoff u. With n = width + 4
// roundings on any path and gamma = n u / (1 - n u), the standard bound for a sum of products in any order, and
// Cauchy-Schwarz,
//   |x - s| <= gamma |scale| |q| |k| + u |x| + n (1 + |k|) (smallest normal number)  =:  a + u |x|;
// where ALiBi takes fl(slope distance) from a score, its own rounding and that of the sum before it add 4 u of it to a;
// the last term is for underflow, of which there is at most one smallest normal number a step, in a product or in a
// scaled query. Norms are computed in double and rounded up. Where T overflows, a is infinite or NaN, every comparison
// with it fails, and a key counts as undecided, never as dropped.
#pragma once

#include <stdint.h>

namespace {

template <typename T>
struct Rounding;

template <>
struct Rounding<float> {
  static constexpr double unit = 0x1p-24, smallest_normal = 0x1p-126;
};

// Screened scores in double decide themselves (see `decisive_score`): they have no error to allow for.
template <>
struct Rounding<double> {
  static constexpr double unit = 0, smallest_normal = 0;
};

template <typename T>
inline double norm_above(const T* x, int64_t width) {
  double lanes[8] = {};
  int64_t d = 0;
  for (; d + 8 <= width; d += 8)
    for (int lane = 0; lane < 8; ++lane) lanes[lane] += double(x[d + lane]) * double(x[d + lane]);
  for (; d < width; ++d) lanes[0] += double(x[d]) * double(x[d]);
  double sum = 0;
  for (int lane = 0; lane < 8; ++lane) sum += lanes[lane];
  return __builtin_sqrt(sum) * (1 + double(width + 4) * 0x1p-52);
}

template <typename T>
inline T larger_of(T a, T b) {
  return a > b ? a : b;
}

inline double larger_or_nan(double a, double b) { return a != a || a > b ? a : b; }

template <typename T>
inline T largest_of(const T* x, int64_t count) {
  T largest = -__builtin_inf();
  for (int64_t i = 0; i < count; ++i) largest = larger_of(largest, x[i]);
  return largest;
}

template <typename T>
class ScreenError {
 public:
  ScreenError() = default;

  // Upper bounds of |scale| |q|, of |k| for every key of the row, and of what ALiBi takes from a score.
  ScreenError(double query, double key, double alibi, int64_t width) {
    const double n = double(width + 4) * Rounding<T>::unit;
    absolute_ = n / (1 - n) * query * key + 4 * Rounding<T>::unit * alibi +
                double(width + 4) * Rounding<T>::smallest_normal * (1 + key);
  }

  // Below this screened score a key's exact score is certainly under c. Finite, so that masked keys (-inf) are under
  // it.
  T below(double c) const {
    const double y = c - absolute_, x = y - 8 * Rounding<T>::unit * __builtin_fabs(y);
    const double lowest = sizeof(T) == 4 ? -double(__FLT_MAX__) : -__DBL_MAX__;
    return x >= lowest ? T(x) : T(lowest);
  }

  // From this screened score on a key's exact score is certainly c or more. Infinite where there is no such bound.
  T above(double c) const {
    const double y = c + absolute_, x = y + 8 * Rounding<T>::unit * __builtin_fabs(y);
    return x == x ? T(x) : T(__builtin_inf());
  }

  // The least and the largest exact score of a key with this screened score.
  double at_least(T screened) const { return screened - absolute_ - relative(screened); }
  double at_most(T screened) const { return screened + absolute_ + relative(screened); }

 private:
  static double relative(T screened) { return 4 * Rounding<T>::unit * __builtin_fabs(double(screened)); }

  double absolute_;
};

}  // namespace
