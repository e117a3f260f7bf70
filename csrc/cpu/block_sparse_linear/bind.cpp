// block_sparse_linear and sampled_block_matmul at key CPU: unpack, split over threads, call the chosen table.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <optional>
#include <string>
#include <type_traits>

#include "../kernels.h"
#include "../partition.h"
#include "../scratch.h"
#include "../tensors.h"

namespace compsparse {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class Run>
void for_dtype(ScalarType dtype, const Run& run) {
  const BlockSparseTable& table = *kernels().block_sparse;
  if (dtype == ScalarType::Double) return run(table.f64);
  if (dtype == ScalarType::BFloat16) return run(table.bf16);
  if (dtype == ScalarType::Half) return run(table.f16);
  run(table.f32);
}

// Shares of the batch that fill whole vectors where it is the vector axis.
Range share_of_batch(int64_t batch, int64_t part, int64_t parts) {
  const Range tiles = equal_share((batch + batch_lanes - 1) / batch_lanes, part, parts);
  return {tiles.begin * batch_lanes, std::min(tiles.end * batch_lanes, batch)};
}

// The batch is split first: its parts share nothing but the packed weights. Rows are split where the batch is short.
template <typename T>
void run_product(const BlockSparseKernels<T>& kernel, const BlockProduct<T>& p, int64_t rows) {
  constexpr int64_t least_batch = 48;
  const int64_t entries = p.ptr[rows];
  const int64_t parts = parts_for(p.batch * (entries * p.block_in * p.block_out + p.out_features));
  const auto packed = make_scratch<Sum<T>>(entries * kernel.packed_entry_size(p));
  if (kernel.packed_entry_size(p))
    for_each_part(parts,
                  [&](int64_t part) { kernel.pack_weights(p, equal_share(entries, part, parts), packed.get()); });
  const int64_t batch_parts = std::clamp<int64_t>(p.batch / least_batch, 1, parts), row_parts = parts / batch_parts;
  for_each_part(batch_parts * row_parts, [&](int64_t part) {
    const auto scratch = make_scratch<Sum<T>>(kernel.product_scratch(p));
    kernel.product(p, packed.get(), balanced_rows(p.ptr, rows, 1, part % row_parts, row_parts),
                   share_of_batch(p.batch, part / row_parts, batch_parts), scratch.get());
  });
}

Tensor block_sparse_linear(const Tensor& x, const Tensor& values, const std::optional<Tensor>& bias, const Tensor& ptr,
                           const Tensor& idx, const Tensor& slot, int64_t out_features, bool transposed,
                           std::string activation) {
  const Tensor input = as_contiguous(x), weights = as_contiguous(values);
  std::optional<Tensor> offset;
  if (bias) offset = as_contiguous(*bias);
  Tensor y = new_tensor(x, {x.size(0), out_features});
  const auto run = [&]<typename T>(const BlockSparseKernels<T>& kernel) {
    const BlockProduct<T> p = {
        .x = static_cast<const T*>(input.data_ptr()),
        .values = static_cast<const T*>(weights.data_ptr()),
        .bias = offset ? static_cast<const T*>(offset->data_ptr()) : nullptr,
        .y = static_cast<T*>(y.data_ptr()),
        .ptr = static_cast<const int64_t*>(ptr.data_ptr()),
        .idx = static_cast<const int32_t*>(idx.data_ptr()),
        .slot = static_cast<const int32_t*>(slot.data_ptr()),
        .batch = x.size(0),
        .in_features = x.size(1),
        .out_features = out_features,
        .block_out = values.size(transposed ? 2 : 1),
        .block_in = values.size(transposed ? 1 : 2),
        .transposed = transposed,
        .activation = activation_from(activation),
    };
    run_product(kernel, p, ptr.size(0) - 1);
  };
  for_dtype(x.scalar_type(), run);
  return y;
}

// Rounded to nearest even, as torch does it.
void round_sum(double sum, double* to) { *to = sum; }
void round_sum(float sum, float* to) { *to = sum; }
void round_sum(float sum, BFloat16* to) { to->bits = torch::headeronly::BFloat16(sum).x; }
void round_sum(float sum, Float16* to) { to->bits = torch::headeronly::Half(sum).x; }

// A slot shared by several entries gets their sum, in the order of the entries, rounded once.
template <typename T>
void reduce_entries(const Sum<T>* entries, const int32_t* slot, int64_t num_entries, int64_t num_slots, int64_t size,
                    T* values) {
  const int64_t parts = parts_for(num_entries * size);
  for_each_part(parts, [&](int64_t part) {
    const Range mine = equal_share(num_slots, part, parts);
    const int64_t first = mine.begin * size, count = (mine.end - mine.begin) * size;
    const auto sums = make_scratch<Sum<T>>(count);
    std::fill(sums.get(), sums.get() + count, Sum<T>(0));
    for (int64_t e = 0; e < num_entries; ++e) {
      if (slot[e] < mine.begin || slot[e] >= mine.end) continue;
      for (int64_t i = 0; i < size; ++i) sums[slot[e] * size - first + i] += entries[e * size + i];
    }
    for (int64_t i = 0; i < count; ++i) round_sum(sums[i], &values[first + i]);
  });
}

// The batch goes through in panels of about equal size, few of them: the end of each costs as much as some rows.
template <typename T>
void run_sampled_by_lanes(const BlockSparseKernels<T>& kernel, const SampledBlocks<T>& s, const T* b, int64_t rows,
                          int64_t parts) {
  constexpr int64_t least_rows = 256;
  const int64_t panels = std::max<int64_t>(s.batch / least_rows, 1);
  const int64_t width = (s.batch + panels * batch_lanes - 1) / (panels * batch_lanes) * batch_lanes;
  const auto a_panel = make_scratch<Sum<T>>(s.out_features * width);
  const auto b_panel = make_scratch<Sum<T>>(s.in_features * width);
  for (int64_t panel = 0; panel < panels; ++panel) {
    const auto [begin, end] = share_of_batch(s.batch, panel, panels);
    const auto pack = [&](const T* x, int64_t features, int64_t part, Sum<T>* to) {
      kernel.pack_lanes(x + begin * features, features, end - begin, equal_share(features, part, parts), to);
    };
    for_each_part(parts, [&](int64_t part) {
      pack(s.a, s.out_features, part, a_panel.get());
      pack(b, s.in_features, part, b_panel.get());
    });
    for_each_entry_share(s.ptr, rows, parts, [&, batch_rows = end - begin](const int64_t* ptr, Range some_rows) {
      SampledBlocks<T> share = s;
      share.ptr = ptr;
      kernel.sampled_by_lanes(share, a_panel.get(), b_panel.get(), batch_rows, panel > 0, some_rows);
    });
  }
}

// Shares of the batch, such that the packed columns of one stay in cache over all entries; one where sums are rounded.
template <typename T>
int64_t panels_of_batch(const SampledBlocks<T>& s) {
  constexpr int64_t rows_of_a_panel = 256;
  const bool adds = s.sums || std::is_same_v<T, Sum<T>>;
  return adds ? std::max<int64_t>(s.batch / rows_of_a_panel, 1) : 1;
}

template <typename T>
void run_sampled(const BlockSparseKernels<T>& kernel, SampledBlocks<T> s, const T* b, int64_t rows) {
  const int64_t work = s.batch * s.ptr[rows] * s.block_in * s.block_out;
  const int64_t parts = parts_for(work);
  if (kernel.sampled_uses_lanes(s)) return run_sampled_by_lanes(kernel, s, b, rows, parts);
  const int64_t columns = (s.in_features + s.block_in - 1) / s.block_in;
  const int64_t panels = panels_of_batch(s), longest = (s.batch + panels - 1) / panels;
  const auto packed = make_scratch<Sum<T>>(columns * kernel.panel_size(longest, s.block_in));
  for (int64_t panel = 0; panel < panels; ++panel) {
    const auto [begin, end] = equal_share(s.batch, panel, panels);
    SampledBlocks<T> mine = s;
    mine.a += begin * s.out_features;
    mine.b_panels = packed.get();
    mine.batch = end - begin;
    mine.add = panel > 0;
    const T* from = b + begin * s.in_features;
    for_each_part(parts, [&](int64_t part) {
      const Range share = equal_share(mine.batch, part, parts);
      kernel.pack_panels(from, mine.batch, s.in_features, s.block_in, share, packed.get());
    });
    for_each_entry_share(s.ptr, rows, parts, [&](const int64_t* ptr, Range some_rows) {
      SampledBlocks<T> share = mine;
      share.ptr = ptr;
      const auto scratch = make_scratch<Sum<T>>(kernel.sampled_scratch(share));
      kernel.sampled(share, some_rows, scratch.get());
    });
  }
}

Tensor sampled_block_matmul(const Tensor& a, const Tensor& b, const Tensor& ptr, const Tensor& idx, const Tensor& slot,
                            int64_t num_slots, bool shared, int64_t block_out, int64_t block_in) {
  const Tensor left = as_contiguous(a), right = as_contiguous(b);
  Tensor values = new_tensor(a, {num_slots, block_out, block_in});
  const int64_t num_entries = idx.size(0);
  const auto run = [&]<typename T>(const BlockSparseKernels<T>& kernel) {
    const int64_t size = block_out * block_in;
    T* blocks = static_cast<T*>(values.data_ptr());
    const int32_t* slots = static_cast<const int32_t*>(slot.data_ptr());
    const auto sums = make_scratch<Sum<T>>(shared ? num_entries * size : 0);
    const SampledBlocks<T> s = {
        .a = static_cast<const T*>(left.data_ptr()),
        .b_panels = nullptr,
        .blocks = blocks,
        .sums = shared ? sums.get() : nullptr,
        .slot = slots,
        .ptr = static_cast<const int64_t*>(ptr.data_ptr()),
        .idx = static_cast<const int32_t*>(idx.data_ptr()),
        .batch = a.size(0),
        .in_features = b.size(1),
        .out_features = a.size(1),
        .block_out = block_out,
        .block_in = block_in,
        .add = false,
    };
    run_sampled(kernel, s, static_cast<const T*>(right.data_ptr()), ptr.size(0) - 1);
    if (shared) reduce_entries(sums.get(), slots, num_entries, num_slots, size, blocks);
  };
  for_dtype(a.scalar_type(), run);
  return values;
}

Tensor activated(const Tensor& z, const std::optional<Tensor>& grad, std::string activation) {
  const Tensor input = as_contiguous(z);
  std::optional<Tensor> gradient;
  if (grad) gradient = as_contiguous(*grad);
  Tensor out = new_tensor(z, {z.size(0), z.size(1)});
  const int64_t size = z.size(0) * z.size(1), parts = parts_for(size * 16);  // about so many steps an element
  const auto run = [&]<typename T>(const BlockSparseKernels<T>& kernel) {
    const ActivatedValues<T> a = {.z = static_cast<const T*>(input.data_ptr()),
                                  .grad = gradient ? static_cast<const T*>(gradient->data_ptr()) : nullptr,
                                  .out = static_cast<T*>(out.data_ptr()),
                                  .activation = activation_from(activation)};
    for_each_part(parts, [&](int64_t part) { kernel.activated(a, equal_share(size, part, parts)); });
  };
  for_dtype(z.scalar_type(), run);
  return out;
}

}  // namespace
}  // namespace compsparse

STABLE_TORCH_LIBRARY_IMPL(compsparse, CPU, m) {
  m.impl("block_sparse_linear", TORCH_BOX(&compsparse::block_sparse_linear));
  m.impl("sampled_block_matmul", TORCH_BOX(&compsparse::sampled_block_matmul));
  m.impl("activated", TORCH_BOX(&compsparse::activated));
}
