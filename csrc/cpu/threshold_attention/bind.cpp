// threshold_attention at key CPU: unpack, split over threads, call the chosen table, gather the support.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../arena.h"
#include "../partition.h"
#include "../scratch.h"
#include "unpack.h"

namespace compsparse {
namespace {

// Buffers of one thread, for blocks of queries against `keys` keys. Pages that no candidate reaches are never touched.
template <typename T>
struct Buffers {
  Buffers(const AttentionKernels<T>& kernel, const AttentionSizes& size)
      : row_capacity(round_up(size.keys, kernel.panel_keys) + kernel.slack),
        queries(make_scratch<T>(kernel.block_queries * size.width)),
        codes(make_scratch<int8_t>(kernel.block_queries * round_up(size.width, 4))),
        scores(make_scratch<T>(kernel.block_queries * kernel.score_stride)),
        counts(new int64_t[kernel.block_queries]),
        columns(new int32_t[kernel.block_queries * row_capacity]),
        weights(make_scratch<T>(kernel.block_queries * row_capacity)),
        spare(make_scratch<T>(2 * row_capacity)),
        sums(new T[2 * kernel.block_queries]),
        slopes(sums.get() + kernel.block_queries) {}

  AttentionScratch<T> scratch(bool with_support) const {
    return {queries.get(), codes.get(), scores.get(), counts.get(), columns.get(), weights.get(),
            spare.get(),   sums.get(),  slopes,       row_capacity, with_support};
  }

  int64_t row_capacity;
  Scratch<T> queries;
  Scratch<int8_t> codes;
  Scratch<T> scores;
  std::unique_ptr<int64_t[]> counts;
  std::unique_ptr<int32_t[]> columns;
  Scratch<T> weights, spare;
  std::unique_ptr<T[]> sums;
  T* slopes;
};

// The survivors of one block of queries, rows one after another.
template <typename T>
struct BlockSupport {
  int32_t* columns;
  T* weights;
  int64_t count = 0;
};

template <typename T>
bool keep_block(const AttentionScratch<T>& scratch, int64_t rows, int64_t* degrees, Arena& arena,
                BlockSupport<T>& block) {
  for (int64_t r = 0; r < rows; ++r) block.count += degrees[r] = scratch.counts[r];
  block.columns = static_cast<int32_t*>(arena.allocate(block.count * sizeof(int32_t)));
  block.weights = static_cast<T*>(arena.allocate(block.count * sizeof(T)));
  if (!block.columns || !block.weights) return false;
  int64_t at = 0;
  for (int64_t r = 0; r < rows; at += scratch.counts[r++]) {
    std::copy_n(scratch.columns + r * scratch.row_capacity, scratch.counts[r], block.columns + at);
    std::copy_n(scratch.weights + r * scratch.row_capacity, scratch.counts[r], block.weights + at);
  }
  return true;
}

// What the kernels need of the keys, made when a block of queries first asks for it.
template <typename T>
class PreparedKeys {
 public:
  PreparedKeys(const AttentionKernels<T>& kernel, Attention<T>& a)
      : kernel_(kernel), a_(a), heads_(a.size.batch * a.size.kv_heads), panels_(panels_of(kernel, a.size)) {
    const int64_t head_size = panels_ * kernel.panel_keys * a.size.width;
    packed_ = make_scratch<T>(heads_ * head_size);
    norms_.reset(new double[heads_ * panels_]);
    finite_.reset(new uint8_t[heads_]);
    once_.reset(new std::once_flag[heads_]);
    a.packed_keys = packed_.get();
    a.norms = norms_.get();
    a.finite_values = finite_.get();
  }

  void need(int64_t b, int64_t kv_head) {
    const int64_t head = b * a_.size.kv_heads + kv_head;
    std::call_once(once_[head], [&] {
      T* packed = packed_.get() + head * panels_ * kernel_.panel_keys * a_.size.width;
      kernel_.pack_keys(a_.key.head(b, kv_head), a_.key.stride, a_.size.keys, a_.size.width, packed,
                        norms_.get() + head * panels_);
      finite_[head] = all_finite(a_.value.head(b, kv_head), a_.value.stride, a_.size.keys, a_.size.value_width);
    });
  }

 private:
  static int64_t panels_of(const AttentionKernels<T>& kernel, const AttentionSizes& size) {
    return (size.keys + kernel.panel_keys - 1) / kernel.panel_keys;
  }

