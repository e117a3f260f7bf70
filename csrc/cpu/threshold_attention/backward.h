// Gradients of thresholded attention: work and memory in proportion to the survivors.
//
// backward_rows, for a query i:  dP_ij = dO_i . v_j,  dS_ij = P_ij (dP_ij - sum_j P_ij dP_ij),  dQ_i = scale sum_j dS_ij k_j
// backward_keys, for a range of keys of one kv head, adding up query heads and queries in ascending order:
//   dK_j = scale sum_i dS_ij q_i,  dV_j = sum_i P_ij dO_i
// The second walks the support by rows and finds a row's part of the key range by bisection: keys have one owner, nothing
// is sorted, and the gradients of a range stay in cache.
#pragma once

#include "../kernels.h"
#include "vectors.h"

namespace {

using namespace compsparse;

template <typename T, int L>
void backward_row(const AttentionGradient<T>& g, int64_t b, int64_t h, int64_t i, Range entries) {
  const int64_t kv_head = h / (g.size.heads / g.size.kv_heads), count = entries.end - entries.begin;
  const int32_t* columns = g.col_idx + entries.begin;
  const T* weights = g.weights + entries.begin;
  T* score_grad = g.score_grad + entries.begin;
  const T* grad = g.grad.head(b, h) + i * g.grad.stride;
  const T* values = g.value.head(b, kv_head);
  for (int64_t e = 0; e < count; ++e)
    score_grad[e] = dot<T, L>(grad, values + columns[e] * g.value.stride, g.size.value_width);
  const T mean = dot<T, L>(weights, score_grad, count);
  for (int64_t e = 0; e < count; ++e) score_grad[e] = weights[e] * (score_grad[e] - mean);
  gather_sum<T, L, 4>(g.key.head(b, kv_head), g.key.stride, g.size.width, columns, score_grad, count, T(g.scale),
                      g.query_grad.head(b, h) + i * g.query_grad.stride);
}

template <typename T, int L>
void attention_backward_rows(const AttentionGradient<T>& g, Range rows) {
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const int64_t head = row / g.size.queries;
    backward_row<T, L>(g, head / g.size.heads, head % g.size.heads, row % g.size.queries,
                       {g.row_ptr[row], g.row_ptr[row + 1]});
  }
}

// First entry of [begin, end) with a column of at least `key`.
inline int64_t first_from(const int32_t* columns, int64_t begin, int64_t end, int64_t key) {
  while (begin < end) {
    const int64_t middle = begin + (end - begin) / 2;
    if (columns[middle] < key)
      begin = middle + 1;
    else
      end = middle;
  }
  return begin;
}

template <typename T>
void clear_rows(const Heads<T>& to, int64_t b, int64_t h, Range tokens, int64_t width) {
  for (int64_t j = tokens.begin; j < tokens.end; ++j)
    for (int64_t d = 0; d < width; ++d) to.head(b, h)[j * to.stride + d] = 0;
}

template <typename T, int L>
void attention_backward_keys(const AttentionGradient<T>& g, int64_t b, int64_t kv_head, Range keys) {
  const int64_t group = g.size.heads / g.size.kv_heads;
  clear_rows(g.key_grad, b, kv_head, keys, g.size.width);
  clear_rows(g.value_grad, b, kv_head, keys, g.size.value_width);
  T* key_grads = g.key_grad.head(b, kv_head);
  T* value_grads = g.value_grad.head(b, kv_head);
  const T scale = T(g.scale);
  for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h) {
    const int64_t* row_ptr = g.row_ptr + (b * g.size.heads + h) * g.size.queries;
    for (int64_t i = 0; i < g.size.queries; ++i) {
      const T* query = g.query.head(b, h) + i * g.query.stride;
      const T* grad = g.grad.head(b, h) + i * g.grad.stride;
      int64_t e = first_from(g.col_idx, row_ptr[i], row_ptr[i + 1], keys.begin);
      for (; e < row_ptr[i + 1] && g.col_idx[e] < keys.end; ++e) {
        const int64_t j = g.col_idx[e];
        add_scaled<T, L>(query, scale * g.score_grad[e], g.size.width, key_grads + j * g.key_grad.stride);
        add_scaled<T, L>(grad, g.weights[e], g.size.value_width, value_grads + j * g.value_grad.stride);
      }
    }
  }
}

}  // namespace
