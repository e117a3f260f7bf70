// Gradients of attention that keeps most of its keys: scores are computed again, block by block, in place of reading a
// support of their size.
//
// For a block of queries i and keys j, P_ij = exp(s_ij - top_i) inverse_i where the bit of j is set, else 0:
//   dP_ij = dO_i . v_j,  dS_ij = P_ij (dP_ij - dO_i . o_i),  dQ_i += scale dS_ij k_j,  dK_j += scale dS_ij q_i,
//   dV_j += P_ij dO_i
//
// A key's gradients are summed over the queries of all heads that read it, in order; a query's over blocks of keys in
// order. Scores are those of the forward bit by bit. Products of whole blocks count 0 times a number: query, key and
// value are finite, and rows of dO that are not go key by key.
#pragma once

#include "finish.h"
#include "tiles.h"

namespace {

// A block: rows of one head, and keys.
template <typename T>
struct BitsBlock {
  int64_t b, h, kv_head;
  Range queries, keys;

  int64_t rows() const { return queries.end - queries.begin; }
  int64_t count() const { return keys.end - keys.begin; }
  int64_t row(const Attention<T>& a, int64_t r) const {
    return (b * a.size.heads + h) * a.size.queries + queries.begin + r;
  }
};

// The bits of L keys from `key` on, a multiple of L.
template <int L>
COMPSPARSE_INLINE uint32_t bits_of(const uint64_t* words, int64_t key) {
  return uint32_t(words[key / 64] >> (key % 64)) & uint32_t((uint64_t{1} << L) - 1);
}

template <typename T>
bool keeps_any(const BitsGradient<T>& g, const BitsBlock<T>& block) {
  uint64_t any = 0;
  for (int64_t r = 0; r < block.rows(); ++r) {
    const uint64_t* words = g.bits.words + block.row(g.of, r) * g.bits.row_words;
    for (int64_t w = block.keys.begin / 64; w < ceil_div(block.keys.end, 64); ++w) any |= words[w];
  }
  return any != 0;
}

// to [rows, keys] = rows times the packed keys
template <typename T, class Target>
void block_products(const T* rows, int64_t number, int64_t width, const T* packed, int64_t count, T* to) {
  for (int64_t key = 0; key < count; key += Target::PanelKeys)
    score_rows<T, Target::Lanes, Target::Vectors, Target::Rows>(rows, number, width, packed + key * width, to + key,
                                                                recompute_keys);
}

template <typename T, class Target>
void block_weights(const BitsGradient<T>& g, const BitsBlock<T>& block, const BitsScratch<T>& scratch) {
  constexpr int L = Target::Lanes;
  const Attention<T>& a = g.of;
  const double window = window_of(a, a.threshold);
  QueryState<T> states[recompute_queries];
  for (int64_t r = 0; r < block.rows(); ++r)
    states[r] = start_query(a, window, block.b, block.h, block.queries.begin + r, scratch.queries + r * a.size.width);
  block_products<T, Target>(scratch.queries, block.rows(), a.size.width, scratch.packed_keys, block.count(),
                            scratch.weights);
  for (int64_t r = 0; r < block.rows(); ++r) {
    T* weights = scratch.weights + r * recompute_keys;
    const int64_t row = block.row(a, r);
    const uint64_t* words = g.bits.words + row * g.bits.row_words;
    if (a.bias || a.alibi_slopes) apply_bias(a, states[r], block.keys.begin, 0, block.count(), weights);
    for (int64_t j = 0; j < block.count(); j += L) {
      // Masked last: the inverse of a row with an undefined score is no number, and its other keys have weight 0.
      const Vec<T, L> weight = exp_of_negative<T, L>(load<T, L>(weights + j) - g.bits.tops[row]) * g.bits.inverses[row];
      store<T, L>(weights + j, keep_lanes<T, L>(weight, bits_of<L>(words, block.keys.begin + j), T(0)));
    }
  }
}

// The block's part of dV of a row of dO that is not finite; the row counts no more.
template <typename T>
void add_apart(const BitsGradient<T>& g, const BitsBlock<T>& block, int64_t r, T* grad, const T* weights) {
  const uint64_t* words = g.bits.words + block.row(g.of, r) * g.bits.row_words;
  T* sums = g.value_grad.head(block.b, block.kv_head);
  const int64_t width = g.of.size.value_width;
  for (int64_t j = block.keys.begin; j < block.keys.end; ++j)
    if (bits_of<1>(words, j))
      for (int64_t d = 0; d < width; ++d) sums[j * g.value_grad.stride + d] += weights[j - block.keys.begin] * grad[d];
  for (int64_t d = 0; d < width; ++d) grad[d] = 0;
}

template <typename T>
bool is_finite(const T* x, int64_t count) {
  T odd = 0;  // 0 or NaN
  for (int64_t d = 0; d < count; ++d) odd += x[d] * T(0);
  return odd == 0;
}

template <typename T, class Target>
void block_score_grads(const BitsGradient<T>& g, const BitsBlock<T>& block, const BitsScratch<T>& scratch) {
  constexpr int L = Target::Lanes;
  const int64_t width = g.of.size.value_width;
  const T* grad = g.grad.head(block.b, block.h) + block.queries.begin * g.grad.stride;
  const T* out = g.out.head(block.b, block.h) + block.queries.begin * g.out.stride;
  for (int64_t r = 0; r < block.rows(); ++r)
    for (int64_t d = 0; d < width; ++d) scratch.grads[r * width + d] = grad[r * g.grad.stride + d];
  block_products<T, Target>(scratch.grads, block.rows(), width, scratch.packed_values, block.count(),
                            scratch.score_grads);
  for (int64_t r = 0; r < block.rows(); ++r) {
    T *row_grad = scratch.grads + r * width, *grads = scratch.score_grads + r * recompute_keys;
    const T* weights = scratch.weights + r * recompute_keys;
    const uint64_t* words = g.bits.words + block.row(g.of, r) * g.bits.row_words;
    const bool finite = is_finite(row_grad, width);
    // A sum over keys of products that are not finite is no number, though that of dO and o may be infinite.
    const T center = finite ? dot<T, L>(row_grad, out + r * g.out.stride, width) : T(__builtin_nan(""));
    for (int64_t j = 0; j < block.count(); j += L) {
      const Vec<T, L> of_score = load<T, L>(weights + j) * (load<T, L>(grads + j) - center) * T(g.of.scale);
      store<T, L>(grads + j, keep_lanes<T, L>(of_score, bits_of<L>(words, block.keys.begin + j), T(0)));
    }
    if (!finite) add_apart(g, block, r, row_grad, weights);
  }
}

template <typename T, class Target>
void add_block_grads(const BitsGradient<T>& g, const BitsBlock<T>& block, const BitsScratch<T>& scratch) {
  constexpr int L = Target::Lanes, C = Target::Vectors, M = Target::Rows;
  const AttentionSizes& size = g.of.size;
  const Heads<const T>&query = g.of.query, &key = g.of.key;
  const int64_t from = block.queries.begin, first = block.keys.begin, rows = block.rows(), count = block.count();
  T *value_sums = g.value_grad.head(block.b, block.kv_head) + first * g.value_grad.stride,
    *key_sums = g.key_grad.head(block.b, block.kv_head) + first * g.key_grad.stride,
    *query_sums = g.query_grad.head(block.b, block.h) + from * g.query_grad.stride;
  add_products<T, L, C, M, true>(scratch.weights, recompute_keys, count, rows, scratch.grads, size.value_width,
                                 size.value_width, value_sums, g.value_grad.stride);
  add_products<T, L, C, M, true>(scratch.score_grads, recompute_keys, count, rows,
                                 query.head(block.b, block.h) + from * query.stride, query.stride, size.width, key_sums,
                                 g.key_grad.stride);
  add_products<T, L, C, M>(scratch.score_grads, recompute_keys, rows, count,
                           key.head(block.b, block.kv_head) + first * key.stride, key.stride, size.width, query_sums,
                           g.query_grad.stride);
}

// A range of keys that begins at a multiple of recompute_keys, and all queries that read them.
template <typename T, class Target>
void backward_bits(const BitsGradient<T>& g, int64_t b, int64_t kv_head, Range keys, const BitsScratch<T>& scratch) {
  static_assert(recompute_keys % Target::PanelKeys == 0);
  const AttentionSizes& size = g.of.size;
  const int64_t group = size.heads / size.kv_heads;
  clear(g.value_grad.head(b, kv_head), g.value_grad.stride, size.value_width, keys);
  clear(g.key_grad.head(b, kv_head), g.key_grad.stride, size.width, keys);
  for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h)
    clear(g.query_grad.head(b, h), g.query_grad.stride, size.width, {0, size.queries});
  for (int64_t first = keys.begin; first < keys.end; first += recompute_keys) {
    const Range some = {first, min64(first + recompute_keys, keys.end)};
    pack_keys<T, Target>(g.of.key.head(b, kv_head) + first * g.of.key.stride, g.of.key.stride, some.end - first,
                         size.width, scratch.packed_keys, nullptr);
    pack_keys<T, Target>(g.of.value.head(b, kv_head) + first * g.of.value.stride, g.of.value.stride, some.end - first,
                         size.value_width, scratch.packed_values, nullptr);
    for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h)
      for (int64_t i = 0; i < size.queries; i += recompute_queries) {
        const BitsBlock<T> block = {b, h, kv_head, {i, min64(i + recompute_queries, size.queries)}, some};
        if (!keeps_any(g, block)) continue;
        block_weights<T, Target>(g, block, scratch);
        block_score_grads<T, Target>(g, block, scratch);
        add_block_grads<T, Target>(g, block, scratch);
      }
  }
}

}  // namespace
