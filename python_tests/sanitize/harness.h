// What the sanitizer runs of all ops share: exactly sized buffers, random patterns, comparison, registration.
//
// A room's file registers its runs with RUN_UNDER_SANITIZERS; main.cpp runs what is registered. Buffers are allocated
// at exactly the size the boundary promises, so AddressSanitizer sees any access past an end; outputs and scratch start
// as NaN, so what a kernel does not write, or reads before writing, does not compare equal.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/cpu/kernels.h"

namespace sanitize {

struct Run {
  std::string name;
  std::function<void()> body;
};

inline std::vector<Run>& runs() {
  static std::vector<Run> all;
  return all;
}

inline int& mismatches() {
  static int count = 0;
  return count;
}

inline bool registered(const char* name, std::function<void()> body) {
  runs().push_back({name, std::move(body)});
  return true;
}

// Registers `body` for an instruction set that this processor has; the tables of the others are not touched.
#define RUN_UNDER_SANITIZERS(op, isa, supported, body) \
  static const bool run_##op##_##isa = (supported) && sanitize::registered(#op " " #isa, body)

#if defined(__x86_64__)
inline bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
inline bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif

// Numbers of a type from double and back; half precision is cut off at its last bit, which no test here looks at.
template <typename T>
struct Number {
  static T from(double x) { return T(x); }
  static double value(T x) { return double(x); }
};

template <>
struct Number<compsparse::BFloat16> {
  static compsparse::BFloat16 from(double x) {
    const float wide = float(x);
    uint32_t bits;
    memcpy(&bits, &wide, sizeof(bits));
    return {uint16_t(bits >> 16)};
  }
  static double value(compsparse::BFloat16 x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float wide;
    memcpy(&wide, &bits, sizeof(wide));
    return wide;
  }
};

template <>
struct Number<compsparse::Float16> {
  static compsparse::Float16 from(double x) {
    if (isnan(x)) return {0x7e00};
    int exponent;
    const double fraction = frexp(fabs(x), &exponent);  // in 0.5 .. 1
    const bool normal = x != 0 && exponent >= -13;
    const int size = normal ? (exponent + 14) * 1024 + int(ldexp(fraction, 11)) - 1024 : int(ldexp(fabs(x), 24));
    return {uint16_t(size | (signbit(x) ? 0x8000 : 0))};
  }
  static double value(compsparse::Float16 x) {
    const int exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
    const double size = exponent == 31 ? (mantissa ? NAN : INFINITY)
                        : exponent     ? ldexp(1024 + mantissa, exponent - 25)
                                       : ldexp(mantissa, -24);
    return x.bits & 0x8000 ? -size : size;
  }
};

// Not a vector: its spare capacity would hide a write past the end. An empty buffer is one that may not be touched.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t size) : size_(size), data_(new T[size]) {}

  static Buffer unwritten(int64_t size) {
    Buffer buffer(size);
    for (int64_t i = 0; i < size; ++i) buffer[i] = Number<T>::from(NAN);
    return buffer;
  }

  static Buffer random(int64_t size, std::mt19937& generator) {
    Buffer buffer(size);
    std::uniform_real_distribution<double> uniform(-1, 1);
    for (int64_t i = 0; i < size; ++i) buffer[i] = Number<T>::from(uniform(generator));
    return buffer;
  }

  static Buffer copy(const std::vector<T>& from) {
    Buffer buffer(int64_t(from.size()));
    for (int64_t i = 0; i < buffer.size_; ++i) buffer[i] = from[i];
    return buffer;
  }

  T* data() const { return data_.get(); }
  T& operator[](int64_t i) const { return data_[i]; }
  int64_t size() const { return size_; }

 private:
  int64_t size_;
  std::unique_ptr<T[]> data_;
};

// A compressed pattern [rows, columns] whose entries are there with probability `density`.
struct Pattern {
  Buffer<int64_t> ptr;
  Buffer<int32_t> idx;
  int64_t entries() const { return idx.size(); }
};

inline Pattern random_pattern(int64_t rows, int64_t columns, double density, std::mt19937& generator) {
  std::bernoulli_distribution there(density);
  std::vector<int64_t> ptr = {0};
  std::vector<int32_t> idx;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c)
      if (there(generator)) idx.push_back(int32_t(c));
    ptr.push_back(int64_t(idx.size()));
  }
  return {Buffer<int64_t>::copy(ptr), Buffer<int32_t>::copy(idx)};
}

// Sums of at most a few hundred terms in -1..1: far below what a wrong index does, far above any order's rounding.
template <typename T>
void expect_equal(const T* ours, const double* exact, int64_t size, const std::string& what) {
  const double tolerance = sizeof(T) == 8 ? 1e-11 : sizeof(T) == 4 ? 1e-4 : 1e-2;
  for (int64_t i = 0; i < size; ++i) {
    const double value = Number<T>::value(ours[i]);
    if (value == exact[i] || (isnan(value) && isnan(exact[i]))) continue;
    if (fabs(value - exact[i]) <= tolerance * (1 + fabs(exact[i]))) continue;
    fprintf(stderr, "%s: element %lld is %g, expected %g\n", what.c_str(), (long long)i, value, exact[i]);
    ++mismatches();
    return;
  }
}

}  // namespace sanitize
