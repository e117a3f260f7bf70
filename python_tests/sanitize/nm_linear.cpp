// nm_linear's tables: entries by row and by column, sums and stores, against plain loops.
#include <algorithm>

#include "harness.h"

namespace {

using namespace compsparse;
using sanitize::Buffer;

struct Shape {
  int64_t out_features, in_features, n, m, batch;
  std::string name() const {
    return std::to_string(out_features) + "x" + std::to_string(in_features) + " " + std::to_string(n) + ":" +
           std::to_string(m) + " batch " + std::to_string(batch);
  }
};

const Shape shapes[] = {
    {1, 1, 1, 1, 1},    {7, 5, 2, 4, 2},      {13, 11, 3, 3, 3},    {24, 40, 4, 8, 8},  {21, 37, 1, 4, 17},
    {64, 48, 2, 4, 33}, {50, 261, 5, 16, 64}, {33, 700, 3, 17, 65}, {20, 30, 2, 7, 48}, {9, 300, 200, 256, 100},
};

constexpr int64_t chunk_rows = 13;  // of the transposed product

int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

// A pattern with random positions, and the column of each slot; in_features and more past the last column.
struct Slots {
  Slots(const Shape& s, std::mt19937& generator)
      : pattern{nullptr, s.out_features, s.in_features, s.n, s.m},
        slots(nm_groups(pattern) * s.n),
        packed(s.out_features * nm_row_bytes(pattern)),
        columns(s.out_features * slots) {
    std::fill(packed.data(), packed.data() + packed.size(), uint8_t(0));
    const int64_t bits = nm_bits(s.m);
    std::vector<int64_t> order(s.m);
    for (int64_t r = 0; r < s.out_features; ++r)
      for (int64_t g = 0; g < nm_groups(pattern); ++g) {
        for (int64_t i = 0; i < s.m; ++i) order[i] = i;
        std::shuffle(order.begin(), order.end(), generator);
        std::sort(order.begin(), order.begin() + s.n);
        for (int64_t k = 0; k < s.n; ++k) {
          const int64_t slot = g * s.n + k;
          packed[r * nm_row_bytes(pattern) + slot * bits / 8] |= uint8_t(order[k] << slot * bits % 8);
          columns[r * slots + slot] = g * s.m + order[k];
        }
      }
    pattern.positions = packed.data();
  }

