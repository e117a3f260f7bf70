// threshold_attention at key CPU: unpack, split over threads, call the chosen table, gather the support.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../kernels.h"
#include "../partition.h"
#include "../scratch.h"
#include "../tensors.h"

namespace compsparse {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

AttentionSizes sizes_of(const Tensor& query, const Tensor& key, const Tensor& value) {
  return {query.size(0), query.size(1), key.size(1), query.size(2), key.size(2), query.size(3), value.size(3)};
}

// Kernels read rows of contiguous elements at any stride.
Tensor with_contiguous_rows(const Tensor& x) {
  return x.stride(3) == 1 || x.size(3) == 1 ? x : torch::stable::contiguous(x);
}

template <typename T>
Heads<T> heads_of(const Tensor& x) {
  return {static_cast<T*>(x.data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
}

template <class Run>
void by_dtype(const Tensor& x, const Run& run) {
  const AttentionTable& table = *kernels().attention;
  x.scalar_type() == ScalarType::Double ? run(table.f64) : run(table.f32);
}

// Buffers of one thread, for blocks of queries against `keys` keys. Pages that no candidate reaches are never touched.
template <typename T>
struct Buffers {
  Buffers(const AttentionKernels<T>& kernel, const AttentionSizes& size)
      : queries(make_scratch<T>(kernel.block_queries * size.width)),
        scores(make_scratch<T>(kernel.block_queries * kernel.score_stride)),
        counts(new int64_t[kernel.block_queries]),
        columns(new int32_t[kernel.block_queries * (size.keys + kernel.slack)]),
        weights(new T[kernel.block_queries * (size.keys + kernel.slack)]),
        row_capacity(size.keys + kernel.slack) {}

  AttentionScratch<T> scratch() const {
    return {queries.get(), scores.get(), counts.get(), columns.get(), weights.get(), row_capacity};
  }

  Scratch<T> queries, scores;
  std::unique_ptr<int64_t[]> counts;
  std::unique_ptr<int32_t[]> columns;
  std::unique_ptr<T[]> weights;
  int64_t row_capacity;
};

// The survivors of one block of queries, rows one after another.
template <typename T>
struct BlockSupport {
  std::unique_ptr<int32_t[]> columns;
  std::unique_ptr<T[]> weights;
  int64_t count = 0;
};

template <typename T>
bool keep_block(const AttentionScratch<T>& scratch, int64_t rows, int64_t* degrees, BlockSupport<T>& block) {
  for (int64_t r = 0; r < rows; ++r) block.count += degrees[r] = scratch.counts[r];
  block.columns.reset(new (std::nothrow) int32_t[block.count]);
  block.weights.reset(new (std::nothrow) T[block.count]);
  if (!block.columns || !block.weights) return false;
  int64_t at = 0;
  for (int64_t r = 0; r < rows; at += scratch.counts[r++]) {
    std::copy_n(scratch.columns + r * scratch.row_capacity, scratch.counts[r], block.columns.get() + at);
    std::copy_n(scratch.weights + r * scratch.row_capacity, scratch.counts[r], block.weights.get() + at);
  }
  return true;
}

// A query block of one head. Parts take the next one when they are ready: with a causal mask later ones cost more.
struct QueryBlocks {
  int64_t heads, queries, block, per_head;
  QueryBlocks(const AttentionSizes& size, int64_t block)
      : heads(size.heads), queries(size.queries), block(block), per_head((size.queries + block - 1) / block) {}
  int64_t total(int64_t batch) const { return batch * heads * per_head; }
  int64_t head(int64_t unit) const { return unit / per_head; }  // batch * heads + head
  Range rows(int64_t unit) const {
    const int64_t begin = unit % per_head * block;
    return {begin, std::min(begin + block, queries)};
  }
};

template <typename T>
struct PackedKeys {
  Scratch<T> keys;
  std::unique_ptr<double[]> norms;
};

template <typename T>
PackedKeys<T> pack_keys(const AttentionKernels<T>& kernel, Attention<T>& a) {
  const AttentionSizes& size = a.size;
  const int64_t panels = (size.keys + kernel.panel_keys - 1) / kernel.panel_keys, heads = size.batch * size.kv_heads;
  const int64_t head_size = panels * kernel.panel_keys * size.width;
  PackedKeys<T> packed = {make_scratch<T>(heads * head_size), std::unique_ptr<double[]>(new double[heads * panels])};
  const int64_t parts = parts_for(heads * head_size);
  for_each_part(parts, [&](int64_t part) {
    for (int64_t head = 0; head < heads; ++head)
      kernel.pack_keys(a, head / size.kv_heads, head % size.kv_heads, equal_share(panels, part, parts),
                       packed.keys.get() + head * head_size, packed.norms.get() + head * panels);
  });
  a.packed_keys = packed.keys.get();
  a.norms = packed.norms.get();
  return packed;
}

// Runs the forward over all blocks of queries; `blocks` gets each one's survivors, and `degrees` their number per row,
// unless they are null.
template <typename T>
void run_forward(const AttentionKernels<T>& kernel, Attention<T>& a, int64_t* degrees, BlockSupport<T>* blocks) {
  const AttentionSizes& size = a.size;
  const PackedKeys<T> packed = pack_keys(kernel, a);
  const QueryBlocks units(size, kernel.block_queries);
  const int64_t total = units.total(size.batch);
  const int64_t work = size.batch * size.heads * size.queries * (size.keys * size.width + size.value_width);
  const int64_t parts = std::max<int64_t>(1, std::min(parts_for(work), total));
  std::vector<Buffers<T>> buffers;
  for (int64_t part = 0; part < parts; ++part) buffers.emplace_back(kernel, size);
  std::vector<uint8_t> failed(parts, 0);
  std::atomic<int64_t> next{0};
  for_each_part(parts, [&](int64_t part) {
    const AttentionScratch<T> scratch = buffers[part].scratch();
    for (int64_t unit; (unit = next++) < total;) {
      const Range rows = units.rows(unit);
      const int64_t head = units.head(unit);
      kernel.forward(a, head / size.heads, head % size.heads, rows, scratch);
      if (blocks &&
          !keep_block(scratch, rows.end - rows.begin, degrees + head * size.queries + rows.begin, blocks[unit]))
        failed[part] = 1;
    }
  });
  STD_TORCH_CHECK(std::find(failed.begin(), failed.end(), 1) == failed.end(), "out of memory for the support");
}

template <typename T>
void set_bias(Attention<T>& a, const Tensor& bias) {
  if (bias.scalar_type() == ScalarType::Bool)
    a.mask = static_cast<const uint8_t*>(bias.data_ptr());
  else
    a.bias = static_cast<const T*>(bias.data_ptr());
  for (int d = 0; d < 4; ++d) a.bias_strides[d] = bias.size(d) == 1 ? 0 : bias.stride(d);
}

// The inputs of both forward ops, kept alive together with the contiguous copies made of them.
struct Inputs {
  Tensor query, key, value;
  std::optional<Tensor> bias, padding;
  double threshold;
  bool absolute, causal;
  double scale;

  template <typename T>
  Attention<T> attention(const Tensor& out) const {
    Attention<T> a = {};
    a.size = sizes_of(query, key, value);
    a.query = heads_of<const T>(query);
    a.key = heads_of<const T>(key);
    a.value = heads_of<const T>(value);
    a.out = heads_of<T>(out);
    if (bias) set_bias(a, *bias);
    if (padding) a.padding = static_cast<const uint8_t*>(padding->data_ptr());
    a.scale = scale;
    a.cut = absolute ? threshold : std::log(threshold);
    a.absolute = absolute;
    a.causal = causal;
    return a;
  }

  Tensor new_output() const { return new_tensor(query, {query.size(0), query.size(1), query.size(2), value.size(3)}); }
};

Inputs inputs_of(const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& bias,
                 const std::optional<Tensor>& padding, double threshold, const std::string& rule, bool is_causal,
                 double scale) {
  Inputs inputs = {with_contiguous_rows(query),
                   with_contiguous_rows(key),
                   with_contiguous_rows(value),
                   bias,
                   std::nullopt,
                   threshold,
                   rule == "absolute",
                   is_causal,
                   scale};
  if (padding) inputs.padding = torch::stable::contiguous(*padding);
  return inputs;
}

Tensor threshold_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                           const std::optional<Tensor>& attn_bias, const std::optional<Tensor>& key_padding_mask,
                           double threshold, std::string rule, bool is_causal, double scale) {
  const Inputs inputs = inputs_of(query, key, value, attn_bias, key_padding_mask, threshold, rule, is_causal, scale);
  Tensor out = inputs.new_output();
  by_dtype(query, [&]<typename T>(const AttentionKernels<T>& kernel) {
    Attention<T> a = inputs.attention<T>(out);
    run_forward<T>(kernel, a, nullptr, nullptr);
  });
  return out;
}

// Blocks of survivors -> the arrays of the support, which begin with row_ptr[1 + row] = degree of the row.
template <typename T>
std::tuple<Tensor, Tensor> join_blocks(const Tensor& like, Tensor& row_ptr, const QueryBlocks& units, int64_t batch,
                                       const std::vector<BlockSupport<T>>& blocks) {
  int64_t* ptr = static_cast<int64_t*>(row_ptr.data_ptr());
  const int64_t rows = row_ptr.size(0) - 1;
  ptr[0] = 0;
  for (int64_t row = 0; row < rows; ++row) ptr[row + 1] += ptr[row];
  Tensor col_idx = new_tensor(like, {ptr[rows]}, aoti_torch_dtype_int32());
  Tensor weights = new_tensor(like, {ptr[rows]});
  const int64_t total = units.total(batch), parts = parts_for(ptr[rows]);
  for_each_part(parts, [&](int64_t part) {
    const Range mine = equal_share(total, part, parts);
    for (int64_t unit = mine.begin; unit < mine.end; ++unit) {
      const int64_t at = ptr[units.head(unit) * units.queries + units.rows(unit).begin];
      const BlockSupport<T>& block = blocks[unit];
      std::copy_n(block.columns.get(), block.count, static_cast<int32_t*>(col_idx.data_ptr()) + at);
      std::copy_n(block.weights.get(), block.count, static_cast<T*>(weights.data_ptr()) + at);
    }
  });
  return {col_idx, weights};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> threshold_attention_support(
    const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& attn_bias,
    const std::optional<Tensor>& key_padding_mask, double threshold, std::string rule, bool is_causal, double scale) {
  const Inputs inputs = inputs_of(query, key, value, attn_bias, key_padding_mask, threshold, rule, is_causal, scale);
  Tensor out = inputs.new_output();
  Tensor row_ptr = new_tensor(query, {query.size(0) * query.size(1) * query.size(2) + 1}, aoti_torch_dtype_int64());
  Tensor col_idx, weights;
  by_dtype(query, [&]<typename T>(const AttentionKernels<T>& kernel) {
    Attention<T> a = inputs.attention<T>(out);
    const QueryBlocks units(a.size, kernel.block_queries);
    std::vector<BlockSupport<T>> blocks(units.total(a.size.batch));
    run_forward<T>(kernel, a, static_cast<int64_t*>(row_ptr.data_ptr()) + 1, blocks.data());
    std::tie(col_idx, weights) = join_blocks(query, row_ptr, units, a.size.batch, blocks);
  });
  return {out, row_ptr, col_idx, weights};
}

template <typename T>
void run_backward(const AttentionKernels<T>& kernel, const AttentionGradient<T>& g) {
  const AttentionSizes& size = g.size;
  const int64_t rows = size.batch * size.heads * size.queries, keys = size.batch * size.kv_heads * size.keys;
  const int64_t work = (g.row_ptr[rows] + rows + keys) * (size.width + size.value_width);
  const int64_t parts = parts_for(work);
  for_each_part(parts, [&](int64_t part) { kernel.backward_rows(g, balanced_rows(g.row_ptr, rows, 4, part, parts)); });
  // A range of keys whose gradients stay in the L2 cache; more ranges where there are fewer heads than threads.
  constexpr int64_t cache = 512 << 10;
  const int64_t kv_heads = size.batch * size.kv_heads, splits = 2 * (parts - 1) / std::max<int64_t>(kv_heads, 1);
  const int64_t in_cache = cache / (std::max(size.width, size.value_width) * int64_t(sizeof(T)));
  const int64_t range = std::clamp<int64_t>(std::min(in_cache, size.keys / (splits + 1)), 64, 1 << 20);
  const int64_t per_head = (size.keys + range - 1) / range;
  std::atomic<int64_t> next{0};
  for_each_part(parts, [&](int64_t) {
    for (int64_t unit; (unit = next++) < kv_heads * per_head;) {
      const int64_t head = unit / per_head, begin = unit % per_head * range;
      kernel.backward_keys(g, head / size.kv_heads, head % size.kv_heads, {begin, std::min(begin + range, size.keys)});
    }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> threshold_attention_backward(const Tensor& grad, const Tensor& query,
                                                                        const Tensor& key, const Tensor& value,
                                                                        const Tensor& row_ptr, const Tensor& col_idx,
                                                                        const Tensor& weights, double scale) {
  const Tensor rows[] = {with_contiguous_rows(query), with_contiguous_rows(key), with_contiguous_rows(value),
                         with_contiguous_rows(grad)};
  const auto new_like = [](const Tensor& x) { return new_tensor(x, {x.size(0), x.size(1), x.size(2), x.size(3)}); };
  Tensor query_grad = new_like(query), key_grad = new_like(key), value_grad = new_like(value);
  Tensor score_grad = new_tensor(weights, {weights.size(0)});
  by_dtype(query, [&]<typename T>(const AttentionKernels<T>& kernel) {
    const AttentionGradient<T> g = {
        .size = sizes_of(query, key, value),
        .query = heads_of<const T>(rows[0]),
        .key = heads_of<const T>(rows[1]),
        .value = heads_of<const T>(rows[2]),
        .grad = heads_of<const T>(rows[3]),
        .row_ptr = static_cast<const int64_t*>(row_ptr.data_ptr()),
        .col_idx = static_cast<const int32_t*>(col_idx.data_ptr()),
        .weights = static_cast<const T*>(weights.data_ptr()),
        .score_grad = static_cast<T*>(score_grad.data_ptr()),
        .query_grad = heads_of<T>(query_grad),
        .key_grad = heads_of<T>(key_grad),
        .value_grad = heads_of<T>(value_grad),
        .scale = scale,
    };
    run_backward(kernel, g);
  });
  return {query_grad, key_grad, value_grad, score_grad};
}

}  // namespace
}  // namespace compsparse

STABLE_TORCH_LIBRARY_IMPL(compsparse, CPU, m) {
  m.impl("threshold_attention", TORCH_BOX(&compsparse::threshold_attention));
  m.impl("threshold_attention_support", TORCH_BOX(&compsparse::threshold_attention_support));
  m.impl("threshold_attention_backward", TORCH_BOX(&compsparse::threshold_attention_backward));
}
