// masked_linear and sampled_matmul at key CPU: unpack, pack the batch to panels, split over threads, call the chosen
// table.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <memory>
#include <optional>

#include "../kernels.h"
#include "../partition.h"
#include "../scratch.h"
#include "../tensors.h"
#include "csr.h"

namespace compsparse {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A matrix [batch, features] cut into panels.
template <typename T>
struct Panels {
  const MaskedKernels<T>& kernel;
  const T* x;
  int64_t batch;
  int64_t features;

  int64_t count() const { return (batch + kernel.panel_rows - 1) / kernel.panel_rows; }
  Range rows(int64_t panel) const {
    const int64_t first = panel * kernel.panel_rows;
    return {first, std::min(first + kernel.panel_rows, batch)};
  }
  int64_t width(int64_t panel) const { return kernel.panel_width(rows(panel).end - rows(panel).begin); }
  bool is_packed(int64_t panel) const { return width(panel) > 1; }
  int64_t packed_size(int64_t panel) const { return is_packed(panel) ? width(panel) * features : 0; }
  // Where a panel lies in a buffer that holds all of them.
  int64_t offset(int64_t panel) const { return panel * kernel.panel_rows * features; }
  int64_t size() const { return count() == 0 ? 0 : offset(count() - 1) + packed_size(count() - 1); }
  int64_t largest() const { return count() == 0 ? 0 : packed_size(0); }

