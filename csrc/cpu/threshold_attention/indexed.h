// Forward by the index: 8-bit scores of all keys, full precision for those alone that these can't exclude.
//
//   screen  products of codes go to a strip of scores, each as the most that the score may be. What a panel's scores
//           certainly reach goes beside it: the largest of that is a lower bound of the row's maximum. A score that can
//           but fall short of what the threshold makes of this bound is dropped; the others are candidates.
//   score   candidates again, in float from the keys themselves, several at once: now these are the screened scores of
//           kernel.h, with their small error, and all goes on as there with `refine`.
#pragma once

#include "code_tiles.h"
#include "kernel.h"

namespace {

constexpr int64_t kIndexVectors = index_panel_keys / kIndexLanes;
constexpr int64_t kIndexStrip = strip_keys<float>(), kStripPanels = kIndexStrip / index_panel_keys;
// With more candidates than this share a block of queries is computed faster by tiles of full precision.
constexpr double kMostCandidates = 0.5;
constexpr int64_t kSampledPanels = 4;

// A key whose score can't be more than less than this certainly is not in the support. Finite, so that masked keys
// (-inf) are under it.
inline float drop_below(const QueryState<float>& q, double reached) {
  const double y = (q.from_top ? reached : 0) + q.cut, x = y - 8 * Rounding<float>::unit * __builtin_fabs(y);
  return x >= -double(__FLT_MAX__) ? float(x) : -__FLT_MAX__;
}

// The largest of up to 64 scores; what is not a number has no part.
inline float largest_of_panel(const float* scores, int64_t count) {
  Vec<float, kIndexLanes> best = lowest<kIndexLanes>();
  for (int64_t i = 0; i < count && i < index_panel_keys; i += kIndexLanes)
    best = larger<float, kIndexLanes>(load<float, kIndexLanes>(scores + i), best);
  return max_lanes<float, kIndexLanes>(best);
}

// Bit i is set unless scores[i] < bound, of up to 64.
COMPSPARSE_INLINE uint64_t candidates_of_panel(const float* scores, int64_t count, float bound) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  if (count >= index_panel_keys) {
    const auto undecided = [&](int v) {
      const __m256 some = _mm256_loadu_ps(scores + 8 * v);
      return _mm256_castps_si256(_mm256_cmp_ps(some, _mm256_set1_ps(bound), _CMP_NLT_UQ));
    };
    const auto half = [&](int v) {  // packing goes by 128 bits: fours of the four vectors in turn
      const __m256i pairs = _mm256_packs_epi32(undecided(v), undecided(v + 1));
      const __m256i fours = _mm256_packs_epi16(pairs, _mm256_packs_epi32(undecided(v + 2), undecided(v + 3)));
      const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
      return uint32_t(_mm256_movemask_epi8(_mm256_permutevar8x32_epi32(fours, order)));
    };
    return half(0) | uint64_t(half(4)) << 32;
  }
#endif
  uint64_t bits = 0;
  for (int64_t v = 0; v < min64(kIndexVectors, ceil_div(count, kIndexLanes)); ++v) {
    const Vec<float, kIndexLanes> some = load<float, kIndexLanes>(scores + v * kIndexLanes);
    bits |= uint64_t(not_below<float, kIndexLanes>(some, bound)) << (v * kIndexLanes);
  }
  return bits;
}

// Panels of a strip for the queries of a block: bounds of their scores, then bias and masks.
struct IndexStrip {
  const uint8_t* index;
  int64_t width;
  const CodedQuery* coded;
  int64_t num_rows;
  bool bare;                                   // are scores products of queries and keys alone?
  float reached[kBlockQueries][kStripPanels];  // by some score of a panel, before bias and masks

  const uint8_t* panel(int64_t number) const { return index + number * index_panel_bytes(width); }

  // Panel `number` goes to place `at` of the strip.
  void screen(const AttentionScratch<float>& scratch, int64_t number, int64_t at) {
    code_rows<kIndexRows>(scratch.codes, coded, num_rows, padded_width(width), panel(number),
                          scratch.scores + at * index_panel_keys, reached[0] + at, kStripPanels);
  }

  // What the scores of panel `number`, finished and `count` of them in sight, certainly reach for a row.
  double certainly_reached(int64_t row, int64_t number, int64_t at, bool whole, const float* scores,
                           int64_t count) const {
    constexpr double slack = 8 * Rounding<float>::unit;
    const double error = coded[row].error(bounds_of(panel(number), width));
    if (!(error < double(__FLT_MAX__))) return -__builtin_inf();
    const double least = bare && whole ? double(reached[row][at]) : largest_of_panel(scores, count) - 2 * error;
    return least - slack * (__builtin_fabs(least) + 2 * error);
  }
};

