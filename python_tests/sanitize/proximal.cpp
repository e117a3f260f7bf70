// proximal's tables: steps of SGD and AdamW with every penalty, against plain loops.
#include "harness.h"

namespace {

using namespace compsparse;
using sanitize::Buffer;

struct Shape {
  int64_t rows, columns, block_out, block_in, panel;
  std::string name() const { return std::to_string(rows) + "x" + std::to_string(columns); }
  int64_t size() const { return rows * columns; }
};

const Shape shapes[] = {
    {1, 1, 1, 1, 1},      {1, 23, 1, 23, 23}, {13, 7, 4, 3, 6},   {9, 70, 2, 8, 32},
    {40, 33, 16, 16, 48}, {6, 131, 1, 1, 64}, {5, 64, 8, 64, 64}, {70, 5, 70, 1, 4},
};
const Penalty penalties[] = {Penalty::none, Penalty::l1, Penalty::hard, Penalty::group_l1};

// What a penalty makes of the stepped weights.
void shrink(std::vector<double>& w, const Shape& s, Penalty penalty, double bound) {
  for (double& x : w) {
    if (penalty == Penalty::l1) x = fabs(x) > bound ? x - copysign(bound, x) : 0;
    if (penalty == Penalty::hard && fabs(x) < bound) x = 0;
  }
  if (penalty != Penalty::group_l1) return;
  for (int64_t row = 0; row < s.rows; row += s.block_out)
    for (int64_t column = 0; column < s.columns; column += s.block_in) {
      std::vector<int64_t> group;
      for (int64_t r = row; r < s.rows && r < row + s.block_out; ++r)
        for (int64_t c = column; c < s.columns && c < column + s.block_in; ++c) group.push_back(r * s.columns + c);
      double squares = 0;
      for (const int64_t i : group) squares += w[i] * w[i];
      const double factor = 1 - bound * sqrt(double(group.size()) / squares);
      for (const int64_t i : group) w[i] *= factor > 0 ? factor : 0;
    }
}

// Calls a kernel on two halves of what it counts, with scratch of exactly the promised size.
template <typename T, class Step>
void run(void (*kernel)(const Step&, const ProximalMap<T>&, Range, Sum<T>*, double*), const Step& step,
         const ProximalMap<T>& map) {
  const bool groups = map.penalty == Penalty::group_l1;
  const auto ceil = [](int64_t total, int64_t part) { return (total + part - 1) / part; };
  const int64_t count = groups ? ceil(map.rows, map.block_out) * ceil(map.columns, map.panel) : map.rows * map.columns;
  const auto scratch = Buffer<Sum<T>>::unwritten(groups ? (map.block_out + 1) * map.panel : 0);
  const auto squares = Buffer<double>::unwritten(groups ? map.panel : 0);
  for (const Range part : {Range{0, count / 2}, Range{count / 2, count}})
    kernel(step, map, part, scratch.data(), squares.data());
}

template <typename T>
std::vector<double> values(const Buffer<T>& buffer) {
  std::vector<double> result;
  for (int64_t i = 0; i < buffer.size(); ++i) result.push_back(sanitize::Number<T>::value(buffer[i]));
  return result;
}

template <typename T>
void check_sgd(const ProximalKernels<T>& kernel, const Shape& s, Penalty penalty, std::mt19937& generator) {
  const bool hard = penalty == Penalty::hard;
  const ProximalMap<T> map = {penalty, 0.25, s.rows, s.columns, s.block_out, s.block_in, s.panel};
  for (const bool momentum : {false, true})
    for (const bool first : {false, true}) {
      const auto param = Buffer<T>::random(s.size(), generator), grad = Buffer<T>::random(s.size(), generator);
      const auto buffer = first ? Buffer<T>::unwritten(s.size()) : Buffer<T>::random(s.size(), generator);
      auto w = values(param), g = values(grad), b = values(buffer);
      for (size_t i = 0; i < w.size(); ++i) {
        double d = g[i] + 0.125 * w[i] + (hard ? (w[i] > 0) - (w[i] < 0) : 0);
        b[i] = first ? d : 0.5 * b[i] + 0.75 * d;
        if (momentum) d += 0.5 * b[i];  // Nesterov's
        w[i] -= 0.5 * d;
      }
      shrink(w, s, penalty, map.bound);
      const SgdStep<T> step = {
          .param = param.data(),
          .grad = grad.data(),
          .buffer = momentum ? buffer.data() : nullptr,
          .lr = Sum<T>(0.5),
          .momentum = Sum<T>(0.5),
          .share = Sum<T>(0.75),
          .decay = Sum<T>(0.125),
          .sign = Sum<T>(hard ? 1 : 0),
          .nesterov = true,
          .first = first,
      };
      run<T>(kernel.sgd, step, map);
      const std::string name = "sgd " + s.name() + " penalty " + std::to_string(int(penalty));
      sanitize::expect_equal(param.data(), w.data(), s.size(), name);
      if (momentum) sanitize::expect_equal(buffer.data(), b.data(), s.size(), name + " buffer");
    }
}

template <typename T>
void check_adamw(const ProximalKernels<T>& kernel, const Shape& s, Penalty penalty, std::mt19937& generator) {
  const ProximalMap<T> map = {penalty, 0.25, s.rows, s.columns, s.block_out, s.block_in, s.panel};
  const auto param = Buffer<T>::random(s.size(), generator), grad = Buffer<T>::random(s.size(), generator);
  const auto mean = Buffer<T>::random(s.size(), generator), square = Buffer<T>::random(s.size(), generator);
  for (int64_t i = 0; i < s.size(); ++i)
    square[i] = sanitize::Number<T>::from(1 + fabs(sanitize::Number<T>::value(square[i])));
  auto w = values(param), g = values(grad), m = values(mean), v = values(square);
  for (size_t i = 0; i < w.size(); ++i) {
    m[i] += 0.125 * (g[i] - m[i]);
    v[i] = 0.75 * v[i] + 0.25 * g[i] * g[i];
    w[i] = 0.875 * w[i] - 0.5 * m[i] / (sqrt(v[i]) / 0.5 + 0.0625);
  }
  shrink(w, s, penalty, map.bound);
  const AdamWStep<T> step = {
      .param = param.data(),
      .grad = grad.data(),
      .mean = mean.data(),
      .square = square.data(),
      .keep = Sum<T>(0.875),
      .rate = Sum<T>(0.5),
      .mean_share = Sum<T>(0.125),
      .square_keep = Sum<T>(0.75),
      .square_share = Sum<T>(0.25),
      .root = Sum<T>(0.5),
      .eps = Sum<T>(0.0625),
  };
  run<T>(kernel.adamw, step, map);
  const std::string name = "adamw " + s.name() + " penalty " + std::to_string(int(penalty));
  sanitize::expect_equal(param.data(), w.data(), s.size(), name);
  sanitize::expect_equal(mean.data(), m.data(), s.size(), name + " mean");
  sanitize::expect_equal(square.data(), v.data(), s.size(), name + " square");
}

template <typename T>
void check_kernels(const ProximalKernels<T>& kernel) {
  std::mt19937 generator(0);
  for (const Shape& s : shapes)
    for (const Penalty penalty : penalties) {
      check_sgd(kernel, s, penalty, generator);
      if (penalty != Penalty::hard) check_adamw(kernel, s, penalty, generator);
    }
}

std::function<void()> check(const ProximalTable& table) {
  return [&table] {
    check_kernels(table.f32);
    check_kernels(table.f64);
    check_kernels(table.bf16);
    check_kernels(table.f16);
  };
}

RUN_UNDER_SANITIZERS(proximal, scalar, true, check(proximal_scalar));
#if defined(__x86_64__)
RUN_UNDER_SANITIZERS(proximal, avx2, sanitize::has_avx2(), check(proximal_avx2));
RUN_UNDER_SANITIZERS(proximal, avx512, sanitize::has_avx512(), check(proximal_avx512));
#endif

}  // namespace
