// nm_linear, nm_linear_transposed and nm_sampled at key CPU: unpack, pack the batch to panels, split over threads, call
// the chosen table.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <type_traits>

#include "../kernels.h"
#include "../partition.h"
#include "../scratch.h"
#include "../tensors.h"

namespace compsparse {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kChunk = 96;         // inputs of a chunk: with a full panel they stay in the first-level cache
constexpr int64_t kSampledChunk = 64;  // the same of wider panels
constexpr int64_t kBlock = 128;        // outputs at a time, whose sums and entries stay in the second level
constexpr int64_t kLongest = 256;      // most inputs of a chunk and outputs of a block, where one group is that large
constexpr int64_t kScattered = 3;      // batch rows that do not pay for sorting the weight by columns
constexpr int64_t kPanels = 16;        // at a time, for which the entries of a block are made once

template <typename T>
const T* data_of(const Tensor& x) {
  return static_cast<const T*>(x.data_ptr());
}

NMPattern pattern_of(const Tensor& positions, int64_t in_features, int64_t n, int64_t m) {
  return {data_of<uint8_t>(positions), positions.size(0), in_features, n, m};
}

int64_t slots_of(const NMPattern& pattern) { return nm_groups(pattern) * pattern.n; }

// Runs body(T{}) for the type of x.
template <class Body>
void with_type(const Tensor& x, const Body& body) {
  x.scalar_type() == ScalarType::Double ? body(double{}) : body(float{});
}

template <typename T>
const NMKernels<T>& kernels_of(T) {
  if constexpr (sizeof(T) == sizeof(double))
    return kernels().nm->f64;
  else
    return kernels().nm->f32;
}

// The entries of some rows in some groups, over values that are read or written.
template <typename Value>
class RowEntries {
 public:
  RowEntries(const NMPattern& pattern, Value* values)
      : pattern_(pattern), values_(values), idx_(make_scratch<uint8_t>(kBlock * kLongest)) {}

  // Groups of a chunk of about that many inputs, such that it begins at a whole byte.
  static int64_t groups(const NMPattern& p, int64_t inputs) {
    const int64_t whole_bytes = 8 / nm_bits(p.m), groups = inputs / p.m;
    return std::max<int64_t>(groups - groups % whole_bytes, 1);
  }

  NMEntries<Value> of(Range rows, Range groups) {
    const int64_t count = (groups.end - groups.begin) * pattern_.n, all = slots_of(pattern_);
    int32_t* const counts = groups.end * pattern_.m > pattern_.in_features ? counts_ : nullptr;
    kernels().nm->f32.by_row(pattern_, rows, groups, idx_.get(), counts);
    return {
        .values = values_ + rows.begin * all + groups.begin * pattern_.n,
        .idx = idx_.get(),
        .counts = counts,
        .count = count,
        .value_stride = all,
        .idx_stride = count,
    };
  }

 private:
  const NMPattern& pattern_;
  Value* values_;
  Scratch<uint8_t> idx_;
  int32_t counts_[kBlock];
};

// W by its rows: outputs read the inputs of some groups at a time.
template <typename T>
class ByRow {
 public:
  ByRow(const NMPattern& pattern, const T* values) : m_(pattern.m), rows_(pattern, values) {}

  static int64_t outputs(const NMPattern& p) { return p.out_features; }
  static int64_t inputs(const NMPattern& p) { return p.in_features; }
  static int64_t unit(const NMPattern&) { return batch_lanes; }
  static int64_t chunk(const NMPattern& p, int64_t inputs) { return RowEntries<const T>::groups(p, inputs) * p.m; }

  NMEntries<const T> entries(Range rows, Range columns) {
    return rows_.of(rows, {columns.begin / m_, (columns.end + m_ - 1) / m_});
  }

 private:
  int64_t m_;
  RowEntries<const T> rows_;
};

// W by its columns: they are the outputs, and its rows the inputs.
template <typename T>
class ByColumn {
 public:
  ByColumn(const NMPattern& pattern, const T* values)
      : pattern_(pattern),
        values_(values),
        idx_(make_scratch<uint8_t>(kLongest * kLongest)),
        ordered_(make_scratch<T>(kLongest * kLongest)) {}

