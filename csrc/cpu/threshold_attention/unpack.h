// What both bind.cpp files of threshold_attention need: tensors as the kernels read them, units of work.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <string>

#include "../kernels.h"
#include "../tensors.h"

namespace compsparse {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

inline AttentionSizes sizes_of(const Tensor& query, const Tensor& key, const Tensor& value) {
  return {query.size(0), query.size(1), key.size(1), query.size(2), key.size(2), query.size(3), value.size(3)};
}

inline bool is_half(const Tensor& x) {
  return x.scalar_type() == ScalarType::BFloat16 || x.scalar_type() == ScalarType::Half;
}

// Kernels read rows of contiguous elements at any stride, in float or double. Half precision is widened as a whole:
// tokens times width, where the work is tokens times tokens times width.
inline Tensor as_rows(const Tensor& x) {
  const Tensor wide = is_half(x) ? torch::stable::to(x, ScalarType::Float) : x;  // which keeps the strides
  return wide.stride(3) == 1 || wide.size(3) == 1 ? wide : torch::stable::contiguous(wide);
}

inline Tensor narrowed_like(const Tensor& x, const Tensor& like) {
  return is_half(like) ? torch::stable::to(x, like.scalar_type()) : x;
}

inline int32_t sum_dtype(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
}

template <typename T>
Heads<T> heads_of(const Tensor& x) {
  return {static_cast<T*>(x.data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
}

template <class Run>
void by_dtype(const Tensor& x, const Run& run) {
  const AttentionTable& table = *kernels().attention;
  x.scalar_type() == ScalarType::Double ? run(table.f64) : run(table.f32);
}

inline Rule rule_from(const std::string& name) {
  if (name == "relative") return Rule::relative;
  if (name == "absolute") return Rule::absolute;
  if (name == "topk") return Rule::topk;
  if (name == "topp") return Rule::topp;
  STD_TORCH_CHECK(name == "entmax", "unknown rule reached the kernel: ", name);
  return Rule::entmax;
}

inline Weighting weighting_from(const std::string& name) {
  if (name == "softmax") return Weighting::softmax;
  if (name == "shrink") return Weighting::shrink;
  STD_TORCH_CHECK(name == "rectified", "unknown weighting reached the kernel: ", name);
  return Weighting::rectified;
}

// A query block of one head. Parts take the next one when they are ready: with a causal mask later ones cost more.
struct QueryBlocks {
  int64_t heads, queries, block, per_head;
  QueryBlocks(const AttentionSizes& size, int64_t block)
      : heads(size.heads), queries(size.queries), block(block), per_head((size.queries + block - 1) / block) {}
  int64_t total(int64_t batch) const { return batch * heads * per_head; }
  int64_t head(int64_t unit) const { return unit / per_head; }  // batch * heads + head
  Range rows(int64_t unit) const {
    const int64_t begin = unit % per_head * block;
    return {begin, std::min(begin + block, queries)};
  }
};

// Several sums side by side, so that the compiler makes vectors of them.
template <typename T>
bool all_finite(const T* rows, int64_t stride, int64_t number, int64_t width) {
  constexpr int64_t Sums = 16;
  T odd[Sums] = {};  // 0 or NaN
  for (int64_t j = 0; j < number; ++j) {
    const T* row = rows + j * stride;
    int64_t d = 0;
    for (; d + Sums <= width; d += Sums)
      for (int64_t i = 0; i < Sums; ++i) odd[i] += row[d + i] * T(0);
    for (; d < width; ++d) odd[0] += row[d] * T(0);
  }
  T total = 0;
  for (const T& some : odd) total += some;
  return total == 0;
}

template <typename T>
bool all_heads_finite(const Heads<const T>& x, int64_t batch, int64_t heads, int64_t tokens, int64_t width) {
  for (int64_t head = 0; head < batch * heads; ++head)
    if (!all_finite(x.head(head / heads, head % heads), x.stride, tokens, width)) return false;
  return true;
}

}  // namespace compsparse
