// The inputs of the forward ops as the kernels read them.
#pragma once

#include <optional>
#include <string>

#include "unpack.h"

// The inputs of the forward ops, in the order of their schema (ops/threshold_attention/contract.py).
#define COMPSPARSE_ATTENTION_PARAMETERS                                                                               \
  const Tensor &query, const Tensor &key, const Tensor &value, const std::optional<Tensor>&bias,                      \
      const std::optional<Tensor>&padding, const std::optional<Tensor>&alibi, const std::optional<Tensor>&thresholds, \
      const std::optional<Tensor>&query_starts, const std::optional<Tensor>&key_starts,                               \
      const std::optional<Tensor>&index, double threshold, const std::string &rule, const std::string &weighting,     \
      bool is_causal, int64_t window_left, int64_t window_right, int64_t query_offset, double scale, double dropout,  \
      int64_t seed
#define COMPSPARSE_ATTENTION_ARGUMENTS                                                                              \
  query, key, value, bias, padding, alibi, thresholds, query_starts, key_starts, index, threshold, rule, weighting, \
      is_causal, window_left, window_right, query_offset, scale, dropout, seed

namespace compsparse {

template <typename T>
void set_bias(Attention<T>& a, const Tensor& bias) {
  if (bias.scalar_type() == ScalarType::Bool)
    a.mask = static_cast<const uint8_t*>(bias.data_ptr());
  else
    a.bias = static_cast<const T*>(bias.data_ptr());
  for (int d = 0; d < 4; ++d) a.bias_strides[d] = bias.size(d) == 1 ? 0 : bias.stride(d);
}

// The inputs of both forward ops, kept alive together with the copies made of them.
struct Inputs {
  Tensor query, key, value;
  std::optional<Tensor> bias, padding, alibi, thresholds, query_starts, key_starts, index;
  double threshold;
  Rule rule;
  Weighting weighting;
  bool causal;
  int64_t window_left, window_right, query_offset;
  double scale, dropout;
  int64_t seed;

  template <typename T>
  Attention<T> attention(const Tensor& out) const {
    Attention<T> a = {};
    a.size = sizes_of(query, key, value);
    a.query = heads_of<const T>(query);
    a.key = heads_of<const T>(key);
    a.value = heads_of<const T>(value);
    a.out = heads_of<T>(out);
    if (bias) set_bias(a, *bias);
    if (padding) a.padding = static_cast<const uint8_t*>(padding->data_ptr());
    if (alibi) a.alibi_slopes = static_cast<const float*>(alibi->data_ptr());
    if (thresholds) {
      a.thresholds = static_cast<const double*>(thresholds->data_ptr());
      for (int d = 0; d < 3; ++d) a.threshold_strides[d] = thresholds->size(d) == 1 ? 0 : thresholds->stride(d);
    }
    if (query_starts) {
      a.query_starts = static_cast<const int64_t*>(query_starts->data_ptr());
      a.key_starts = static_cast<const int64_t*>(key_starts->data_ptr());
      a.sequences = query_starts->size(0) - 1;
    }
    if (index && sizeof(T) == sizeof(float)) {
      a.index = static_cast<const uint8_t*>(index->data_ptr());
      a.index_stride = index->stride(1);
    }
    a.threshold = threshold;
    a.rule = rule;
    a.weighting = weighting;
    a.causal = causal;
    a.window_left = window_left;
    a.window_right = window_right;
    a.query_offset = query_offset;
    a.scale = scale;
    a.dropout = dropout;
    a.seed = uint64_t(seed);
    return a;
  }

  // In the dtype that the kernels compute in.
  Tensor new_output() const { return new_tensor(query, {query.size(0), query.size(1), query.size(2), value.size(3)}); }
};

inline std::optional<Tensor> contiguous_or_none(const std::optional<Tensor>& x) {
  return x ? std::optional<Tensor>(torch::stable::contiguous(*x)) : std::nullopt;
}

inline Inputs inputs_of(COMPSPARSE_ATTENTION_PARAMETERS) {
  std::optional<Tensor> wide_bias = bias;
  if (bias && is_half(*bias)) wide_bias = torch::stable::to(*bias, ScalarType::Float);
  return {as_rows(query),
          as_rows(key),
          as_rows(value),
          wide_bias,
          contiguous_or_none(padding),
          contiguous_or_none(alibi),
          thresholds,
          contiguous_or_none(query_starts),
          contiguous_or_none(key_starts),
          kernels().attention->f32.forward_indexed ? index : std::nullopt,
          threshold,
          rule_from(rule),
          weighting_from(weighting),
          is_causal,
          window_left,
          window_right,
          query_offset,
          scale,
          dropout,
          seed};
}

}  // namespace compsparse
