// Forward by the index: 8-bit scores of all keys, full precision for those alone that these can't exclude.
//
//   screen  products of a panel's codes say what its scores may be at most, and what they certainly reach: the largest
//           of that is a lower bound of the row's maximum, which rises panel by panel. A score that can but fall short
//           of what the threshold makes of the bound is dropped; the others are candidates, and those of earlier panels
//           are held against the last bound again.
//   score   candidates again, in float from the keys themselves, several at once: now these are the screened scores of
//           kernel.h, with their small error, and all goes on as there with `refine`.
#pragma once

#include "code_tiles.h"
#include "kernel.h"

namespace {

constexpr int64_t kIndexVectors = index_panel_keys / kIndexLanes;
// With more candidates than this share a block of queries is computed faster by tiles of full precision.
constexpr double kMostCandidates = 0.5;

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

// A block of queries before the panels of an index.
struct IndexedRows {
  const Attention<float>& a;
  const AttentionScratch<float>& scratch;
  const uint8_t* index;
  int64_t number;
  bool bare;  // are scores products of queries and keys alone?
  QueryState<float> query[kBlockQueries];
  CodedQuery coded[kBlockQueries];
  Reach reach[kBlockQueries];
  PanelScreen found[kBlockQueries];  // of the panel last screened
  int64_t samples, sampled[kSampledPanels], counts[kSampledPanels][kBlockQueries];

  const uint8_t* panel(int64_t p) const { return index + p * index_panel_bytes(a.size.width); }
  float* scores(int64_t row, int64_t place) const {
    return scratch.scores + row * kPanelStride + place * index_panel_keys;
  }

  // Is all that `screen` found of panel p true as it stands?
  bool is_final(Range seen_by_all, int64_t p) const {
    return bare && seen_by_all.begin <= p * index_panel_keys && (p + 1) * index_panel_keys <= seen_by_all.end;
  }

  // The scores of panel p as the row sees them; returns how many there are to look at.
  int64_t finish(int64_t row, int64_t p, int64_t place) {
    const QueryState<float>& q = query[row];
    if (is_final({q.sight.first, q.sight.end}, p)) {
      if (found[row].raises) raise_by_lanes(row, p);
      return index_panel_keys;
    }
    float* some = scores(row, place);
    const int64_t count = finish_scores<float, kIndexLanes>(a, q, p * index_panel_keys, index_panel_keys, some);
    raise(row, p, largest_of_panel(some, count), 2);
    return count;
  }

  void raise_by_lanes(int64_t row, int64_t p) {
    raise(row, p, max_lanes<float, kIndexLanes>(load<float, kIndexLanes>(found[row].reached)), 0);
  }

