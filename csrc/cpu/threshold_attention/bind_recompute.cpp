// threshold_attention without a support at key CPU, for training where most keys are kept: unpack, split over threads,
// call the chosen table.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <numeric>
#include <string>
#include <tuple>
#include <vector>

#include "../partition.h"
#include "inputs.h"
#include "prepared.h"

namespace compsparse {
namespace {

// From this share of the keys on that are kept, computing scores again is faster than storing the support.
constexpr double kRecomputeShare = 0.3;
constexpr int64_t kLeastKeys = 32, kLeastQueries = 24;

// By the look of a few queries of each head.
template <typename T>
bool is_dense(const AttentionKernels<T>& kernel, const Attention<T>& a) {
  const AttentionSizes& size = a.size;
  if (a.rule != Rule::relative && a.rule != Rule::absolute) return false;
  if (a.weighting != Weighting::softmax || a.dropout > 0 || size.value_width == 0) return false;
  if (size.keys < kLeastKeys || size.queries < kLeastQueries || size.batch * size.heads == 0) return false;
  const int64_t heads = size.batch * size.heads, parts = std::min(heads, parts_for(heads * size.keys * size.width));
  std::vector<double> shares(heads);
  for_each_part(parts, [&](int64_t part) {
    const Buffers<T> buffers(kernel, size);
    const Range mine = equal_share(heads, part, parts);
    for (int64_t head = mine.begin; head < mine.end; ++head)
      shares[head] = kernel.true_share(a, head / size.heads, head % size.heads, buffers.scratch(false));
  });
  return std::accumulate(shares.begin(), shares.end(), 0.0) >= kRecomputeShare * double(heads) &&
         all_heads_finite(a.query, size.batch, size.heads, size.queries, size.width) &&
         all_heads_finite(a.key, size.batch, size.kv_heads, size.keys, size.width) &&
         all_heads_finite(a.value, size.batch, size.kv_heads, size.keys, size.value_width);
}

bool threshold_attention_is_dense(COMPSPARSE_ATTENTION_PARAMETERS) {
  const Inputs inputs = inputs_of(COMPSPARSE_ATTENTION_ARGUMENTS);
  bool dense = false;
  if (is_half(query)) return dense;
  by_dtype(inputs.query, [&]<typename T>(const AttentionKernels<T>& kernel) {
    dense = is_dense<T>(kernel, inputs.attention<T>(query));
  });
  return dense;
}

template <typename T>
KeptBits<T> bits_of(const Tensor& kept, const Tensor& tops, const Tensor& inverses) {
  return {static_cast<uint64_t*>(kept.data_ptr()), kept.size(3), static_cast<T*>(tops.data_ptr()),
          static_cast<T*>(inverses.data_ptr())};
}

template <typename T>
void run_forward(const AttentionKernels<T>& kernel, Attention<T>& a, const KeptBits<T>& bits) {
  const AttentionSizes& size = a.size;
  const QueryBlocks units(size, kernel.block_queries);
  const int64_t total = units.total(size.batch), group = size.heads / size.kv_heads;
  const int64_t work = total * kernel.block_queries * size.keys * (size.width + size.value_width);
  const int64_t parts = std::min(parts_for(work), total);
  PreparedKeys<T> keys(kernel, a, parts);
  std::vector<Buffers<T>> buffers;
  for (int64_t part = 0; part < parts; ++part) buffers.emplace_back(kernel, size);
  const int64_t together = keys.blocks_together(group, units.per_head);
  std::atomic<int64_t> next{0};
  for_each_part(parts, [&](int64_t part) {
    Attention<T> mine = a;
    for (int64_t first; (first = next.fetch_add(together)) < total;)
      for (int64_t unit = first; unit < first + together; ++unit) {
        const int64_t head = units.head(unit), b = head / size.heads, h = head % size.heads;
        keys.need(part, b, h / group, mine);
        kernel.forward_bits(mine, bits, b, h, units.rows(unit), buffers[part].scratch(false));
      }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> threshold_attention_bits(COMPSPARSE_ATTENTION_PARAMETERS) {
  STD_TORCH_CHECK(!is_half(query), "query: expected float32 or float64");
  const Inputs inputs = inputs_of(COMPSPARSE_ATTENTION_ARGUMENTS);
  const int64_t batch = query.size(0), heads = query.size(1), queries = query.size(2);
  Tensor out = inputs.new_output();
  Tensor kept = new_tensor(query, {batch, heads, queries, (key.size(2) + 63) / 64}, aoti_torch_dtype_int64());
  Tensor tops = new_tensor(query, {batch, heads, queries}), inverses = new_tensor(query, {batch, heads, queries});
  by_dtype(inputs.query, [&]<typename T>(const AttentionKernels<T>& kernel) {
    Attention<T> a = inputs.attention<T>(out);
    run_forward<T>(kernel, a, bits_of<T>(kept, tops, inverses));
  });
  return {out, kept, tops, inverses};
}

template <typename T>
struct BlockBuffers {
  explicit BlockBuffers(const AttentionSizes& size)
      : queries(make_scratch<T>(recompute_queries * size.width)),
        grads(make_scratch<T>(recompute_queries * size.value_width)),
        weights(make_scratch<T>(recompute_queries * recompute_keys)),
        score_grads(make_scratch<T>(recompute_queries * recompute_keys)),
        packed_keys(make_scratch<T>(recompute_keys * size.width)),
        packed_values(make_scratch<T>(recompute_keys * size.value_width)) {}

  BitsScratch<T> scratch() const {
    return {queries.get(), grads.get(), weights.get(), score_grads.get(), packed_keys.get(), packed_values.get()};
  }

  Scratch<T> queries, grads, weights, score_grads, packed_keys, packed_values;
};

// Ranges that the keys of a head are cut into: one where there are heads enough for some threads. It depends on sizes
// alone, and so does the order in which gradients of queries are summed.
int64_t ranges_of(const AttentionSizes& size) {
  constexpr int64_t units = 8, least_blocks = 4;
  const int64_t kv_heads = size.batch * size.kv_heads;
  const int64_t most = size.keys / (least_blocks * recompute_keys);
  return std::clamp<int64_t>((units + kv_heads - 1) / kv_heads, 1, std::max<int64_t>(most, 1));
}

template <typename T>
void run_backward(const AttentionKernels<T>& kernel, const BitsGradient<T>& g, const Tensor& query_parts) {
  const AttentionSizes& size = g.of.size;
  const int64_t kv_heads = size.batch * size.kv_heads, ranges = ranges_of(size), total = kv_heads * ranges;
  const int64_t blocks = (size.keys + recompute_keys - 1) / recompute_keys;
  const int64_t parts = std::min(total, parts_for(total * size.queries * size.keys * size.width));
  std::vector<BlockBuffers<T>> buffers;
  for (int64_t part = 0; part < parts; ++part) buffers.emplace_back(size);
  std::atomic<int64_t> next{0};
  for_each_part(parts, [&](int64_t part) {
    for (int64_t unit; (unit = next++) < total;) {
      const int64_t head = unit / ranges, range = unit % ranges;
      const Range some = equal_share(blocks, range, ranges);
      BitsGradient<T> mine = g;
      if (range > 0)
        mine.query_grad.data = static_cast<T*>(query_parts.data_ptr()) + (range - 1) * query_parts.stride(0);
      kernel.backward_bits(mine, head / size.kv_heads, head % size.kv_heads,
                           {some.begin * recompute_keys, std::min(some.end * recompute_keys, size.keys)},
                           buffers[part].scratch());
    }
  });
  const int64_t numbers = size.batch * size.heads * size.queries * size.width, adders = parts_for(ranges * numbers);
  if (ranges == 1) return;
  for_each_part(adders, [&](int64_t part) {
    const Range mine = equal_share(numbers, part, adders);
    for (int64_t range = 0; range + 1 < ranges; ++range) {
      const T* more = static_cast<const T*>(query_parts.data_ptr()) + range * query_parts.stride(0);
      for (int64_t i = mine.begin; i < mine.end; ++i) g.query_grad.data[i] += more[i];
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> threshold_attention_bits_backward(const Tensor& grad, const Tensor& out,
                                                                     const Tensor& kept, const Tensor& tops,
                                                                     const Tensor& inverses,
                                                                     COMPSPARSE_ATTENTION_PARAMETERS) {
  STD_TORCH_CHECK(!is_half(query), "query: expected float32 or float64");
  const Inputs inputs = inputs_of(COMPSPARSE_ATTENTION_ARGUMENTS);
  const Tensor rows[] = {as_rows(grad), as_rows(out)};
  const auto new_like = [](const Tensor& x) { return new_tensor(x, {x.size(0), x.size(1), x.size(2), x.size(3)}); };
  Tensor query_grad = new_like(query), key_grad = new_like(key), value_grad = new_like(value);
  by_dtype(inputs.query, [&]<typename T>(const AttentionKernels<T>& kernel) {
    const BitsGradient<T> g = {
        .of = inputs.attention<T>(out),
        .bits = bits_of<T>(kept, tops, inverses),
        .out = heads_of<const T>(rows[1]),
        .grad = heads_of<const T>(rows[0]),
        .query_grad = heads_of<T>(query_grad),
        .key_grad = heads_of<T>(key_grad),
        .value_grad = heads_of<T>(value_grad),
    };
    const int64_t more = ranges_of(g.of.size) - 1;
    run_backward<T>(kernel, g,
                    new_tensor(query, {more, query.size(0) * query.size(1) * query.size(2) * query.size(3)}));
  });
  return {query_grad, key_grad, value_grad};
}

}  // namespace
}  // namespace compsparse

STABLE_TORCH_LIBRARY_IMPL(compsparse, CPU, m) {
  m.impl("threshold_attention_is_dense", TORCH_BOX(&compsparse::threshold_attention_is_dense));
  m.impl("threshold_attention_bits", TORCH_BOX(&compsparse::threshold_attention_bits));
  m.impl("threshold_attention_bits_backward", TORCH_BOX(&compsparse::threshold_attention_bits_backward));
}
