// masked_linear and sampled_matmul at key CPU: unpack, pack the batch to panels, split over threads, call the chosen
// table.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "../kernels.h"
#include "../partition.h"
#include "../scratch.h"
#include "../tensors.h"
#include "rows.h"

namespace compsparse {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class Run>
void for_dtype(ScalarType dtype, const Run& run) {
  const MaskedTable& table = *kernels().masked;
  if (dtype == ScalarType::Double) return run(table.f64);
  if (dtype == ScalarType::BFloat16) return run(table.bf16);
  if (dtype == ScalarType::Half) return run(table.f16);
  run(table.f32);
}

// Calls run(idx) with columns of their own width.
template <class Run>
void for_columns(const Tensor& idx, const Run& run) {
  const bool is_narrow = idx.scalar_type() == ScalarType::Short;
  STD_TORCH_CHECK(is_narrow || idx.scalar_type() == ScalarType::Int, "idx: expected int16 or int32");
  is_narrow ? run(static_cast<const int16_t*>(idx.data_ptr())) : run(static_cast<const int32_t*>(idx.data_ptr()));
}

// A matrix [batch, features] cut into panels.
template <typename T>
struct Panels {
  const MaskedKernels<T>& kernel;
  int64_t panel_rows;
  const T* x;
  int64_t batch;
  int64_t features;

  int64_t count() const { return (batch + panel_rows - 1) / panel_rows; }
  Range rows(int64_t panel) const {
    const int64_t first = panel * panel_rows;
    return {first, std::min(first + panel_rows, batch)};
  }
  int64_t width(int64_t panel) const { return kernel.panel_width(rows(panel).end - rows(panel).begin); }
  bool is_packed(int64_t panel) const { return narrows<T> || width(panel) > 1; }
  int64_t packed_size(int64_t panel) const { return is_packed(panel) ? width(panel) * features : 0; }
  // Where a panel lies in a buffer that holds all of them.
  int64_t offset(int64_t panel) const { return panel * panel_rows * features; }
  int64_t size() const { return count() == 0 ? 0 : offset(count() - 1) + packed_size(count() - 1); }
  int64_t largest() const { return count() == 0 ? 0 : packed_size(0); }

