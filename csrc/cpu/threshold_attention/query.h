// One query on its way through a block: what it sees, what decides about its keys, and how its scores are made final.
#pragma once

#include "bounds.h"
#include "table.h"
#include "vectors.h"

namespace {

using namespace compsparse;

constexpr int64_t kBlockQueries = 24;  // a panel of keys is read from cache once for so many queries

// The keys first <= j < end that a query may see, and its own place among them.
struct Sight {
  int64_t first, end, place;
};

template <typename T>
Sight sight_of(const Attention<T>& a, int64_t i) {
  Sight sight = {0, a.size.keys, i + a.query_offset};
  if (a.query_starts) {
    int64_t low = 0, high = a.sequences;  // starts[low] <= i < starts[high]
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (a.query_starts[middle] <= i ? low : high) = middle;
    }
    sight = {a.key_starts[low], a.key_starts[low + 1], sight.place - a.query_starts[low] + a.key_starts[low]};
  }
  int64_t last = sight.end - 1;
  if (a.causal) last = min64(last, sight.place);
  if (a.window_right >= 0 && sight.place < last - a.window_right) last = sight.place + a.window_right;
  if (a.window_left >= 0 && sight.place - sight.first > a.window_left) sight.first = sight.place - a.window_left;
  sight.end = last + 1 > sight.first ? last + 1 : sight.first;
  return sight;
}

template <typename T>
struct QueryState {
  int64_t b, h, i;
  Sight sight;
  const T* query;    // as given, not scaled
  double threshold;  // of the rule
  bool from_top;     // are keys kept from `cut` below the row's largest score on, or from `cut` itself?
  double cut;
  double alibi;  // slope
  ScreenError<T> error;
  T top;  // largest screened score so far
};

// Where the rule's support, or a superset from which it is solved, begins: below the largest score unless absolute.
//   topp    keys further down than log((1 - p) eps / keys) hold less than (1 - p) eps of the mass together
//   entmax  (alpha - 1) s >= (alpha - 1) max - 1 where a weight is positive
template <typename T>
double window_of(const Attention<T>& a, double threshold) {
  switch (a.rule) {
    case Rule::relative:
      return __builtin_log(threshold);
    case Rule::topp: {
      const double eps = sizeof(T) == 4 ? 0x1p-26 : 0x1p-55;
      return threshold < 1 ? __builtin_log((1 - threshold) * eps / double(a.size.keys)) : -__builtin_inf();
    }
    case Rule::entmax:
      return -1 / (threshold - 1);
    case Rule::topk:
      return -__builtin_inf();
    default:
      return threshold;
  }
}

// `window` is that of the threshold all queries share, if they do.
template <typename T>
QueryState<T> start_query(const Attention<T>& a, double window, int64_t b, int64_t h, int64_t i, T* scaled) {
  const T* query = a.query.head(b, h) + i * a.query.stride;
  for (int64_t d = 0; d < a.size.width; ++d) scaled[d] = T(a.scale * query[d]);
  const int64_t* strides = a.threshold_strides;
  const double threshold = a.thresholds ? a.thresholds[b * strides[0] + h * strides[1] + i * strides[2]] : a.threshold;
  if (a.thresholds) window = window_of(a, threshold);
  QueryState<T> q = {b, h, i, sight_of(a, i), query, threshold, a.rule != Rule::absolute, window};
  q.alibi = a.alibi_slopes ? a.alibi_slopes[h] : 0;
  q.top = -__builtin_inf();
  return q;
}

template <typename T>
bool sees_all(const QueryState<T>& q, Range keys) {
  return q.sight.first <= keys.begin && keys.end <= q.sight.end;
}

// The most that ALiBi takes from a score.
template <typename T>
double most_alibi(const QueryState<T>& q) {
  const double before = __builtin_fabs(double(q.sight.place - q.sight.first));
  const double after = __builtin_fabs(double(q.sight.end - q.sight.place));
  return __builtin_fabs(q.alibi) * larger_of(before, after);
}

