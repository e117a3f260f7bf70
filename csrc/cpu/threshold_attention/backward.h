// Gradients of thresholded attention: work and memory in proportion to the survivors.
//
// backward_rows, for a query i:  dP_ij = dO_i . v_j,  dS_ij from dP_ij (ops/threshold_attention/reference.py),
//                                dQ_i = scale sum_j dS_ij k_j
// backward_keys, for a key j:    dK_j = scale sum_i dS_ij q_i,  dV_j = sum_i P_ij dO_i,
//                                over the queries of all heads that read it
//
// Rows have one owner, and so have keys: the owner of a range of keys walks all rows of the support and takes its part
// of each. Sums run in the order of rows, by blocks of a fixed grid, so threads do not change a bit. Scattering over
// rows was measured to be faster than sorting the support by keys and gathering. Where most of a block is kept,
// products of all its places by tiles are faster; what is not kept counts 0 times a number, so all must be finite.
#pragma once

#include "bounds.h"
#include "philox.h"
#include "table.h"
#include "tiles.h"
#include "vectors.h"

namespace {

using namespace compsparse;

constexpr double kDenseGradients = 0.35;  // share of places from which on tiles are faster
constexpr double kBlocksFrom = 0.08;      // and from which on keys meet enough rows at a time
constexpr int64_t kRowsTogether = 64, kKeysTogether = 64;

// Gradients of the weights of a row -> those of its scores, in place; returns that of its cut.
template <typename T, int L>
T entmax_gradient(const AttentionGradient<T>& g, const T* weights, T* grads, int64_t count) {
  const bool sparsemax = g.threshold == 2;
  const auto steepness = [&](int64_t e) { return sparsemax ? T(1) : T(root(double(weights[e]))); };
  double weighted = 0, total = 0;
  for (int64_t e = 0; e < count; ++e) weighted += steepness(e) * grads[e], total += steepness(e);
  const T center = T(weighted / total);
  for (int64_t e = 0; e < count; ++e) grads[e] = steepness(e) * (grads[e] - center);
  return 0;
}

// What the row's largest score, from which the rule relative counts, takes of the gradients of all.
template <typename T>
void take_from_largest(const T* weights, T* grads, int64_t count) {
  const T largest = largest_of(weights, count);
  double total = 0;
  int64_t holders = 0;
  for (int64_t e = 0; e < count; ++e) total += grads[e], holders += weights[e] == largest;
  for (int64_t e = 0; e < count; ++e)
    if (weights[e] == largest) grads[e] -= T(total / double(holders));
}

template <typename T, int L>
T weighted_gradient(const AttentionGradient<T>& g, const T* weights, T slope, T* grads, int64_t count) {
  const T center = dot<T, L>(weights, grads, count);
  if (g.weighting == Weighting::softmax) {
    for (int64_t e = 0; e < count; ++e) grads[e] = weights[e] * (grads[e] - center);
    return 0;
  }
  const bool shrink = g.weighting == Weighting::shrink;
  double total = 0;
  for (int64_t e = 0; e < count; ++e) {
    const T centered = grads[e] - center;
    total += centered;
    grads[e] = (shrink ? weights[e] + slope : slope) * centered;
  }
  if (g.rule == Rule::relative) take_from_largest(weights, grads, count);
  return T(-double(slope) * total);
}

// The gradients of the weights lie in score_grad, and become those of the scores.
template <typename T, int L>
void score_gradient(const AttentionGradient<T>& g, int64_t row) {
  const int64_t begin = g.row_ptr[row], count = g.row_ptr[row + 1] - begin;
  const int32_t* columns = g.col_idx + begin;
  const T* weights = g.weights + begin;
  T* grads = g.score_grad + begin;
  if (g.dropped) {
    drop(g.seed, g.dropout, uint64_t(row), columns, count, weights, g.dropped + begin);
    drop(g.seed, g.dropout, uint64_t(row), columns, count, grads, grads);
  }
  g.cut_grad[row] = g.rule == Rule::entmax ? entmax_gradient<T, L>(g, weights, grads, count)
                                           : weighted_gradient<T, L>(g, weights, g.slopes[row], grads, count);
}

template <typename T>
bool is_dense(const AttentionGradient<T>& g, int64_t entries, int64_t places) {
  return g.finite && double(entries) >= kDenseGradients * double(places);
}

// Queries whose support is most of the keys: products of all keys by tiles; `first` is the row of the first query.
template <typename T, class Target>
void dense_queries(const AttentionGradient<T>& g, const T* packed, int64_t b, int64_t h, int64_t first, Range queries,
                   const AttentionBackwardScratch<T>& scratch) {
  constexpr int L = Target::Lanes;
  constexpr int64_t P = Target::PanelKeys;
  const int64_t kv_head = h / (g.size.heads / g.size.kv_heads), number = queries.end - queries.begin;
  const int64_t* ptr = g.row_ptr + first;
  const T* grad = g.grad.head(b, h) + queries.begin * g.grad.stride;
  const int64_t stride = scratch.dense_stride, width = g.size.value_width;
  for (int64_t r = 0; r < number; ++r)
    for (int64_t d = 0; d < width; ++d) scratch.rows[r * width + d] = grad[r * g.grad.stride + d];
  for (int64_t key = 0; key < g.size.keys; key += P)
    score_rows<T, L, Target::Vectors, Target::Rows>(scratch.rows, number, width, packed + key * width,
                                                    scratch.dense + key, stride);
  for (int64_t r = 0; r < number; ++r) {
    T* dense = scratch.dense + r * stride;
    const int64_t begin = ptr[r], end = ptr[r + 1];
    for (int64_t e = begin; e < end; ++e) g.score_grad[e] = dense[g.col_idx[e]];
    score_gradient<T, L>(g, first + r);
    for (int64_t j = 0; j < g.size.keys; ++j) dense[j] = 0;
    for (int64_t e = begin; e < end; ++e) dense[g.col_idx[e]] = T(g.scale) * g.score_grad[e];
  }
  T* query_grad = g.query_grad.head(b, h) + queries.begin * g.query_grad.stride;
  for (int64_t r = 0; r < number; ++r)
    for (int64_t d = 0; d < g.size.width; ++d) query_grad[r * g.query_grad.stride + d] = 0;
  const T* keys = g.key.head(b, kv_head);
  for (int64_t key = 0; key < g.size.keys; key += kSumChain)
    add_products<T, L, Target::Vectors, Target::Rows>(scratch.dense + key, stride, number,
                                                      min64(kSumChain, g.size.keys - key), keys + key * g.key.stride,
                                                      g.key.stride, g.size.width, query_grad, g.query_grad.stride);
}

template <typename T, int L>
void sparse_queries(const AttentionGradient<T>& g, int64_t b, int64_t h, int64_t first, Range queries) {
  const int64_t kv_head = h / (g.size.heads / g.size.kv_heads), number = queries.end - queries.begin;
  const T* grad = g.grad.head(b, h) + queries.begin * g.grad.stride;
  const int64_t* ptr = g.row_ptr + first;
  for (int64_t r = 0; r < number; ++r) {
    gather_dots<T, L>(g.value.head(b, kv_head), g.value.stride, g.size.value_width, g.col_idx + ptr[r],
                      ptr[r + 1] - ptr[r], grad + r * g.grad.stride, g.score_grad + ptr[r]);
    score_gradient<T, L>(g, first + r);
  }
  for (int64_t r = 0; r < number; ++r)
    gather_sum<T, L, 4>(g.key.head(b, kv_head), g.key.stride, g.size.width, g.col_idx + ptr[r], g.score_grad + ptr[r],
                        ptr[r + 1] - ptr[r], T(g.scale),
                        g.query_grad.head(b, h) + (queries.begin + r) * g.query_grad.stride);
}

// A block of queries of one head: `packed` has its values as `pack_keys` packs keys, or is null.
template <typename T, class Target>
void attention_backward_rows(const AttentionGradient<T>& g, const T* packed, int64_t b, int64_t h, Range queries,
                             const AttentionBackwardScratch<T>& scratch) {
  const int64_t first = (b * g.size.heads + h) * g.size.queries + queries.begin;
  const int64_t number = queries.end - queries.begin, entries = g.row_ptr[first + number] - g.row_ptr[first];
  if (packed && is_dense(g, entries, number * g.size.keys))
    dense_queries<T, Target>(g, packed, b, h, first, queries, scratch);
  else
    sparse_queries<T, Target::Lanes>(g, b, h, first, queries);
}

// First entry of [begin, end) with a column of at least `key`.
inline int64_t first_from(const int32_t* columns, int64_t begin, int64_t end, int64_t key) {
  if (begin == end || columns[begin] >= key) return begin;
  while (begin < end) {
    const int64_t middle = begin + (end - begin) / 2;
    if (columns[middle] < key)
      begin = middle + 1;
    else
      end = middle;
  }
  return begin;
}

// to[j] = factor * sum over queries i of the head's group of weights_ij x_i, for the keys j of a range: query by query.
template <typename T, int L>
void scatter_queries(const AttentionGradient<T>& g, int64_t b, int64_t kv_head, Range keys, const Heads<const T>& x,
                     const T* weights, T factor, int64_t width, const Heads<T>& to) {
  const int64_t group = g.size.heads / g.size.kv_heads;
  T* sums = to.head(b, kv_head);
  for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h) {
    const int64_t* ptr = g.row_ptr + (b * g.size.heads + h) * g.size.queries;
    for (int64_t i = 0; i < g.size.queries; ++i) {
      const int64_t begin = first_from(g.col_idx, ptr[i], ptr[i + 1], keys.begin);
      const int64_t end = keys.end == g.size.keys ? ptr[i + 1] : first_from(g.col_idx, begin, ptr[i + 1], keys.end);
      scatter<T, L, 4>(x.head(b, h) + i * x.stride, width, g.col_idx + begin, weights + begin, end - begin, factor,
                       sums, to.stride);
    }
  }
}

