// Thresholded attention, exact in its support, written once for every vector width.
//
// forward, a block of queries against all keys that any of them sees, in one of four ways:
//   indexed  8-bit products tell which keys are candidates, and their scores alone are computed (indexed.h)
//   sparse   score tiles [M queries, R vectors of keys] stay in registers over the width, as in a matrix product,
//            and go to a strip of scores that fits in cache; a scan of the strip keeps the candidates
//   dense    scores of all keys are kept, and values are summed by tiles: where many keys survive. Whether they do is
//            seen in the scores themselves where one strip holds them all, else in a sample of them
//   direct   dot products with the keys as they lie: for queries too few to repack keys
// then
//   refine   the few candidates within the screen's rounding bound of the row's threshold (or of its maximum) are
//            decided by scores computed in double; all others are certain already (refine.h; rules.h for top-k,
//            top-p, entmax)
//   attend   weights over the survivors (weigh.h), and a sum over their rows of V
//
// A screened score is added up in an order that does not depend on the key, so equal keys have equal scores; the way is
// chosen by the block's own numbers. So results do not depend on the split over threads.
#pragma once

#include "backward.h"
#include "finish.h"
#include "recompute.h"
#include "shares.h"

namespace {

using namespace compsparse;

// From this share of the keys on that are kept, sums over all values in order are faster than over the survivors. A
// sample of the keys, without the largest scores in view, takes too many for kept.
constexpr double kDenseShare = 0.2, kDenseSampledShare = 0.4;

// Candidates for one query among the keys of a strip, whose first `count` scores are final.
template <typename T, int L>
void screen(QueryState<T>& q, int64_t r, int64_t first, int64_t count, const T* scores,
            const AttentionScratch<T>& scratch) {
  T bound = q.error.below(q.cut);
  if (q.from_top) {
    q.top = larger_of(q.top, largest_score<T, L>(scores, count));
    bound = q.error.below(q.error.at_least(q.top) + q.cut);
  }
  const int64_t at = r * scratch.row_capacity + scratch.counts[r];
  scratch.counts[r] += collect<T, L>(scores, first, count, bound, scratch.columns + at, scratch.weights + at);
}

template <typename T, class Target>
void sparse_block(const Attention<T>& a, const T* packed, QueryState<T>* rows, int64_t num_rows, Range keys,
                  const AttentionScratch<T>& scratch) {
  constexpr int L = Target::Lanes;
  const int64_t begin = keys.begin / Target::PanelKeys * Target::PanelKeys;
  for (int64_t r = 0; r < num_rows; ++r) scratch.counts[r] = 0;
  for (int64_t first = begin, end; first < keys.end; first = end) {
    end = min64(first + strip_keys<T>(), keys.end);
    score_panels<T, Target>(a, packed, num_rows, first, end, scratch, scratch.scores, score_stride<T>());
    for (int64_t r = 0; r < num_rows; ++r) {
      T* scores = scratch.scores + r * score_stride<T>();
      screen<T, L>(rows[r], r, first, finish_scores<T, L>(a, rows[r], first, end - first, scores), scores, scratch);
    }
  }
  for (int64_t r = 0; r < num_rows; ++r) finish_row<T, Target>(a, rows[r], r, scratch);
}

// Few queries: norms of the keys are computed beside their scores, strip by strip, while these are in cache.
template <typename T, class Target>
void direct_block(const Attention<T>& a, const T* keys_of_head, QueryState<T>* rows, int64_t num_rows, Range keys,
                  const AttentionScratch<T>& scratch) {
  constexpr int L = Target::Lanes;
  double largest_key = 0;
  for (int64_t r = 0; r < num_rows; ++r) scratch.counts[r] = 0;
  for (int64_t first = keys.begin, end; first < keys.end; first = end) {
    end = min64(first + strip_keys<T>(), keys.end);
    const T* some = keys_of_head + first * a.key.stride;
    for (int64_t j = 0; j < end - first; ++j)
      largest_key = larger_or_nan(largest_key, norm_above(some + j * a.key.stride, a.size.width));
    for (int64_t r = 0; r < num_rows; ++r) {
      rows[r].error = error_of(a, rows[r], largest_key);
      T* scores = scratch.scores + r * score_stride<T>();
      direct_scores<T, L>(scratch.queries + r * a.size.width, a.size.width, some, a.key.stride, end - first, scores);
      screen<T, L>(rows[r], r, first, finish_scores<T, L>(a, rows[r], first, end - first, scores), scores, scratch);
    }
  }
  for (int64_t r = 0; r < num_rows; ++r) finish_row<T, Target>(a, rows[r], r, scratch);
}

// Where the keys that a row keeps are written: their columns, or a bit for each; or nowhere.
struct KeptRow {
  int32_t* columns;
  uint64_t* words;

