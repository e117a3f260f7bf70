// The rules that are solved on a short list of candidates: top-k, top-p, entmax.
#pragma once

#include <stddef.h>

#include "refine.h"

namespace {

template <typename T>
COMPSPARSE_INLINE void exchange(T& a, T& b) {
  const T other = a;
  a = b;
  b = other;
}

// Scores in order of their size as far as it takes to find the place where `enough` is reached: the largest score v
// such that gain(scores >= v) is enough. Quickselect with three parts, since many scores may be equal. Both arrays are
// shuffled; `gains` may be null: each score counts 1.
template <typename T>
T descend(T* scores, T* gains, int64_t count, double enough) {
  int64_t begin = 0, end = count;
  T reached = -__builtin_inf();
  while (begin < end) {
    const T a = scores[begin], b = scores[begin + (end - begin) / 2], c = scores[end - 1];
    const T pivot = a < b ? (b < c ? b : a < c ? c : a) : (a < c ? a : b < c ? c : b);
    int64_t above = begin, at = begin, below = end;  // [begin, above) larger, [above, at) equal, [below, end) smaller
    double larger = 0, equal = 0;
    while (at < below) {
      const double gain = gains ? double(gains[at]) : 1;
      if (scores[at] > pivot) {
        larger += gain;
        exchange(scores[above], scores[at]);
        if (gains) exchange(gains[above], gains[at]);
        ++above, ++at;
      } else if (scores[at] == pivot) {
        equal += gain;
        ++at;
      } else {
        --below;
        exchange(scores[at], scores[below]);
        if (gains) exchange(gains[at], gains[below]);
      }
    }
    if (larger >= enough && above > begin) {
      end = above;
      continue;
    }
    reached = pivot;
    if (larger + equal >= enough) return pivot;
    enough -= larger + equal;
    begin = at;
  }
  return reached;
}

// Of the scores those for which decide(vector) has a bit set, in place; returns how many.
template <typename T, int L, class Decide>
int64_t keep_scores(T* scores, int64_t count, const Decide& decide) {
  int64_t kept = 0;
  for (int64_t e = 0; e < count; e += L) {
    const Vec<T, L> some = load<T, L>(scores + e);
    kept += compress<T, L>(some, decide(some) & lanes_there<L>(count - e), scores + kept);
  }
  return kept;
}

template <typename T, int L, class Decide>
int64_t count_scores(const T* scores, int64_t count, const Decide& decide) {
  int64_t number = 0;
  for (int64_t e = 0; e < count; e += L)
    number += count_bits(decide(load<T, L>(scores + e)) & lanes_there<L>(count - e));
  return number;
}

// The kth largest of `count` scores that are numbers, k of at least 1, or the least where there are fewer. Quickselect
// by vectors, without a branch on a score.
template <typename T, int L>
T kth_largest(const T* scores, int64_t count, int64_t k, T* spare) {
  __builtin_memcpy(spare, scores, size_t(count) * sizeof(T));
  T pivot = -__builtin_inf();
  while (count > 0) {
    const T a = spare[0], b = spare[count / 2], c = spare[count - 1];
    pivot = a < b ? (b < c ? b : a < c ? c : a) : (a < c ? a : b < c ? c : b);
    const auto at_least = [&](Vec<T, L> some) { return not_below<T, L>(some, pivot); };
    const auto above = [&](Vec<T, L> some) { return ~not_below<T, L>(Vec<T, L>{} - some, -pivot); };
    const int64_t larger = count_scores<T, L>(spare, count, above);
    const int64_t reached = count_scores<T, L>(spare, count, at_least);
    if (larger >= k) {
      count = keep_scores<T, L>(spare, count, above);
    } else if (reached >= k) {
      return pivot;
    } else {
      k -= reached;
      count = keep_scores<T, L>(spare, count, [&](Vec<T, L> some) { return ~at_least(some); });
    }
  }
  return pivot;
}

// The candidates of the k largest scores, all that equal the kth among them. Those within rounding of it are decided by
// scores in double.
template <typename T, int L>
int64_t keep_largest(const Attention<T>& a, const QueryState<T>& q, int32_t* columns, T* scores, int64_t count,
                     T* spare, int64_t row_capacity) {
  const int64_t k = int64_t(q.threshold);
  if (count <= k) return count;
  const T kth = kth_largest<T, L>(scores, count, k, spare);
  const T least = q.error.below(q.error.at_least(kth)), enough = q.error.above(q.error.at_most(kth));
  int64_t certain = 0, open = 0;
  auto* exact = reinterpret_cast<double*>(spare);  // 2 row_capacity numbers of T are row_capacity of double
  for (int64_t e = 0; e < count; ++e) {
    if (scores[e] >= enough)
      ++certain;
    else if (scores[e] >= least && open < row_capacity)
      exact[open++] = decisive_score(a, q, columns[e], scores[e]);
  }
  const double cut = descend<double>(exact, nullptr, open, double(k - certain));
  return filter<T, L>(columns, scores, count, [&](Vec<T, L> some, int64_t at) {
    uint32_t bits = not_below<T, L>(some, least);
    for (uint32_t left = bits & ~not_below<T, L>(some, enough); left; left &= left - 1) {
      const int lane = __builtin_ctz(left);
      if (decisive_score(a, q, columns[at + lane], some[lane]) < cut) bits &= ~(1u << lane);
    }
    return bits;
  });
}

// The fewest keys whose mass is p of all, all that equal the last of them among these.
template <typename T, int L>
int64_t keep_mass(const QueryState<T>& q, int32_t* columns, T* scores, int64_t count, T* spare, int64_t row_capacity) {
  if (q.threshold >= 1) return count;
  T* masses = spare + row_capacity;
  double total = 0;
  for (int64_t e = 0; e < count; e += L) {
    const Vec<T, L> mass = exp_of_negative<T, L>(load<T, L>(scores + e) - q.top);
    store<T, L>(masses + e, mass);
    store<T, L>(spare + e, load<T, L>(scores + e));
    for (int lane = 0; lane < L; ++lane) total += double(mass[lane]);
  }
  const T cut = descend<T>(spare, masses, count, q.threshold * total);
  const T lowest = sizeof(T) == 4 ? T(-__FLT_MAX__) : T(-__DBL_MAX__);
  const T least = larger_of(cut, lowest);  // where a score is infinite no mass is enough: then all but what is masked
  return filter<T, L>(columns, scores, count, [&](Vec<T, L> some, int64_t) { return not_below<T, L>(some, least); });
}

// Sums over all scores of relu(slope (s - top) - tau)^power, power 1 or 2, and of what they lose as tau rises; the last
// vector is filled with -inf.
template <typename T, int L>
struct EntmaxSums {
  Vec<double, L / 2> values = {}, losses = {};