// to[0 .. C L) += sum over the rows whose bit is set of weights[row] * x[row]
template <typename T, int L, int C>
COMPSPARSE_INLINE void add_rows_chunk(const T* x, int64_t stride, uint64_t rows, const T* weights, T* to) {
  Vec<T, L> acc[C] = {};
  for (; rows; rows &= rows - 1) {
    const int r = __builtin_ctzll(rows);
    COMPSPARSE_UNROLL for (int c = 0; c < C; ++c) acc[c] += load<T, L>(x + r * stride + c * L) * weights[r];
  }
  COMPSPARSE_UNROLL for (int c = 0; c < C; ++c) store<T, L>(to + c * L, load<T, L>(to + c * L) + acc[c]);
}

template <typename T, int L, int C>
void add_rows(const T* x, int64_t stride, int64_t width, uint64_t rows, const T* weights, T* to) {
  int64_t d = 0;
  for (; d + C * L <= width; d += C * L) add_rows_chunk<T, L, C>(x + d, stride, rows, weights, to + d);
  if (d == width) return;
  if constexpr (C > 1)
    add_rows<T, L, C / 2>(x + d, stride, width - d, rows, weights, to + d);
  else if constexpr (L > 1)
    add_rows<T, L / 2, 1>(x + d, stride, width - d, rows, weights, to + d);
}