  template <int L>
  COMPSPARSE_INLINE void keep(int64_t first, uint32_t bits, int64_t kept) const {
    if (columns) compress_columns<L>(int32_t(first), bits, columns + kept);
    if (words) words[first / 64] |= uint64_t(bits) << (first % 64);  // `first` is a multiple of L
  }
};

// Scores [0, count) of one row -> the same, -inf where a key is dropped. Returns how many are kept. decide(vector,
// where it lies) -> bits.
template <typename T, int L, class Decide>
int64_t keep_in_place(T* scores, int64_t count, int64_t first, const KeptRow& to, const Decide& decide) {
  int64_t kept = 0;
  for (int64_t j = 0; j < count; j += L) {
    const Vec<T, L> some = load<T, L>(scores + j);
    const uint32_t bits = decide(some, j);
    store<T, L>(scores + j, keep_lanes<T, L>(some, bits, T(-__builtin_inf())));
    to.keep<L>(first + j, bits, kept);
    kept += count_bits(bits);
  }
  return kept;
}

// Final scores of one row of the keys [begin, begin + seen) -> weights in place, 0 where a key is dropped.
template <typename T, int L>
void weigh_dense_row(const Attention<T>& a, QueryState<T>& q, int64_t r, int64_t begin, int64_t seen, int64_t count,
                     T* scores, const AttentionScratch<T>& scratch, const KeptBits<T>* bits) {
  const int64_t row = row_number(a, q);
  const KeptRow to = {scratch.with_support ? scratch.columns + r * scratch.row_capacity : nullptr,
                      bits ? bits->words + row * bits->row_words : nullptr};
  q.top = largest_score<T, L>(scores, seen);
  const CutBounds<T> known = bounds_of_cut(q);
  uint32_t open = 0;  // where the bounds don't decide: hardly ever
  int64_t kept = keep_in_place<T, L>(scores, seen, begin, to, [&](Vec<T, L> some, int64_t) {
    const uint32_t some_bits = not_below<T, L>(some, known.least);
    open |= (some_bits & ~not_below<T, L>(some, known.enough)) | unordered<T, L>(some);
    return some_bits;
  });
  if (open) {
    const auto column = [&](int64_t at) { return begin + at; };
    const RowDecision<T, L, decltype(column)> keeps(a, q, scores, seen, column);
    if (bits) bits->clear(row);
    kept = keep_in_place<T, L>(scores, seen, begin, to, keeps);
  }
  const T top = q.from_top ? q.top : largest_of(scores, seen);
  const RowSums<T> sums = weigh<T, L>(a, q, scores, seen, top);
  for (int64_t j = round_up(seen, L); j < count; ++j) scores[j] = 0;
  scratch.counts[r] = kept;
  keep_sums(sums, r, scratch);
  if (!bits) return;
  bits->tops[row] = top > -__builtin_inf() ? top : 0;
  bits->inverses[row] = sums.sum == 0 ? 0 : 1 / sums.sum;
}

// Final scores of all rows, `stride` apart, of the keys [begin, begin + count), of which row r looks at seen[r] ->
// weights, and their sums over all values in order.
template <typename T, class Target>
void finish_dense(const Attention<T>& a, QueryState<T>* rows, int64_t num_rows, int64_t begin, const int64_t* seen,
                  int64_t count, T* scores, int64_t stride, const AttentionScratch<T>& scratch,
                  const KeptBits<T>* bits) {
  constexpr int L = Target::Lanes;
  for (int64_t r = 0; r < num_rows; ++r)
    weigh_dense_row<T, L>(a, rows[r], r, begin, seen[r], count, scores + r * stride, scratch, bits);
  const QueryState<T>& q = rows[0];
  const int64_t kv_head = q.h / (a.size.heads / a.size.kv_heads);
  T* out = a.out.head(q.b, q.h) + q.i * a.out.stride;
  for (int64_t r = 0; r < num_rows; ++r)
    for (int64_t d = 0; d < a.size.value_width; ++d) out[r * a.out.stride + d] = 0;
  const T* values = a.value.head(q.b, kv_head) + begin * a.value.stride;
  for (int64_t key = 0; key < count; key += kSumChain)
    add_products<T, L, Target::Vectors, Target::Rows>(scores + key, stride, num_rows, min64(kSumChain, count - key),
                                                      values + key * a.value.stride, a.value.stride, a.size.value_width,
                                                      out, a.out.stride);
  if (!scratch.with_support) return;
  for (int64_t r = 0; r < num_rows; ++r) {
    const T* from = scores + r * stride;
    T* to = scratch.weights + r * scratch.row_capacity;  // perhaps the same: a key is never before its place
    const int32_t* columns = scratch.columns + r * scratch.row_capacity;
    for (int64_t e = 0; e < scratch.counts[r]; ++e) to[e] = from[columns[e] - begin];
  }
}

template <typename T, class Target>
void dense_block(const Attention<T>& a, const T* packed, QueryState<T>* rows, int64_t num_rows, Range keys,
                 const AttentionScratch<T>& scratch, const KeptBits<T>* bits = nullptr) {
  const int64_t begin = keys.begin / Target::PanelKeys * Target::PanelKeys, count = keys.end - begin;
  const int64_t stride = scratch.row_capacity;
  score_panels<T, Target>(a, packed, num_rows, begin, keys.end, scratch, scratch.weights, stride);
  int64_t seen[kBlockQueries];
  for (int64_t r = 0; r < num_rows; ++r)
    seen[r] = finish_scores<T, Target::Lanes>(a, rows[r], begin, count, scratch.weights + r * stride);
  finish_dense<T, Target>(a, rows, num_rows, begin, seen, count, scratch.weights, stride, scratch, bits);
}

// May the block go by sums over all values?
template <typename T, class Target>
bool may_be_dense(const Attention<T>& a, const QueryState<T>* rows, int64_t num_rows) {
  if (a.rule != Rule::relative && a.rule != Rule::absolute) return false;
  if (a.dropout > 0 || num_rows < Target::Rows) return false;
  const int64_t kv_head = rows[0].h / (a.size.heads / a.size.kv_heads);
  return a.finite_values && a.finite_values[rows[0].b * a.size.kv_heads + kv_head];  // else 0 times inf
}

// The keys that all fit in a strip: every other row tells how many are kept, once the scores of all are there.
template <typename T, class Target>
void strip_block(const Attention<T>& a, const T* packed, QueryState<T>* rows, int64_t num_rows, Range keys,
                 const AttentionScratch<T>& scratch) {
  constexpr int L = Target::Lanes;
  const int64_t begin = keys.begin / Target::PanelKeys * Target::PanelKeys, count = keys.end - begin;
  const int64_t stride = round_up(count, Target::PanelKeys) + 64 / sizeof(T);  // rows in different cache sets
  score_panels<T, Target>(a, packed, num_rows, begin, keys.end, scratch, scratch.scores, stride);
  int64_t seen[kBlockQueries], looked = 0, kept = 0;
  for (int64_t r = 0; r < num_rows; ++r) {
    T* scores = scratch.scores + r * stride;
    seen[r] = finish_scores<T, L>(a, rows[r], begin, count, scores);
    if (r % 2 == 0) {
      const T least = T((rows[r].from_top ? double(largest_score<T, L>(scores, seen[r])) : 0) + rows[r].cut);
      looked += seen[r];
      for (int64_t j = 0; j < seen[r]; j += L) kept += count_bits(not_below<T, L>(load<T, L>(scores + j), least));
    }
  }
  if (double(kept) > kDenseShare * double(looked) && may_be_dense<T, Target>(a, rows, num_rows)) {
    finish_dense<T, Target>(a, rows, num_rows, begin, seen, count, scratch.scores, stride, scratch, nullptr);
    return;
  }
  for (int64_t r = 0; r < num_rows; ++r) {
    scratch.counts[r] = 0;
    screen<T, L>(rows[r], r, begin, seen[r], scratch.scores + r * stride, scratch);
  }
  for (int64_t r = 0; r < num_rows; ++r) finish_row<T, Target>(a, rows[r], r, scratch);
}

template <typename T>
double largest_norm(const Attention<T>& a, int64_t head, int64_t panels, Range which) {
  double largest = 0;
  for (int64_t p = which.begin; p < which.end; ++p) largest = larger_or_nan(largest, a.norms[head * panels + p]);
  return largest;
}

template <typename T, class Target>
void forward(const Attention<T>& a, int64_t b, int64_t h, Range queries, const AttentionScratch<T>& scratch) {
  constexpr int64_t P = Target::PanelKeys;
  const int64_t kv_head = h / (a.size.heads / a.size.kv_heads), head = b * a.size.kv_heads + kv_head;
  const int64_t panels = ceil_div(a.size.keys, P), num_rows = queries.end - queries.begin;
  QueryState<T> rows[kBlockQueries];
  const Range keys = start_rows(a, b, h, queries, rows, scratch);
  if (!a.packed_keys) {
    direct_block<T, Target>(a, a.key.head(b, kv_head), rows, num_rows, keys, scratch);
    return;
  }
  const double largest_key = largest_norm(a, head, panels, {keys.begin / P, ceil_div(keys.end, P)});
  for (int64_t r = 0; r < num_rows; ++r) rows[r].error = error_of(a, rows[r], largest_key);
  const T* packed = a.packed_keys + head * a.packed_stride;
  if (keys.end - keys.begin / P * P <= strip_keys<T>())
    strip_block<T, Target>(a, packed, rows, num_rows, keys, scratch);
  else if (may_be_dense<T, Target>(a, rows, num_rows) &&
           sampled_share<T, Target>(a, packed, rows, num_rows, keys, scratch) > kDenseSampledShare)
    dense_block<T, Target>(a, packed, rows, num_rows, keys, scratch);
  else
    sparse_block<T, Target>(a, packed, rows, num_rows, keys, scratch);
}

// All queries of the block by tiles, and a bit for each key they keep in place of the support.
template <typename T, class Target>
void forward_bits(const Attention<T>& a, const KeptBits<T>& bits, int64_t b, int64_t h, Range queries,
                  const AttentionScratch<T>& scratch) {
  constexpr int64_t P = Target::PanelKeys;
  const int64_t head = b * a.size.kv_heads + h / (a.size.heads / a.size.kv_heads), panels = ceil_div(a.size.keys, P);
  QueryState<T> rows[kBlockQueries];
  const Range keys = start_rows(a, b, h, queries, rows, scratch);
  const double largest_key = largest_norm(a, head, panels, {keys.begin / P, ceil_div(keys.end, P)});
  for (int64_t r = 0; r < queries.end - queries.begin; ++r) {
    rows[r].error = error_of(a, rows[r], largest_key);
    bits.clear(row_number(a, rows[r]));
  }
  dense_block<T, Target>(a, a.packed_keys + head * a.packed_stride, rows, queries.end - queries.begin, keys, scratch,
                         &bits);
}

template <typename T, class Target>
constexpr AttentionKernels<T> attention_kernels() {
  return {Target::PanelKeys,
          kBlockQueries,
          score_stride<T>(),
          kCandidateSlack,
          pack_keys<T, Target>,
          forward<T, Target>,
          0,
          head_share<T, Target>,
          true_share<T, Target>,
          nullptr,
          nullptr,
          attention_backward_rows<T, Target>,
          attention_backward_keys<T, Target>,
          forward_bits<T, Target>,
          backward_bits<T, Target>};
}

}  // namespace
