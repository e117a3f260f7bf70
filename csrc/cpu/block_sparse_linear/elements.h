// What a tile multiplies: elements, each the size of a sum, made of one input, or of two of half that size.
#pragma once

#include "../numbers.h"

namespace {

// How one instruction set multiplies T: lanes of a sum in its widest vector, accumulators a tile may hold, vectors side
// by side. An element is one input as wide as a sum.
template <typename T_, int MaxLanes_, int Accumulators_, int MaxVectors_>
struct Target {
  using T = T_;
  static constexpr int MaxLanes = MaxLanes_;
  static constexpr int Accumulators = Accumulators_;
  static constexpr int MaxVectors = MaxVectors_;
  static constexpr int MinLanes = 16 / sizeof(Sum<T>);
  static constexpr int NarrowRows = 12;  // batch rows of a product's tile that is one vector wide
  static constexpr int Together = 1;     // inputs of an element
  static constexpr bool AsStored = sizeof(T) == sizeof(Sum<T>);  // are elements side by side what lies in memory?

  // sum + a * b, where b is a vector too, or one element for all lanes
  template <int L, class B>
  static COMPSPARSE_INLINE Vec<Sum<T>, L> multiply_add(Vec<Sum<T>, L> a, B b, Vec<Sum<T>, L> sum) {
    return sum + a * b;
  }

  // The same with an element in memory that nothing else is multiplied by.
  template <int L>
  static COMPSPARSE_INLINE Vec<Sum<T>, L> multiply_add_once(Vec<Sum<T>, L> a, const Sum<T>* b, Vec<Sum<T>, L> sum) {
    return sum + a * *b;
  }

  // L elements of one row
  template <int L>
  static COMPSPARSE_INLINE Vec<Sum<T>, L> along(const T* row) {
    return load_wide<T, L>(row);
  }

  // L elements of `Together` rows, a column each; `next` is null where only zeros follow
  template <int L>
  static COMPSPARSE_INLINE Vec<Sum<T>, L> across(const T* row, const T*) {
    return load_wide<T, L>(row);
  }
};

// The first `count` inputs only, zero in the others: for ragged edges, never on a hot path.
template <class Target, int L, typename T>
COMPSPARSE_INLINE Vec<Sum<T>, L> along_partial(const T* row, int64_t count) {
  T inputs[L * Target::Together] = {};
  for (int64_t i = 0; i < count && i < L * Target::Together; ++i) inputs[i] = row[i];
  return Target::template along<L>(inputs);
}

// `count` inputs of a row as elements, the last filled up with a zero. Whole vectors first, then narrower ones.
template <class Target, int L>
COMPSPARSE_INLINE void copy_along(const typename Target::T* row, int64_t count, Sum<typename Target::T>* to) {
  using T = typename Target::T;
  constexpr int Inputs = L * Target::Together;
  for (; count >= Inputs; row += Inputs, count -= Inputs, to += L) store<Sum<T>, L>(to, Target::template along<L>(row));
  if constexpr (L > 1) {
    if (count) copy_along<Target, L / 2>(row, count, to);
  } else if (count) {
    const T last[Target::Together] = {*row};
    store<Sum<T>, 1>(to, Target::template along<1>(last));
  }
}

template <class Target, int L>
COMPSPARSE_INLINE void copy_across(const typename Target::T* row, const typename Target::T* next, int64_t count,
                                   Sum<typename Target::T>* to) {
  int64_t i = 0;
  for (; i + L <= count; i += L)
    store<Sum<typename Target::T>, L>(to + i, Target::template across<L>(row + i, next ? next + i : nullptr));
  if constexpr (L > 1) {
    if (i < count) copy_across<Target, L / 2>(row + i, next ? next + i : nullptr, count - i, to + i);
  }
}

// Columns of blocks of x, one after another: [block columns, batch / Rows, width], zero-padded. An element is made of
// inputs of one row, or of one input each of `Rows` rows. Twelve rows at a time: each is read as a stream, and each
// panel gets one run of cache lines.
template <class Target, int Rows>
void pack_columns(const typename Target::T* x, int64_t batch, int64_t in_features, int64_t block_in, int64_t width,
                  Range rows, Sum<typename Target::T>* panels) {
  constexpr int64_t together = 12;
  constexpr int Inputs = Rows == 1 ? Target::Together : 1;
  const int64_t columns = ceil_div(in_features, block_in), height = ceil_div(batch, Rows);
  for (int64_t begin = round_up(rows.begin, Rows); begin < rows.end; begin += together) {
    const int64_t end = min64(begin + together, rows.end);
    for (int64_t c = 0; c < columns; ++c) {
      const int64_t valid = min64(block_in, in_features - c * block_in);
      for (int64_t n = begin; n < end; n += Rows) {
        const auto* from = x + n * in_features + c * block_in;
        auto* to = panels + (c * height + n / Rows) * width;
        if constexpr (Rows == 1)
          copy_along<Target, Target::MaxLanes>(from, valid, to);
        else
          copy_across<Target, Target::MaxLanes>(from, n + 1 < batch ? from + in_features : nullptr, valid, to);
        for (int64_t i = ceil_div(valid, Inputs); i < width; ++i) to[i] = 0;
      }
    }
  }
}

// The narrowest vector that holds `width` elements, or the widest there is.
template <class Target, int L = Target::MaxLanes>
int lanes_for(int64_t width) {
  if constexpr (L > Target::MinLanes) {
    if (width <= L / 2) return lanes_for<Target, L / 2>(width);
  }
  return L;
}

// Rows of the tile for what a tile of M rows leaves over: 12, 6, 4, 2, 1, or 8, 4, 2, 1. A single row waits for its own
// sums.
constexpr int fewer_rows(int M) { return M == 6 ? 4 : M / 2; }

}  // namespace
