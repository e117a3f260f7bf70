// The product for a few batch rows, where reading W once is what costs: blocks are read as they are stored, each output
// as the dot product of a row of W with the inputs, and L outputs are summed across lanes together.
#pragma once

#include "../activations.h"
#include "../shuffle.h"
#include "elements.h"
#include "table.h"

namespace {

using namespace compsparse;

template <typename T, class Target>
bool uses_dots(const BlockProduct<T>& p) {
  constexpr int64_t few = 8;  // from there on, packed weights are read often enough
  return p.batch < few && !p.transposed && p.block_in % (Target::MinLanes * Target::Together) == 0;
}

// Lane i: the sum over the lanes of v[i].
template <typename T, int L, int Count>
COMPSPARSE_INLINE Vec<T, L> sum_each(const Vec<T, L>* v) {
  if constexpr (Count == 1) {
    return v[0];
  } else {
    constexpr int Half = Count / 2;
    return fold<T, L, L / Half>(sum_each<T, L, Half>(v), sum_each<T, L, Half>(v + Half));
  }
}

// acc[i] += x[k] * w[k + rows[i]], k = 0 .. inputs
template <class Target, int L, typename T>
COMPSPARSE_INLINE void add_dots(const T* x, const T* w, const int64_t (&rows)[L], int64_t inputs,
                                Vec<Sum<T>, L> (&acc)[L]) {
  constexpr int Step = L * Target::Together;
  int64_t k = 0;
  for (; k + Step <= inputs; k += Step) {
    const Vec<Sum<T>, L> input = Target::template along<L>(x + k);
    COMPSPARSE_UNROLL for (int i = 0; i < L; ++i) acc[i] =
        Target::template multiply_add<L>(Target::template along<L>(w + rows[i] + k), input, acc[i]);
  }
  if (k == inputs) return;
  const Vec<Sum<T>, L> input = along_partial<Target, L>(x + k, inputs - k);
  for (int i = 0; i < L; ++i)
    acc[i] = Target::template multiply_add<L>(along_partial<Target, L>(w + rows[i] + k, inputs - k), input, acc[i]);
}

// Outputs first .. first + count of block row `row`, for one batch row.
template <class Target, int L, typename T>
void dot_outputs(const BlockProduct<T>& p, int64_t row, int64_t first, int64_t count, const T* x, T* y) {
  const int64_t block_size = p.block_out * p.block_in, out = row * p.block_out + first;
  int64_t rows[L];
  for (int i = 0; i < L; ++i) rows[i] = (first + min64(i, count - 1)) * p.block_in;
  Vec<Sum<T>, L> acc[L] = {};
  for (int64_t e = p.ptr[row]; e < p.ptr[row + 1]; ++e) {
    const int64_t column = p.idx[e] * p.block_in;
    add_dots<Target, L>(x + column, p.values + p.slot[e] * block_size, rows, min64(p.block_in, p.in_features - column),
                        acc);
  }
  Vec<Sum<T>, L> sums = sum_each<Sum<T>, L, L>(acc);
  if (p.bias) sums += load_wide_partial<T, L>(p.bias + out, count);
  sums = activate<Sum<T>, L>(sums, p.activation);
  if (count >= L)
    store_narrow<T, L>(y + out, sums);
  else
    store_narrow_partial<T, L>(y + out, sums, count);
}

template <typename T, int L, class Target>
void product_by_dots(const BlockProduct<T>& p, Range rows, Range batch) {
  if constexpr (L > Target::MinLanes) {
    if (p.block_in % (L * Target::Together) != 0) return product_by_dots<T, L / 2, Target>(p, rows, batch);
  }
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const int64_t outputs = min64(p.block_out, p.out_features - row * p.block_out);
    for (int64_t first = 0; first < outputs; first += L)
      for (int64_t n = batch.begin; n < batch.end; ++n)
        dot_outputs<Target, L>(p, row, first, min64(L, outputs - first), p.x + n * p.in_features,
                               p.y + n * p.out_features);
  }
}

}  // namespace