  const AttentionKernels<T>& kernel_;
  Attention<T>& a_;
  int64_t heads_, panels_;
  Scratch<T> packed_;
  std::unique_ptr<double[]> norms_;
  std::unique_ptr<uint8_t[]> finite_;
  std::unique_ptr<std::once_flag[]> once_;
};

// Queries so few that keys are read as they lie: to repack them costs as much as some products with them.
constexpr int64_t few_queries = 8;

// Heads [batch * heads] whose queries go by the index; where most keys are kept it is a detour.
template <typename T>
std::vector<uint8_t> heads_by_index(const AttentionKernels<T>& kernel, const Attention<T>& a,
                                    const AttentionScratch<T>& scratch) {
  constexpr int64_t least_keys = 256;
  const AttentionSizes& size = a.size;
  std::vector<uint8_t> chosen(size.batch * size.heads, a.index != nullptr);
  if (chosen.empty() || !kernel.forward_indexed || a.index || a.rule == Rule::topk || size.keys < least_keys)
    return chosen;
  if (size.queries * (size.heads / size.kv_heads) <= few_queries) return chosen;
  for (int64_t head = 0; head < size.batch * size.heads; ++head)
    chosen[head] = !(kernel.head_share(a, head / size.heads, head % size.heads, scratch) > kernel.most_by_index);
  return chosen;
}

// The index of the keys that the chosen heads attend to, where none was given.
template <typename T>
Scratch<uint8_t> new_index(const AttentionKernels<T>& kernel, Attention<T>& a, const std::vector<uint8_t>& chosen) {
  const AttentionSizes& size = a.size;
  if (a.index || std::find(chosen.begin(), chosen.end(), 1) == chosen.end()) return nullptr;
  const int64_t panels = (size.keys + index_panel_keys - 1) / index_panel_keys, heads = size.batch * size.kv_heads;
  const int64_t group = size.heads / size.kv_heads;
  a.index_stride = panels * index_panel_bytes(size.width);
  Scratch<uint8_t> index = make_scratch<uint8_t>(heads * a.index_stride);
  const int64_t parts = parts_for(heads * size.keys * size.width);
  for_each_part(parts, [&](int64_t part) {
    for (int64_t head = 0; head < heads; ++head) {
      const auto first = chosen.begin() + head * group;
      if (std::find(first, first + group, 1) == first + group) continue;
      const Range mine = equal_share(panels, part, parts);
      const Range keys = {mine.begin * index_panel_keys, std::min(mine.end * index_panel_keys, size.keys)};
      kernel.pack_index(a.key.head(head / size.kv_heads, head % size.kv_heads) + keys.begin * a.key.stride,
                        a.key.stride, size.width, keys, index.get() + head * a.index_stride);
    }
  });
  a.index = index.get();
  return index;
}

// What goes to the support: survivors of each block, and numbers of each row.
template <typename T>
struct SupportParts {
  int64_t* degrees;
  T* log_sums;
  T* slopes;
  std::vector<BlockSupport<T>> blocks;
  std::vector<Arena> arenas;
};

// Runs the forward over all blocks of queries; `support` may be null.
template <typename T>
void run_forward(const AttentionKernels<T>& kernel, Attention<T>& a, SupportParts<T>* support) {
  const AttentionSizes& size = a.size;
  const int64_t group = size.heads / std::max<int64_t>(size.kv_heads, 1);
  std::optional<PreparedKeys<T>> keys;
  if (size.queries * group > few_queries) keys.emplace(kernel, a);
  const QueryBlocks units(size, kernel.block_queries);
  const int64_t total = units.total(size.batch);
  const int64_t work = size.batch * size.heads * size.queries * (size.keys * size.width + size.value_width);
  const int64_t parts = std::max<int64_t>(1, std::min(parts_for(work), total));
  std::vector<Buffers<T>> buffers;
  for (int64_t part = 0; part < parts; ++part) buffers.emplace_back(kernel, size);
  if (support) support->arenas.resize(parts);
  const std::vector<uint8_t> by_index = heads_by_index(kernel, a, buffers[0].scratch(false));
  const Scratch<uint8_t> index = new_index(kernel, a, by_index);
  std::vector<uint8_t> failed(parts, 0);
  std::atomic<int64_t> next{0};
  for_each_part(parts, [&](int64_t part) {
    const AttentionScratch<T> scratch = buffers[part].scratch(support != nullptr);
    for (int64_t unit; (unit = next++) < total;) {
      const Range rows = units.rows(unit);
      const int64_t head = units.head(unit), b = head / size.heads, h = head % size.heads;
      if (!by_index[head] || !kernel.forward_indexed(a, b, h, rows, scratch)) {
        if (keys) keys->need(b, h / group);
        kernel.forward(a, b, h, rows, scratch);
      }
      if (!support) continue;
      const int64_t first = head * size.queries + rows.begin, count = rows.end - rows.begin;
      std::copy_n(scratch.log_sums, count, support->log_sums + first);
      std::copy_n(scratch.slopes, count, support->slopes + first);
      if (!keep_block(scratch, count, support->degrees + first, support->arenas[part], support->blocks[unit]))
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

// The inputs of both forward ops, kept alive together with the copies made of them.
struct Inputs {
  Tensor query, key, value;
  std::optional<Tensor> bias, padding, alibi, thresholds, query_starts, key_starts, index;
  double threshold;
  Rule rule;
  Weighting weighting;
  bool causal;
  int64_t window_left, window_right, query_offset;
  double scale, dropout;
  int64_t seed;

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
    if (alibi) a.alibi_slopes = static_cast<const float*>(alibi->data_ptr());
    if (thresholds) {
      a.thresholds = static_cast<const double*>(thresholds->data_ptr());
      for (int d = 0; d < 3; ++d) a.threshold_strides[d] = thresholds->size(d) == 1 ? 0 : thresholds->stride(d);
    }
    if (query_starts) {
      a.query_starts = static_cast<const int64_t*>(query_starts->data_ptr());
      a.key_starts = static_cast<const int64_t*>(key_starts->data_ptr());
      a.sequences = query_starts->size(0) - 1;
    }
    if (index && sizeof(T) == sizeof(float)) {
      a.index = static_cast<const uint8_t*>(index->data_ptr());
      a.index_stride = index->stride(1);
    }
    a.threshold = threshold;
    a.rule = rule;
    a.weighting = weighting;
    a.causal = causal;
    a.window_left = window_left;
    a.window_right = window_right;
    a.query_offset = query_offset;
    a.scale = scale;
    a.dropout = dropout;
    a.seed = uint64_t(seed);
    return a;
  }

  // In the dtype that the kernels compute in.
  Tensor new_output() const { return new_tensor(query, {query.size(0), query.size(1), query.size(2), value.size(3)}); }
};

std::optional<Tensor> contiguous_or_none(const std::optional<Tensor>& x) {
  return x ? std::optional<Tensor>(torch::stable::contiguous(*x)) : std::nullopt;
}

Inputs inputs_of(const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& bias,
                 const std::optional<Tensor>& padding, const std::optional<Tensor>& alibi,
                 const std::optional<Tensor>& thresholds, const std::optional<Tensor>& query_starts,
                 const std::optional<Tensor>& key_starts, const std::optional<Tensor>& index, double threshold,
                 const std::string& rule, const std::string& weighting, bool is_causal, int64_t window_left,
                 int64_t window_right, int64_t query_offset, double scale, double dropout, int64_t seed) {
  std::optional<Tensor> wide_bias = bias;
  if (bias && is_half(*bias)) wide_bias = torch::stable::to(*bias, ScalarType::Float);
  return {as_rows(query),
          as_rows(key),
          as_rows(value),
          wide_bias,
          contiguous_or_none(padding),
          contiguous_or_none(alibi),
          thresholds,
          contiguous_or_none(query_starts),
          contiguous_or_none(key_starts),
          kernels().attention->f32.forward_indexed ? index : std::nullopt,
          threshold,
          rule_from(rule),
          weighting_from(weighting),
          is_causal,
          window_left,
          window_right,
          query_offset,
          scale,
          dropout,
          seed};
}

Tensor threshold_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                           const std::optional<Tensor>& attn_bias, const std::optional<Tensor>& key_padding_mask,
                           const std::optional<Tensor>& alibi_slopes, const std::optional<Tensor>& thresholds,
                           const std::optional<Tensor>& cu_seqlens_q, const std::optional<Tensor>& cu_seqlens_k,
                           const std::optional<Tensor>& index, double threshold, std::string rule,
                           std::string weighting, bool is_causal, int64_t window_left, int64_t window_right,
                           int64_t query_offset, double scale, double dropout_p, int64_t seed) {
  const Inputs inputs = inputs_of(query, key, value, attn_bias, key_padding_mask, alibi_slopes, thresholds,
                                  cu_seqlens_q, cu_seqlens_k, index, threshold, rule, weighting, is_causal, window_left,
                                  window_right, query_offset, scale, dropout_p, seed);
  Tensor out = inputs.new_output();
  by_dtype(inputs.query, [&]<typename T>(const AttentionKernels<T>& kernel) {
    Attention<T> a = inputs.attention<T>(out);
    run_forward<T>(kernel, a, nullptr);
  });
  return narrowed_like(out, query);
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
  Tensor weights = new_tensor(like, {ptr[rows]}, sum_dtype(like));
  prefer_large_pages(col_idx.data_ptr(), ptr[rows] * sizeof(int32_t));
  prefer_large_pages(weights.data_ptr(), ptr[rows] * sizeof(T));
  const int64_t total = units.total(batch), parts = parts_for(ptr[rows]);
  for_each_part(parts, [&](int64_t part) {
    const Range mine = equal_share(total, part, parts);
    for (int64_t unit = mine.begin; unit < mine.end; ++unit) {
      const int64_t at = ptr[units.head(unit) * units.queries + units.rows(unit).begin];
      const BlockSupport<T>& block = blocks[unit];
      std::copy_n(block.columns, block.count, static_cast<int32_t*>(col_idx.data_ptr()) + at);
      std::copy_n(block.weights, block.count, static_cast<T*>(weights.data_ptr()) + at);
    }
  });
  return {col_idx, weights};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> threshold_attention_support(
    const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& attn_bias,
    const std::optional<Tensor>& key_padding_mask, const std::optional<Tensor>& alibi_slopes,
    const std::optional<Tensor>& thresholds, const std::optional<Tensor>& cu_seqlens_q,
    const std::optional<Tensor>& cu_seqlens_k, const std::optional<Tensor>& index, double threshold, std::string rule,
    std::string weighting, bool is_causal, int64_t window_left, int64_t window_right, int64_t query_offset,
    double scale, double dropout_p, int64_t seed) {
  const Inputs inputs = inputs_of(query, key, value, attn_bias, key_padding_mask, alibi_slopes, thresholds,
                                  cu_seqlens_q, cu_seqlens_k, index, threshold, rule, weighting, is_causal, window_left,
                                  window_right, query_offset, scale, dropout_p, seed);
  Tensor out = inputs.new_output();
  const int64_t batch = query.size(0), heads = query.size(1), queries = query.size(2);
  Tensor row_ptr = new_tensor(query, {batch * heads * queries + 1}, aoti_torch_dtype_int64());
  Tensor log_sum = new_tensor(query, {batch, heads, queries}, sum_dtype(query));
  Tensor slope = new_tensor(query, {batch, heads, queries}, sum_dtype(query));
  Tensor col_idx, weights;
  by_dtype(inputs.query, [&]<typename T>(const AttentionKernels<T>& kernel) {
    Attention<T> a = inputs.attention<T>(out);
    const QueryBlocks units(a.size, kernel.block_queries);
    SupportParts<T> support = {static_cast<int64_t*>(row_ptr.data_ptr()) + 1,
                               static_cast<T*>(log_sum.data_ptr()),
                               static_cast<T*>(slope.data_ptr()),
                               std::vector<BlockSupport<T>>(units.total(a.size.batch)),
                               {}};
    run_forward<T>(kernel, a, &support);
    std::tie(col_idx, weights) = join_blocks(query, row_ptr, units, a.size.batch, support.blocks);
  });
  return {narrowed_like(out, query), row_ptr, col_idx, weights, log_sum, slope};
}

// Entries of the keys that begin with number `first`. Kernels without an index leave it as it is.
void write_index(Tensor& index, const Tensor& key, int64_t first) {
  const AttentionKernels<float>& kernel = kernels().attention->f32;
  if (!kernel.pack_index || key.scalar_type() == ScalarType::Double) return;
  const Tensor keys = as_rows(key);
  const Heads<const float> heads = heads_of<const float>(keys);
  auto* bytes = static_cast<uint8_t*>(index.data_ptr());
  for (int64_t b = 0; b < keys.size(0); ++b)
    for (int64_t h = 0; h < keys.size(1); ++h)
      kernel.pack_index(heads.head(b, h), heads.stride, keys.size(3), {first, first + keys.size(2)},
                        bytes + b * index.stride(0) + h * index.stride(1));
}

Tensor threshold_attention_index(const Tensor& key) {
  const int64_t panels = (key.size(2) + index_panel_keys - 1) / index_panel_keys;
  Tensor index = torch::stable::new_zeros(key, {key.size(0), key.size(1), panels, index_panel_bytes(key.size(3))},
                                          ScalarType::Byte);
  write_index(index, key, 0);
  return index;
}

void threshold_attention_index_(Tensor index, const Tensor& key, int64_t first) { write_index(index, key, first); }

}  // namespace
}  // namespace compsparse

STABLE_TORCH_LIBRARY_IMPL(compsparse, CPU, m) {
  m.impl("threshold_attention", TORCH_BOX(&compsparse::threshold_attention));
  m.impl("threshold_attention_support", TORCH_BOX(&compsparse::threshold_attention_support));
  m.impl("threshold_attention_index", TORCH_BOX(&compsparse::threshold_attention_index));
  m.impl("threshold_attention_index_", TORCH_BOX(&compsparse::threshold_attention_index_));
}
