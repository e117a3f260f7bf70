// Gradients of thresholded attention: work and memory in proportion to the survivors.
//
// backward_rows, for a query i:  dP_ij = dO_i . v_j,  dS_ij = P_ij (dP_ij - sum_j P_ij dP_ij),  dQ_i = scale sum_j
// dS_ij k_j backward_keys, for a key j:    dK_j = scale sum_i dS_ij q_i,  dV_j = sum_i P_ij dO_i,  over the queries of
// all its heads Rows have one owner, and so have keys: the owner of a range of keys walks all rows of the support and
// takes its part of each. Sums run in the order of rows, so threads do not change a bit. Scattering over rows was
// measured to be faster than sorting the support by keys and gathering. Values and keys have loops of their own: then
// each has the cache for itself.
#pragma once

#include "bounds.h"
#include "philox.h"
#include "table.h"
#include "vectors.h"

namespace {

using namespace compsparse;

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

template <typename T, int L>
void score_gradient(const AttentionGradient<T>& g, int64_t row, const T* grad, const T* values) {
  const int64_t begin = g.row_ptr[row], count = g.row_ptr[row + 1] - begin;
  const int32_t* columns = g.col_idx + begin;
  const T* weights = g.weights + begin;
  T* grads = g.score_grad + begin;
  gather_dots<T, L>(values, g.value.stride, g.size.value_width, columns, count, grad, grads);
  if (g.dropped) {
    drop(g.seed, g.dropout, uint64_t(row), columns, count, weights, g.dropped + begin);
    drop(g.seed, g.dropout, uint64_t(row), columns, count, grads, grads);
  }
  g.cut_grad[row] = g.rule == Rule::entmax ? entmax_gradient<T, L>(g, weights, grads, count)
                                           : weighted_gradient<T, L>(g, weights, g.slopes[row], grads, count);
}

// Queries of one head, which begins at row `first` of the support.
template <typename T, int L>
void backward_queries(const AttentionGradient<T>& g, int64_t b, int64_t h, int64_t first, Range queries) {
  const int64_t kv_head = h / (g.size.heads / g.size.kv_heads);
  const T* grad = g.grad.head(b, h);
  const int64_t* ptr = g.row_ptr + first;
  for (int64_t i = queries.begin; i < queries.end; ++i)
    score_gradient<T, L>(g, first + i, grad + i * g.grad.stride, g.value.head(b, kv_head));
  for (int64_t i = queries.begin; i < queries.end; ++i)
    gather_sum<T, L, 4>(g.key.head(b, kv_head), g.key.stride, g.size.width, g.col_idx + ptr[i], g.score_grad + ptr[i],
                        ptr[i + 1] - ptr[i], T(g.scale), g.query_grad.head(b, h) + i * g.query_grad.stride);
}

template <typename T, int L>
void attention_backward_rows(const AttentionGradient<T>& g, Range rows) {
  for (int64_t row = rows.begin; row < rows.end;) {
    const int64_t head = row / g.size.queries, first = head * g.size.queries;
    const int64_t end = min64(rows.end, first + g.size.queries);
    backward_queries<T, L>(g, head / g.size.heads, head % g.size.heads, first, {row - first, end - first});
    row = end;
  }
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

// to[j] = factor * sum over queries i of the head's group of weights_ij x_i, for the keys j of a range.
template <typename T, int L>
void sum_over_queries(const AttentionGradient<T>& g, int64_t b, int64_t kv_head, Range keys, const Heads<const T>& x,
                      const T* weights, T factor, int64_t width, const Heads<T>& to) {
  const int64_t group = g.size.heads / g.size.kv_heads;
  T* sums = to.head(b, kv_head);
  for (int64_t j = keys.begin; j < keys.end; ++j)
    for (int64_t d = 0; d < width; ++d) sums[j * to.stride + d] = 0;
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

template <typename T, int L>
void attention_backward_keys(const AttentionGradient<T>& g, int64_t b, int64_t kv_head, Range keys) {
  sum_over_queries<T, L>(g, b, kv_head, keys, g.grad, g.shares, T(1), g.size.value_width, g.value_grad);
  sum_over_queries<T, L>(g, b, kv_head, keys, g.query, g.score_grad, T(g.scale), g.size.width, g.key_grad);
}

}  // namespace
