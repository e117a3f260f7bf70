// Gradients of threshold_attention at key CPU: unpack, split over threads, call the chosen table.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <string>
#include <tuple>
#include <vector>

#include "../arena.h"
#include "../partition.h"
#include "../scratch.h"
#include "unpack.h"

namespace compsparse {
namespace {

template <typename T>
bool all_numbers_finite(const AttentionGradient<T>& g) {
  const AttentionSizes& size = g.size;
  return all_heads_finite(g.query, size.batch, size.heads, size.queries, size.width) &&
         all_heads_finite(g.key, size.batch, size.kv_heads, size.keys, size.width) &&
         all_heads_finite(g.value, size.batch, size.kv_heads, size.keys, size.value_width) &&
         all_heads_finite(g.grad, size.batch, size.heads, size.queries, size.value_width);
}

// Where so much of all places is kept, there may be blocks of queries that keep most of them.
constexpr double maybe_dense = 0.1;

template <typename T>
struct BackwardBuffers {
  BackwardBuffers(const AttentionKernels<T>& kernel, const AttentionSizes& size, bool dense)
      : stride(dense ? round_up(size.keys, kernel.panel_keys) : 0),
        rows(make_scratch<T>(kernel.block_queries * size.value_width)),
        matrix(make_scratch<T>(kernel.block_queries * stride)),
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
  g.finite = size.value_width > 0 && double(g.row_ptr[rows]) >= maybe_dense * double(rows) * double(size.keys) &&
             all_numbers_finite(g);
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

}  // namespace
}  // namespace compsparse

STABLE_TORCH_LIBRARY_IMPL(compsparse, CPU, m) {
  m.impl("threshold_attention_backward", TORCH_BOX(&compsparse::threshold_attention_backward));
}
