// How many keys are kept, before any is chosen: what a way through the block or the head is picked by.
#pragma once

#include "finish.h"
#include "tiles.h"

namespace {

using namespace compsparse;

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

}  // namespace
