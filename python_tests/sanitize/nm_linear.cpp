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

// Some batch rows of x [batch, features] as a panel, in a buffer of exactly its size; one row is not packed.
template <typename T>
struct Panel {
  Panel(const NMPanels<T>& kernel, const Buffer<T>& x, int64_t first, int64_t batch, int64_t features)
      : rows(std::min(kernel.rows, batch - first)),
        width(kernel.width(rows)),
        packed(Buffer<T>::unwritten(width == 1 ? 0 : width * features)),
        data(width == 1 ? x.data() + first * features : packed.data()) {
    for (int64_t part = 0; part < 2 && width > 1; ++part)
      kernel.pack(x.data() + first * features, features, rows, {features * part / 2, features * (part + 1) / 2},
                  packed.data());
  }
  const T* from(int64_t feature) const { return data + feature * width; }

  int64_t rows, width;
  Buffer<T> packed;
  const T* data;
};

// y [batch, outputs] panel by panel: stores the sums of all chunks, which `accumulate` makes.
template <typename T, class Accumulate>
void run_panels(const NMKernels<T>& kernel, const Buffer<T>& x, int64_t batch, int64_t features, int64_t outputs,
                const Buffer<T>& y, const Accumulate& accumulate) {
  for (int64_t first = 0; first < batch; first += kernel.product_panels.rows) {
    const Panel<T> panel(kernel.product_panels, x, first, batch, features);
    const auto sums = Buffer<T>::unwritten(round_up(outputs, batch_lanes) * panel.width);
    accumulate(panel, sums);
    kernel.store(sums.data(), panel.width, panel.rows, outputs, outputs, y.data() + first * outputs);
  }
}

// Some groups at a time, which begin at whole bytes and have no more than 256 columns.
template <class Visit>
void for_each_chunk(const NMPattern& p, const Visit& visit) {
  const int64_t at_once = p.m > 60 ? 1 : 4;
  for (int64_t g = 0; g < nm_groups(p); g += at_once) visit(Range{g, std::min(g + at_once, nm_groups(p))});
}

template <typename T>
void check_product(const NMKernels<T>& kernel, const Shape& s, const Slots& slots, bool with_bias,
                   std::mt19937& generator) {
  const NMPattern& p = slots.pattern;
  const auto x = Buffer<T>::random(s.batch * s.in_features, generator);
  const auto values = Buffer<T>::random(slots.columns.size(), generator);
  const auto bias = Buffer<T>::random(s.out_features, generator);
  const auto y = Buffer<T>::unwritten(s.batch * s.out_features);
  const auto accumulate = [&](const Panel<T>& panel, const Buffer<T>& sums) {
    for_each_chunk(p, [&](Range groups) {
      const int64_t count = (groups.end - groups.begin) * s.n;
      const Buffer<uint8_t> idx(s.out_features * count);
      const Buffer<int32_t> counts(s.out_features);
      int32_t* const inside = groups.end * s.m > s.in_features ? counts.data() : nullptr;
      kernel.by_row(p, {0, s.out_features}, groups, idx.data(), inside);
      const T* const first = values.data() + groups.begin * s.n;
      const NMEntries<const T> entries = {first, idx.data(), inside, count, slots.slots, count};
      kernel.accumulate(entries, panel.from(groups.begin * s.m), panel.width, s.out_features, groups.begin == 0,
                        with_bias ? bias.data() : nullptr, sums.data());
    });
  };
  run_panels(kernel, x, s.batch, s.in_features, s.out_features, y, accumulate);
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
  const auto accumulate = [&](const Panel<T>& panel, const Buffer<T>& sums) {
    for (int64_t r = 0; r < s.out_features; r += chunk_rows)
      for_each_chunk(p, [&](Range groups) {
        const int64_t first = groups.begin * s.m, columns = (groups.end - groups.begin) * s.m;
        const Range rows = {r, std::min(r + chunk_rows, s.out_features)};
        const int64_t stride = rows.end - rows.begin;
        const Buffer<uint8_t> idx(columns * stride);
        const auto ordered = Buffer<T>::unwritten(columns * stride);
        const Buffer<int32_t> counts(columns);
        kernel.by_column(p, values.data(), groups, rows, idx.data(), ordered.data(), counts.data());
        const NMEntries<const T> entries = {ordered.data(), idx.data(), counts.data(), 0, stride, stride};
        kernel.accumulate(entries, panel.from(r), panel.width, std::min(columns, s.in_features - first), r == 0,
                          nullptr, sums.data() + first * panel.width);
      });
  };
  run_panels(kernel, x, s.batch, s.out_features, s.in_features, y, accumulate);
  std::vector<double> exact(y.size());
  for (int64_t n = 0; n < s.batch; ++n)
    for (int64_t k = 0; k < slots.columns.size(); ++k)
      if (slots.columns[k] < s.in_features)
        exact[n * s.in_features + slots.columns[k]] += double(values[k]) * x[n * s.out_features + k / slots.slots];
  sanitize::expect_equal(y.data(), exact.data(), y.size(), "transposed product " + s.name());
  const int64_t middle = nm_groups(p) / 8 * 4;  // begins at a whole byte
  for (int64_t n = 0; n < s.batch; ++n) {
    T* const row = y.data() + n * s.in_features;
    std::fill(row, row + s.in_features, T(0));
    for (const Range groups : {Range{0, middle}, Range{middle, nm_groups(p)}})
      kernel.scatter(p, values.data(), x.data() + n * s.out_features, groups, row);
  }
  sanitize::expect_equal(y.data(), exact.data(), y.size(), "scattered product " + s.name());
}

template <typename T>
void check_sampled(const NMKernels<T>& kernel, const Shape& s, const Slots& slots, std::mt19937& generator) {
  const NMPattern& p = slots.pattern;
  const auto a = Buffer<T>::random(s.batch * s.out_features, generator);
  const auto b = Buffer<T>::random(s.batch * s.in_features, generator);
  const auto values = Buffer<T>::unwritten(slots.columns.size());
  for (int64_t first = 0; first < s.batch; first += kernel.sampled_panels.rows) {
    const Panel<T> a_panel(kernel.sampled_panels, a, first, s.batch, s.out_features);
    const Panel<T> b_panel(kernel.sampled_panels, b, first, s.batch, s.in_features);
    for_each_chunk(p, [&](Range groups) {
      const int64_t count = (groups.end - groups.begin) * s.n;
      const Buffer<uint8_t> idx(s.out_features * count);
      const Buffer<int32_t> counts(s.out_features);
      kernel.by_row(p, {0, s.out_features}, groups, idx.data(), counts.data());
      T* const to = values.data() + groups.begin * s.n;
      const NMEntries<T> entries = {to, idx.data(), counts.data(), count, slots.slots, count};
      kernel.sampled(entries, a_panel.data, b_panel.from(groups.begin * s.m), a_panel.width, s.out_features, first > 0);
    });
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
