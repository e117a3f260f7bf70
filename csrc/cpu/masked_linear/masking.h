// Values beside a mask of a byte, 0 or 1, for each: plain loops that the compiler vectorises, since zero is a matter of
// bits. One pass over memory that the product reads or has written: it is paid for in every step of kind dense.
#pragma once

#include "../simd.h"
#include "table.h"

namespace {

using namespace compsparse;

// Is any element but 0 and -0 where the mask has a 0?
template <typename Bits>
bool any_outside(const Bits* values, const uint8_t* mask, Range mine) {
  constexpr int64_t chunk = 4096;  // elements between two looks at the answer
  for (int64_t begin = mine.begin; begin < mine.end; begin += chunk) {
    const int64_t end = min64(begin + chunk, mine.end);
    Bits found = 0;
    for (int64_t i = begin; i < end; ++i) found |= values[i] & Bits(Bits(mask[i]) - 1);
    if (Bits(found << 1)) return true;  // but for the sign
  }
  return false;
}

template <typename Bits>
void zero_outside(Bits* values, const uint8_t* mask, Range mine) {
  for (int64_t i = mine.begin; i < mine.end; ++i) values[i] &= Bits(-Bits(mask[i]));
}

template <typename Bits>
constexpr MaskingKernels<Bits> masking_kernels() {
  return {any_outside<Bits>, zero_outside<Bits>};
}

}  // namespace