  NMPattern pattern;
  int64_t slots;
  Buffer<uint8_t> packed;
  Buffer<int64_t> columns;
};

// Packs x [batch, features] panel by panel, and stores the sums of every chunk that `accumulate` makes.
template <typename T, class Accumulate>
void run_panels(const NMKernels<T>& kernel, const Buffer<T>& x, int64_t batch, int64_t features, int64_t outputs,
                const Buffer<T>& y, const Accumulate& accumulate) {
  for (int64_t first = 0; first < batch; first += kernel.product_panels.rows) {
    const int64_t rows = std::min(kernel.product_panels.rows, batch - first), width = kernel.product_panels.width(rows);
    const auto panel = Buffer<T>::unwritten(width * features);
    for (int64_t part = 0; part < 2; ++part)
      kernel.product_panels.pack(x.data() + first * features, features, rows,
                                 {features * part / 2, features * (part + 1) / 2}, panel.data());
    const auto sums = Buffer<T>::unwritten(round_up(outputs, batch_lanes) * width);
    accumulate(panel, width, sums);
    kernel.store(sums.data(), width, rows, outputs, outputs, y.data() + first * outputs);
  }
}

template <typename T>
void check_product(const NMKernels<T>& kernel, const Shape& s, const Slots& slots, bool with_bias,
                   std::mt19937& generator) {
  const NMPattern& p = slots.pattern;
  const auto x = Buffer<T>::random(s.batch * s.in_features, generator);
  const auto values = Buffer<T>::random(slots.columns.size(), generator);
  const auto bias = Buffer<T>::random(s.out_features, generator);
  const auto y = Buffer<T>::unwritten(s.batch * s.out_features);
  const int64_t at_once = s.m > 60 ? 1 : 4;  // groups, which begin at whole bytes
  run_panels(kernel, x, s.batch, s.in_features, s.out_features, y,
             [&](const Buffer<T>& panel, int64_t width, const Buffer<T>& sums) {
               for (int64_t g = 0; g < nm_groups(p); g += at_once) {
                 const int64_t end = std::min(g + at_once, nm_groups(p)), count = (end - g) * s.n;
                 const Buffer<uint8_t> idx(s.out_features * count);
                 const Buffer<int32_t> counts(s.out_features);
                 const bool ragged = end * s.m > s.in_features;
                 kernel.by_row(p, {0, s.out_features}, {g, end}, idx.data(), ragged ? counts.data() : nullptr);
                 const NMEntries<const T> entries = {
                     values.data() + g * s.n, idx.data(), ragged ? counts.data() : nullptr, count, slots.slots, count};
                 kernel.accumulate(entries, panel.data() + g * s.m * width, width, s.out_features, g == 0,
                                   with_bias ? bias.data() : nullptr, sums.data());
               }
             });
  std::vector<double> exact(y.size());
  for (int64_t n = 0; n < s.batch; ++n)
    for (int64_t r = 0; r < s.out_features; ++r) {
      double sum = with_bias ? bias[r] : 0;
      for (int64_t k = r * slots.slots; k < (r + 1) * slots.slots; ++k)
        if (slots.columns[k] < s.in_features) sum += double(values[k]) * x[n * s.in_features + slots.columns[k]];
      exact[n * s.out_features + r] = sum;
    }
  sanitize::expect_equal(y.data(), exact.data(), y.size(), "product " + s.name());
}

template <typename T>
void check_transposed(const NMKernels<T>& kernel, const Shape& s, const Slots& slots, std::mt19937& generator) {
  const NMPattern& p = slots.pattern;
  const auto x = Buffer<T>::random(s.batch * s.out_features, generator);
  const auto values = Buffer<T>::random(slots.columns.size(), generator);
  const auto y = Buffer<T>::unwritten(s.batch * s.in_features);
  const int64_t columns = nm_groups(p) * s.m;
  run_panels(
      kernel, x, s.batch, s.out_features, s.in_features, y,
      [&](const Buffer<T>& panel, int64_t width, const Buffer<T>& sums) {
        for (int64_t r = 0; r < s.out_features; r += chunk_rows) {
          const int64_t end = std::min(r + chunk_rows, s.out_features), stride = end - r;
          const Buffer<uint8_t> idx(columns * stride);
          const auto ordered = Buffer<T>::unwritten(columns * stride);
          const Buffer<int32_t> counts(columns);
          kernel.by_column(p, values.data(), {0, nm_groups(p)}, {r, end}, idx.data(), ordered.data(), counts.data());
          const NMEntries<const T> entries = {ordered.data(), idx.data(), counts.data(), 0, stride, stride};
          kernel.accumulate(entries, panel.data() + r * width, width, s.in_features, r == 0, nullptr, sums.data());
        }
      });
  std::vector<double> exact(y.size());
  for (int64_t n = 0; n < s.batch; ++n)
    for (int64_t k = 0; k < slots.columns.size(); ++k)
      if (slots.columns[k] < s.in_features)
        exact[n * s.in_features + slots.columns[k]] += double(values[k]) * x[n * s.out_features + k / slots.slots];
  sanitize::expect_equal(y.data(), exact.data(), y.size(), "transposed product " + s.name());
}

template <typename T>
void check_sampled(const NMKernels<T>& kernel, const Shape& s, const Slots& slots, std::mt19937& generator) {
  const NMPattern& p = slots.pattern;
  const auto a = Buffer<T>::random(s.batch * s.out_features, generator);
  const auto b = Buffer<T>::random(s.batch * s.in_features, generator);
  const auto values = Buffer<T>::unwritten(slots.columns.size());
  const Buffer<int32_t> counts(s.out_features);
  const NMPanels<T>& panels = kernel.sampled_panels;
  for (int64_t first = 0; first < s.batch; first += panels.rows) {
    const int64_t rows = std::min(panels.rows, s.batch - first), width = panels.width(rows);
    const auto a_panel = Buffer<T>::unwritten(width * s.out_features);
    const auto b_panel = Buffer<T>::unwritten(width * s.in_features);
    panels.pack(a.data() + first * s.out_features, s.out_features, rows, {0, s.out_features}, a_panel.data());
    panels.pack(b.data() + first * s.in_features, s.in_features, rows, {0, s.in_features}, b_panel.data());
    const int64_t at_once = 8 / nm_bits(s.m);
    for (int64_t g = 0; g < nm_groups(p); g += at_once) {
      const int64_t end = std::min(g + at_once, nm_groups(p)), count = (end - g) * s.n;
      const Buffer<uint8_t> idx(s.out_features * count);
      kernel.by_row(p, {0, s.out_features}, {g, end}, idx.data(), counts.data());
      const NMEntries<T> entries = {values.data() + g * s.n, idx.data(), counts.data(), count, slots.slots, count};
      kernel.sampled(entries, a_panel.data(), b_panel.data() + g * s.m * width, width, s.out_features, first > 0);
    }
  }
  std::vector<double> exact(values.size());
  for (int64_t k = 0; k < values.size(); ++k) {
    if (slots.columns[k] >= s.in_features) {
      values[k] = 0;  // not written: bind.cpp fills it
      continue;
    }
    for (int64_t n = 0; n < s.batch; ++n)
      exact[k] += double(a[n * s.out_features + k / slots.slots]) * b[n * s.in_features + slots.columns[k]];
  }
  sanitize::expect_equal(values.data(), exact.data(), values.size(), "sampled " + s.name());
}

template <typename T>
void check_kernels(const NMKernels<T>& kernel) {
  std::mt19937 generator(0);
  for (const Shape& s : shapes) {
    const Slots slots(s, generator);
    for (const bool with_bias : {false, true}) check_product(kernel, s, slots, with_bias, generator);
    check_transposed(kernel, s, slots, generator);
    check_sampled(kernel, s, slots, generator);
  }
}

std::function<void()> check(const NMTable& table) {
  return [&table] {
    check_kernels(table.f32);
    check_kernels(table.f64);
  };
}

RUN_UNDER_SANITIZERS(nm_linear, scalar, true, check(nm_scalar));
#if defined(__x86_64__)
RUN_UNDER_SANITIZERS(nm_linear, avx2, sanitize::has_avx2(), check(nm_avx2));
RUN_UNDER_SANITIZERS(nm_linear, avx512, sanitize::has_avx512(), check(nm_avx512));
#endif

}  // namespace
