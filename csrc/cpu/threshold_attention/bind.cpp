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
#include "../kernels.h"
#include "../partition.h"
#include "../scratch.h"
#include "../tensors.h"

namespace compsparse {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

AttentionSizes sizes_of(const Tensor& query, const Tensor& key, const Tensor& value) {
  return {query.size(0), query.size(1), key.size(1), query.size(2), key.size(2), query.size(3), value.size(3)};
}

bool is_half(const Tensor& x) { return x.scalar_type() == ScalarType::BFloat16 || x.scalar_type() == ScalarType::Half; }

// Kernels read rows of contiguous elements at any stride, in float or double. Half precision is widened as a whole:
// tokens times width, where the work is tokens times tokens times width.
Tensor as_rows(const Tensor& x) {
  if (is_half(x)) return torch::stable::to(x, ScalarType::Float);
  return x.stride(3) == 1 || x.size(3) == 1 ? x : torch::stable::contiguous(x);
}

Tensor narrowed_like(const Tensor& x, const Tensor& like) {
  return is_half(like) ? torch::stable::to(x, like.scalar_type()) : x;
}

int32_t sum_dtype(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
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
bool all_finite(const T* rows, int64_t stride, int64_t number, int64_t width) {
  T odd = 0;  // 0 or NaN
  for (int64_t j = 0; j < number; ++j)
    for (int64_t d = 0; d < width; ++d) odd += rows[j * stride + d] * T(0);
  return odd == 0;
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

// The index of all keys, where it pays and none was given.
template <typename T>
Scratch<uint8_t> new_index(const AttentionKernels<T>& kernel, Attention<T>& a) {
  const AttentionSizes& size = a.size;
  constexpr int64_t least_keys = 256;
  if (!kernel.forward_indexed || a.index || a.rule == Rule::topk || size.keys < least_keys) return nullptr;
  if (size.queries * (size.heads / size.kv_heads) <= few_queries) return nullptr;
  const int64_t panels = (size.keys + index_panel_keys - 1) / index_panel_keys, heads = size.batch * size.kv_heads;
  a.index_stride = panels * index_panel_bytes(size.width);
  Scratch<uint8_t> index = make_scratch<uint8_t>(heads * a.index_stride);
  const int64_t parts = parts_for(heads * size.keys * size.width);
  for_each_part(parts, [&](int64_t part) {
    for (int64_t head = 0; head < heads; ++head) {
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
  const Scratch<uint8_t> index = new_index(kernel, a);
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
  std::vector<uint8_t> failed(parts, 0);
  std::atomic<int64_t> next{0};
  for_each_part(parts, [&](int64_t part) {
    const AttentionScratch<T> scratch = buffers[part].scratch(support != nullptr);
    for (int64_t unit; (unit = next++) < total;) {
      const Range rows = units.rows(unit);
      const int64_t head = units.head(unit), b = head / size.heads, h = head % size.heads;
      if (!a.index || !kernel.forward_indexed(a, b, h, rows, scratch)) {
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

Rule rule_from(const std::string& name) {
  if (name == "relative") return Rule::relative;
  if (name == "absolute") return Rule::absolute;
  if (name == "topk") return Rule::topk;
  if (name == "topp") return Rule::topp;
  STD_TORCH_CHECK(name == "entmax", "unknown rule reached the kernel: ", name);
  return Rule::entmax;
}

Weighting weighting_from(const std::string& name) {
  if (name == "softmax") return Weighting::softmax;
  if (name == "shrink") return Weighting::shrink;
  STD_TORCH_CHECK(name == "rectified", "unknown weighting reached the kernel: ", name);
  return Weighting::rectified;
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

template <typename T>
bool all_finite(const Heads<const T>& x, int64_t batch, int64_t heads, int64_t tokens, int64_t width) {
  for (int64_t head = 0; head < batch * heads; ++head)
    if (!all_finite(x.head(head / heads, head % heads), x.stride, tokens, width)) return false;
  return true;
}

template <typename T>
bool all_finite(const AttentionGradient<T>& g) {
  const AttentionSizes& size = g.size;
  return all_finite(g.query, size.batch, size.heads, size.queries, size.width) &&
         all_finite(g.key, size.batch, size.kv_heads, size.keys, size.width) &&
         all_finite(g.value, size.batch, size.kv_heads, size.keys, size.value_width) &&
         all_finite(g.grad, size.batch, size.heads, size.queries, size.value_width);
}

// Where so much of all places is kept, there may be blocks of queries that keep most of them.
constexpr double maybe_dense = 0.1;

template <typename T>
struct BackwardBuffers {
  BackwardBuffers(const AttentionKernels<T>& kernel, const AttentionSizes& size, bool dense)
      : stride(dense ? round_up(size.keys, kernel.panel_keys) : 0),
        rows(make_scratch<T>(kernel.block_queries * size.value_width)),
        matrix(make_scratch<T>(kernel.block_queries * std::max(stride, kernel.panel_keys))),
        block(make_scratch<T>(2 * 64 * 64)) {}

  AttentionBackwardScratch<T> scratch() const { return {rows.get(), matrix.get(), stride, block.get()}; }

  int64_t stride;
  Scratch<T> rows, matrix, block;
};

template <typename T>
void run_backward(const AttentionKernels<T>& kernel, AttentionGradient<T>& g) {
  const AttentionSizes& size = g.size;
  const int64_t rows = size.batch * size.heads * size.queries, keys = size.batch * size.kv_heads * size.keys;
  const int64_t work = (g.row_ptr[rows] + rows + keys) * (size.width + size.value_width);
  const int64_t parts = parts_for(work), kv_heads = size.batch * size.kv_heads;
  if (kv_heads == 0) return;
  g.finite = double(g.row_ptr[rows]) >= maybe_dense * double(rows) * double(size.keys) && all_finite(g);
  const int64_t packed_head = round_up(size.keys, kernel.panel_keys) * size.value_width;
  const Scratch<T> packed = g.finite ? make_scratch<T>(kv_heads * packed_head) : nullptr;
  if (packed)
    for (int64_t head = 0; head < kv_heads; ++head)
      kernel.pack_keys(g.value.head(head / size.kv_heads, head % size.kv_heads), g.value.stride, size.keys,
                       size.value_width, packed.get() + head * packed_head, nullptr);
  std::vector<BackwardBuffers<T>> buffers;
  for (int64_t part = 0; part < parts; ++part) buffers.emplace_back(kernel, size, g.finite);
  const QueryBlocks units(size, kernel.block_queries);
  const int64_t total = units.total(size.batch), group = size.heads / size.kv_heads;
  std::atomic<int64_t> next{0};
  for_each_part(parts, [&](int64_t part) {
    for (int64_t unit; (unit = next++) < total;) {
      const int64_t head = units.head(unit), b = head / size.heads, h = head % size.heads;
      const T* values = packed ? packed.get() + (b * size.kv_heads + h / group) * packed_head : nullptr;
      kernel.backward_rows(g, values, b, h, units.rows(unit), buffers[part].scratch());
    }
  });
  // A range of keys whose gradients stay in the L2 cache; more ranges where there are fewer heads than threads.
  constexpr int64_t cache = 512 << 10;
  const int64_t splits = 2 * (parts - 1) / kv_heads;
  const int64_t in_cache = cache / (std::max(size.width, size.value_width) * int64_t(sizeof(T)));
  const int64_t range = round_up(std::clamp<int64_t>(std::min(in_cache, size.keys / (splits + 1)), 64, 1 << 20), 64);
  const int64_t per_head = (size.keys + range - 1) / range;
  next = 0;
  for_each_part(parts, [&](int64_t part) {
    for (int64_t unit; (unit = next++) < kv_heads * per_head;) {
      const int64_t head = unit / per_head, begin = unit % per_head * range;
      kernel.backward_keys(g, head / size.kv_heads, head % size.kv_heads, {begin, std::min(begin + range, size.keys)},
                           buffers[part].scratch());
    }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> threshold_attention_backward(
    const Tensor& grad, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& row_ptr,
    const Tensor& col_idx, const Tensor& weights, const Tensor& slope, double threshold, std::string rule,
    std::string weighting, double scale, double dropout_p, int64_t seed) {
  const Tensor rows[] = {as_rows(query), as_rows(key), as_rows(value), as_rows(grad)};
  const auto new_like = [](const Tensor& x) { return new_tensor(x, {x.size(0), x.size(1), x.size(2), x.size(3)}); };
  Tensor query_grad = new_like(rows[0]), key_grad = new_like(rows[1]), value_grad = new_like(rows[2]);
  Tensor score_grad = new_tensor(weights, {weights.size(0)});
  prefer_large_pages(score_grad.data_ptr(), weights.size(0) * 4);
  Tensor cut_grad = new_tensor(slope, {query.size(0), query.size(1), query.size(2)});
  const Tensor slopes = as_contiguous(slope);
  by_dtype(rows[0], [&]<typename T>(const AttentionKernels<T>& kernel) {
    const Scratch<T> dropped = dropout_p > 0 ? make_scratch<T>(weights.size(0)) : nullptr;
    const T* stored = static_cast<const T*>(weights.data_ptr());
    AttentionGradient<T> g = {
        .size = sizes_of(query, key, value),
        .query = heads_of<const T>(rows[0]),
        .key = heads_of<const T>(rows[1]),
        .value = heads_of<const T>(rows[2]),
        .grad = heads_of<const T>(rows[3]),
        .row_ptr = static_cast<const int64_t*>(row_ptr.data_ptr()),
        .col_idx = static_cast<const int32_t*>(col_idx.data_ptr()),
        .weights = stored,
        .slopes = static_cast<const T*>(slopes.data_ptr()),
        .shares = dropped ? dropped.get() : stored,
        .dropped = dropped.get(),
        .score_grad = static_cast<T*>(score_grad.data_ptr()),
        .cut_grad = static_cast<T*>(cut_grad.data_ptr()),
        .query_grad = heads_of<T>(query_grad),
        .key_grad = heads_of<T>(key_grad),
        .value_grad = heads_of<T>(value_grad),
        .threshold = threshold,
        .rule = rule_from(rule),
        .weighting = weighting_from(weighting),
        .scale = scale,
        .dropout = dropout_p,
        .seed = uint64_t(seed),
    };
    run_backward(kernel, g);
  });
  return {narrowed_like(query_grad, query), narrowed_like(key_grad, key), narrowed_like(value_grad, value), score_grad,
          cut_grad};
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
  m.impl("threshold_attention_backward", TORCH_BOX(&compsparse::threshold_attention_backward));
  m.impl("threshold_attention_index", TORCH_BOX(&compsparse::threshold_attention_index));
  m.impl("threshold_attention_index_", TORCH_BOX(&compsparse::threshold_attention_index_));
}
