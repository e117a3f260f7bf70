// Thresholded attention, exact in its support, written once for every vector width.
//
// forward, a block of queries against all keys:
//   screen   score tiles [M queries, R vectors of keys] stay in registers over the width, as in a matrix product, and
//   go to
//            a strip of scores that fits in cache; a scan of the strip keeps the candidates.
//   refine   the few candidates within the screen's rounding bound of the row's threshold (or of its maximum) are
//   decided
//            by scores computed in double; all others are certain already.
//   attend   softmax over the survivors, and a sum over their rows of V.
//
// A screened score is added up in the order of the width, the same in whatever tile it is computed, so equal keys have
// equal scores; the rest depends on a row alone. So results do not depend on the split over threads.
#pragma once

#include "backward.h"
#include "bounds.h"
#include "table.h"
#include "vectors.h"

namespace {

using namespace compsparse;

constexpr int64_t kBlockQueries = 24;  // a panel of keys is read from cache once for so many queries
constexpr int64_t kStripBytes =
    8192;                       // of scores of one query; with all queries of a block, a fraction of the L2 cache
constexpr int64_t kChain = 64;  // products added up one after another, then the chains: less rounding
constexpr int64_t kCandidateSlack = 16;  // `compress` writes whole vectors

// Lanes of T in the widest vector; registers for accumulators; vectors of keys side by side in a tile.
template <int Lanes_, int Accumulators, int Vectors_>
struct Target {
  static constexpr int Lanes = Lanes_;
  static constexpr int Vectors = Vectors_;
  static constexpr int Rows = Accumulators / Vectors;
  static constexpr int PanelKeys = Lanes * Vectors;
};

template <typename T>
constexpr int64_t strip_keys() {
  return kStripBytes / sizeof(T);
}

// Strips of different queries start in different cache sets.
template <typename T>
constexpr int64_t score_stride() {
  return strip_keys<T>() + 64 / sizeof(T);
}

// packed[panel][d][lane] = key[panel * PanelKeys + lane][d], zero past the last key
template <typename T, class Target>
void pack_keys(const Attention<T>& a, int64_t b, int64_t kv_head, Range panels, T* packed, double* norms) {
  constexpr int64_t P = Target::PanelKeys;
  const T* keys = a.key.head(b, kv_head);
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    T* to = packed + panel * a.size.width * P;
    const int64_t valid = min64(P, a.size.keys - panel * P);
    double largest = 0;
    for (int64_t lane = 0; lane < P; ++lane) {
      const T* row = keys + (panel * P + lane) * a.key.stride;
      for (int64_t d = 0; d < a.size.width; ++d) to[d * P + lane] = lane < valid ? row[d] : T(0);
      if (lane < valid) largest = larger_or_nan(largest, norm_above(row, a.size.width));
    }
    norms[panel] = largest;
  }
}

// scores[m][0 .. R L) = queries[m] . packed, M queries against one panel
template <typename T, int L, int R, int M>
void score_tile(const T* queries, int64_t width, const T* packed, T* scores, int64_t stride) {
  constexpr int Groups = (M + 2) / 3;  // x86 addresses base, base + s, base + 2 s
  const T* group[Groups];
  COMPSPARSE_UNROLL for (int g = 0; g < Groups; ++g) group[g] = queries + 3 * g * width;
  for (int64_t begin = 0; begin < width; begin += kChain) {
    const int64_t end = min64(begin + kChain, width);
    Vec<T, L> acc[M][R] = {};
    for (int64_t d = begin; d < end; ++d, packed += R * L) {
      Vec<T, L> key[R];
      COMPSPARSE_UNROLL for (int r = 0; r < R; ++r) key[r] = load<T, L>(packed + r * L);
      COMPSPARSE_UNROLL for (int m = 0; m < M; ++m) {
        const T query = group[m / 3][(m % 3) * width + d];
        COMPSPARSE_UNROLL for (int r = 0; r < R; ++r) acc[m][r] += key[r] * query;
      }
    }
    COMPSPARSE_UNROLL for (int m = 0; m < M; ++m) COMPSPARSE_UNROLL for (int r = 0; r < R; ++r) {
      T* to = scores + m * stride + r * L;
      store<T, L>(to, begin == 0 ? acc[m][r] : load<T, L>(to) + acc[m][r]);
    }
  }
}