// Looks at a few panels all over the keys: what they certainly reach is a first bound of each row's maximum, and the
// share of candidates among them tells whether the index is worth it.
inline double sampled_share(const Attention<float>& a, const QueryState<float>* rows, IndexStrip& strip, Range panels,
                            const AttentionScratch<float>& scratch, double* reached) {
  const int64_t number = panels.end - panels.begin;
  const int64_t samples = number < 2 * kSampledPanels ? 1 : kSampledPanels;
  int64_t found = 0, seen = 0, sampled[kSampledPanels];
  for (int64_t s = 0; s < samples; ++s) {
    sampled[s] = panels.begin + (2 * s + 1) * number / (2 * samples);
    strip.screen(scratch, sampled[s], s);
  }
  for (int64_t r = 0; r < strip.num_rows; ++r) {
    float* scores = scratch.scores + r * score_stride<float>();
    int64_t counts[kSampledPanels];
    for (int64_t s = 0; s < samples; ++s) {
      float* some = scores + s * index_panel_keys;
      const Range keys = {sampled[s] * index_panel_keys, (sampled[s] + 1) * index_panel_keys};
      counts[s] = finish_scores<float, kIndexLanes>(a, rows[r], keys.begin, index_panel_keys, some);
      const bool whole = sees_all(rows[r], keys);
      reached[r] = larger_of(reached[r], strip.certainly_reached(r, sampled[s], s, whole, some, counts[s]));
    }
    const float least = drop_below(rows[r], reached[r]);
    for (int64_t s = 0; s < samples; ++s) {
      found += __builtin_popcountll(candidates_of_panel(scores + s * index_panel_keys, counts[s], least));
      seen += counts[s];
    }
  }
  return double(found) / double(seen > 0 ? seen : 1);
}

// Appends first + i for each bit i; a few are written whether they are there or not.
inline int64_t append_columns(int32_t first, uint64_t bits, int32_t* to) {
  constexpr int Few = 4;  // no branch on how many there are, which can't be foreseen
  const int64_t number = __builtin_popcountll(bits);
  if (number <= Few) {
    COMPSPARSE_UNROLL for (int i = 0; i < Few; ++i, bits &= bits - 1) to[i] =
        first + int32_t(__builtin_ctzll(bits | uint64_t(1) << 63));
    return number;
  }
  for (int64_t v = 0, at = 0; v < kIndexVectors; ++v, bits >>= kIndexLanes) {
    const uint32_t some = bits & ((1u << kIndexLanes) - 1);
    compress_columns<kIndexLanes>(first + int32_t(v * kIndexLanes), some, to + at);
    at += __builtin_popcount(some);
  }
  return number;
}

// The keys [first, first + count) of a strip whose scores lie ready -> candidates; returns how many.
inline int64_t collect_indexed(const QueryState<float>& q, const IndexStrip& strip, int64_t row, int64_t first,
                               int64_t count, const float* scores, double& reached, int32_t* columns) {
  const int64_t panels = ceil_div(count, index_panel_keys);
  if (q.from_top)
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t key = first + p * index_panel_keys;
      const double least =
          strip.certainly_reached(row, key / index_panel_keys, p, sees_all(q, {key, key + index_panel_keys}),
                                  scores + p * index_panel_keys, count - p * index_panel_keys);
      reached = larger_of(reached, least);
    }
  const float least = drop_below(q, reached);
  int64_t found = 0;
  for (int64_t j = 0; j < count; j += index_panel_keys) {
    const uint64_t bits = candidates_of_panel(scores + j, count - j, least);
    found += append_columns(int32_t(first + j), bits, columns + found);
  }
  return found;
}

// Candidates of several strips with the most that their scores may be: the earlier strips did not know what the later
// ones reach. Returns how many are left.
inline int64_t drop_again(const QueryState<float>& q, double reached, int32_t* columns, float* most, int64_t count) {
  fill_last_vector<float, kIndexLanes>(most, count);
  const float least = drop_below(q, reached);
  return filter<float, kIndexLanes>(columns, most, count, [&](Vec<float, kIndexLanes> some, int64_t) {
    return not_below<float, kIndexLanes>(some, least);
  });
}

