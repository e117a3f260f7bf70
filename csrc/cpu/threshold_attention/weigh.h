// Scores of survivors -> weights, as ops/threshold_attention/reference.py defines them.
#pragma once

#include "query.h"

namespace {

// What a row hands on to the backward.
template <typename T>
struct RowSums {
  T top;       // the score from which the others are taken
  double all;  // sum of e^(score - top) over the support
  T slope = 0;
  T sum = 0;  // of the weights before they were divided by it

  T log_sum() const { return T(double(top) + __builtin_log(all)); }
};

// A sum of vectors over all their lanes: some of them at a time, then their sums in double.
template <typename T, int L>
class LongSum {
 public:
  COMPSPARSE_INLINE void add(Vec<T, L> v) {
    some_ += v;
    if (++number_ < 32) return;
    total_ += double(sum_lanes<T, L>(some_));
    some_ = Vec<T, L>{};
    number_ = 0;
  }
  double total() const { return total_ + double(sum_lanes<T, L>(some_)); }

 private:
  Vec<T, L> some_ = {};
  double total_ = 0;
  int number_ = 0;
};

// By the inverse, where it is a number.
template <typename T, int L>
void divide(T* x, int64_t count, T divisor) {
  const T inverse = 1 / divisor;
  if (inverse < __builtin_inf())
    for (int64_t e = 0; e < count; e += L) store<T, L>(x + e, load<T, L>(x + e) * inverse);
  else
    for (int64_t e = 0; e < count; e += L) store<T, L>(x + e, load<T, L>(x + e) / divisor);
}

// In place. What is -inf gets weight 0, and so does the rest of the last vector.
template <typename T, int L>
RowSums<T> softmax(T* scores, int64_t count, T top) {
  LongSum<T, L> total;
  for (int64_t e = 0; e < count; e += L) {
    const Vec<T, L> weight = exp_of_negative<T, L>(load<T, L>(scores + e) - top);
    store<T, L>(scores + e, weight);
    total.add(weight);
  }
  const double all = total.total();
  const T sum = T(all);
  if (sum == 0) return {top, all};
  divide<T, L>(scores, count, sum);
  return {top, all, 0 / sum, sum};  // no number where the weights are none
}

template <typename T, int L>
RowSums<T> shrink(const QueryState<T>& q, T* scores, int64_t count, T top) {
  const T base = T(q.from_top ? q.threshold : __builtin_exp(q.threshold - double(top)));
  LongSum<T, L> all, total;
  for (int64_t e = 0; e < count; e += L) {
    const Vec<T, L> share = exp_of_negative<T, L>(load<T, L>(scores + e) - top), height = share - base;
    const Vec<T, L> weight = height < 0 ? Vec<T, L>{} : height;  // NaN stays
    store<T, L>(scores + e, weight);
    all.add(share);
    total.add(weight);
  }
  const T sum = T(total.total());
  if (sum == 0) return {top, all.total()};
  divide<T, L>(scores, count, sum);
  return {top, all.total(), base / sum, sum};
}

template <typename T, int L>
RowSums<T> rectified(const QueryState<T>& q, T* scores, int64_t count, T top) {
  const T from = q.from_top ? top : T(q.cut), cut = q.from_top ? T(q.cut) : T(0);
  LongSum<T, L> all, total;
  for (int64_t e = 0; e < count; e += L) {
    const Vec<T, L> score = load<T, L>(scores + e), height = score - from - cut;
    const Vec<T, L> weight = height < 0 ? Vec<T, L>{} : height;
    store<T, L>(scores + e, weight);
    all.add(exp_of_negative<T, L>(score - top));
    total.add(weight);
  }
  const T sum = T(total.total());
  if (sum == 0) return {top, all.total()};
  divide<T, L>(scores, count, sum);
  return {top, all.total(), 1 / sum, sum};
}

// Is some score no number?
template <typename T>
bool any_undefined(const T* scores, int64_t count) {
  for (int64_t e = 0; e < count; ++e)
    if (scores[e] != scores[e]) return true;
  return false;
}

template <typename T, int L>
RowSums<T> weigh_by(const Attention<T>& a, const QueryState<T>& q, T* scores, int64_t count, T top) {
  switch (a.weighting) {
    case Weighting::rectified:
      return rectified<T, L>(q, scores, count, top);
    case Weighting::shrink:
      return shrink<T, L>(q, scores, count, top);
    default:
      return softmax<T, L>(scores, count, top);
  }
}

template <typename T, int L>
RowSums<T> weigh(const Attention<T>& a, const QueryState<T>& q, T* scores, int64_t count, T top) {
  const T infinity = __builtin_inf();
  if (!(top > -infinity)) top = 0;  // nothing is kept, or what is no number
  const bool infinite = top == infinity && !any_undefined(scores, count);
  RowSums<T> sums = weigh_by<T, L>(a, q, scores, count, top);
  if (infinite) sums.top = infinity, sums.all = 1;
  return sums;
}

}  // namespace
