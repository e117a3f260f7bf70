// Gradients of thresholded attention: work and memory in proportion to the survivors.
//
// backward_rows, for a query i:  dP_ij = dO_i . v_j,  dS_ij from dP_ij (ops/threshold_attention/reference.py),
//                                dQ_i = scale sum_j dS_ij k_j
// backward_keys, for a key j:    dK_j = scale sum_i dS_ij q_i,  dV_j = sum_i P_ij dO_i,  over the queries of all its
// heads Rows have one owner, and so have keys: the owner of a range of keys walks all rows of the support and takes its
// part of each. Sums run in the order of rows, by blocks of a fixed grid, so threads do not change a bit. Scattering
// over rows was measured to be faster than sorting the support by keys and gathering. Where most of a block is kept,
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
constexpr int64_t kKeysTogether = 64;     // whose sums share the L1 cache with what is added to them
constexpr int64_t kEntriesTogether = 8;

// Gradients of the weights of a row -> those of its scores, in place; returns that of its cut.
template <typename T, int L>
T entmax_gradient(const AttentionGradient<T>& g, const T* weights, T* grads, int64_t count) {
  const bool sparsemax = g.threshold == 2;
  const auto steepness = [&](int64_t e) { return sparsemax ? T(1) : T(root(double(weights[e]))); };
  T weighted = 0, total = 0;
  for (int64_t e = 0; e < count; ++e) weighted += steepness(e) * grads[e], total += steepness(e);
  const T center = weighted / total;
  for (int64_t e = 0; e < count; ++e) grads[e] = steepness(e) * (grads[e] - center);
  return 0;
}

// What the row's largest score, from which the rule relative counts, takes of the gradients of all.
template <typename T>
void take_from_largest(const T* weights, T* grads, int64_t count) {
  const T largest = largest_of(weights, count);
  T total = 0;
  int64_t holders = 0;
  for (int64_t e = 0; e < count; ++e) total += grads[e], holders += weights[e] == largest;
  for (int64_t e = 0; e < count; ++e)
    if (weights[e] == largest) grads[e] -= total / T(holders);
}

template <typename T, int L>
T weighted_gradient(const AttentionGradient<T>& g, const T* weights, T slope, T* grads, int64_t count) {
  const T center = dot<T, L>(weights, grads, count);
  if (g.weighting == Weighting::softmax) {
    for (int64_t e = 0; e < count; ++e) grads[e] = weights[e] * (grads[e] - center);
    return 0;
  }
  const bool shrink = g.weighting == Weighting::shrink;
  T total = 0;
  for (int64_t e = 0; e < count; ++e) {
    const T centered = grads[e] - center;
    total += centered;
    grads[e] = (shrink ? weights[e] + slope : slope) * centered;
  }
  if (g.rule == Rule::relative) take_from_largest(weights, grads, count);
  return -slope * total;
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
    add_products<T, L, 4, Target::Rows>(scratch.dense + key, stride, number, min64(kSumChain, g.size.keys - key),
                                        keys + key * g.key.stride, g.key.stride, g.size.width, query_grad,
                                        g.query_grad.stride);
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

// The sum for some keys [first, first + number) over a block of queries by tiles: entries cursors[r] .. ends[r] of row
// r.
template <typename T, class Target>
void add_dense_block(const AttentionGradient<T>& g, const T* x, int64_t x_stride, int64_t width, const T* weights,
                     T factor, const int64_t* cursors, const int64_t* ends, int64_t rows, int64_t first, int64_t number,
                     T* dense, T* sums, int64_t stride) {
  for (int64_t i = 0; i < number * kBlockQueries; ++i) dense[i] = 0;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t e = cursors[r]; e < ends[r]; ++e)
      dense[(g.col_idx[e] - first) * kBlockQueries + r] = factor * weights[e];
  add_products<T, Target::Lanes, 4, Target::Rows>(dense, kBlockQueries, number, rows, x, x_stride, width, sums, stride);
}

// to[j] = factor * sum over queries i of the head's group of weights_ij x_i, for the keys j of a range. Some keys at a
// time, so that their sums stay in the nearest cache while all queries pass by: `cursors` has the next entry of each.
template <typename T, class Target>
void sum_over_queries(const AttentionGradient<T>& g, int64_t b, int64_t kv_head, Range keys, int64_t together,
                      const Heads<const T>& x, const T* weights, T factor, int64_t width, const Heads<T>& to,
                      const AttentionBackwardScratch<T>& scratch) {
  constexpr int L = Target::Lanes;
  const int64_t group = g.size.heads / g.size.kv_heads, queries = g.size.queries;
  const int64_t* ptr = g.row_ptr + (b * g.size.heads + kv_head * group) * queries;
  T* sums = to.head(b, kv_head);
  for (int64_t j = keys.begin; j < keys.end; ++j)
    for (int64_t d = 0; d < width; ++d) sums[j * to.stride + d] = 0;
  for (int64_t row = 0; row < group * queries; ++row)
    scratch.cursors[row] = first_from(g.col_idx, ptr[row], ptr[row + 1], keys.begin);
  for (int64_t first = keys.begin, last; first < keys.end; first = last) {
    last = min64(first + together, keys.end);
    for (int64_t h = 0; h < group; ++h)
      for (int64_t begin = 0; begin < queries; begin += kBlockQueries) {
        const int64_t rows = min64(kBlockQueries, queries - begin), at = h * queries + begin;
        int64_t ends[kBlockQueries], entries = 0;
        for (int64_t r = 0; r < rows; ++r) {
          int64_t e = scratch.cursors[at + r];
          const int64_t end = ptr[at + r + 1];
          if (last == g.size.keys)
            e = end;
          else
            while (e < end && g.col_idx[e] < last) ++e;
          entries += e - scratch.cursors[at + r];
          ends[r] = e;
        }
        const T* some = x.head(b, kv_head * group + h) + begin * x.stride;
        if (together <= kKeysTogether && is_dense(g, entries, rows * (last - first)))
          add_dense_block<T, Target>(g, some, x.stride, width, weights, factor, scratch.cursors + at, ends, rows, first,
                                     last - first, scratch.dense, sums + first * to.stride, to.stride);
        else
          for (int64_t r = 0; r < rows; ++r) {
            const int64_t e = scratch.cursors[at + r];
            scatter<T, L, 4>(some + r * x.stride, width, g.col_idx + e, weights + e, ends[r] - e, factor, sums,
                             to.stride);
          }
        for (int64_t r = 0; r < rows; ++r) scratch.cursors[at + r] = ends[r];
      }
  }
}

template <typename T, class Target>
void attention_backward_keys(const AttentionGradient<T>& g, int64_t b, int64_t kv_head, Range keys,
                             const AttentionBackwardScratch<T>& scratch) {
  const int64_t group = g.size.heads / g.size.kv_heads, rows = group * g.size.queries;
  const int64_t* ptr = g.row_ptr + (b * g.size.heads + kv_head * group) * g.size.queries;
  // So many keys that a row has some entries among them: what is done once a row should be little beside these.
  int64_t together = kKeysTogether;
  while (together < g.size.keys && (ptr[rows] - ptr[0]) * together < kEntriesTogether * rows * g.size.keys)
    together *= 2;
  sum_over_queries<T, Target>(g, b, kv_head, keys, together, g.grad, g.shares, T(1), g.size.value_width, g.value_grad,
                              scratch);
  sum_over_queries<T, Target>(g, b, kv_head, keys, together, g.query, g.score_grad, T(g.scale), g.size.width,
                              g.key_grad, scratch);
}

}  // namespace