  static int64_t outputs(const NMPattern& p) { return p.in_features; }
  static int64_t inputs(const NMPattern& p) { return p.out_features; }
  static int64_t unit(const NMPattern& p) { return p.m * (8 / nm_bits(p.m)); }  // begins at a whole byte
  static int64_t chunk(const NMPattern&, int64_t inputs) { return inputs; }

  NMEntries<const T> entries(Range columns, Range rows) {
    const Range groups = {columns.begin / pattern_.m, (columns.end + pattern_.m - 1) / pattern_.m};
    kernels_of(T{}).by_column(pattern_, values_, groups, rows, idx_.get(), ordered_.get(), counts_);
    const int64_t stride = rows.end - rows.begin;
    return {
        .values = ordered_.get(),
        .idx = idx_.get(),
        .counts = counts_,
        .count = 0,
        .value_stride = stride,
        .idx_stride = stride,
    };
  }

 private:
  const NMPattern& pattern_;
  const T* values_;
  Scratch<uint8_t> idx_;
  Scratch<T> ordered_;
  int32_t counts_[kLongest];
};

// A matrix [batch, features] packed to panels, one after another.
template <typename T>
class Panels {
 public:
  Panels(const NMPanels<T>& kernel, const T* x, int64_t batch, int64_t features, int64_t parts)
      : kernel_(kernel), x_(x), batch_(batch), features_(features) {
    const int64_t last = count() - 1;
    packed_ = make_scratch<T>(count() == 0 ? 0 : offset(last) + (is_packed(last) ? width(last) * features : 0));
    for_each_part(parts, [&](int64_t part) {
      constexpr int64_t line = 64 / sizeof(T);
      const Range lines = equal_share((features + line - 1) / line, part, parts);
      const Range some = {lines.begin * line, std::min(lines.end * line, features)};
      for (int64_t panel = 0; panel < count(); ++panel)
        if (is_packed(panel))
          kernel_.pack(x + rows(panel).begin * features, features, size(panel), some, packed_.get() + offset(panel));
    });
  }

  int64_t count() const { return (batch_ + kernel_.rows - 1) / kernel_.rows; }
  Range rows(int64_t panel) const {
    const int64_t first = panel * kernel_.rows;
    return {first, std::min(first + kernel_.rows, batch_)};
  }
  int64_t size(int64_t panel) const { return rows(panel).end - rows(panel).begin; }
  int64_t width(int64_t panel) const { return kernel_.width(size(panel)); }
  // The panel from a feature on.
  const T* data(int64_t panel, int64_t feature) const {
    if (!is_packed(panel)) return x_ + rows(panel).begin * features_ + feature;
    return packed_.get() + offset(panel) + feature * width(panel);
  }

 private:
  bool is_packed(int64_t panel) const { return width(panel) > 1; }
  int64_t offset(int64_t panel) const { return panel * kernel_.rows * features_; }

