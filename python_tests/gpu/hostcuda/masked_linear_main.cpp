// masked_linear's CUDA kernels on ragged cases, for the sanitizer builds: each result against sums in long double.
//   masked_linear [seed] [element types...]
//
// The bound is that of floating-point summation: a sum of n products in any order errs by at most (n + 1) u / (1 - (n +
// 1) u) times the sum of their sizes (Higham, section 3.1), u the unit roundoff of the accumulator; rounding to the
// element type adds that type's unit roundoff.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "buffer.h"
#include "masked_linear.h"

namespace {

template <typename T>
struct Traits;
template <>
struct Traits<float> {
  static constexpr ElementType type = Float32;
  static constexpr double unit = 0x1p-24, sum_unit = 0x1p-24, smallest = 0x1p-149;
};
template <>
struct Traits<double> {
  static constexpr ElementType type = Float64;
  static constexpr double unit = 0x1p-53, sum_unit = 0x1p-53, smallest = 0x1p-1074;
};
template <>
struct Traits<__half> {
  static constexpr ElementType type = Float16;
  static constexpr double unit = 0x1p-11, sum_unit = 0x1p-24, smallest = 0x1p-24;
};
template <>
struct Traits<__nv_bfloat16> {
  static constexpr ElementType type = BFloat16;
  static constexpr double unit = 0x1p-8, sum_unit = 0x1p-24, smallest = 0x1p-133;
};

// A sum and what bounds its error.
struct Exact {
  long double sum = 0, size = 0;
  int64_t terms = 0;
  void add(long double term) {
    sum += term;
    size += std::fabs(term);
    ++terms;
  }
};

struct Shape {
  int64_t out_features, in_features, batch;
  int64_t row_length = -1;  // of all rows; -1: ragged
};

struct Pattern {
  std::vector<int64_t> ptr = {0};
  std::vector<int32_t> idx;
  int64_t entries() const { return ptr.back(); }
};

// Ragged rows are of unsorted lengths: a third empty, one that holds every column.
Pattern random_pattern(const Shape& shape, std::mt19937& generator) {
  Pattern pattern;
  std::vector<int32_t> columns(shape.in_features);
  for (int64_t c = 0; c < shape.in_features; ++c) columns[c] = static_cast<int32_t>(c);
  for (int64_t row = 0; row < shape.out_features; ++row) {
    std::shuffle(columns.begin(), columns.end(), generator);
    int64_t length = generator() % 3 == 0 ? 0 : generator() % std::min<int64_t>(shape.in_features + 1, 90);
    if (row == shape.out_features / 2) length = shape.in_features;
    if (shape.row_length >= 0) length = shape.row_length;
    std::sort(columns.begin(), columns.begin() + length);
    pattern.idx.insert(pattern.idx.end(), columns.begin(), columns.begin() + length);
    pattern.ptr.push_back(static_cast<int64_t>(pattern.idx.size()));
  }
  return pattern;
}

template <typename T>
Buffer<T> random_buffer(int64_t size, std::mt19937& generator) {
  std::normal_distribution<float> normal;
  Buffer<T> buffer(size);
  for (int64_t i = 0; i < size; ++i) buffer[i] = T(normal(generator));
  return buffer;
}

template <typename T>
Buffer<T> exactly(const std::vector<T>& from) {
  Buffer<T> buffer(static_cast<int64_t>(from.size()));
  std::copy(from.begin(), from.end(), buffer.data());
  return buffer;
}

template <typename T>
long double number(const T& value) {
  if constexpr (sizeof(T) == 2)
    return static_cast<float>(value);
  else
    return value;
}

int failures = 0;

template <typename T>
void expect(const char* what, const Shape& shape, int64_t i, const T& result, const Exact& exact) {
  const long double sum_error = static_cast<long double>(exact.terms + 1) * Traits<T>::sum_unit;
  const long double summed = exact.size * sum_error / (1 - sum_error);
  const long double bound = summed + Traits<T>::unit * (std::fabs(exact.sum) + summed) + Traits<T>::smallest;
  const long double error = std::fabs(number(result) - exact.sum);
  if (error <= bound) return;  // false for NaN
  ++failures;
  fprintf(stderr, "%s, element type %d, %ld x %ld, batch %ld, element %ld: got %Lg, expected %Lg +- %Lg\n", what,
          Traits<T>::type, long(shape.out_features), long(shape.in_features), long(shape.batch), long(i),
          number(result), exact.sum, bound);
}

template <typename T, typename Index>
void check_product(const Shape& shape, const Pattern& pattern, bool permuted, std::mt19937& generator) {
  const int64_t entries = pattern.entries();
  const auto x = random_buffer<T>(shape.batch * shape.in_features, generator);
  const auto values = random_buffer<T>(entries, generator), bias = random_buffer<T>(shape.out_features, generator);
  const auto ptr = exactly(pattern.ptr);
  const auto idx = exactly(std::vector<Index>(pattern.idx.begin(), pattern.idx.end()));
  Buffer<int32_t> perm(entries);
  for (int64_t p = 0; p < entries; ++p) perm[p] = static_cast<int32_t>(permuted ? entries - 1 - p : p);
  Buffer<T> y(shape.batch * shape.out_features);
  hostcuda_masked_linear(Traits<T>::type, x.data(), values.data(), bias.data(), y.data(), ptr.data(), idx.data(),
                         sizeof(Index) == 4, permuted ? perm.data() : nullptr, false, shape.batch, shape.in_features,
                         shape.out_features, entries);
  for (int64_t n = 0; n < shape.batch; ++n)
    for (int64_t row = 0; row < shape.out_features; ++row) {
      Exact exact;
      exact.add(number(bias[row]));
      for (int64_t p = ptr[row]; p < ptr[row + 1]; ++p)
        exact.add(number(values[perm[p]]) * number(x[n * shape.in_features + idx[p]]));
      expect("product", shape, n * shape.out_features + row, y[n * shape.out_features + row], exact);
    }
}

template <typename T, typename Index>
void check_sampled(const Shape& shape, const Pattern& pattern, std::mt19937& generator) {
  const auto a = random_buffer<T>(shape.batch * shape.out_features, generator);
  const auto b = random_buffer<T>(shape.batch * shape.in_features, generator);
  const auto ptr = exactly(pattern.ptr);
  const auto idx = exactly(std::vector<Index>(pattern.idx.begin(), pattern.idx.end()));
  Buffer<T> values(pattern.entries());
  hostcuda_sampled_matmul(Traits<T>::type, a.data(), b.data(), values.data(), ptr.data(), idx.data(),
                          sizeof(Index) == 4, shape.batch, shape.in_features, shape.out_features, pattern.entries());
  for (int64_t row = 0; row < shape.out_features; ++row)
    for (int64_t p = ptr[row]; p < ptr[row + 1]; ++p) {
      Exact exact;
      for (int64_t n = 0; n < shape.batch; ++n)
        exact.add(number(a[n * shape.out_features + row]) * number(b[n * shape.in_features + idx[p]]));
      expect("sampled", shape, p, values[p], exact);
    }
}

template <typename T, typename Index>
void check_columns(const Shape& shape, const Pattern& pattern, std::mt19937& generator) {
  check_product<T, Index>(shape, pattern, shape.batch % 2 == 0, generator);
  check_sampled<T, Index>(shape, pattern, generator);
}

template <typename T>
void check(const Shape& shape, std::mt19937& generator) {
  const Pattern pattern = random_pattern(shape, generator);
  check_columns<T, int16_t>(shape, pattern, generator);
  check_columns<T, int32_t>(shape, pattern, generator);
}

}  // namespace