  COMPSPARSE_INLINE void add(Vec<T, L / 2> scores, double top, double slope, double tau, bool squared) {
    const Vec<double, L / 2> above = (__builtin_convertvector(scores, Vec<double, L / 2>) - top) * slope - tau;
    const Vec<double, L / 2> none = {}, one = none + 1, positive = above <= 0 ? none : above;  // NaN stays
    values += squared ? positive * positive : positive;
    losses += squared ? positive + positive : (above <= 0 ? none : one);
  }

  void add_all(const T* scores, int64_t count, double top, double slope, double tau, bool squared) {
    for (int64_t e = 0; e < count; e += L) {
      const Vec<T, L> some = load<T, L>(scores + e);
      add(lower_half<T, L>(some), top, slope, tau, squared);
      add(upper_half<T, L>(some), top, slope, tau, squared);
    }
  }
};

// Scores -> weights relu((alpha - 1) s - tau)^(1 / (alpha - 1)), and the candidates for which they are positive.
// Newton's method on the convex sum of weights, from the left, never passes tau; and it has arrived where it stands
// still. What a step leaves without weight has none at any later tau either.
template <typename T, int L>
int64_t entmax(const QueryState<T>& q, int32_t* columns, T* scores, int64_t count, double& sum) {
  const double slope = q.threshold - 1, top = q.top;
  const bool sparsemax = q.threshold == 2;
  double tau = -1;
  fill_last_vector<T, L>(scores, count);
  for (int step = 0; step < 100; ++step) {
    EntmaxSums<T, L> sums;
    sums.add_all(scores, count, top, slope, tau, !sparsemax);
    const double value = sum_lanes<double, L / 2>(sums.values), loss = sum_lanes<double, L / 2>(sums.losses);
    const double next = tau + (value - 1) / loss;
    if (!(next > tau)) break;
    tau = next;
    const double edge = top + tau / slope, rounding = sizeof(T) == 4 ? 0x1p-21 : 0x1p-49;
    const T least = T(edge - rounding * (__builtin_fabs(edge) + __builtin_fabs(top)));
    count = filter<T, L>(columns, scores, count, [&](Vec<T, L> some, int64_t) { return not_below<T, L>(some, least); });
  }
  int64_t kept = 0;
  sum = 0;
  for (int64_t e = 0; e < count; ++e) {
    const double below = double(scores[e]) - double(q.top), above = slope * below - tau;
    if (above <= 0) continue;
    sum += __builtin_exp(below);
    columns[kept] = columns[e];
    scores[kept++] = T(sparsemax ? above : above * above);
  }
  return kept;
}

}  // namespace