// What some keys of a block get of its rows: sums [keys, width] of x [rows, width] with weights [keys, kRowsTogether].
template <typename T>
struct BlockSums {
  const T* weights;
  const T* x;
  int64_t x_stride, width;
  T* sums;
  int64_t stride;
};

// Both sums of a key, as far as both are wide: rows are found once, and the additions of one wait for no other.
template <typename T, int L, int C>
COMPSPARSE_INLINE void add_rows_of_both(const BlockSums<T>& a, const BlockSums<T>& b, int64_t key, uint64_t rows,
                                        int64_t d) {
  const T *a_weights = a.weights + key * kRowsTogether, *b_weights = b.weights + key * kRowsTogether;
  Vec<T, L> a_sum[C] = {}, b_sum[C] = {};
  for (; rows; rows &= rows - 1) {
    const int r = __builtin_ctzll(rows);
    COMPSPARSE_UNROLL for (int c = 0; c < C; ++c) {
      a_sum[c] += load<T, L>(a.x + r * a.x_stride + d + c * L) * a_weights[r];
      b_sum[c] += load<T, L>(b.x + r * b.x_stride + d + c * L) * b_weights[r];
    }
  }
  T *a_to = a.sums + key * a.stride + d, *b_to = b.sums + key * b.stride + d;
  COMPSPARSE_UNROLL for (int c = 0; c < C; ++c) {
    store<T, L>(a_to + c * L, load<T, L>(a_to + c * L) + a_sum[c]);
    store<T, L>(b_to + c * L, load<T, L>(b_to + c * L) + b_sum[c]);
  }
}

template <typename T, int L, int C>
void add_rows_of_key(const BlockSums<T>& a, const BlockSums<T>& b, int64_t key, uint64_t rows) {
  int64_t d = 0;
  for (; d + C * L <= min64(a.width, b.width); d += C * L) add_rows_of_both<T, L, C>(a, b, key, rows, d);
  const auto add_rest = [&](const BlockSums<T>& each) {
    add_rows<T, L, C>(each.x + d, each.x_stride, each.width - d, rows, each.weights + key * kRowsTogether,
                      each.sums + key * each.stride + d);
  };
  add_rest(a);
  add_rest(b);
}

// The part of the support in some rows and some keys, key by key: which rows have an entry, and what it holds.
template <typename T>
struct Block {
  int64_t rows, first, last;  // number of rows; keys [first, last)
  bool dense;                 // then what has no entry holds 0
  uint64_t who[kKeysTogether];
  T* shares;       // [kKeysTogether, kRowsTogether]
  T* score_grads;  // the same
};