int main(int count, char** arguments) {
  // Every warp shape and more than one piece of the batch, more than one block, long rows; rows of 15 entries, so that
  // some begin where a warp's window does; several long rows in a block; rows that are cut into pieces.
  const Shape shapes[] = {{1, 1, 1},    {5, 7, 2},     {13, 300, 1},     {29, 530, 3},     {60, 40, 33},
                          {70, 600, 1}, {9, 270, 130}, {130, 20, 2, 15}, {6, 300, 2, 300}, {3, 6200, 2, 6150}};
  std::mt19937 generator(count > 1 ? static_cast<unsigned>(std::stoul(arguments[1])) : 0);
  std::set<int> types;
  for (int i = 2; i < count; ++i) types.insert(std::stoi(arguments[i]));
  if (types.empty()) types = {Float32, Float64, Float16, BFloat16};
  for (const Shape& shape : shapes) {
    hostcuda_seed(generator());
    if (types.contains(Float32)) check<float>(shape, generator);
    if (types.contains(Float64)) check<double>(shape, generator);
    if (types.contains(Float16)) check<__half>(shape, generator);
    if (types.contains(BFloat16)) check<__nv_bfloat16>(shape, generator);
  }
  if (failures) return 1;
  puts("masked_linear: all within the bound");
}