template <typename T, int L, int R, int M>
void score_rows(const T* queries, int64_t count, int64_t width, const T* packed, T* scores, int64_t stride) {
  for (; count >= M; count -= M, queries += M * width, scores += M * stride)
    score_tile<T, L, R, M>(queries, width, packed, scores, stride);
  if constexpr (M > 1) {
    if (count > 0) score_rows<T, L, R, M / 2>(queries, count, width, packed, scores, stride);
  }
}

// One query of a block: where it is, what it has found so far.
template <typename T>
struct QueryState {
  int64_t b, h, i;
  int64_t visible;  // keys 0 .. visible may be attended as far as causality goes
  const T* query;   // as given, not scaled
  ScreenError<T> error;
  T top;  // largest screened score so far
};

// Bias, masks and the end of the row, on the scores of keys [first, first + count); what is masked becomes -inf.
template <typename T, int L>
void apply_bias(const Attention<T>& a, const QueryState<T>& q, int64_t first, int64_t count, T* scores) {
  const T hidden = -__builtin_inf();
  const int64_t step = a.bias_strides[3];
  const int64_t at = q.b * a.bias_strides[0] + q.h * a.bias_strides[1] + q.i * a.bias_strides[2] + first * step;
  if (a.bias && step == 1)
    for (int64_t j = 0; j < count; ++j) scores[j] += a.bias[at + j];
  else if (a.bias)
    for (int64_t j = 0; j < count; ++j) scores[j] += a.bias[at + j * step];
  if (a.mask)
    for (int64_t j = 0; j < count; ++j) scores[j] = a.mask[at + j * step] ? scores[j] : hidden;
  if (a.padding) {
    const uint8_t* padding = a.padding + q.b * a.size.keys + first;
    for (int64_t j = 0; j < count; ++j) scores[j] = padding[j] ? hidden : scores[j];
  }
  for (int64_t j = count; j < round_up(count, L); ++j) scores[j] = hidden;
}

template <typename T, int L>
T largest_score(const T* scores, int64_t count) {
  const T lowest = -__builtin_inf();
  Vec<T, L> a = Vec<T, L>{} + lowest, b = a;
  int64_t j = 0;
  for (; j + 2 * L <= count; j += 2 * L) {
    a = larger<T, L>(load<T, L>(scores + j), a);
    b = larger<T, L>(load<T, L>(scores + j + L), b);
  }
  for (; j < count; j += L) a = larger<T, L>(load<T, L>(scores + j), a);
  return max_lanes<T, L>(larger<T, L>(a, b));
}

// Appends the keys whose score may reach the threshold of the row.
template <typename T, int L>
int64_t collect(const T* scores, int64_t first, int64_t count, T bound, int32_t* columns, T* candidates) {
  constexpr int Group = 4;  // one branch for so many vectors: whether a single one has a candidate can't be foreseen
  int64_t found = 0;
  for (int64_t j = 0; j < count; j += Group * L) {
    const int64_t vectors = min64(Group, ceil_div(count - j, L));
    uint32_t bits[Group] = {}, any = 0;
    for (int64_t g = 0; g < vectors; ++g) any |= bits[g] = not_below<T, L>(load<T, L>(scores + j + g * L), bound);
    if (any == 0) continue;
    for (int64_t g = 0; g < vectors; ++g) {
      compress_columns<L>(int32_t(first + j + g * L), bits[g], columns + found);
      found += compress<T, L>(load<T, L>(scores + j + g * L), bits[g], candidates + found);
    }
  }
  return found;
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
  const int64_t at = q.b * a.bias_strides[0] + q.h * a.bias_strides[1] + q.i * a.bias_strides[2];
  return a.scale * sum + (a.bias ? a.bias[at + key * a.bias_strides[3]] : 0);
}