  void pack(int64_t panel, Range some, T* packed) const {
    if (!is_packed(panel)) return;
    const Range mine = rows(panel);
    kernel.pack(x + mine.begin * features, features, mine.end - mine.begin, some, packed);
  }
  const T* data(int64_t panel, const T* packed) const {
    return is_packed(panel) ? packed : x + rows(panel).begin * features;
  }
};

// Every part packs its share of the features of all panels.
template <typename T>
void pack_all(const Panels<T>& panels, int64_t part, int64_t parts, T* packed) {
  constexpr int64_t line = 64 / sizeof(T);
  const Range lines = equal_share((panels.features + line - 1) / line, part, parts);
  const Range some = {lines.begin * line, std::min(lines.end * line, panels.features)};
  for (int64_t panel = 0; panel < panels.count(); ++panel) panels.pack(panel, some, packed + panels.offset(panel));
}

// Each part takes whole panels: nothing is shared, and a panel is still in cache when it is used.
template <typename T>
void product_by_panels(const Panels<T>& panels, const MaskedProduct<T>& p, int64_t parts) {
  const int64_t line = 64 / sizeof(T), stride = (panels.largest() + line - 1) / line * line;
  const auto scratch = make_scratch<T>(parts * stride);
  for_each_part(parts, [&](int64_t part) {
    T* const packed = scratch.get() + part * stride;
    const Range mine = equal_share(panels.count(), part, parts);
    for (int64_t panel = mine.begin; panel < mine.end; ++panel) {
      panels.pack(panel, {0, p.in_features}, packed);
      panels.kernel.product(p, panels.data(panel, packed), panels.rows(panel), {0, p.out_features});
    }
  });
}

template <typename T>
void product_by_rows(const Panels<T>& panels, const MaskedProduct<T>& p, int64_t parts) {
  const auto packed = make_scratch<T>(panels.size());
  for_each_part(parts, [&](int64_t part) { pack_all(panels, part, parts, packed.get()); });
  for_each_part(parts, [&](int64_t part) {
    const Range rows = balanced_rows(p.ptr, p.out_features, 1, part, parts);
    for (int64_t panel = 0; panel < panels.count(); ++panel)
      panels.kernel.product(p, panels.data(panel, packed.get() + panels.offset(panel)), panels.rows(panel), rows);
  });
}

template <typename T>
void run_product(const Panels<T>& panels, const MaskedProduct<T>& p) {
  const int64_t parts = parts_for(p.batch * (p.ptr[p.out_features] + p.out_features));
  const bool even = p.batch % (panels.kernel.panel_rows * parts) == 0 || panels.count() >= 4 * parts;
  even ? product_by_panels(panels, p, parts) : product_by_rows(panels, p, parts);
}

// The values in the order of the entries: once a call, since every panel reads them.
template <typename T, typename Position>
void gather(const T* values, const Position* perm, int64_t nnz, T* ordered) {
  const int64_t parts = parts_for(nnz);
  for_each_part(parts, [&](int64_t part) {
    const Range mine = equal_share(nnz, part, parts);
    for (int64_t p = mine.begin; p < mine.end; ++p) ordered[p] = values[perm[p]];
  });
}

template <typename T>
std::unique_ptr<T[]> ordered_values(const Tensor& values, const Tensor& perm) {
  const int64_t nnz = perm.size(0);
  std::unique_ptr<T[]> ordered(new T[nnz]);
  const T* from = static_cast<const T*>(values.data_ptr());
  if (perm.scalar_type() == ScalarType::Long)
    gather(from, static_cast<const int64_t*>(perm.data_ptr()), nnz, ordered.get());
  else
    gather(from, static_cast<const int32_t*>(perm.data_ptr()), nnz, ordered.get());
  return ordered;
}

Tensor masked_linear(const Tensor& x, const Tensor& values, const std::optional<Tensor>& bias, const Tensor& ptr,
                     const Tensor& idx, const std::optional<Tensor>& perm, int64_t out_features) {
  const Tensor input = as_contiguous(x), weights = as_contiguous(values);
  std::optional<Tensor> offset;
  if (bias) offset = as_contiguous(*bias);
  Tensor y = new_tensor(x, {x.size(0), out_features});
  const auto run = [&]<typename T>(const MaskedKernels<T>& kernel) {
    const std::unique_ptr<T[]> ordered = perm ? ordered_values<T>(weights, *perm) : nullptr;
    const MaskedProduct<T> p = {
        .values = ordered ? ordered.get() : static_cast<const T*>(weights.data_ptr()),
        .bias = offset ? static_cast<const T*>(offset->data_ptr()) : nullptr,
        .y = static_cast<T*>(y.data_ptr()),
        .ptr = static_cast<const int64_t*>(ptr.data_ptr()),
        .idx = static_cast<const int32_t*>(idx.data_ptr()),
        .batch = x.size(0),
        .in_features = x.size(1),
        .out_features = out_features,
    };
    run_product<T>({kernel, static_cast<const T*>(input.data_ptr()), p.batch, p.in_features}, p);
  };
  const MaskedTable& table = *kernels().masked;
  x.scalar_type() == ScalarType::Double ? run(table.f64) : run(table.f32);
  return y;
}

template <typename T>
void run_sampled(const Panels<T>& a, const Panels<T>& b, const SampledValues<T>& s) {
  const int64_t nnz = s.ptr[s.out_features], parts = parts_for(s.batch * nnz);
  if (s.batch == 0) std::fill(s.values, s.values + nnz, T(0));
  const auto a_packed = make_scratch<T>(a.size()), b_packed = make_scratch<T>(b.size());
  for_each_part(parts, [&](int64_t part) {
    pack_all(a, part, parts, a_packed.get());
    pack_all(b, part, parts, b_packed.get());
  });
  for_each_entry_share(s.ptr, s.out_features, parts, [&](const int64_t* ptr, Range rows) {
    SampledValues<T> share = s;
    share.ptr = ptr;
    for (int64_t panel = 0; panel < a.count(); ++panel) {
      const Range batch = a.rows(panel);
      a.kernel.sampled(share, a.data(panel, a_packed.get() + a.offset(panel)),
                       b.data(panel, b_packed.get() + b.offset(panel)), batch.end - batch.begin, panel > 0, rows);
    }
  });
}

Tensor sampled_matmul(const Tensor& a, const Tensor& b, const Tensor& ptr, const Tensor& idx) {
  const Tensor left = as_contiguous(a), right = as_contiguous(b);
  Tensor values = new_tensor(a, {idx.size(0)});
  const auto run = [&]<typename T>(const MaskedKernels<T>& kernel) {
    const SampledValues<T> s = {
        .values = static_cast<T*>(values.data_ptr()),
        .ptr = static_cast<const int64_t*>(ptr.data_ptr()),
        .idx = static_cast<const int32_t*>(idx.data_ptr()),
        .batch = a.size(0),
        .in_features = b.size(1),
        .out_features = a.size(1),
    };
    run_sampled<T>({kernel, static_cast<const T*>(left.data_ptr()), s.batch, s.out_features},
                   {kernel, static_cast<const T*>(right.data_ptr()), s.batch, s.in_features}, s);
  };
  const MaskedTable& table = *kernels().masked;
  a.scalar_type() == ScalarType::Double ? run(table.f64) : run(table.f32);
  return values;
}

template <typename T>
const MaskedKernels<T>& kernels_of() {
  if constexpr (sizeof(T) == sizeof(double))
    return kernels().masked->f64;
  else
    return kernels().masked->f32;
}

}  // namespace

template <typename T>
void csr_product(const T* x, const MaskedProduct<T>& p) {
  run_product<T>({kernels_of<T>(), x, p.batch, p.in_features}, p);
}

template <typename T>
void csr_sampled(const T* a, const T* b, const SampledValues<T>& s) {
  const MaskedKernels<T>& kernel = kernels_of<T>();
  run_sampled<T>({kernel, a, s.batch, s.out_features}, {kernel, b, s.batch, s.in_features}, s);
}

template void csr_product(const float*, const MaskedProduct<float>&);
template void csr_product(const double*, const MaskedProduct<double>&);
template void csr_sampled(const float*, const float*, const SampledValues<float>&);
template void csr_sampled(const double*, const double*, const SampledValues<double>&);

}  // namespace compsparse

STABLE_TORCH_LIBRARY_IMPL(compsparse, CPU, m) {
  m.impl("masked_linear", TORCH_BOX(&compsparse::masked_linear));
  m.impl("sampled_matmul", TORCH_BOX(&compsparse::sampled_matmul));
}
