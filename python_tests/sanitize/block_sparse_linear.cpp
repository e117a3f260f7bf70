// block_sparse_linear's tables: pack_weights, product, pack_panels and sampled, pack_lanes and sampled_by_lanes,
// against plain loops.
#include "harness.h"

namespace {

using namespace compsparse;
using sanitize::Buffer;
using sanitize::Number;
using sanitize::Pattern;

struct Shape {
  int64_t out_features, in_features, block_out, block_in, batch;
  double density;
  int64_t rows() const { return (out_features + block_out - 1) / block_out; }
  int64_t columns() const { return (in_features + block_in - 1) / block_in; }
  std::string name() const {
    return std::to_string(out_features) + "x" + std::to_string(in_features) + " blocks " + std::to_string(block_out) +
           "x" + std::to_string(block_in) + " batch " + std::to_string(batch);
  }
};

const Shape shapes[] = {
    {1, 1, 1, 1, 1, 1.0},         {7, 5, 1, 1, 3, 0.5},         {9, 10, 2, 3, 4, 0.6},     {13, 11, 4, 4, 7, 0.7},
    {24, 40, 8, 8, 13, 0.4},      {21, 37, 8, 16, 6, 0.5},      {64, 48, 16, 16, 25, 0.4}, {50, 61, 16, 5, 12, 0.5},
    {33, 70, 33, 70, 9, 1.0},     {96, 96, 32, 32, 26, 0.5},    {70, 90, 32, 24, 5, 0.6},  {129, 130, 64, 48, 14, 0.6},
    {140, 140, 128, 128, 3, 1.0}, {127, 200, 127, 100, 2, 0.8}, {40, 40, 8, 8, 0, 0.5},    {40, 40, 8, 8, 5, 0.0},
    {24, 40, 8, 8, 40, 0.4},      {21, 37, 4, 4, 149, 0.5},     {50, 61, 20, 5, 33, 0.5},  {127, 60, 61, 17, 35, 0.8},
};

double activated(double z, Activation activation) {
  if (activation == Activation::relu) return z < 0 ? 0 : z;
  if (activation == Activation::gelu) return z / 2 * (1 + erf(z * sqrt(0.5)));
  if (activation == Activation::silu) return z / (1 + exp(-z));
  return z;
}

// Value blocks that stand in another order than their entries, and are shared where `slots` is less than the entries.
Buffer<int32_t> slots_of(int64_t entries, int64_t slots) {
  Buffer<int32_t> slot(entries);
  for (int64_t e = 0; e < entries; ++e) slot[e] = int32_t((entries - 1 - e) % slots);
  return slot;
}

template <typename T>
std::vector<double> exact_product(const BlockProduct<T>& p) {
  std::vector<double> y(p.batch * p.out_features);
  for (int64_t n = 0; n < p.batch; ++n)
    for (int64_t o = 0; o < p.out_features; ++o) {
      const int64_t row = o / p.block_out, i = o % p.block_out;
      double sum = p.bias ? Number<T>::value(p.bias[o]) : 0;
      for (int64_t e = p.ptr[row]; e < p.ptr[row + 1]; ++e) {
        const T* block = p.values + p.slot[e] * p.block_out * p.block_in;
        for (int64_t k = 0; k < p.block_in && p.idx[e] * p.block_in + k < p.in_features; ++k)
          sum += Number<T>::value(block[p.transposed ? k * p.block_out + i : i * p.block_in + k]) *
                 Number<T>::value(p.x[n * p.in_features + p.idx[e] * p.block_in + k]);
      }
      y[n * p.out_features + o] = activated(sum, p.activation);
    }
  return y;
}

// Two parts of rows by two parts of the batch, each with scratch of its own, as threads do it.
template <typename T>
void run_product(const BlockSparseKernels<T>& kernel, const BlockProduct<T>& p, int64_t rows) {
  const int64_t entries = p.ptr[rows];
  const auto packed = Buffer<Sum<T>>::unwritten(entries * kernel.packed_entry_size(p));
  for (int64_t part = 0; part < 2 && packed.size(); ++part)
    kernel.pack_weights(p, {entries * part / 2, entries * (part + 1) / 2}, packed.data());
  for (int64_t part = 0; part < 4; ++part) {
    const Range mine = {rows * (part % 2) / 2, rows * (part % 2 + 1) / 2};
    const Range batch = {p.batch * (part / 2) / 2, p.batch * (part / 2 + 1) / 2};
    const auto scratch = Buffer<Sum<T>>::unwritten(kernel.product_scratch(p));
    kernel.product(p, packed.data(), mine, batch, scratch.data());
  }
}

template <typename T>
Buffer<Sum<T>> panels_of(const BlockSparseKernels<T>& kernel, const T* x, int64_t batch, const Shape& s) {
  auto panels = Buffer<Sum<T>>::unwritten(s.columns() * kernel.panel_size(batch, s.block_in));
  for (int64_t part = 0; part < 2; ++part)
    kernel.pack_panels(x, batch, s.in_features, s.block_in, {batch * part / 2, batch * (part + 1) / 2}, panels.data());
  return panels;
}

// Two shares of the batch where sums are not rounded, each in two parts of the rows.
template <typename T>
void run_sampled(const BlockSparseKernels<T>& kernel, SampledBlocks<T> sampled, const Buffer<T>& b, const Shape& s) {
  const int64_t shares = sampled.sums || sizeof(T) == sizeof(Sum<T>) ? 2 : 1;
  const T* a = sampled.a;
  for (int64_t share = 0; share < shares; ++share) {
    const int64_t begin = s.batch * share / shares;
    sampled.batch = s.batch * (share + 1) / shares - begin;
    const auto panels = panels_of(kernel, b.data() + begin * s.in_features, sampled.batch, s);
    sampled.a = a + begin * s.out_features, sampled.b_panels = panels.data(), sampled.add = share > 0;
    for (int64_t part = 0; part < 2; ++part) {
      const auto scratch = Buffer<Sum<T>>::unwritten(kernel.sampled_scratch(sampled));
      kernel.sampled(sampled, {s.rows() * part / 2, s.rows() * (part + 1) / 2}, scratch.data());
    }
  }
}

// Two panels of the batch, each packed and summed in two parts.
template <typename T>
void run_sampled_by_lanes(const BlockSparseKernels<T>& kernel, const SampledBlocks<T>& s, const Buffer<T>& b,
                          int64_t rows) {
  for (int64_t panel = 0; panel < 2; ++panel) {
    const int64_t begin = s.batch * panel / 2, count = s.batch * (panel + 1) / 2 - begin;
    const int64_t width = (count + batch_lanes - 1) / batch_lanes * batch_lanes;
    const auto a_panel = Buffer<Sum<T>>::unwritten(s.out_features * width);
    const auto b_panel = Buffer<Sum<T>>::unwritten(s.in_features * width);
    const auto pack = [&](const T* x, int64_t features, Sum<T>* to) {
      for (int64_t part = 0; part < 2; ++part)
        kernel.pack_lanes(x + begin * features, features, count, {features * part / 2, features * (part + 1) / 2}, to);
    };
    pack(s.a, s.out_features, a_panel.data());
    pack(b.data(), s.in_features, b_panel.data());
    for (int64_t part = 0; part < 2; ++part)
      kernel.sampled_by_lanes(s, a_panel.data(), b_panel.data(), count, panel > 0,
                              {rows * part / 2, rows * (part + 1) / 2});
  }
}

template <typename T>
void check_product(const BlockSparseKernels<T>& kernel, const Shape& s, const Pattern& pattern,
                   std::mt19937& generator) {
  const int64_t slots = pattern.entries() / 2 + 1;
  const auto slot = slots_of(pattern.entries(), slots);
  const auto x = Buffer<T>::random(s.batch * s.in_features, generator);
  const auto values = Buffer<T>::random(slots * s.block_out * s.block_in, generator);
  const auto bias = Buffer<T>::random(s.out_features, generator);
  for (int option = 0; option < 8; ++option) {
    const bool transposed = option & 1;
    const auto activation = Activation(option / 2);
    const auto y = Buffer<T>::unwritten(s.batch * s.out_features);
    const BlockProduct<T> p = {
        .x = x.data(),
        .values = values.data(),
        .bias = activation == Activation::none ? nullptr : bias.data(),
        .y = y.data(),
        .ptr = pattern.ptr.data(),
        .idx = pattern.idx.data(),
        .slot = slot.data(),
        .batch = s.batch,
        .in_features = s.in_features,
        .out_features = s.out_features,
        .block_out = s.block_out,
        .block_in = s.block_in,
        .transposed = transposed,
        .activation = activation,
    };
    run_product(kernel, p, s.rows());
    sanitize::expect_equal(y.data(), exact_product(p).data(), y.size(),
                           "product " + s.name() + " option " + std::to_string(option));
  }
}

// Blocks at their slots, rounded; or where `sums` is not null sums in the order of the entries.
template <typename T>
void check_sampled(const BlockSparseKernels<T>& kernel, const Shape& s, const Pattern& pattern, bool as_sums,
                   std::mt19937& generator) {
  const int64_t size = s.block_out * s.block_in;
  const auto a = Buffer<T>::random(s.batch * s.out_features, generator);
  const auto b = Buffer<T>::random(s.batch * s.in_features, generator);
  const auto slot = slots_of(pattern.entries(), pattern.entries());
  const auto blocks = Buffer<T>::unwritten(as_sums ? 0 : pattern.entries() * size);
  const auto sums = Buffer<Sum<T>>::unwritten(as_sums ? pattern.entries() * size : 0);
  const auto at = [&](int64_t e) { return as_sums ? e : int64_t(slot[e]); };
  const SampledBlocks<T> sampled = {
      .a = a.data(),
      .b_panels = nullptr,
      .blocks = blocks.data(),
      .sums = as_sums ? sums.data() : nullptr,
      .slot = slot.data(),
      .ptr = pattern.ptr.data(),
      .idx = pattern.idx.data(),
      .batch = s.batch,
      .in_features = s.in_features,
      .out_features = s.out_features,
      .block_out = s.block_out,
      .block_in = s.block_in,
      .add = false,
  };
  if (kernel.sampled_uses_lanes(sampled))
    run_sampled_by_lanes(kernel, sampled, b, s.rows());
  else
    run_sampled(kernel, sampled, b, s);
  std::vector<double> exact(pattern.entries() * size);
  for (int64_t row = 0; row < s.rows(); ++row)
    for (int64_t e = pattern.ptr[row]; e < pattern.ptr[row + 1]; ++e)
      for (int64_t i = 0; i < size; ++i) {
        const int64_t o = row * s.block_out + i / s.block_in, k = pattern.idx[e] * s.block_in + i % s.block_in;
        if (o >= s.out_features || k >= s.in_features) continue;
        for (int64_t n = 0; n < s.batch; ++n)
          exact[at(e) * size + i] +=
              Number<T>::value(a[n * s.out_features + o]) * Number<T>::value(b[n * s.in_features + k]);
      }
  sanitize::expect_equal(blocks.data(), exact.data(), blocks.size(), "sampled " + s.name());
  sanitize::expect_equal(sums.data(), exact.data(), sums.size(), "sums of sampled " + s.name());
}

// silu and its gradient; gelu differs by formulas alone.
template <typename T>
void check_activated(const BlockSparseKernels<T>& kernel, int64_t size, std::mt19937& generator) {
  const auto z = Buffer<T>::random(size, generator), grad = Buffer<T>::random(size, generator);
  for (const bool backward : {false, true}) {
    const auto out = Buffer<T>::unwritten(size);
    const ActivatedValues<T> a = {z.data(), backward ? grad.data() : nullptr, out.data(), Activation::silu};
    kernel.activated(a, {0, size / 2});
    kernel.activated(a, {size / 2, size});
    std::vector<double> exact(size);
    for (int64_t i = 0; i < size; ++i) {
      const double x = Number<T>::value(z[i]), share = 1 / (1 + exp(-x));
      exact[i] = backward ? Number<T>::value(grad[i]) * share * (1 + x * (1 - share)) : x * share;
    }
    sanitize::expect_equal(out.data(), exact.data(), size, "activated " + std::to_string(size));
  }
}

template <typename T>
void check_kernels(const BlockSparseKernels<T>& kernel) {
  std::mt19937 generator(0);
  for (const int64_t size : {0, 1, 7, 16, 61, 250}) check_activated(kernel, size, generator);
  for (const Shape& s : shapes) {
    const Pattern pattern = sanitize::random_pattern(s.rows(), s.columns(), s.density, generator);
    check_product(kernel, s, pattern, generator);
    check_sampled(kernel, s, pattern, false, generator);
    check_sampled(kernel, s, pattern, true, generator);
  }
}

std::function<void()> check(const BlockSparseTable& table) {
  return [&table] {
    check_kernels(table.f32);
    check_kernels(table.f64);
    check_kernels(table.bf16);
    check_kernels(table.f16);
  };
}

RUN_UNDER_SANITIZERS(block_sparse_linear, scalar, true, check(block_sparse_scalar));
#if defined(__x86_64__)
RUN_UNDER_SANITIZERS(block_sparse_linear, avx2, sanitize::has_avx2(), check(block_sparse_avx2));
RUN_UNDER_SANITIZERS(block_sparse_linear, avx512, sanitize::has_avx512(), check(block_sparse_avx512));
RUN_UNDER_SANITIZERS(block_sparse_linear, avx512_bf16, __builtin_cpu_supports("avx512bf16"),
                     [] { check_kernels(block_sparse_avx512_bf16); });
#endif

}  // namespace
