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

enum class Rule : int32_t { relative, absolute, topk, topp, entmax };

enum class Weighting : int32_t { softmax, shrink, rectified };

// s_ij = scale q_i . k_j + bias_ij - slope |p_i - j| for the keys j that query i sees, p_i being its own place among
// them. The rule with its threshold says which keys it keeps (ops/threshold_attention/contract.py).
template <typename T>
struct Attention {
  AttentionSizes size;
  Heads<const T> query, key, value;
  Heads<T> out;
  const T* bias;        // float bias or null, strides in bias_strides (0 where it is broadcast)
  const uint8_t* mask;  // bool bias (true = may attend) or null, same strides
  int64_t bias_strides[4];
  const uint8_t* padding;     // [batch, keys], true = no query sees this key; or null
  const float* alibi_slopes;  // [heads] or null
  const double* thresholds;   // of each batch, head and query; or null: `threshold` for all
  int64_t threshold_strides[3];
  const int64_t* query_starts;  // [sequences + 1] or null: one sequence
  const int64_t* key_starts;
  int64_t sequences;
  double threshold;
  Rule rule;
  Weighting weighting;
  bool causal;
  int64_t window_left;  // keys before a query's own place that it sees, and after it; -1: all
  int64_t window_right;
  int64_t query_offset;
  double scale;
  double dropout;
  uint64_t seed;
  const T* packed_keys;          // of each key-value head [panels, width, panel_keys] by `pack_keys`, or null
  int64_t packed_stride;         // between heads; 0 where it is the head at hand alone
  const double* norms;           // [batch, kv_heads, panels]: the largest norm of a key in the panel
  const uint8_t* index;          // by `pack_index`, or null
  int64_t index_stride;          // of a key-value head
  const uint8_t* finite_values;  // [batch, kv_heads]: all values are finite; or null: not known
};

// What one thread needs for a block of queries; kept keys of row r: columns[r * row_capacity ...], counts[r] of them.
template <typename T>
struct AttentionScratch {
  T* queries;        // [block_queries, width], scaled
  int8_t* codes;     // [block_queries, width rounded up to 4], of the index
  T* scores;         // [block_queries, score_stride]
  int64_t* counts;   // [block_queries]
  int32_t* columns;  // [block_queries, row_capacity]
  T* weights;        // [block_queries, row_capacity]
  T* spare;          // [2, row_capacity]
  T* log_sums;       // [block_queries]
  T* slopes;         // [block_queries]
  int64_t row_capacity;
  bool with_support;  // are the kept keys, their weights, log_sums and slopes wanted?
};

// The support of every query and the gradients that flow through it; row = (b * heads + h) * queries + i.
template <typename T>
struct AttentionGradient {
  AttentionSizes size;
  Heads<const T> query, key, value, grad;
  const int64_t* row_ptr;  // [rows + 1]
  const int32_t* col_idx;  // [nnz], ascending in each row
  const T* weights;        // [nnz]
  const T* slopes;         // [rows]
  const T* shares;         // [nnz]: the weights after dropout
  T* dropped;              // the same, where there is any; else null
  T* score_grad;           // [nnz]
  T* cut_grad;             // [rows]
  Heads<T> query_grad, key_grad, value_grad;
  double threshold;
  Rule rule;
  Weighting weighting;
  double scale;
  double dropout;
  uint64_t seed;
  bool finite;  // are all numbers of query, key, value and grad?
};

template <typename T>
struct AttentionBackwardScratch {
  T* rows;               // [block_queries, value_width]
  T* dense;              // [block_queries, dense_stride]
  int64_t dense_stride;  // keys rounded up to a whole panel
  T* block;              // [2, 64, 64]
};

// In place of a support: a bit for each key that a row keeps, and what makes the weights of its scores again,
// exp(s - top) inverse. Rows are (b, h, i).
template <typename T>
struct KeptBits {
  uint64_t* words;  // [rows, row_words]
  int64_t row_words;
  T* tops;      // [rows]
  T* inverses;  // [rows]

  void clear(int64_t row) const {
    for (int64_t w = 0; w < row_words; ++w) words[row * row_words + w] = 0;
  }
};

// Queries and keys of a block whose scores are computed again; ranges of keys are multiples of it.
constexpr int64_t recompute_queries = 48, recompute_keys = 192;

// softmax, no dropout. The gradient of the queries is of a range of keys alone.
template <typename T>
struct BitsGradient {
  Attention<T> of;
  KeptBits<T> bits;
  Heads<const T> out, grad;
  Heads<T> query_grad, key_grad, value_grad;
};

template <typename T>
struct BitsScratch {
  T* queries;        // [recompute_queries, width], scaled
  T* grads;          // [recompute_queries, value_width]
  T* weights;        // [recompute_queries, recompute_keys]
  T* score_grads;    // the same
  T* packed_keys;    // [recompute_keys, width]
  T* packed_values;  // [recompute_keys, value_width]
};

template <typename T>
struct AttentionKernels {
  int64_t panel_keys;     // keys side by side in a packed panel
  int64_t block_queries;  // most queries of one call of `forward`
  int64_t score_stride;
  int64_t slack;  // elements that `forward` may write past a row's last candidate
  // Keys of one head, and the largest norm in each panel where these are wanted.
  void (*pack_keys)(const T* keys, int64_t stride, int64_t number, int64_t width, T* packed, double* norms);
  void (*forward)(const Attention<T>&, int64_t b, int64_t h, Range queries, const AttentionScratch<T>&);
  double most_by_index;  // share of keys kept up to which the index pays
  // That share for a few queries of a head and a few keys.
  double (*head_share)(const Attention<T>&, int64_t b, int64_t h, const AttentionScratch<T>&);
  // The same for a few queries and all keys: slower, and nearer to the truth.
  double (*true_share)(const Attention<T>&, int64_t b, int64_t h, const AttentionScratch<T>&);
  // By the index alone; false where too many keys are candidates, and nothing is done. Null: no index here.
  bool (*forward_indexed)(const Attention<T>&, int64_t b, int64_t h, Range queries, const AttentionScratch<T>&);
  void (*pack_index)(const T* keys, int64_t stride, int64_t width, Range which, uint8_t* index);
  // score_grad, cut_grad, query_grad, dropped; `packed` are the head's values by `pack_keys`, or null
  void (*backward_rows)(const AttentionGradient<T>&, const T* packed, int64_t b, int64_t h, Range queries,
                        const AttentionBackwardScratch<T>&);
  // key_grad, value_grad
  void (*backward_keys)(const AttentionGradient<T>&, int64_t b, int64_t kv_head, Range keys,
                        const AttentionBackwardScratch<T>&);
  // Keys packed, their norms and finite values known.
  void (*forward_bits)(const Attention<T>&, const KeptBits<T>&, int64_t b, int64_t h, Range queries,
                       const AttentionScratch<T>&);
  void (*backward_bits)(const BitsGradient<T>&, int64_t b, int64_t kv_head, Range keys, const BitsScratch<T>&);
};

struct AttentionTable {
  AttentionKernels<float> f32;
  AttentionKernels<double> f64;
};

// An index [panels] of so many keys each: codes [width / 4][keys][4], three floats for each key, bounds (index.h).
constexpr int64_t index_panel_keys = 64;
constexpr int64_t index_panel_bytes(int64_t width) { return index_panel_keys * ((width + 3) / 4 * 4 + 12) + 64; }

extern const AttentionTable attention_scalar, attention_avx2, attention_avx512;
extern const AttentionKernels<float> attention_avx512_bf16;

}  // namespace compsparse