// Entries of the rows from their cursors on, which move to what lies behind the block.
template <typename T>
void transpose(const AttentionGradient<T>& g, const int64_t* row_ends, int64_t* cursors, Block<T>& block) {
  const int64_t keys = block.last - block.first;
  for (int64_t j = 0; j < keys; ++j) block.who[j] = 0;
  if (block.dense)
    for (int64_t i = 0; i < keys * kRowsTogether; ++i) block.shares[i] = block.score_grads[i] = 0;
  for (int64_t r = 0; r < block.rows; ++r) {
    int64_t e = cursors[r];
    for (; e < row_ends[r] && g.col_idx[e] < block.last; ++e) {
      const int64_t key = g.col_idx[e] - block.first;
      block.who[key] |= uint64_t(1) << r;
      block.shares[key * kRowsTogether + r] = g.shares[e];
      block.score_grads[key * kRowsTogether + r] = g.score_grad[e];
    }
    cursors[r] = e;
  }
}

template <typename T, class Target>
void add_block(const Block<T>& block, const BlockSums<T>& a, const BlockSums<T>& b) {
  constexpr int L = Target::Lanes;
  const int64_t keys = block.last - block.first;
  if (block.dense) {
    const auto add_all = [&](const BlockSums<T>& each) {
      add_products<T, L, Target::Vectors, Target::Rows>(each.weights, kRowsTogether, keys, block.rows, each.x,
                                                        each.x_stride, each.width, each.sums, each.stride);
    };
    add_all(a);
    add_all(b);
    return;
  }
  for (int64_t j = 0; j < keys; ++j)
    if (block.who[j]) add_rows_of_key<T, L, 4>(a, b, j, block.who[j]);
}

// The same sums for both gradients, a block of rows and keys after the other: what is added and what it is added to
// stay in the nearest cache. The factor of dK is left for the end.
template <typename T, class Target>
void sum_by_blocks(const AttentionGradient<T>& g, int64_t b, int64_t kv_head, Range keys,
                   const AttentionBackwardScratch<T>& scratch) {
  const int64_t group = g.size.heads / g.size.kv_heads, queries = g.size.queries;
  T *value_grad = g.value_grad.head(b, kv_head), *key_grad = g.key_grad.head(b, kv_head);
  Block<T> block;
  block.shares = scratch.block;
  block.score_grads = scratch.block + kKeysTogether * kRowsTogether;
  for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h)
    for (int64_t begin = 0; begin < queries; begin += kRowsTogether) {
      block.rows = min64(kRowsTogether, queries - begin);
      const int64_t* ptr = g.row_ptr + (b * g.size.heads + h) * queries + begin;
      block.dense = is_dense(g, ptr[block.rows] - ptr[0], block.rows * g.size.keys);
      const Heads<const T>&grad = g.grad, &query = g.query;
      int64_t cursors[kRowsTogether];
      for (int64_t r = 0; r < block.rows; ++r) cursors[r] = first_from(g.col_idx, ptr[r], ptr[r + 1], keys.begin);
      for (block.first = keys.begin; block.first < keys.end; block.first = block.last) {
        block.last = min64(block.first + kKeysTogether, keys.end);
        transpose(g, ptr + 1, cursors, block);
        add_block<T, Target>(block,
                             {block.shares, grad.head(b, h) + begin * grad.stride, grad.stride, g.size.value_width,
                              value_grad + block.first * g.value_grad.stride, g.value_grad.stride},
                             {block.score_grads, query.head(b, h) + begin * query.stride, query.stride, g.size.width,
                              key_grad + block.first * g.key_grad.stride, g.key_grad.stride});
      }
    }
  for (int64_t j = keys.begin; j < keys.end; ++j)
    for (int64_t d = 0; d < g.size.width; ++d) key_grad[j * g.key_grad.stride + d] *= T(g.scale);
}

// A range of keys that begins at a multiple of kKeysTogether.
template <typename T, class Target>
void attention_backward_keys(const AttentionGradient<T>& g, int64_t b, int64_t kv_head, Range keys,
                             const AttentionBackwardScratch<T>& scratch) {
  clear(g.value_grad.head(b, kv_head), g.value_grad.stride, g.size.value_width, keys);
  clear(g.key_grad.head(b, kv_head), g.key_grad.stride, g.size.width, keys);
  const int64_t group = g.size.heads / g.size.kv_heads, rows = group * g.size.queries;
  const int64_t* ptr = g.row_ptr + (b * g.size.heads + kv_head * group) * g.size.queries;
  if (double(ptr[rows] - ptr[0]) >= kBlocksFrom * double(rows) * double(g.size.keys))
    return sum_by_blocks<T, Target>(g, b, kv_head, keys, scratch);
  constexpr int L = Target::Lanes;
  scatter_queries<T, L>(g, b, kv_head, keys, g.grad, g.shares, T(1), g.size.value_width, g.value_grad);
  scatter_queries<T, L>(g, b, kv_head, keys, g.query, g.score_grad, T(g.scale), g.size.width, g.key_grad);
}

}  // namespace
