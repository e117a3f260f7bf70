// Scores -> candidates -> survivors. Rows of scores are filled up to a whole last vector with -inf.
#pragma once

#include "query.h"

namespace {

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

template <typename T, int L>
void fill_last_vector(T* scores, int64_t count) {
  for (int64_t e = count; e < round_up(count, L); ++e) scores[e] = -__builtin_inf();
}

// Appends the keys whose score may reach the bound, and their scores.
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

// Keeps the candidates for which keep(vector of scores, where it lies) has a bit set; in place and in order.
template <typename T, int L, class Keep>
int64_t filter(int32_t* columns, T* scores, int64_t count, const Keep& keep) {
  int64_t kept = 0;
  for (int64_t e = 0; e < count; e += L) {
    const Vec<T, L> some = load<T, L>(scores + e);
    const Vec<int32_t, L> some_columns = load<int32_t, L>(columns + e);
    const uint32_t bits = keep(some, e);
    compress<int32_t, L>(some_columns, bits, columns + kept);
    kept += compress<T, L>(some, bits, scores + kept);
  }
  fill_last_vector<T, L>(scores, kept);
  return kept;
}

// What is known of a row's cut before any score is computed again: from `enough` on a key is kept, below `least` not.
template <typename T>
struct CutBounds {
  T least, enough;
};

template <typename T>
CutBounds<T> bounds_of_cut(const QueryState<T>& q) {
  if (!q.from_top) return {q.error.below(q.cut), q.error.above(q.cut)};
  return {q.error.below(q.error.at_least(q.top) + q.cut), q.error.above(q.error.at_most(q.top) + q.cut)};
}

template <typename T, int L, class Column>
double exact_maximum(const Attention<T>& a, const QueryState<T>& q, const T* scores, int64_t count,
                     const Column& column) {
  const T contender = q.error.below(q.error.at_least(q.top));
  double maximum = -__builtin_inf();
  for (int64_t e = 0; e < count; e += L)
    for (uint32_t bits = not_below<T, L>(load<T, L>(scores + e), contender); bits; bits &= bits - 1) {
      const int64_t at = e + __builtin_ctz(bits);
      maximum = larger_of(maximum, decisive_score(a, q, column(at), scores[at]));
    }
  return maximum;
}

// Which of the vectors of a row are kept: keeps(vector, where it lies) -> bits. `column` tells the key of a place.
template <typename T, int L, class Column>
struct RowDecision {
  const Attention<T>& a;
  const QueryState<T>& q;
  const Column& column;
  CutBounds<T> known;
  double cut = 0;
  bool undefined = false;  // the row has scores that are no numbers: these alone are kept

  RowDecision(const Attention<T>& a, const QueryState<T>& q, const T* scores, int64_t count, const Column& column)
      : a(a), q(q), column(column), known(bounds_of_cut(q)) {
    uint32_t open = 0, odd = 0;
    for (int64_t e = 0; e < count; e += L) {
      const Vec<T, L> some = load<T, L>(scores + e);
      open |= not_below<T, L>(some, known.least) & ~not_below<T, L>(some, known.enough);
      odd |= unordered<T, L>(some);
    }
    undefined = odd != 0;
    if (!open || undefined) return;
    cut = q.from_top ? exact_maximum<T, L>(a, q, scores, count, column) + q.cut : q.cut;
    known = {q.error.below(cut), q.error.above(cut)};
  }

  COMPSPARSE_INLINE uint32_t operator()(Vec<T, L> some, int64_t at) const {
    if (undefined) return unordered<T, L>(some);
    uint32_t bits = not_below<T, L>(some, known.least);
    for (uint32_t open = bits & ~not_below<T, L>(some, known.enough); open; open &= open - 1) {
      const int lane = __builtin_ctz(open);
      if (decisive_score(a, q, column(at + lane), some[lane]) < cut) bits &= ~(1u << lane);
    }
    return bits;
  }
};

// Candidates -> survivors of the rules relative and absolute, in place and in order.
template <typename T, int L>
int64_t refine(const Attention<T>& a, const QueryState<T>& q, int32_t* columns, T* scores, int64_t count) {
  fill_last_vector<T, L>(scores, count);
  const auto column = [&](int64_t at) { return int64_t(columns[at]); };
  const RowDecision<T, L, decltype(column)> keeps(a, q, scores, count, column);
  return filter<T, L>(columns, scores, count, keeps);
}

template <typename T, int L>
int64_t keep_undefined(int32_t* columns, T* scores, int64_t count) {
  fill_last_vector<T, L>(scores, count);
  uint32_t odd = 0;
  for (int64_t e = 0; e < count; e += L) odd |= unordered<T, L>(load<T, L>(scores + e));
  if (!odd) return 0;
  return filter<T, L>(columns, scores, count, [](Vec<T, L> some, int64_t) { return unordered<T, L>(some); });
}

}  // namespace