  // Some score of panel p is certainly `reached` less so many times its error.
  void raise(int64_t row, int64_t p, float reached, double errors) {
    if (!(double(reached) > reach[row].score)) return;
    constexpr double slack = 8 * Rounding<float>::unit;
    const double error = coded[row].error(bounds_of(panel(p), a.size.width));
    if (!(error < double(__FLT_MAX__))) return;
    const double least = double(reached) - errors * error, score = least - slack * (__builtin_fabs(least) + 2 * error);
    if (!(score > reach[row].score)) return;
    reach[row] = {score, float(score), drop_below(query[row], score)};
  }
};

// Looks at a few panels all over the keys: what they certainly reach is a first bound of each row's maximum, and the
// share of candidates among them tells whether the index is worth it.
inline double sampled_share(IndexedRows& rows, CodeTiles& tiles, Range panels) {
  const int64_t number = panels.end - panels.begin;
  int64_t found = 0, seen = 0;
  rows.samples = number < 2 * kSampledPanels ? min64(number, 1) : kSampledPanels;
  for (int64_t s = 0; s < rows.samples; ++s) {
    const int64_t p = rows.sampled[s] = panels.begin + (2 * s + 1) * number / (2 * rows.samples);
    tiles.screen(rows.panel(p), rows.reach, rows.scores(0, s), rows.found);
    for (int64_t r = 0; r < rows.number; ++r) rows.counts[s][r] = rows.finish(r, p, s);
  }
  for (int64_t s = 0; s < rows.samples; ++s)
    for (int64_t r = 0; r < rows.number; seen += rows.counts[s][r++])
      found += __builtin_popcountll(candidates_of_panel(rows.scores(r, s), rows.counts[s][r], rows.reach[r].least));
  return double(found) / double(seen > 0 ? seen : 1);
}

// first + i and scores[i] for each bit i; a few are written whether they are there or not. Returns how many.
inline int64_t append(uint64_t bits, int64_t first, const float* scores, int32_t* columns, float* most) {
  constexpr int Few = 4;  // no branch on how many there are, which can't be foreseen
  const int64_t number = __builtin_popcountll(bits);
  if (number <= Few) {
    COMPSPARSE_UNROLL for (int i = 0; i < Few; ++i, bits &= bits - 1) {
      const int lane = __builtin_ctzll(bits | uint64_t(1) << 63);
      columns[i] = int32_t(first) + lane;
      most[i] = scores[lane];
    }
    return number;
  }
  for (int64_t v = 0, at = 0; v < kIndexVectors; ++v, bits >>= kIndexLanes) {
    const uint32_t some = bits & ((1u << kIndexLanes) - 1);
    compress_columns<kIndexLanes>(int32_t(first + v * kIndexLanes), some, columns + at);
    at += compress<float, kIndexLanes>(load<float, kIndexLanes>(scores + v * kIndexLanes), some, most + at);
  }
  return number;
}

// Appends candidates of a row among the keys of panel p, with the most that their scores may be.
COMPSPARSE_INLINE void append_candidates(const IndexedRows& rows, int64_t r, int64_t p, int64_t place, uint64_t bits) {
  const AttentionScratch<float>& scratch = rows.scratch;
  const int64_t at = r * scratch.row_capacity + scratch.counts[r];
  scratch.counts[r] +=
      append(bits, p * index_panel_keys, rows.scores(r, place), scratch.columns + at, scratch.weights + at);
}

inline void collect_sampled(const IndexedRows& rows, int64_t s) {
  for (int64_t r = 0; r < rows.number; ++r) {
    const uint64_t bits = candidates_of_panel(rows.scores(r, s), rows.counts[s][r], rows.reach[r].least);
    append_candidates(rows, r, rows.sampled[s], s, bits);
  }
}

inline void collect_panel(IndexedRows& rows, CodeTiles& tiles, Range seen_by_all, int64_t p) {
  constexpr int64_t place = kSampledPanels;
  tiles.screen(rows.panel(p), rows.reach, rows.scores(0, place), rows.found);
  if (rows.is_final(seen_by_all, p)) {
    for (int64_t r = 0; r < rows.number; ++r) {
      append_candidates(rows, r, p, place, rows.found[r].candidates);
      if (rows.found[r].raises) rows.raise_by_lanes(r, p);
    }
    return;
  }
  for (int64_t r = 0; r < rows.number; ++r) {
    const int64_t count = rows.finish(r, p, place);
    append_candidates(rows, r, p, place, candidates_of_panel(rows.scores(r, place), count, rows.reach[r].least));
  }
}

// The candidates of all rows, their columns ascending.
inline void collect_panels(IndexedRows& rows, CodeTiles& tiles, Range keys, Range panels) {
  Range seen_by_all = keys;
  for (int64_t r = 0; r < rows.number; ++r) {
    const Sight& sight = rows.query[r].sight;
    seen_by_all = {max64(seen_by_all.begin, sight.first), min64(seen_by_all.end, sight.end)};
  }
  int64_t next = 0;  // of the panels that are screened already
  for (int64_t p = panels.begin; p < panels.end; ++p)
    if (next < rows.samples && rows.sampled[next] == p)
      collect_sampled(rows, next++);
    else
      collect_panel(rows, tiles, seen_by_all, p);
}

// Candidates with the most that their scores may be: earlier panels did not know what later ones reach. Returns how
// many are left.
inline int64_t drop_again(float least, int32_t* columns, float* most, int64_t count) {
  fill_last_vector<float, kIndexLanes>(most, count);
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

// The queries of a block, their codes, and the keys that any of them sees.
inline Range start_indexed(IndexedRows& rows, int64_t b, int64_t h, Range queries) {
  const Attention<float>& a = rows.a;
  const int64_t width = a.size.width;
  const Range keys = start_rows(a, b, h, queries, rows.query, rows.scratch);
  CodeBounds all;
  for (int64_t p = keys.begin / index_panel_keys; p < ceil_div(keys.end, index_panel_keys); ++p)
    all.include(bounds_of(rows.panel(p), width));
  for (int64_t r = 0; r < rows.number; ++r) {
    QueryState<float>& q = rows.query[r];
    rows.coded[r] = encode_query<kIndexLanes>(q.query, width, query_step(q.query, width), a.scale, most_alibi(q), all,
                                              rows.scratch.codes + r * padded_width(width));
    q.error = error_of(a, q, rows.coded[r].norm, all.norm);
    const double nothing = q.from_top ? -__builtin_inf() : __builtin_inf();  // more than which nothing raises
    rows.reach[r] = {nothing, float(nothing), drop_below(q, nothing)};
    rows.scratch.counts[r] = 0;
  }
  return keys;
}

template <class Target>
bool forward_indexed(const Attention<float>& a, int64_t b, int64_t h, Range queries,
                     const AttentionScratch<float>& scratch) {
  static_assert(Target::Lanes == kIndexLanes);
  if (a.rule == Rule::topk) return false;  // the kth largest score has no bound as good as the largest one
  const int64_t head = b * a.size.kv_heads + h / (a.size.heads / a.size.kv_heads);
  const bool bare = !a.bias && !a.mask && !a.padding && !a.alibi_slopes;
  IndexedRows rows = {a, scratch, a.index + head * a.index_stride, queries.end - queries.begin, bare};
  const Range keys = start_indexed(rows, b, h, queries);
  const Range panels = {keys.begin / index_panel_keys, ceil_div(keys.end, index_panel_keys)};
  CodeTiles tiles(scratch.codes, rows.coded, rows.number, padded_width(a.size.width));
  if (sampled_share(rows, tiles, panels) > kMostCandidates) return false;
  collect_panels(rows, tiles, keys, panels);
  for (int64_t r = 0; r < rows.number; ++r) {
    QueryState<float>& q = rows.query[r];
    int32_t* columns = scratch.columns + r * scratch.row_capacity;
    float* scores = scratch.weights + r * scratch.row_capacity;
    int64_t& count = scratch.counts[r];
    count = drop_again(rows.reach[r].least, columns, scores, count);
    score_candidates(a, q, scratch.queries + r * a.size.width, columns, count, scores);
    fill_last_vector<float, kIndexLanes>(scores, count);
    q.top = largest_score<float, kIndexLanes>(scores, count);
    finish_row<float, Target>(a, q, r, scratch);
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