inline void score_candidates(const Attention<float>& a, const QueryState<float>& q, const float* scaled,
                             const int32_t* columns, int64_t count, float* scores) {
  const float* keys = a.key.head(q.b, q.h / (a.size.heads / a.size.kv_heads));
  gather_dots<float, kIndexLanes>(keys, a.key.stride, a.size.width, columns, count, scaled, scores);
  if (a.bias) {
    const float* bias = a.bias + bias_offset(a, q);
    for (int64_t e = 0; e < count; ++e) scores[e] += bias[columns[e] * a.bias_strides[3]];
  }
  if (a.alibi_slopes)
    for (int64_t e = 0; e < count; ++e)
      scores[e] -= float(q.alibi) * float(__builtin_llabs(q.sight.place - columns[e]));
}

template <class Target>
bool forward_indexed(const Attention<float>& a, int64_t b, int64_t h, Range queries,
                     const AttentionScratch<float>& scratch) {
  static_assert(Target::Lanes == kIndexLanes);
  if (a.rule == Rule::topk) return false;  // the kth largest score has no bound as good as the largest one
  const int64_t kv_head = h / (a.size.heads / a.size.kv_heads), head = b * a.size.kv_heads + kv_head;
  const int64_t num_rows = queries.end - queries.begin, width = a.size.width;
  QueryState<float> rows[kBlockQueries];
  const Range keys = start_rows(a, b, h, queries, rows, scratch);
  const Range panels = {keys.begin / index_panel_keys, ceil_div(keys.end, index_panel_keys)};
  CodedQuery coded[kBlockQueries];
  const bool bare = !a.bias && !a.mask && !a.padding && !a.alibi_slopes;
  IndexStrip strip = {a.index + head * a.index_stride, width, coded, num_rows, bare, {}};
  CodeBounds all;
  for (int64_t p = panels.begin; p < panels.end; ++p) all.include(bounds_of(strip.panel(p), width));
  double reached[kBlockQueries];
  for (int64_t r = 0; r < num_rows; ++r) {
    rows[r].error = error_of(a, rows[r], all.norm);
    coded[r] = encode_query<kIndexLanes>(rows[r].query, width, query_step(rows[r].query, width), a.scale,
                                         most_alibi(rows[r]), all, scratch.codes + r * padded_width(width));
    reached[r] = -__builtin_inf();
    scratch.counts[r] = 0;
  }
  if (panels.begin < panels.end && sampled_share(a, rows, strip, panels, scratch, reached) > kMostCandidates)
    return false;
  const bool several = panels.end - panels.begin > kStripPanels;  // strips
  int64_t found = 0;
  for (int64_t first = panels.begin * index_panel_keys, end; first < keys.end; first = end) {
    end = min64(first + kIndexStrip, keys.end);
    for (int64_t key = first; key < end; key += index_panel_keys)
      strip.screen(scratch, key / index_panel_keys, (key - first) / index_panel_keys);
    for (int64_t r = 0; r < num_rows; ++r) {
      float* scores = scratch.scores + r * score_stride<float>();
      const int64_t count = finish_scores<float, kIndexLanes>(a, rows[r], first, end - first, scores);
      int32_t* columns = scratch.columns + r * scratch.row_capacity + scratch.counts[r];
      const int64_t more = collect_indexed(rows[r], strip, r, first, count, scores, reached[r], columns);
      float* most = scratch.weights + r * scratch.row_capacity + scratch.counts[r];
      if (several)
        for (int64_t e = 0; e < more; ++e) most[e] = scores[columns[e] - first];
      scratch.counts[r] += more;
      found += more;
    }
    if (double(found) > 2 * kMostCandidates * double((end - keys.begin) * num_rows)) return false;
  }
  for (int64_t r = 0; r < num_rows; ++r) {
    int32_t* columns = scratch.columns + r * scratch.row_capacity;
    float* scores = scratch.weights + r * scratch.row_capacity;
    int64_t& count = scratch.counts[r];
    if (several) count = drop_again(rows[r], reached[r], columns, scores, count);
    score_candidates(a, rows[r], scratch.queries + r * width, columns, count, scores);
    fill_last_vector<float, kIndexLanes>(scores, count);
    rows[r].top = largest_score<float, kIndexLanes>(scores, count);
    finish_row<float, Target>(a, rows[r], r, scratch);
  }
  return true;
}

template <class Target>
constexpr AttentionKernels<float> indexed_kernels() {
  AttentionKernels<float> kernels = attention_kernels<float, Target>();
  kernels.most_by_index = kMostByIndex;
  kernels.forward_indexed = forward_indexed<Target>;
  kernels.pack_index = pack_index<kIndexLanes>;
  return kernels;
}

}  // namespace
