// The boundary between torch and the arithmetic of threshold_attention.
#pragma once

#include "../types.h"

namespace compsparse {

// A tensor [batch, heads, tokens, width] read through its strides; only the last dimension is contiguous.
template <typename T>
struct Heads {
  T* data;
  int64_t batch_stride;
  int64_t head_stride;
  int64_t stride;  // of tokens
  T* head(int64_t b, int64_t h) const { return data + b * batch_stride + h * head_stride; }
};

struct AttentionSizes {
  int64_t batch;
  int64_t heads;
  int64_t kv_heads;  // query head h reads key-value head h / (heads / kv_heads)
  int64_t queries;
  int64_t keys;
  int64_t width;  // of a query and of a key
  int64_t value_width;
};

// s_ij = scale q_i . k_j + bias_ij. Query i keeps key j where s_ij >= cut (absolute) or s_ij >= max_j s_ij + cut.
template <typename T>
struct Attention {
  AttentionSizes size;
  Heads<const T> query, key, value;
  Heads<T> out;
  const T* bias;        // float bias or null, strides in bias_strides (0 where it is broadcast)
  const uint8_t* mask;  // bool bias (true = may attend) or null, same strides
  int64_t bias_strides[4];
  const uint8_t* padding;  // [batch, keys], true = no query sees this key; or null
  const T* packed_keys;    // [batch, kv_heads, panels, width, panel_keys] by `pack_keys`
  const double* norms;     // [batch, kv_heads, panels]: the largest norm of a key in the panel
  double scale;
  double cut;
  bool absolute;
  bool causal;
};

// What one thread needs for a block of queries; kept keys of row r: columns[r * row_capacity ...], counts[r] of them.
template <typename T>
struct AttentionScratch {
  T* queries;        // [block_queries, width], scaled
  T* scores;         // [block_queries, score_stride]
  int64_t* counts;   // [block_queries]
  int32_t* columns;  // [block_queries, row_capacity]
  T* weights;        // [block_queries, row_capacity]
  int64_t row_capacity;
};

// The support of every query and the gradients that flow through it; row = (b * heads + h) * queries + i.
template <typename T>
struct AttentionGradient {
  AttentionSizes size;
  Heads<const T> query, key, value, grad;
  const int64_t* row_ptr;  // [rows + 1]
  const int32_t* col_idx;  // [nnz], ascending in each row
  const T* weights;        // [nnz]
  T* score_grad;           // [nnz]
  Heads<T> query_grad, key_grad, value_grad;
  double scale;
};

template <typename T>
struct AttentionKernels {
  int64_t panel_keys;     // keys side by side in a packed panel
  int64_t block_queries;  // most queries of one call of `forward`
  int64_t score_stride;
  int64_t slack;  // elements that `forward` may write past a row's last candidate
  void (*pack_keys)(const Attention<T>&, int64_t b, int64_t kv_head, Range panels, T* packed, double* norms);
  void (*forward)(const Attention<T>&, int64_t b, int64_t h, Range queries, const AttentionScratch<T>&);
  void (*backward_rows)(const AttentionGradient<T>&, Range rows);                              // score_grad, query_grad
  void (*backward_keys)(const AttentionGradient<T>&, int64_t b, int64_t kv_head, Range keys);  // key_grad, value_grad
};

struct AttentionTable {
  AttentionKernels<float> f32;
  AttentionKernels<double> f64;
};

extern const AttentionTable attention_scalar, attention_avx2, attention_avx512;

}  // namespace compsparse