  void pack(int64_t panel, Range some, Sum<T>* packed) const {
    if (!is_packed(panel)) return;
    const Range mine = rows(panel);
    kernel.pack(x + mine.begin * features, features, mine.end - mine.begin, some, packed);
  }
  const Sum<T>* data(int64_t panel, const Sum<T>* packed) const {
    if constexpr (!narrows<T>)
      if (!is_packed(panel)) return x + rows(panel).begin * features;
    return packed;
  }
};

// Every part packs its share of the features of all panels.
template <typename T>
void pack_all(const Panels<T>& panels, int64_t part, int64_t parts, Sum<T>* packed) {
  constexpr int64_t line = 64 / sizeof(T);
  const Range lines = equal_share((panels.features + line - 1) / line, part, parts);
  const Range some = {lines.begin * line, std::min(lines.end * line, panels.features)};
  for (int64_t panel = 0; panel < panels.count(); ++panel) panels.pack(panel, some, packed + panels.offset(panel));
}

// Each part takes whole panels: nothing is shared, and a panel is still in cache when it is used.
template <typename T, class Rows>
void product_by_panels(const Panels<T>& panels, const Rows& rows, int64_t parts) {
  const int64_t line = 64 / sizeof(Sum<T>), stride = (panels.largest() + line - 1) / line * line;
  const auto scratch = make_scratch<Sum<T>>(parts * stride);
  for_each_part(parts, [&](int64_t part) {
    Sum<T>* const packed = scratch.get() + part * stride;
    const Range mine = equal_share(panels.count(), part, parts);
    for (int64_t panel = mine.begin; panel < mine.end; ++panel) {
      panels.pack(panel, {0, panels.features}, packed);
      rows.multiply(part, true, panels.data(panel, packed), panels.rows(panel));
    }
  });
}

template <typename T, class Rows>
void product_by_rows(const Panels<T>& panels, const Rows& rows, int64_t parts) {
  const auto packed = make_scratch<Sum<T>>(panels.size());
  if (panels.size() > 0) for_each_part(parts, [&](int64_t part) { pack_all(panels, part, parts, packed.get()); });
  for_each_part(parts, [&](int64_t part) {
    for (int64_t panel = 0; panel < panels.count(); ++panel)
      rows.multiply(part, false, panels.data(panel, packed.get() + panels.offset(panel)), panels.rows(panel));
  });
}

// Threads are worth starting earlier for a single batch row: its inputs are gathered one by one, 3 to 5 a nanosecond,
// where a panel multiplies 25.
constexpr int64_t kGathered = 4;

template <typename T, typename Index>
void run_product(const Panels<T>& panels, const MaskedProduct<T, Index>& p) {
  const IndexedKernels<T, Index>& kernel = panels.kernel;
  const int64_t work = p.batch * (p.ptr[p.out_features] + p.out_features);
  const int64_t parts = parts_for(p.batch == 1 ? kGathered * work : work);
  const bool even = p.batch % (panels.panel_rows * parts) == 0 || panels.count() >= 4 * parts;
  const auto run = [&](const auto& rows) {
    even ? product_by_panels(panels, rows, parts) : product_by_rows(panels, rows, parts);
  };
  if (const int64_t columns = block_columns(p))
    run(BlockedRows<T, Index>(kernel, p, panels.panel_rows, columns, parts));
  else
    run(PlainRows<T, Index>{kernel, p, parts});
}

// A row as wide as its sums, where it is not so already.
template <typename T>
Scratch<Sum<T>> widened(const MaskedKernels<T>& kernel, const T* row, int64_t size) {
  if (!narrows<T>) return nullptr;
  auto wide = make_scratch<Sum<T>>(size);
  const int64_t parts = parts_for(size);
  for_each_part(parts, [&](int64_t part) { kernel.pack(row, size, 1, equal_share(size, part, parts), wide.get()); });
  return wide;
}

template <typename T, typename Position>
void gather(const MaskedKernels<T>& kernel, const T* values, const Position* perm, Range entries, Sum<T>* ordered) {
  if constexpr (!narrows<T>) {
    for (int64_t p = entries.begin; p < entries.end; ++p) ordered[p] = values[perm[p]];
  } else {
    T some[256];
    for (int64_t p = entries.begin; p < entries.end;) {
      const int64_t count = std::min<int64_t>(std::size(some), entries.end - p);
      for (int64_t i = 0; i < count; ++i) some[i] = values[perm[p + i]];
      kernel.pack(some, count, 1, {0, count}, ordered + p);
      p += count;
    }
  }
}

// The values as the product reads them, in the order of the entries: once a call, since every panel does. Null where
// they lie so already.
template <typename T>
Scratch<Sum<T>> ordered_values(const MaskedKernels<T>& kernel, const T* values, int64_t nnz,
                               const std::optional<Tensor>& perm) {
  if (!perm) return widened(kernel, values, nnz);
  auto ordered = make_scratch<Sum<T>>(nnz);
  const int64_t parts = parts_for(nnz);
  for_each_part(parts, [&](int64_t part) {
    const Range mine = equal_share(nnz, part, parts);
    if (perm->scalar_type() == ScalarType::Long)
      gather(kernel, values, static_cast<const int64_t*>(perm->data_ptr()), mine, ordered.get());
    else
      gather(kernel, values, static_cast<const int32_t*>(perm->data_ptr()), mine, ordered.get());
  });
  return ordered;
}

// `wide` if there is one, else what was as wide as its sums from the start.
template <typename T>
const Sum<T>* wide_or_stored(const Scratch<Sum<T>>& wide, const T* stored) {
  if constexpr (!narrows<T>)
    if (!wide) return stored;
  return wide.get();
}

Tensor masked_linear(const Tensor& x, const Tensor& values, const std::optional<Tensor>& bias, const Tensor& ptr,
                     const Tensor& idx, const std::optional<Tensor>& perm, int64_t out_features) {
  const Tensor input = as_contiguous(x), weights = as_contiguous(values);
  std::optional<Tensor> offset;
  if (bias) offset = as_contiguous(*bias);
  Tensor y = new_tensor(x, {x.size(0), out_features});
  const auto run = [&]<typename T>(const MaskedKernels<T>& kernel) {
    const T* stored = static_cast<const T*>(weights.data_ptr());
    const T* stored_bias = offset ? static_cast<const T*>(offset->data_ptr()) : nullptr;
    const auto ordered = ordered_values(kernel, stored, idx.size(0), perm);
    const auto wide_bias = offset ? widened(kernel, stored_bias, out_features) : nullptr;
    for_columns(idx, [&]<typename Index>(const Index* columns) {
      const MaskedProduct<T, Index> p = {
          .values = wide_or_stored(ordered, stored),
          .bias = wide_or_stored(wide_bias, stored_bias),
          .y = static_cast<T*>(y.data_ptr()),
          .ptr = static_cast<const int64_t*>(ptr.data_ptr()),
          .idx = columns,
          .batch = x.size(0),
          .in_features = x.size(1),
          .out_features = out_features,
      };
      run_product<T>({kernel, kernel.product_rows, static_cast<const T*>(input.data_ptr()), p.batch, p.in_features}, p);
    });
  };
  for_dtype(x.scalar_type(), run);
  return y;
}

// Sums that are not rounded are the values.
template <typename T, typename Index>
void run_sampled(const Panels<T>& a, const Panels<T>& b, SampledSums<Sum<T>, Index> s, T* values) {
  const IndexedKernels<T, Index>& kernel = a.kernel;
  const int64_t nnz = s.ptr[s.out_features], parts = parts_for(s.batch * nnz);
  if (s.batch == 0) return std::fill(values, values + nnz, T{});
  const auto a_packed = make_scratch<Sum<T>>(a.size()), b_packed = make_scratch<Sum<T>>(b.size());
  const auto unrounded = make_scratch<Sum<T>>(narrows<T> ? nnz : 0);
  if constexpr (narrows<T>)
    s.sums = unrounded.get();
  else
    s.sums = values;
  for_each_part(parts, [&](int64_t part) {
    pack_all(a, part, parts, a_packed.get());
    pack_all(b, part, parts, b_packed.get());
  });
  for_each_entry_share(s.ptr, s.out_features, parts, [&](const int64_t* ptr, Range rows) {
    SampledSums<Sum<T>, Index> share = s;
    share.ptr = ptr;
    for (int64_t panel = 0; panel < a.count(); ++panel) {
      const Range batch = a.rows(panel);
      kernel.sampled(share, a.data(panel, a_packed.get() + a.offset(panel)),
                     b.data(panel, b_packed.get() + b.offset(panel)), batch.end - batch.begin, panel > 0, rows);
    }
    if (narrows<T>) a.kernel.round(share.sums, {ptr[rows.begin], ptr[rows.end]}, values);
  });
}

Tensor sampled_matmul(const Tensor& a, const Tensor& b, const Tensor& ptr, const Tensor& idx) {
  const Tensor left = as_contiguous(a), right = as_contiguous(b);
  Tensor values = new_tensor(a, {idx.size(0)});
  const auto run = [&]<typename T>(const MaskedKernels<T>& kernel) {
    for_columns(idx, [&]<typename Index>(const Index* columns) {
      const SampledSums<Sum<T>, Index> s = {
          .sums = nullptr,
          .ptr = static_cast<const int64_t*>(ptr.data_ptr()),
          .idx = columns,
          .batch = a.size(0),
          .in_features = b.size(1),
          .out_features = a.size(1),
      };
      run_sampled<T>({kernel, kernel.sampled_rows, static_cast<const T*>(left.data_ptr()), s.batch, s.out_features},
                     {kernel, kernel.sampled_rows, static_cast<const T*>(right.data_ptr()), s.batch, s.in_features}, s,
                     static_cast<T*>(values.data_ptr()));
    });
  };
  for_dtype(a.scalar_type(), run);
  return values;
}

}  // namespace
}  // namespace compsparse

STABLE_TORCH_LIBRARY_IMPL(compsparse, CPU, m) {
  m.impl("masked_linear", TORCH_BOX(&compsparse::masked_linear));
  m.impl("sampled_matmul", TORCH_BOX(&compsparse::sampled_matmul));
}