// In double the screen's own score, the same for equal keys, is the law.
template <typename T>
double decisive_score(const Attention<T>& a, const QueryState<T>& q, int64_t key, T screened) {
  if constexpr (sizeof(T) == sizeof(double))
    return screened;
  else
    return exact_score(a, q, key);
}

template <typename T>
double exact_maximum(const Attention<T>& a, const QueryState<T>& q, const int32_t* columns, const T* scores,
                     int64_t count) {
  const T contender = q.error.below(q.error.at_least(q.top));
  double maximum = -__builtin_inf();
  for (int64_t e = 0; e < count; ++e) {
    if (scores[e] < contender) continue;
    const double score = decisive_score(a, q, columns[e], scores[e]);
    if (score > maximum) maximum = score;
  }
  return maximum;
}

// Keys whose score is not a number; a row that has any keeps those alone, so its output is not a number either.
template <typename T>
int64_t keep_undefined(int32_t* columns, T* scores, int64_t count) {
  int64_t kept = 0;
  for (int64_t e = 0; e < count; ++e)
    if (scores[e] != scores[e]) columns[kept] = columns[e], scores[kept++] = scores[e];
  return kept;
}

// From this screened score on a key certainly belongs to the support, wherever in its bounds the row's maximum lies.
template <typename T>
T certain_score(const Attention<T>& a, const QueryState<T>& q) {
  return q.error.above(a.absolute ? a.cut : q.error.at_most(q.top) + a.cut);
}

// Candidates -> survivors, in place and in order.
template <typename T>
int64_t refine(const Attention<T>& a, const QueryState<T>& q, int32_t* columns, T* scores, int64_t count) {
  const T enough = certain_score(a, q);
  bool all = true;
  for (int64_t e = 0; e < count; ++e) all &= scores[e] >= enough;
  if (all) return count;
  if (const int64_t undefined = keep_undefined(columns, scores, count)) return undefined;
  const double cut = a.absolute ? a.cut : exact_maximum(a, q, columns, scores, count) + a.cut;
  const T low = q.error.below(cut), high = q.error.above(cut);
  int64_t kept = 0;
  for (int64_t e = 0; e < count; ++e) {
    const T score = scores[e];
    const bool certain = score >= high;
    if (!certain && (score < low || decisive_score(a, q, columns[e], score) < cut)) continue;
    columns[kept] = columns[e];
    scores[kept++] = score;
  }
  return kept;
}

// Scores -> softmax weights, in place. The buffer has room for a whole last vector.
template <typename T, int L>
void softmax(T* scores, int64_t count, T top) {
  Vec<T, L> total = {};
  for (int64_t e = 0; e < count; e += L) {
    const int64_t valid = min64(L, count - e);
    Vec<T, L> weight = exp_below_overflow<T, L>(load<T, L>(scores + e) - top);
    for (int64_t lane = valid; lane < L; ++lane) weight[lane] = 0;
    store<T, L>(scores + e, weight);
    total += weight;
  }
  const T sum = sum_lanes<T, L>(total);
  for (int64_t e = 0; e < count; ++e) scores[e] /= sum;
}

template <typename T>
QueryState<T> start_query(const Attention<T>& a, int64_t b, int64_t h, int64_t i, double largest_key, T* scaled) {
  const T* query = a.query.head(b, h) + i * a.query.stride;
  for (int64_t d = 0; d < a.size.width; ++d) scaled[d] = T(a.scale * query[d]);
  const int64_t visible = a.causal ? min64(i + 1, a.size.keys) : a.size.keys;
  const double scaled_norm = __builtin_fabs(a.scale) * norm_above(query, a.size.width);
  return {b, h, i, visible, query, ScreenError<T>(scaled_norm, largest_key, a.size.width), T(-__builtin_inf())};
}

