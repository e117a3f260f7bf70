// threshold_attention by its definition (ops/threshold_attention/reference.py), in double and in plain loops.
#pragma once

#include <algorithm>

#include "../../csrc/cpu/threshold_attention/philox.h"
#include "threshold_attention_cases.h"

namespace {

// Of row (b * heads + h) * queries + i; `out` lies as the kernel's output does.
struct Exact {
  std::vector<double> weights;  // [rows, keys], before dropout
  std::vector<uint8_t> kept;    // [rows, keys]
  std::vector<double> scores;   // [rows, keys]
  std::vector<double> out, slopes;
};

// What dropout multiplies a weight by.
inline double dropout_factor(uint64_t seed, double p, int64_t row, int64_t column) {
  if (p == 0) return 1;
  return philox(seed, uint32_t(column), uint64_t(row)) >= nearbyint(p * 0x1p32) ? 1 / (1 - p) : 0;
}

// The sequence of a token: the last that begins no later.
inline int64_t sequence_of(const int64_t* starts, int64_t sequences, int64_t token) {
  int64_t sequence = 0;
  for (int64_t s = 1; s < sequences; ++s)
    if (starts[s] <= token) sequence = s;
  return sequence;
}

template <typename T>
double exact_score(const Attention<T>& a, int64_t b, int64_t h, int64_t i, int64_t j) {
  int64_t place = i + a.query_offset, key_place = j;
  if (a.query_starts) {
    const int64_t sequence = sequence_of(a.query_starts, a.sequences, i);
    if (sequence != sequence_of(a.key_starts, a.sequences, j)) return -INFINITY;
    place -= a.query_starts[sequence], key_place -= a.key_starts[sequence];
  }
  const int64_t distance = key_place - place;
  if (a.causal && distance > 0) return -INFINITY;
  if (a.window_left >= 0 && distance < -a.window_left) return -INFINITY;
  if (a.window_right >= 0 && distance > a.window_right) return -INFINITY;
  if (a.padding && a.padding[b * a.size.keys + j]) return -INFINITY;
  const int64_t bias = b * a.bias_strides[0] + h * a.bias_strides[1] + i * a.bias_strides[2] + j * a.bias_strides[3];
  if (a.mask && !a.mask[bias]) return -INFINITY;
  const T* q = a.query.data + at(a.query, b, h, i);
  const T* k = a.key.data + at(a.key, b, h / (a.size.heads / a.size.kv_heads), j);
  double sum = 0;
  for (int64_t d = 0; d < a.size.width; ++d) sum += double(q[d]) * k[d];
  const double slope = a.alibi_slopes ? a.alibi_slopes[h] : 0;
  return a.scale * sum + (a.bias ? double(a.bias[bias]) : 0) - slope * fabs(double(distance));
}

// The score from which on keys are kept, of any rule but entmax.
inline double exact_cut(const std::vector<double>& scores, double top, Rule rule, double threshold) {
  if (rule == Rule::relative) return top + log(threshold);
  if (rule == Rule::absolute) return threshold;
  std::vector<double> ordered = scores;
  std::sort(ordered.begin(), ordered.end(), std::greater<double>());
  if (rule == Rule::topk) return ordered[std::min(size_t(threshold), ordered.size()) - 1];
  double total = 0, mass = 0;
  for (const double score : ordered) total += exp(score - top);
  for (const double score : ordered)
    if (threshold < 1 && (mass += exp(score - top)) >= threshold * total) return score;
  return -INFINITY;
}

// relu((alpha - 1) (s - top) - tau)^(1 / (alpha - 1)) of all scores, and their sum.
inline double entmax_weights(const std::vector<double>& scores, double top, double alpha, double tau, double* weights) {
  double total = 0;
  for (size_t j = 0; j < scores.size(); ++j)
    total += weights[j] = pow(fmax((alpha - 1) * (scores[j] - top) - tau, 0), 1 / (alpha - 1));
  return total;
}

// The sum falls as tau grows, and is 1 or more at -1, where the largest score alone has the weight 1.
inline void exact_entmax(const std::vector<double>& scores, double top, double alpha, double* weights) {
  double low = -1, high = 0;
  for (int step = 0; step < 60; ++step) {
    const double middle = (low + high) / 2;
    (entmax_weights(scores, top, alpha, middle, weights) >= 1 ? low : high) = middle;
  }
  entmax_weights(scores, top, alpha, low, weights);
}

struct RowRule {
  Rule rule;
  Weighting weighting;
  double threshold;
};

// Weights and the slope of a row whose keys are known.
inline double weigh_row(const RowRule& by, const std::vector<double>& scores, const uint8_t* kept, double top,
                        double* weights) {
  const bool relative = by.rule == Rule::relative;
  double slope = 0, total = 0;
  if (by.weighting == Weighting::shrink) slope = relative ? by.threshold : exp(by.threshold - top);
  for (size_t j = 0; j < scores.size(); ++j) {
    weights[j] = 0;
    if (!kept[j]) continue;
    if (by.weighting == Weighting::rectified)
      weights[j] = relative ? scores[j] - top - log(by.threshold) : scores[j] - by.threshold;
    else
      weights[j] = exp(scores[j] - top) - slope;
    total += weights[j];
  }
  if (by.weighting == Weighting::rectified) slope = 1;
  if (total == 0) return 0;
  for (size_t j = 0; j < scores.size(); ++j) weights[j] /= total;
  return slope / total;
}

// A row with scores that are no numbers keeps exactly these.
inline bool keep_undefined(const std::vector<double>& scores, uint8_t* kept, double* weights) {
  bool any = false;
  for (size_t j = 0; j < scores.size(); ++j) {
    if (!isnan(scores[j])) continue;
    any = true;
    kept[j] = 1;
    weights[j] = NAN;
  }
  return any;
}

template <typename T>
void exact_row(const Attention<T>& a, int64_t b, int64_t h, int64_t i, Exact& exact) {
  const int64_t keys = a.size.keys, row = (b * a.size.heads + h) * a.size.queries + i;
  const int64_t* strides = a.threshold_strides;
  const double threshold = a.thresholds ? a.thresholds[b * strides[0] + h * strides[1] + i * strides[2]] : a.threshold;
  double *weights = exact.weights.data() + row * keys, top = -INFINITY;
  uint8_t* kept = exact.kept.data() + row * keys;
  std::vector<double> scores(keys);
  for (int64_t j = 0; j < keys; ++j) top = fmax(top, scores[j] = exact_score(a, b, h, i, j));
  std::copy(scores.begin(), scores.end(), exact.scores.begin() + row * keys);
  double* out = exact.out.data() + at(a.out, b, h, i);
  if (keep_undefined(scores, kept, weights)) {
    exact.slopes[row] = NAN;
    std::fill_n(out, a.size.value_width, NAN);
    return;
  }
  if (top == -INFINITY) return;
  if (a.rule == Rule::entmax) {
    exact_entmax(scores, top, threshold, weights);
    for (int64_t j = 0; j < keys; ++j) kept[j] = weights[j] > 0;
  } else {
    const double cut = exact_cut(scores, top, a.rule, threshold);
    for (int64_t j = 0; j < keys; ++j) kept[j] = scores[j] > -INFINITY && scores[j] >= cut;
    exact.slopes[row] = weigh_row({a.rule, a.weighting, threshold}, scores, kept, top, weights);
  }
  const T* values = a.value.head(b, h / (a.size.heads / a.size.kv_heads));
  for (int64_t j = 0; j < keys; ++j) {
    const double share = kept[j] ? weights[j] * dropout_factor(a.seed, a.dropout, row, j) : 0;
    if (share == 0) continue;  // the value may be no number
    for (int64_t d = 0; d < a.size.value_width; ++d) out[d] += share * values[j * a.value.stride + d];
  }
}

template <typename T>
Exact exact_forward(const Attention<T>& a) {
  const AttentionSizes& s = a.size;
  const int64_t rows = s.batch * s.heads * s.queries;
  Exact exact = {std::vector<double>(rows * s.keys), std::vector<uint8_t>(rows * s.keys),
                 std::vector<double>(rows * s.keys), std::vector<double>(rows * s.value_width),
                 std::vector<double>(rows)};
  for (int64_t row = 0; row < rows; ++row)
    exact_row(a, row / s.queries / s.heads, row / s.queries % s.heads, row % s.queries, exact);
  return exact;
}

// Of e^score over some columns of a row.
inline double exact_log_sum(const double* scores, const int32_t* columns, int64_t count) {
  double top = -INFINITY, sum = 0;
  for (int64_t e = 0; e < count; ++e) top = fmax(top, scores[columns[e]]);
  for (int64_t e = 0; e < count; ++e) sum += exp(scores[columns[e]] - top);
  return top + log(sum);
}

// From the support that the kernel found. The gradients lie as the kernel's do.
struct ExactGradient {
  std::vector<double> shares, score_grad, cut_grad, query_grad, key_grad, value_grad;
};

// The gradients of the weights of one row -> those of its scores; returns that of its cut.
template <typename T>
double exact_score_gradient(const AttentionGradient<T>& g, const T* weights, double slope, double* grads,
                            int64_t count) {
  const auto steepness = [&](int64_t e) {
    if (g.rule == Rule::entmax) return pow(double(weights[e]), 2 - g.threshold);
    if (g.weighting == Weighting::rectified) return slope;
    return weights[e] + (g.weighting == Weighting::shrink ? slope : 0);
  };
  double center = 0, total = 0, centered = 0, sum = 0, largest = 0, holders = 0;
  for (int64_t e = 0; e < count; ++e) {
    const double part = g.rule == Rule::entmax ? steepness(e) : double(weights[e]);
    center += part * grads[e], total += part;
    largest = fmax(largest, weights[e]);
  }
  if (g.rule == Rule::entmax) center /= total;
  for (int64_t e = 0; e < count; ++e) {
    centered += grads[e] - center;
    sum += grads[e] = steepness(e) * (grads[e] - center);
    holders += weights[e] == largest;
  }
  if (g.rule == Rule::entmax) return 0;
  if (g.rule == Rule::relative && g.weighting != Weighting::softmax)
    for (int64_t e = 0; e < count; ++e) grads[e] -= weights[e] == largest ? sum / holders : 0;
  return g.weighting == Weighting::softmax ? 0 : -slope * centered;
}

template <typename T>
void exact_row_gradient(const AttentionGradient<T>& g, int64_t b, int64_t h, int64_t i, ExactGradient& exact) {
  const AttentionSizes& s = g.size;
  const int64_t row = (b * s.heads + h) * s.queries + i, kv_head = h / (s.heads / s.kv_heads);
  const int64_t begin = g.row_ptr[row], end = g.row_ptr[row + 1], q = at(g.query, b, h, i), out = at(g.grad, b, h, i);
  double* grads = exact.score_grad.data();
  for (int64_t e = begin; e < end; ++e) {
    const int64_t v = at(g.value, b, kv_head, g.col_idx[e]), to = at(g.value_grad, b, kv_head, g.col_idx[e]);
    const double factor = dropout_factor(g.seed, g.dropout, row, g.col_idx[e]);
    exact.shares[e] = factor * g.weights[e];
    for (int64_t d = 0; d < s.value_width; ++d) {
      grads[e] += factor * g.grad.data[out + d] * g.value.data[v + d];
      exact.value_grad[to + d] += exact.shares[e] * g.grad.data[out + d];
    }
  }
  exact.cut_grad[row] = exact_score_gradient(g, g.weights + begin, double(g.slopes[row]), grads + begin, end - begin);
  for (int64_t e = begin; e < end; ++e) {
    const int64_t k = at(g.key, b, kv_head, g.col_idx[e]), to = at(g.key_grad, b, kv_head, g.col_idx[e]);
    for (int64_t d = 0; d < s.width; ++d) {
      exact.query_grad[at(g.query_grad, b, h, i) + d] += g.scale * grads[e] * g.key.data[k + d];
      exact.key_grad[to + d] += g.scale * grads[e] * g.query.data[q + d];
    }
  }
}

template <typename T>
ExactGradient exact_backward(const AttentionGradient<T>& g) {
  const AttentionSizes& s = g.size;
  const int64_t rows = s.batch * s.heads * s.queries, kv_tokens = s.batch * s.kv_heads * s.keys, nnz = g.row_ptr[rows];
  ExactGradient exact = {std::vector<double>(nnz),
                         std::vector<double>(nnz),
                         std::vector<double>(rows),
                         std::vector<double>(rows * s.width),
                         std::vector<double>(kv_tokens * s.width),
                         std::vector<double>(kv_tokens * s.value_width)};
  for (int64_t row = 0; row < rows; ++row)
    exact_row_gradient(g, row / s.queries / s.heads, row / s.queries % s.heads, row % s.queries, exact);
  return exact;
}

}  // namespace
