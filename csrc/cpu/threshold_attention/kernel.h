// Thresholded attention, exact in its support, written once for every vector width.
//
// forward, a block of queries against all keys that any of them sees, in one of four ways:
//   indexed  8-bit products tell which keys are candidates, and their scores alone are computed (indexed.h)
//   sparse   score tiles [M queries, R vectors of keys] stay in registers over the width, as in a matrix product,
//            and go to a strip of scores that fits in cache; a scan of the strip keeps the candidates
//   dense    scores of all keys are kept, and values are summed by tiles: where most keys survive
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
#include "tiles.h"

namespace {

using namespace compsparse;

// From this share of the keys on that are kept, sums over all values in order are faster than over the survivors.
constexpr double kDenseShare = 0.4;
constexpr int64_t kLeastDense = 128;  // keys

// scores[r][0 ..) of the keys [first, end) by tiles; first lies at the beginning of a panel
template <typename T, class Target>
void score_panels(const Attention<T>& a, const T* packed, int64_t num_rows, int64_t first, int64_t end,
                  const AttentionScratch<T>& scratch, T* scores, int64_t stride) {
  for (int64_t key = first; key < end; key += Target::PanelKeys)
    score_rows<T, Target::Lanes, Target::Vectors, Target::Rows>(
        scratch.queries, num_rows, a.size.width, packed + key * a.size.width, scores + key - first, stride);
}

// Candidates among the keys of a strip for one query.
template <typename T, int L>
void screen(const Attention<T>& a, QueryState<T>& q, int64_t r, int64_t first, int64_t count, T* scores,
            const AttentionScratch<T>& scratch) {
  count = finish_scores<T, L>(a, q, first, count, scores);
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
  const int64_t begin = keys.begin / Target::PanelKeys * Target::PanelKeys;
  for (int64_t r = 0; r < num_rows; ++r) scratch.counts[r] = 0;
  for (int64_t first = begin, end; first < keys.end; first = end) {
    end = min64(first + strip_keys<T>(), keys.end);
    score_panels<T, Target>(a, packed, num_rows, first, end, scratch, scratch.scores, score_stride<T>());
    for (int64_t r = 0; r < num_rows; ++r)
      screen<T, Target::Lanes>(a, rows[r], r, first, end - first, scratch.scores + r * score_stride<T>(), scratch);
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
      screen<T, L>(a, rows[r], r, first, end - first, scores, scratch);
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

// Scores of one row of the keys [begin, begin + count) -> weights in place, 0 where a key is dropped.
template <typename T, int L>
void weigh_dense_row(const Attention<T>& a, QueryState<T>& q, int64_t r, int64_t begin, int64_t count, T* scores,
                     const AttentionScratch<T>& scratch, const KeptBits<T>* bits) {
  const int64_t seen = finish_scores<T, L>(a, q, begin, count, scores), row = row_number(a, q);
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
  scratch.log_sums[r] = sums.log_sum;
  scratch.slopes[r] = sums.slope;
  if (!bits) return;
  bits->tops[row] = top > -__builtin_inf() ? top : 0;
  bits->inverses[row] = sums.sum == 0 ? 0 : 1 / sums.sum;
}

template <typename T, class Target>
void dense_block(const Attention<T>& a, const T* packed, QueryState<T>* rows, int64_t num_rows, Range keys,
                 const AttentionScratch<T>& scratch, const KeptBits<T>* bits = nullptr) {
  constexpr int L = Target::Lanes;
  const int64_t begin = keys.begin / Target::PanelKeys * Target::PanelKeys, count = keys.end - begin;
  const int64_t stride = scratch.row_capacity;
  score_panels<T, Target>(a, packed, num_rows, begin, keys.end, scratch, scratch.weights, stride);
  for (int64_t r = 0; r < num_rows; ++r)
    weigh_dense_row<T, L>(a, rows[r], r, begin, count, scratch.weights + r * stride, scratch, bits);
  const QueryState<T>& q = rows[0];
  const int64_t kv_head = q.h / (a.size.heads / a.size.kv_heads);
  T* out = a.out.head(q.b, q.h) + q.i * a.out.stride;
  for (int64_t r = 0; r < num_rows; ++r)
    for (int64_t d = 0; d < a.size.value_width; ++d) out[r * a.out.stride + d] = 0;
  const T* values = a.value.head(q.b, kv_head) + begin * a.value.stride;
  for (int64_t key = 0; key < count; key += kSumChain)
    add_products<T, L, Target::Vectors, Target::Rows>(scratch.weights + key, stride, num_rows,
                                                      min64(kSumChain, count - key), values + key * a.value.stride,
                                                      a.value.stride, a.size.value_width, out, a.out.stride);
  if (!scratch.with_support) return;
  for (int64_t r = 0; r < num_rows; ++r) {
    T* weights = scratch.weights + r * stride;
    const int32_t* columns = scratch.columns + r * scratch.row_capacity;
    for (int64_t e = 0; e < scratch.counts[r]; ++e) weights[e] = weights[columns[e] - begin];
  }
}

// The share of keys that may be kept among a few panels all over those in sight.
template <typename T, class Target>
double sampled_share(const Attention<T>& a, const T* packed, const QueryState<T>* rows, int64_t num_rows, Range keys,
                     const AttentionScratch<T>& scratch) {
  constexpr int64_t P = Target::PanelKeys, Samples = 4;
  constexpr int L = Target::Lanes;
  const int64_t first = keys.begin / P, number = ceil_div(keys.end, P) - first;
  int64_t found = 0, seen = 0;
  for (int64_t s = 0; s < Samples; ++s) {
    const int64_t key = (first + (2 * s + 1) * number / (2 * Samples)) * P;
    score_panels<T, Target>(a, packed, num_rows, key, key + 1, scratch, scratch.scores + s * P, score_stride<T>());
  }
  for (int64_t r = 0; r < num_rows; ++r) {
    T top = -__builtin_inf();
    int64_t counts[Samples];
    T* scores = scratch.scores + r * score_stride<T>();
    for (int64_t s = 0; s < Samples; ++s) {
      const int64_t key = (first + (2 * s + 1) * number / (2 * Samples)) * P;
      counts[s] = finish_scores<T, L>(a, rows[r], key, min64(P, a.size.keys - key), scores + s * P);
      top = larger_of(top, largest_score<T, L>(scores + s * P, counts[s]));
    }
    const T least = T((rows[r].from_top ? double(top) : 0) + rows[r].cut);
    for (int64_t s = 0; s < Samples; ++s) {
      for (int64_t j = 0; j < counts[s]; j += L)
        found += count_bits(not_below<T, L>(load<T, L>(scores + s * P + j), least));
      seen += counts[s];
    }
  }
  return seen > 0 ? double(found) / double(seen) : 0;
}

template <typename T, class Target>
bool mostly_kept(const Attention<T>& a, const T* packed, const QueryState<T>* rows, int64_t num_rows, Range keys,
                 const AttentionScratch<T>& scratch) {
  if (a.rule != Rule::relative && a.rule != Rule::absolute) return false;
  if (a.dropout > 0 || num_rows < Target::Rows || keys.end - keys.begin < kLeastDense) return false;
  const int64_t kv_head = rows[0].h / (a.size.heads / a.size.kv_heads);
  if (!a.finite_values || !a.finite_values[rows[0].b * a.size.kv_heads + kv_head]) return false;  // 0 times inf
  return sampled_share<T, Target>(a, packed, rows, num_rows, keys, scratch) > kDenseShare;
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
  const T* packed = a.packed_keys + head * panels * P * a.size.width;
  if (mostly_kept<T, Target>(a, packed, rows, num_rows, keys, scratch))
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
  dense_block<T, Target>(a, a.packed_keys + head * panels * P * a.size.width, rows, queries.end - queries.begin, keys,
                         scratch, &bits);
}

// The share of keys that may be kept by a few queries of a head, among a few keys all over those in sight.
template <typename T, class Target>
double head_share(const Attention<T>& a, int64_t b, int64_t h, const AttentionScratch<T>& scratch) {
  constexpr int64_t Queries = 8, Places = 4, Keys = 64;  // at each place
  constexpr int L = Target::Lanes;
  const T* keys = a.key.head(b, h / (a.size.heads / a.size.kv_heads));
  int64_t found = 0, seen = 0;
  for (int64_t s = 0; s < Queries; ++s) {
    const int64_t i = (2 * s + 1) * a.size.queries / (2 * Queries);
    const QueryState<T> q = start_query(a, window_of(a, a.threshold), b, h, i, scratch.queries);
    const int64_t spare = max64(q.sight.end - q.sight.first - Keys, 0);
    T* scores = scratch.scores;
    T top = -__builtin_inf();
    int64_t counts[Places];
    for (int64_t p = 0; p < Places; ++p) {
      const int64_t first = q.sight.first + p * spare / (Places - 1), count = min64(Keys, q.sight.end - first);
      direct_scores<T, L>(scratch.queries, a.size.width, keys + first * a.key.stride, a.key.stride, count,
                          scores + p * Keys);
      counts[p] = finish_scores<T, L>(a, q, first, count, scores + p * Keys);
      top = larger_of(top, largest_score<T, L>(scores + p * Keys, counts[p]));
    }
    const T lowest = sizeof(T) == 4 ? T(-__FLT_MAX__) : T(-__DBL_MAX__);  // masked keys are under it
    const T least = larger_of(T((q.from_top ? double(top) : 0) + q.cut), lowest);
    for (int64_t p = 0; p < Places; seen += counts[p++])
      for (int64_t j = 0; j < counts[p]; j += L)
        found += count_bits(not_below<T, L>(load<T, L>(scores + p * Keys + j), least));
  }
  return seen > 0 ? double(found) / double(seen) : 0;
}

// The share of keys kept by a few queries of a head, of all those in sight: without the largest scores in view the
// other look takes too many for kept.
template <typename T, class Target>
double true_share(const Attention<T>& a, int64_t b, int64_t h, const AttentionScratch<T>& scratch) {
  constexpr int64_t Queries = 8;
  constexpr int L = Target::Lanes;
  const T* keys = a.key.head(b, h / (a.size.heads / a.size.kv_heads));
  const T lowest = sizeof(T) == 4 ? T(-__FLT_MAX__) : T(-__DBL_MAX__);  // masked keys are under it
  T* scores = scratch.weights;
  int64_t found = 0, seen = 0;
  for (int64_t s = 0; s < Queries; ++s) {
    const int64_t i = (2 * s + 1) * a.size.queries / (2 * Queries);
    const QueryState<T> q = start_query(a, window_of(a, a.threshold), b, h, i, scratch.queries);
    const int64_t first = q.sight.first, number = q.sight.end - first;
    direct_scores<T, L>(scratch.queries, a.size.width, keys + first * a.key.stride, a.key.stride, number, scores);
    const int64_t count = finish_scores<T, L>(a, q, first, number, scores);
    const T top = largest_score<T, L>(scores, count);
    const T least = larger_of(T((q.from_top ? double(top) : 0) + q.cut), lowest);
    for (int64_t j = 0; j < count; j += L) found += count_bits(not_below<T, L>(load<T, L>(scores + j), least));
    seen += count;
  }
  return seen > 0 ? double(found) / double(seen) : 0;
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
