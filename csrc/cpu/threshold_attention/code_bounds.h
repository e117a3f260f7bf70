// What exact products of a query's codes with those of a panel's keys tell of their scores.
#pragma once

#include "index.h"

namespace {

constexpr int64_t kSampledPanels = 4;  // that are looked at first
// Of the scores of one query: those panels, and one more. Queries begin in different cache sets.
constexpr int64_t kPanelStride = (kSampledPanels + 1) * index_panel_keys + 16;

// A query's own bounds: what some key's score certainly is, and the score under which keys are dropped for it.
struct Reach {
  double score;
  float rounded;  // the same
  float least;
};

template <int L>
COMPSPARSE_INLINE Vec<float, L> lowest() {
  return Vec<float, L>{} - __builtin_inff();
}

// What a panel's products tell of one query.
struct PanelScreen {
  uint64_t candidates;  // keys that may score no less than its bound
  bool raises;          // is something certainly reached that is more than before?
  float reached[16];    // what is, lane by lane

  template <int L>
  COMPSPARSE_INLINE void note(uint64_t bits, Vec<float, L> certain, const Reach& before) {
    static_assert(L <= 16);
    candidates = bits;
    raises = any_above<L>(certain, before.rounded);
    store<float, L>(reached, certain);
  }
};

// scores[0 .. L): the most that the scores may be whose codes have these products; reached: the largest of what they
// certainly are, lane by lane. What is not a number has no part in that. `scales` are those of the keys in a panel.
// Returns a bit for each key that may score no less than `least`.
template <int L>
COMPSPARSE_INLINE uint64_t bound_scores(Vec<int32_t, L> products, const float* scales, const CodedQuery& query,
                                        float least, float* scores, Vec<float, L>& reached) {
  const Vec<float, L> scale = load<float, L>(scales), size = load<float, L>(scales + index_panel_keys),
                      error = load<float, L>(scales + 2 * index_panel_keys);
  const Vec<float, L> x = __builtin_convertvector(products, Vec<float, L>) * scale * query.factor;
  const Vec<float, L> off = size * query.per_size + (error * query.per_error + query.constant);
  const Vec<float, L> most = x + off;
  store<float, L>(scores, most);
  reached = larger<float, L>(x - off, reached);
  return not_below<float, L>(most, least);
}

}  // namespace