// Candidates among the keys [first, end) for the queries of a block.
template <typename T, class Target>
void screen(const Attention<T>& a, QueryState<T>* rows, int64_t num_rows, int64_t first, int64_t end, const T* packed,
            const AttentionScratch<T>& scratch) {
  constexpr int64_t P = Target::PanelKeys;
  constexpr int L = Target::Lanes;
  for (int64_t key = first; key < end; key += P)
    score_rows<T, L, Target::Vectors, Target::Rows>(scratch.queries, num_rows, a.size.width,
                                                    packed + key * a.size.width, scratch.scores + key - first,
                                                    score_stride<T>());
  for (int64_t r = 0; r < num_rows; ++r) {
    QueryState<T>& q = rows[r];
    const int64_t count = min64(end, q.visible) - first;
    if (count <= 0) continue;
    T* scores = scratch.scores + r * score_stride<T>();
    apply_bias<T, L>(a, q, first, count, scores);
    T bound = q.error.below(a.cut);
    if (!a.absolute) {
      q.top = larger_of(q.top, largest_score<T, L>(scores, count));
      bound = q.error.below(q.error.at_least(q.top) + a.cut);
    }
    const int64_t at = r * scratch.row_capacity + scratch.counts[r];
    scratch.counts[r] += collect<T, L>(scores, first, count, bound, scratch.columns + at, scratch.weights + at);
  }
}

template <typename T, class Target>
void forward(const Attention<T>& a, int64_t b, int64_t h, Range queries, const AttentionScratch<T>& scratch) {
  constexpr int64_t P = Target::PanelKeys;
  constexpr int L = Target::Lanes;
  const int64_t kv_head = h / (a.size.heads / a.size.kv_heads), head = b * a.size.kv_heads + kv_head;
  const int64_t panels = ceil_div(a.size.keys, P), num_rows = queries.end - queries.begin;
  double largest_key = 0;
  for (int64_t p = 0; p < panels; ++p) largest_key = larger_or_nan(largest_key, a.norms[head * panels + p]);
  QueryState<T> rows[kBlockQueries];
  for (int64_t r = 0; r < num_rows; ++r) {
    rows[r] = start_query(a, b, h, queries.begin + r, largest_key, scratch.queries + r * a.size.width);
    scratch.counts[r] = 0;
  }
  const T* packed = a.packed_keys + head * panels * P * a.size.width;
  const int64_t visible = a.causal ? min64(queries.end, a.size.keys) : a.size.keys;
  for (int64_t first = 0; first < visible; first += strip_keys<T>())
    screen<T, Target>(a, rows, num_rows, first, min64(first + strip_keys<T>(), visible), packed, scratch);
  for (int64_t r = 0; r < num_rows; ++r) {
    int32_t* columns = scratch.columns + r * scratch.row_capacity;
    T* weights = scratch.weights + r * scratch.row_capacity;
    const int64_t kept = refine(a, rows[r], columns, weights, scratch.counts[r]);
    softmax<T, L>(weights, kept, a.absolute ? largest_of(weights, kept) : rows[r].top);
    gather_sum<T, L, 4>(a.value.head(b, kv_head), a.value.stride, a.size.value_width, columns, weights, kept, T(1),
                        a.out.head(b, h) + rows[r].i * a.out.stride);
    scratch.counts[r] = kept;
  }
}

template <typename T, class Target>
constexpr AttentionKernels<T> attention_kernels() {
  return {Target::PanelKeys,
          kBlockQueries,
          score_stride<T>(),
          kCandidateSlack,
          pack_keys<T, Target>,
          forward<T, Target>,
          attention_backward_rows<T, Target::Lanes>,
          attention_backward_keys<T, Target::Lanes>};
}

}  // namespace
