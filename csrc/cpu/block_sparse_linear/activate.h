// gelu and silu of what a product gave, and their gradients, for training: the derivative needs the product itself, so
// there the activation is no epilogue. Every element is computed the same way, whatever share of the work it is in.
#pragma once

#include "../activations.h"
#include "../numbers.h"
#include "table.h"

namespace {

template <typename T, int L>
COMPSPARSE_INLINE Vec<Sum<T>, L> activate_lanes(const ActivatedValues<T>& a, int64_t i, int64_t count) {
  const auto read = [&](const T* from) {
    return count >= L ? load_wide<T, L>(from + i) : load_wide_partial<T, L>(from + i, count);
  };
  if (!a.grad) return activate<Sum<T>, L>(read(a.z), a.activation);
  Vec<Sum<T>, L> slope;
  activate_with_slope<Sum<T>, L>(read(a.z), slope, a.activation);
  return read(a.grad) * slope;
}

template <typename T, class Target>
void activated(const ActivatedValues<T>& a, Range elements) {
  constexpr int L = Target::MaxLanes;
  int64_t i = elements.begin;
  for (; i + L <= elements.end; i += L) store_narrow<T, L>(a.out + i, activate_lanes<T, L>(a, i, L));
  const int64_t rest = elements.end - i;
  if (rest) store_narrow_partial<T, L>(a.out + i, activate_lanes<T, L>(a, i, rest), rest);
}

}  // namespace