  const NMPanels<T>& kernel_;
  const T* x_;
  int64_t batch_;
  int64_t features_;
  Scratch<T> packed_;
};

template <typename T>
struct Product {
  const NMPattern& pattern;
  const Panels<T>& panels;
  const T* values;
  const T* bias;  // or null
  T* y;           // [batch, outputs]
};

// All outputs of a block for some panels. Entries are made once for all of these, and used at once.
template <typename T, template <typename> class By>
void product_block(const Product<T>& p, By<T>& by, Range outputs, Range panels, T* sums) {
  const NMKernels<T>& kernel = kernels_of(T{});
  const int64_t size = outputs.end - outputs.begin, inputs = By<T>::inputs(p.pattern);
  const int64_t chunk = By<T>::chunk(p.pattern, p.panels.width(0) == kernel.product_panels.rows ? kChunk : kLongest);
  const int64_t stride = (kLongest + batch_lanes) * kernel.product_panels.rows;
  for (int64_t first = 0; first < inputs; first += chunk) {
    const NMEntries<const T> entries = by.entries(outputs, {first, std::min(first + chunk, inputs)});
    for (int64_t panel = panels.begin; panel < panels.end; ++panel)
      kernel.accumulate(entries, p.panels.data(panel, first), p.panels.width(panel), size, first == 0,
                        p.bias ? p.bias + outputs.begin : nullptr, sums + (panel - panels.begin) * stride);
  }
  const int64_t all = By<T>::outputs(p.pattern);
  for (int64_t panel = panels.begin; panel < panels.end; ++panel)
    kernel.store(sums + (panel - panels.begin) * stride, p.panels.width(panel), p.panels.size(panel), size, all,
                 p.y + p.panels.rows(panel).begin * all + outputs.begin);
}

// Each part takes whole panels where there are many, else its share of the outputs.
template <typename T, template <typename> class By>
void run_product(const Product<T>& p, int64_t parts) {
  const int64_t all = By<T>::outputs(p.pattern), unit = By<T>::unit(p.pattern), units = (all + unit - 1) / unit;
  const int64_t panels = p.panels.count();
  // A single batch row stays in cache: the weight is then read nearly as it lies.
  const int64_t wanted = panels > 0 && p.panels.width(0) == 1 ? batch_lanes : kBlock;
  const int64_t block = std::max<int64_t>(wanted / unit, 1) * unit;
  const bool by_panels = panels >= 4 * parts;
  const int64_t stride = (kLongest + batch_lanes) * kernels_of(T{}).product_panels.rows;
  for_each_part(parts, [&](int64_t part) {
    const Range mine = by_panels ? Range{0, units} : equal_share(units, part, parts);
    const Range my_panels = by_panels ? equal_share(panels, part, parts) : Range{0, panels};
    const auto sums = make_scratch<T>(std::min(kPanels, my_panels.end - my_panels.begin) * stride);
    By<T> by(p.pattern, p.values);
    for (int64_t panel = my_panels.begin; panel < my_panels.end; panel += kPanels)
      for (int64_t o = mine.begin * unit; o < std::min(mine.end * unit, all); o += block)
        product_block<T, By>(p, by, {o, std::min({o + block, mine.end * unit, all})},
                             {panel, std::min(panel + kPanels, my_panels.end)}, sums.get());
  });
}

// The transposed product of few batch rows. Each part takes its share of the columns.
template <typename T>
void run_scattered(const NMPattern& pattern, const T* x, int64_t batch, const T* values, const T* bias, T* y,
                   int64_t parts) {
  const int64_t unit = 8 / nm_bits(pattern.m), groups = nm_groups(pattern), in = pattern.in_features;
  for_each_part(parts, [&](int64_t part) {
    const Range units = equal_share((groups + unit - 1) / unit, part, parts);
    const Range mine = {units.begin * unit, std::min(units.end * unit, groups)};
    const Range columns = {mine.begin * pattern.m, std::min(mine.end * pattern.m, in)};
    for (int64_t n = 0; n < batch; ++n) {
      T* const row = y + n * in;
      if (bias)
        std::copy(bias + columns.begin, bias + columns.end, row + columns.begin);
      else
        std::fill(row + columns.begin, row + columns.end, T(0));
      kernels_of(T{}).scatter(pattern, values, x + n * pattern.out_features, mine, row);
    }
  });
}

template <template <typename> class By>
Tensor product(const Tensor& x, const Tensor& values, const std::optional<Tensor>& bias, const Tensor& positions,
               int64_t in_features, int64_t m) {
  const Tensor input = as_contiguous(x), weights = as_contiguous(values), packed = as_contiguous(positions);
  std::optional<Tensor> offset;
  if (bias) offset = as_contiguous(*bias);
  const NMPattern pattern = pattern_of(packed, in_features, values.size(2), m);
  const int64_t batch = x.size(0);
  Tensor y = new_tensor(x, {batch, By<float>::outputs(pattern)});
  with_type(x, [&]<typename T>(T) {
    const int64_t parts = parts_for(batch * pattern.out_features * slots_of(pattern));
    const T* const bias = offset ? data_of<T>(*offset) : nullptr;
    T* const to = static_cast<T*>(y.data_ptr());
    if constexpr (std::is_same_v<By<T>, ByColumn<T>>)
      if (batch <= kScattered)
        return run_scattered(pattern, data_of<T>(input), batch, data_of<T>(weights), bias, to, parts);
    const Panels<T> panels(kernels_of(T{}).product_panels, data_of<T>(input), batch, By<T>::inputs(pattern), parts);
    run_product<T, By>({.pattern = pattern, .panels = panels, .values = data_of<T>(weights), .bias = bias, .y = to},
                       parts);
  });
  return y;
}

Tensor nm_linear(const Tensor& x, const Tensor& values, const std::optional<Tensor>& bias, const Tensor& positions,
                 int64_t m) {
  return product<ByRow>(x, values, bias, positions, x.size(1), m);
}

Tensor nm_linear_transposed(const Tensor& x, const Tensor& values, const std::optional<Tensor>& bias,
                            const Tensor& positions, int64_t m, int64_t in_features) {
  return product<ByColumn>(x, values, bias, positions, in_features, m);
}

// So many inputs that a row has entries for a whole vector in them, where it can.
int64_t sampled_chunk(const NMPattern& p) { return std::clamp(batch_lanes * p.m / p.n, kSampledChunk, kLongest); }

// Each part takes its share of the rows. What lies past the last column is 0.
template <typename T>
void run_sampled(const NMPattern& pattern, const Panels<T>& a, const Panels<T>& b, T* values, int64_t parts) {
  const NMKernels<T>& kernel = kernels_of(T{});
  const int64_t all = nm_groups(pattern), chunk = RowEntries<T>::groups(pattern, sampled_chunk(pattern));
  for_each_part(parts, [&](int64_t part) {
    const Range mine = equal_share(pattern.out_features, part, parts);
    if (a.count() == 0 || pattern.in_features % pattern.m != 0)
      std::fill(values + mine.begin * slots_of(pattern), values + mine.end * slots_of(pattern), T(0));
    RowEntries<T> rows(pattern, values);
    for (int64_t first = mine.begin; first < mine.end; first += kBlock)
      for (int64_t g = 0; g < all; g += chunk) {
        const Range some = {first, std::min(first + kBlock, mine.end)};
        const NMEntries<T> entries = rows.of(some, {g, std::min(g + chunk, all)});
        for (int64_t panel = 0; panel < a.count(); ++panel)
          kernel.sampled(entries, a.data(panel, first), b.data(panel, g * pattern.m), a.width(panel),
                         some.end - some.begin, panel > 0);
      }
  });
}

Tensor nm_sampled(const Tensor& a, const Tensor& b, const Tensor& positions, int64_t n, int64_t m) {
  const Tensor left = as_contiguous(a), right = as_contiguous(b), packed = as_contiguous(positions);
  const NMPattern pattern = pattern_of(packed, b.size(1), n, m);
  Tensor values = new_tensor(a, {pattern.out_features, nm_groups(pattern), n});
  with_type(a, [&]<typename T>(T) {
    const int64_t batch = a.size(0), parts = parts_for(batch * pattern.out_features * slots_of(pattern));
    const NMPanels<T>& kernel = kernels_of(T{}).sampled_panels;
    const Panels<T> a_panels(kernel, data_of<T>(left), batch, pattern.out_features, parts);
    const Panels<T> b_panels(kernel, data_of<T>(right), batch, pattern.in_features, parts);
    run_sampled<T>(pattern, a_panels, b_panels, static_cast<T*>(values.data_ptr()), parts);
  });
  return values;
}

}  // namespace
}  // namespace compsparse

STABLE_TORCH_LIBRARY_IMPL(compsparse, CPU, m) {
  m.impl("nm_linear", TORCH_BOX(&compsparse::nm_linear));
  m.impl("nm_linear_transposed", TORCH_BOX(&compsparse::nm_linear_transposed));
  m.impl("nm_sampled", TORCH_BOX(&compsparse::nm_sampled));
}
