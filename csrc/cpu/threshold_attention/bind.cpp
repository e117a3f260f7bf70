// threshold_attention at key CPU: unpack, split over threads, call the chosen table, gather the support.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../arena.h"
#include "../partition.h"
#include "../scratch.h"
#include "inputs.h"
#include "prepared.h"
#include "unpack.h"

namespace compsparse {
namespace {

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

// Queries so few that keys are read as they lie: to repack them costs as much as some products with them.
constexpr int64_t few_queries = 8;

// Heads [batch * heads] whose queries go by the index; where most keys are kept it is a detour.
template <typename T>
std::vector<uint8_t> heads_by_index(const AttentionKernels<T>& kernel, const Attention<T>& a,
                                    const std::vector<Buffers<T>>& buffers) {
  constexpr int64_t least_keys = 384;  // for fewer, scores of all are as fast
  const AttentionSizes& size = a.size;
  std::vector<uint8_t> chosen(size.batch * size.heads, a.index != nullptr);
  if (chosen.empty() || !kernel.forward_indexed || a.index || a.rule == Rule::topk || size.keys < least_keys)
    return chosen;
  if (size.queries * (size.heads / size.kv_heads) <= few_queries) return chosen;
  const int64_t heads = size.batch * size.heads, parts = buffers.size();
  for_each_part(parts, [&](int64_t part) {
    const Range mine = equal_share(heads, part, parts);
    for (int64_t head = mine.begin; head < mine.end; ++head)
      chosen[head] = !(kernel.head_share(a, head / size.heads, head % size.heads, buffers[part].scratch(false)) >
                       kernel.most_by_index);
  });
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
  const QueryBlocks units(size, kernel.block_queries);
  const int64_t total = units.total(size.batch);
  const int64_t work = size.batch * size.heads * size.queries * (size.keys * size.width + size.value_width);
  const int64_t parts = std::max<int64_t>(1, std::min(parts_for(work), total));
  std::optional<PreparedKeys<T>> keys;
  if (size.queries * group > few_queries) keys.emplace(kernel, a, parts);
  std::vector<Buffers<T>> buffers;
  for (int64_t part = 0; part < parts; ++part) buffers.emplace_back(kernel, size);
  if (support) support->arenas.resize(parts);
  const std::vector<uint8_t> by_index = heads_by_index(kernel, a, buffers);
  const Scratch<uint8_t> index = new_index(kernel, a, by_index);
  std::vector<uint8_t> failed(parts, 0);
  const int64_t together = keys ? keys->blocks_together(group, units.per_head) : 1;
  std::atomic<int64_t> next{0};
  for_each_part(parts, [&](int64_t part) {
    const AttentionScratch<T> scratch = buffers[part].scratch(support != nullptr);
    Attention<T> mine = a;
    const auto run = [&](int64_t unit) {
      const Range rows = units.rows(unit);
      const int64_t head = units.head(unit), b = head / size.heads, h = head % size.heads;
      if (!by_index[head] || !kernel.forward_indexed(mine, b, h, rows, scratch)) {
        if (keys) keys->need(part, b, h / group, mine);
        kernel.forward(mine, b, h, rows, scratch);
      }
      if (!support) return;
      const int64_t first = head * size.queries + rows.begin, count = rows.end - rows.begin;
      std::copy_n(scratch.log_sums, count, support->log_sums + first);
      std::copy_n(scratch.slopes, count, support->slopes + first);
      if (!keep_block(scratch, count, support->degrees + first, support->arenas[part], support->blocks[unit]))
        failed[part] = 1;
    };
    for (int64_t first; (first = next.fetch_add(together)) < total;)
      for (int64_t unit = first; unit < first + together; ++unit) run(unit);
  });
  STD_TORCH_CHECK(std::find(failed.begin(), failed.end(), 1) == failed.end(), "out of memory for the support");
}

Tensor threshold_attention(COMPSPARSE_ATTENTION_PARAMETERS) {
  const Inputs inputs = inputs_of(COMPSPARSE_ATTENTION_ARGUMENTS);
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
    COMPSPARSE_ATTENTION_PARAMETERS) {
  const Inputs inputs = inputs_of(COMPSPARSE_ATTENTION_ARGUMENTS);
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
