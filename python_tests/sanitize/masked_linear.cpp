// masked_linear's tables: pack, product, sampled and the two of kind dense, against plain loops.
#include "harness.h"

namespace {

using namespace compsparse;
using sanitize::Buffer;
using sanitize::Number;
using sanitize::Pattern;

struct Shape {
  int64_t out_features, in_features, batch;
  double density;
  std::string name() const {
    return std::to_string(out_features) + "x" + std::to_string(in_features) + " batch " + std::to_string(batch);
  }
};

const Shape shapes[] = {
    {1, 1, 1, 1.0},    {7, 5, 2, 0.5},     {13, 11, 3, 0.7},   {24, 40, 8, 0.3}, {21, 37, 17, 0.2}, {64, 48, 33, 0.1},
    {50, 61, 64, 0.3}, {33, 70, 100, 0.5}, {20, 30, 131, 0.4}, {40, 40, 0, 0.5}, {40, 40, 5, 0.0},  {9, 200, 65, 0.9},
};

// A matrix [batch, features] in panels, each in a buffer of exactly its size.
template <typename T>
struct Panels {
  Panels(const MaskedKernels<T>& kernel, int64_t panel_rows, const Buffer<T>& x, int64_t batch, int64_t features)
      : x(x), features(features) {
    for (int64_t first = 0; first < batch; first += panel_rows) {
      const int64_t end = first + panel_rows < batch ? first + panel_rows : batch;
      const int64_t width = kernel.panel_width(end - first);
      rows.push_back({first, end});
      const bool as_stored = width == 1 && !narrows<T>;
      packed.push_back(Buffer<Sum<T>>::unwritten(as_stored ? 0 : width * features));
      if (as_stored) continue;
      for (int64_t part = 0; part < 2; ++part)
        kernel.pack(x.data() + first * features, features, end - first,
                    {features * part / 2, features * (part + 1) / 2}, packed.back().data());
    }
  }
  const Sum<T>* data(size_t panel) const {
    if constexpr (!narrows<T>)
      if (!packed[panel].size()) return x.data() + rows[panel].begin * features;
    return packed[panel].data();
  }

  const Buffer<T>& x;
  int64_t features;
  std::vector<Range> rows;
  std::vector<Buffer<Sum<T>>> packed;
};

// The pattern's columns in a buffer of their own width.
template <typename Index>
Buffer<Index> columns_of(const Pattern& pattern) {
  return Buffer<Index>::copy(std::vector<Index>(pattern.idx.data(), pattern.idx.data() + pattern.entries()));
}

// Blocks of columns, in buffers of exactly the size that they need while they are made.
template <typename T, typename Index>
struct Blocks {
  Blocks(const IndexedKernels<T, Index>& kernel, const MaskedProduct<T, Index>& p, Range rows, int64_t columns)
      : count((p.in_features + columns - 1) / columns),
        values(Buffer<Sum<T>>::unwritten(p.ptr[rows.end] - p.ptr[rows.begin] + batch_lanes)),
        idx(p.ptr[rows.end] - p.ptr[rows.begin] + batch_lanes),
        segments(count * (rows.end - rows.begin)),
        blocks{.rows = rows,
               .columns = columns,
               .count = count,
               .values = values.data(),
               .idx = idx.data(),
               .segments = segments.data()} {
    std::vector<int64_t> next(rows.end - rows.begin);
    std::vector<int32_t> counts(segments.size()), places(count * (columns + 1));
    blocks.next = next.data(), blocks.counts = counts.data(), blocks.places = places.data();
    kernel.cut(p, blocks);
  }

