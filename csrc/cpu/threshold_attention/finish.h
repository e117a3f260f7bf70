// What every way through a block of queries begins and ends with.
#pragma once

#include "philox.h"
#include "rules.h"
#include "weigh.h"

namespace {

// The queries of a block; returns the keys that any of them sees.
template <typename T>
Range start_rows(const Attention<T>& a, int64_t b, int64_t h, Range queries, QueryState<T>* rows,
                 const AttentionScratch<T>& scratch) {
  Range keys = {a.size.keys, 0};
  const double window = window_of(a, a.threshold);
  for (int64_t i = queries.begin; i < queries.end; ++i) {
    const int64_t r = i - queries.begin;
    rows[r] = start_query(a, window, b, h, i, scratch.queries + r * a.size.width);
    const Sight& sight = rows[r].sight;
    if (sight.first >= sight.end) continue;
    keys.begin = min64(keys.begin, sight.first);
    keys.end = larger_of(keys.end, sight.end);
  }
  return keys.begin < keys.end ? keys : Range{0, 0};
}

// Candidates with their screened scores -> survivors with their weights; returns how many.
template <typename T, int L>
int64_t solve(const Attention<T>& a, const QueryState<T>& q, int32_t* columns, T* scores, int64_t count, T* spare,
              int64_t row_capacity, RowSums<T>& sums) {
  if (a.rule != Rule::relative && a.rule != Rule::absolute) {
    const int64_t undefined = keep_undefined<T, L>(columns, scores, count);
    if (undefined) {
      sums = weigh<T, L>(a, q, scores, undefined, q.top);
      return undefined;
    }
  }
  switch (a.rule) {
    case Rule::entmax:
      sums.top = q.top;
      return entmax<T, L>(q, columns, scores, count, sums.all);
    case Rule::topk:
      count = keep_largest<T, L>(a, q, columns, scores, count, spare, row_capacity);
      break;
    case Rule::topp:
      count = keep_mass<T, L>(q, columns, scores, count, spare, row_capacity);
      break;
    default:
      count = refine<T, L>(a, q, columns, scores, count);
  }
  sums = weigh<T, L>(a, q, scores, count, q.from_top ? q.top : largest_of(scores, count));
  return count;
}

template <typename T>
int64_t row_number(const Attention<T>& a, const QueryState<T>& q) {
  return (q.b * a.size.heads + q.h) * a.size.queries + q.i;
}

template <typename T>
void keep_sums(const RowSums<T>& sums, int64_t r, const AttentionScratch<T>& scratch) {
  if (!scratch.with_support) return;  // a logarithm saved
  scratch.log_sums[r] = sums.log_sum();
  scratch.slopes[r] = sums.slope;
}

// Candidates of row r of the block -> survivors, weights, and the row of the output.
template <typename T, class Target>
void finish_row(const Attention<T>& a, const QueryState<T>& q, int64_t r, const AttentionScratch<T>& scratch) {
  constexpr int L = Target::Lanes;
  int32_t* columns = scratch.columns + r * scratch.row_capacity;
  T* weights = scratch.weights + r * scratch.row_capacity;
  RowSums<T> sums = {T(-__builtin_inf()), 1};
  const int64_t count =
      solve<T, L>(a, q, columns, weights, scratch.counts[r], scratch.spare, scratch.row_capacity, sums);
  scratch.counts[r] = count;
  keep_sums(sums, r, scratch);
  const T* shares = weights;
  if (a.dropout > 0) {
    drop(a.seed, a.dropout, uint64_t(row_number(a, q)), columns, count, weights, scratch.spare);
    shares = scratch.spare;
  }
  gather_sum<T, L, 4>(a.value.head(q.b, q.h / (a.size.heads / a.size.kv_heads)), a.value.stride, a.size.value_width,
                      columns, shares, count, T(1), a.out.head(q.b, q.h) + q.i * a.out.stride);
}

}  // namespace