// Once the largest norms of a key and of the query are known, so is how far a score may be off.
template <typename T>
ScreenError<T> error_of(const Attention<T>& a, const QueryState<T>& q, double norm, double largest_key) {
  return ScreenError<T>(__builtin_fabs(a.scale) * norm, largest_key, most_alibi(q), a.size.width);
}

template <typename T>
ScreenError<T> error_of(const Attention<T>& a, const QueryState<T>& q, double largest_key) {
  return error_of(a, q, norm_above(q.query, a.size.width), largest_key);
}

template <typename T>
int64_t bias_offset(const Attention<T>& a, const QueryState<T>& q) {
  return q.b * a.bias_strides[0] + q.h * a.bias_strides[1] + q.i * a.bias_strides[2];
}

// Bias and masks on the scores of the keys first + (begin .. end), all of them in sight; what is masked becomes -inf.
template <typename T>
void apply_bias(const Attention<T>& a, const QueryState<T>& q, int64_t first, int64_t begin, int64_t end, T* scores) {
  const T hidden = -__builtin_inf();
  const int64_t step = a.bias_strides[3], at = bias_offset(a, q) + first * step;
  if (a.bias && step == 1)
    for (int64_t j = begin; j < end; ++j) scores[j] += a.bias[at + j];
  else if (a.bias)
    for (int64_t j = begin; j < end; ++j) scores[j] += a.bias[at + j * step];
  if (a.alibi_slopes)
    for (int64_t j = begin; j < end; ++j) {
      const int64_t distance = q.sight.place - first - j;
      scores[j] -= T(q.alibi) * T(distance < 0 ? -distance : distance);
    }
  if (a.mask)
    for (int64_t j = begin; j < end; ++j) scores[j] = a.mask[at + j * step] ? scores[j] : hidden;
  if (a.padding) {
    const uint8_t* padding = a.padding + q.b * a.size.keys + first;
    for (int64_t j = begin; j < end; ++j) scores[j] = padding[j] ? hidden : scores[j];
  }
}

// The scores of keys first .. first + count as the query sees them, -inf elsewhere and up to a whole last vector.
// Returns how many there are to look at.
template <typename T, int L>
int64_t finish_scores(const Attention<T>& a, const QueryState<T>& q, int64_t first, int64_t count, T* scores) {
  const T hidden = -__builtin_inf();
  const int64_t end = min64(count, q.sight.end - first);
  if (end <= 0) return 0;
  int64_t begin = q.sight.first - first;
  if (begin < 0) begin = 0;
  if (begin >= end) return 0;
  apply_bias(a, q, first, begin, end, scores);
  for (int64_t j = 0; j < begin; ++j) scores[j] = hidden;
  for (int64_t j = end; j < round_up(end, L); ++j) scores[j] = hidden;
  return end;
}

// The score in double, in an order of its own: eight lanes over the width, then a tree.
template <typename T>
double exact_score(const Attention<T>& a, const QueryState<T>& q, int64_t key) {
  const T* row = a.key.head(q.b, q.h / (a.size.heads / a.size.kv_heads)) + key * a.key.stride;
  double acc[8] = {};
  int64_t d = 0;
  for (; d + 8 <= a.size.width; d += 8)
    for (int lane = 0; lane < 8; ++lane) acc[lane] += double(q.query[d + lane]) * double(row[d + lane]);
  for (int lane = 0; d < a.size.width; ++d) acc[lane++] += double(q.query[d]) * double(row[d]);
  const double sum = ((acc[0] + acc[4]) + (acc[2] + acc[6])) + ((acc[1] + acc[5]) + (acc[3] + acc[7]));
  const double distance = __builtin_fabs(double(q.sight.place - key));
  return a.scale * sum + (a.bias ? a.bias[bias_offset(a, q) + key * a.bias_strides[3]] : 0) - q.alibi * distance;
}

// In double the screen's own score, the same for equal keys, is the law.
template <typename T>
double decisive_score(const Attention<T>& a, const QueryState<T>& q, int64_t key, T screened) {
  if constexpr (sizeof(T) == sizeof(double))
    return screened;
  else
    return exact_score(a, q, key);
}

}  // namespace
