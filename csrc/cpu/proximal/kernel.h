// Steps of SGD and AdamW, each followed by the proximal map of a penalty, written once for every vector width.
//
// single weights: read, stepped, shrunk and written while they are in registers.
// groups:         a panel of them is stepped into scratch, unrounded; norms are taken there, in double and in one
//                 order; the shrunk panel is written. What a panel needs stays in cache.
//
// A weight's arithmetic depends on where it lies, never on who computes it.
#pragma once

#include "../numbers.h"
#include "../vector_math.h"
#include "table.h"

namespace {

using namespace compsparse;

// The L elements from `at` on, or fewer of them, `count`, at a ragged edge.
template <typename T, int L_>
struct Lanes {
  static constexpr int L = L_;
  using V = Vec<Sum<T>, L>;
  int64_t at;
  int64_t count;

  COMPSPARSE_INLINE V read(const T* from) const {
    return count >= L ? load_wide<T, L>(from + at) : load_wide_partial<T, L>(from + at, count);
  }
  COMPSPARSE_INLINE void write(T* to, V v) const {
    count >= L ? store_narrow<T, L>(to + at, v) : store_narrow_partial<T, L>(to + at, v, count);
  }
};

// Visits elements in whole vectors, then in narrower ones, at last in part of one.
template <typename T, int L, class Visit>
COMPSPARSE_INLINE void for_lanes(Range elements, const Visit& visit) {
  int64_t i = elements.begin;
  for (; i + L <= elements.end; i += L) visit(Lanes<T, L>{i, L});
  if (i == elements.end) return;
  if constexpr (L > 16 / int(sizeof(Sum<T>)))
    for_lanes<T, L / 2>({i, elements.end}, visit);
  else
    visit(Lanes<T, L>{i, elements.end - i});
}

template <typename V>
COMPSPARSE_INLINE V sign(V v) {
  return v > 0 ? V{} + 1 : v < 0 ? V{} - 1 : v;  // NaN stays
}

// What a term of weight 0 multiplies is not looked at: it may be infinite.
template <typename T, class At, class V = typename At::V>
COMPSPARSE_INLINE V stepped(const SgdStep<T>& s, At at) {
  const V w = at.read(s.param);
  V d = at.read(s.grad);
  if (s.decay != 0) d += w * s.decay;
  if (s.sign != 0) d += sign(w) * s.sign;
  if (s.buffer) {
    const V buffer = s.first ? d : at.read(s.buffer) * s.momentum + d * s.share;
    at.write(s.buffer, buffer);
    d = s.nesterov ? d + buffer * s.momentum : buffer;
  }
  return w - d * s.lr;
}

template <typename T, class At, class V = typename At::V>
COMPSPARSE_INLINE V stepped(const AdamWStep<T>& s, At at) {
  const V g = at.read(s.grad), before = at.read(s.mean);
  const V mean = before + (g - before) * s.mean_share;
  const V square = at.read(s.square) * s.square_keep + g * s.square_share * g;
  at.write(s.mean, mean);
  at.write(s.square, square);
  const V size = vector_sqrt<Sum<T>, At::L>(square) / s.root + s.eps;
  return at.read(s.param) * s.keep - mean * s.rate / size;
}

// w minus what lies in -bound .. bound: NaN stays, and what is killed is +0.
template <typename V, typename S>
COMPSPARSE_INLINE V soft(V w, S bound) {
  V inside = w > bound ? V{} + bound : w;
  inside = inside < -bound ? V{} - bound : inside;
  return w - inside;
}

template <typename V, typename S>
COMPSPARSE_INLINE V hard(V w, S bound) {
  return (w < 0 ? -w : w) < bound ? V{} : w;  // NaN stays
}

template <typename T, int L, class Step>
void step_weights(const Step& step, const ProximalMap<T>& map, Range weights) {
  const Sum<T> bound = Sum<T>(map.bound);
  if (map.penalty == Penalty::none)
    for_lanes<T, L>(weights, [&](auto at) { at.write(step.param, stepped(step, at)); });
  else if (map.penalty == Penalty::l1)
    for_lanes<T, L>(weights, [&](auto at) { at.write(step.param, soft(stepped(step, at), bound)); });
  else
    for_lanes<T, L>(weights, [&](auto at) { at.write(step.param, hard(stepped(step, at), bound)); });
}

// squares[c] = sum of the squares of column c. In double, no square of a float overflows or vanishes.
template <typename S, int L>
void sum_squares(const S* values, int64_t height, int64_t width, double* squares) {
  int64_t c = 0;
  for (; c + L <= width; c += L) {
    Vec<double, L> sum = {};
    for (int64_t r = 0; r < height; ++r) {
      const Vec<double, L> v = __builtin_convertvector((load<S, L>(values + r * width + c)), Vec<double, L>);
      sum += v * v;
    }
    store<double, L>(squares + c, sum);
  }
  for (; c < width; ++c) {
    double sum = 0;
    for (int64_t r = 0; r < height; ++r) sum += double(values[r * width + c]) * double(values[r * width + c]);
    squares[c] = sum;
  }
}

template <int L>
double sum_of(const double* values, int64_t count) {
  constexpr int Sums = 4;  // their chains of additions overlap
  Vec<double, L> sums[Sums] = {};
  int64_t i = 0;
  for (; i + Sums * L <= count; i += Sums * L)
    COMPSPARSE_UNROLL for (int s = 0; s < Sums; ++s) sums[s] += load<double, L>(values + i + s * L);
  const Vec<double, L> lanes = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  double sum = 0;
  COMPSPARSE_UNROLL for (int l = 0; l < L; ++l) sum += lanes[l];
  for (; i < count; ++i) sum += values[i];
  return sum;
}

// What a group is multiplied by; NaN stays.
inline double shrinkage(double squares, double bound, int64_t size) {
  const double norm = root(squares), cut = bound * root(double(size));
  return norm <= cut ? 0 : 1 - cut / norm;
}

// Panels of groups that lie side by side, so that memory is read in long rows.
template <typename T, int L, class Step>
void step_groups(const Step& step, const ProximalMap<T>& map, Range panels, Sum<T>* scratch, double* squares) {
  using S = Sum<T>;
  constexpr int Doubles = sizeof(S) == sizeof(float) ? L / 2 : L;
  S* const factors = scratch + map.block_out * map.panel;
  const int64_t across = ceil_div(map.columns, map.panel);
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    const int64_t row = panel / across * map.block_out, column = panel % across * map.panel;
    const int64_t height = min64(map.block_out, map.rows - row), width = min64(map.panel, map.columns - column);
    const auto for_rows = [&](const auto& visit) {  // with the place of a row in the parameter and in scratch
      for (int64_t r = 0; r < height; ++r) visit((row + r) * map.columns + column, scratch + r * width);
    };
    for_rows([&](int64_t begin, S* to) {
      for_lanes<T, L>({begin, begin + width},
                      [&]<class At>(At at) { Lanes<S, At::L>{at.at - begin, at.count}.write(to, stepped(step, at)); });
    });
    sum_squares<S, Doubles>(scratch, height, width, squares);
    for (int64_t c = 0; c < width; c += map.block_in) {
      const int64_t end = min64(c + map.block_in, width), size = height * (end - c);
      const S factor = S(shrinkage(sum_of<Doubles>(squares + c, end - c), map.bound, size));
      for (int64_t i = c; i < end; ++i) factors[i] = factor;
    }
    for_rows([&](int64_t begin, const S* from) {
      for_lanes<T, L>({begin, begin + width}, [&]<class At>(At at) {
        const Lanes<S, At::L> there = {at.at - begin, at.count};
        at.write(step.param, there.read(from) * there.read(factors));
      });
    });
  }
}

template <typename T, int L, class Step>
void proximal_step(const Step& step, const ProximalMap<T>& map, Range part, Sum<T>* scratch, double* squares) {
  if (map.penalty == Penalty::group_l1)
    step_groups<T, L>(step, map, part, scratch, squares);
  else
    step_weights<T, L>(step, map, part);
}

template <typename T, int L>
constexpr ProximalKernels<T> proximal_kernels() {
  return {proximal_step<T, L, SgdStep<T>>, proximal_step<T, L, AdamWStep<T>>};
}

}  // namespace