  int64_t count;
  Buffer<Sum<T>> values;
  Buffer<Index> idx;
  std::vector<Segment> segments;
  ColumnBlocks<Sum<T>, Index> blocks;
};

Range half(int64_t total, int64_t part) { return {total * part / 2, total * (part + 1) / 2}; }

template <typename Index, typename T>
std::vector<double> exact_product(const MaskedProduct<T, Index>& p, const Buffer<T>& x) {
  std::vector<double> exact(p.batch * p.out_features);
  for (int64_t n = 0; n < p.batch; ++n)
    for (int64_t r = 0; r < p.out_features; ++r) {
      double sum = p.bias ? p.bias[r] : 0;
      for (int64_t e = p.ptr[r]; e < p.ptr[r + 1]; ++e)
        sum += p.values[e] * Number<T>::value(x[n * p.in_features + p.idx[e]]);
      exact[n * p.out_features + r] = sum;
    }
  return exact;
}

template <typename Index, typename T>
void check_product(const MaskedKernels<T>& kernel, const Shape& s, const Pattern& pattern, bool with_bias,
                   std::mt19937& generator) {
  const IndexedKernels<T, Index>& indexed = kernel;
  const auto columns = columns_of<Index>(pattern);
  const auto x = Buffer<T>::random(s.batch * s.in_features, generator);
  const auto values = Buffer<Sum<T>>::random(pattern.entries(), generator);
  const auto bias = Buffer<Sum<T>>::random(s.out_features, generator);
  const auto y = Buffer<T>::unwritten(s.batch * s.out_features);
  const MaskedProduct<T, Index> p = {
      .values = values.data(),
      .bias = with_bias ? bias.data() : nullptr,
      .y = y.data(),
      .ptr = pattern.ptr.data(),
      .idx = columns.data(),
      .batch = s.batch,
      .in_features = s.in_features,
      .out_features = s.out_features,
  };
  const Panels<T> panels(kernel, kernel.product_rows, x, s.batch, s.in_features);
  for (int64_t part = 0; part < 2; ++part)
    for (size_t panel = 0; panel < panels.rows.size(); ++panel)
      indexed.product(p, panels.data(panel), panels.rows[panel], half(s.out_features, part));
  const std::vector<double> exact = exact_product(p, x);
  sanitize::expect_equal(y.data(), exact.data(), y.size(), "product " + s.name());
  for (const int64_t columns : {7, 32}) {
    std::fill_n(y.data(), y.size(), Number<T>::from(NAN));
    for (int64_t part = 0; part < 2; ++part) {
      const Range rows = half(s.out_features, part);
      const Blocks<T, Index> blocks(indexed, p, rows, columns);
      const auto sums = Buffer<Sum<T>>::unwritten((rows.end - rows.begin + batch_lanes) * kernel.product_rows);
      for (size_t panel = 0; panel < panels.rows.size(); ++panel)
        indexed.product_blocked(p, blocks.blocks, panels.data(panel), panels.rows[panel], sums.data());
    }
    sanitize::expect_equal(y.data(), exact.data(), y.size(), "product by blocks of columns " + s.name());
  }
}

template <typename Index, typename T>
void check_sampled(const MaskedKernels<T>& kernel, const Shape& s, const Pattern& pattern, std::mt19937& generator) {
  if (s.batch == 0) return;  // no panel, no call: bind.cpp writes the zeros
  const IndexedKernels<T, Index>& indexed = kernel;
  const auto columns = columns_of<Index>(pattern);
  const auto a = Buffer<T>::random(s.batch * s.out_features, generator);
  const auto b = Buffer<T>::random(s.batch * s.in_features, generator);
  const auto sums = Buffer<Sum<T>>::unwritten(pattern.entries());
  const auto values = Buffer<T>::unwritten(pattern.entries());
  const SampledSums<Sum<T>, Index> sampled = {
      .sums = sums.data(),
      .ptr = pattern.ptr.data(),
      .idx = columns.data(),
      .batch = s.batch,
      .in_features = s.in_features,
      .out_features = s.out_features,
  };
  const Panels<T> a_panels(kernel, kernel.sampled_rows, a, s.batch, s.out_features),
      b_panels(kernel, kernel.sampled_rows, b, s.batch, s.in_features);
  for (int64_t part = 0; part < 2; ++part)
    for (size_t panel = 0; panel < a_panels.rows.size(); ++panel)
      indexed.sampled(sampled, a_panels.data(panel), b_panels.data(panel),
                      a_panels.rows[panel].end - a_panels.rows[panel].begin, panel > 0, half(s.out_features, part));
  for (int64_t part = 0; part < 2; ++part) kernel.round(sums.data(), half(values.size(), part), values.data());
  std::vector<double> exact(values.size());
  for (int64_t r = 0; r < s.out_features; ++r)
    for (int64_t e = pattern.ptr[r]; e < pattern.ptr[r + 1]; ++e)
      for (int64_t n = 0; n < s.batch; ++n)
        exact[e] +=
            Number<T>::value(a[n * s.out_features + r]) * Number<T>::value(b[n * s.in_features + pattern.idx[e]]);
  sanitize::expect_equal(values.data(), exact.data(), values.size(), "sampled " + s.name());
}

template <typename T>
void check_kernels(const MaskedKernels<T>& kernel) {
  std::mt19937 generator(0);
  for (const Shape& s : shapes) {
    const Pattern pattern = sanitize::random_pattern(s.out_features, s.in_features, s.density, generator);
    for (const bool with_bias : {false, true}) {
      check_product<int16_t>(kernel, s, pattern, with_bias, generator);
      check_product<int32_t>(kernel, s, pattern, with_bias, generator);
    }
    check_sampled<int16_t>(kernel, s, pattern, generator);
    check_sampled<int32_t>(kernel, s, pattern, generator);
  }
}

// Every single element outside of the mask is seen, and only those are written.
template <typename Bits>
void check_masking(const MaskingKernels<Bits>& kernel) {
  constexpr Bits sign = Bits(1) << (8 * sizeof(Bits) - 1);
  std::mt19937 generator(0);
  std::bernoulli_distribution kept(0.5);
  for (const int64_t size : {0, 1, 7, 64, 129, 4097}) {
    const std::string what = "masking " + std::to_string(8 * sizeof(Bits)) + " bits, size " + std::to_string(size);
    Buffer<uint8_t> mask(size);
    Buffer<Bits> values(size);
    std::vector<double> exact(size);
    const auto look = [&] { return kernel.any_outside(values.data(), mask.data(), {0, size}); };
    for (int64_t i = 0; i < size; ++i) {
      mask[i] = kept(generator);
      values[i] = mask[i] ? Bits(i + 1) : i % 2 ? sign : Bits(0);
      exact[i] = mask[i] ? double(i + 1) : 0;
    }
    bool right = !look();
    for (int64_t i = 0; i < size; i += 1 + size / 64)
      for (const Bits odd : {Bits(1), Bits(sign | 1), Bits(sign >> 1)}) {
        const Bits before = values[i];
        values[i] = odd;
        right &= look() == !mask[i];
        values[i] = before;
      }
    const double looked = right, expected = 1;
    sanitize::expect_equal(&looked, &expected, 1, what + ": the look");
    for (int64_t part = 0; part < 2; ++part) kernel.zero_outside(values.data(), mask.data(), half(size, part));
    std::vector<double> written(size);
    for (int64_t i = 0; i < size; ++i) written[i] = double(values[i]);
    sanitize::expect_equal(written.data(), exact.data(), size, what);
  }
}

std::function<void()> check(const MaskedTable& table) {
  return [&table] {
    check_kernels(table.f32);
    check_kernels(table.f64);
    check_kernels(table.bf16);
    check_kernels(table.f16);
    check_masking(table.masking16);
    check_masking(table.masking32);
    check_masking(table.masking64);
  };
}

RUN_UNDER_SANITIZERS(masked_linear, scalar, true, check(masked_scalar));
#if defined(__x86_64__)
RUN_UNDER_SANITIZERS(masked_linear, avx2, sanitize::has_avx2(), check(masked_avx2));
RUN_UNDER_SANITIZERS(masked_linear, avx512, sanitize::has_avx512(), check(masked_avx512));
#endif

}  // namespace
