// What kind dense needs beside a dense product, at key CPU: is a weight zero where its mask drops, and making it so.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

#include "../partition.h"

namespace compsparse {
namespace {

using torch::stable::Tensor;

constexpr int64_t kChunk = 4096;  // elements between two looks at the answer

// Calls body(Bits()) with the unsigned integer that is as wide as the elements; zero is a matter of bits.
template <class Body>
void with_bits_of(const Tensor& values, const Body& body) {
  switch (values.element_size()) {
    case 2:
      return body(uint16_t());
    case 4:
      return body(uint32_t());
    default:
      return body(uint64_t());
  }
}

// Is any element but 0 and -0 where the mask has a 0? The mask has a byte, 0 or 1, for each element.
template <typename Bits>
bool any_outside(const Bits* values, const uint8_t* mask, Range mine) {
  for (int64_t begin = mine.begin; begin < mine.end; begin += kChunk) {
    const int64_t end = std::min(begin + kChunk, mine.end);
    Bits found = 0;
    for (int64_t i = begin; i < end; ++i) found |= Bits(values[i] << 1) & Bits(Bits(mask[i]) - 1);
    if (found) return true;
  }
  return false;
}

bool is_zero_outside(const Tensor& values, const Tensor& mask) {
  const int64_t size = values.numel(), parts = parts_for(size);
  const auto* dropped = static_cast<const uint8_t*>(mask.data_ptr());
  std::vector<char> found(parts);
  with_bits_of(values, [&]<typename Bits>(Bits) {
    const auto* bits = static_cast<const Bits*>(values.data_ptr());
    for_each_part(parts,
                  [&](int64_t part) { found[part] = any_outside(bits, dropped, equal_share(size, part, parts)); });
  });
  return std::find(found.begin(), found.end(), 1) == found.end();
}

void zero_outside(const Tensor& values, const Tensor& mask) {
  const int64_t size = values.numel(), parts = parts_for(size);
  const auto* kept = static_cast<const uint8_t*>(mask.data_ptr());
  with_bits_of(values, [&]<typename Bits>(Bits) {
    auto* bits = static_cast<Bits*>(values.data_ptr());
    for_each_part(parts, [&](int64_t part) {
      const Range mine = equal_share(size, part, parts);
      for (int64_t i = mine.begin; i < mine.end; ++i) bits[i] &= Bits(-Bits(kept[i]));
    });
  });
}

}  // namespace
}  // namespace compsparse

STABLE_TORCH_LIBRARY_IMPL(compsparse, CPU, m) {
  m.impl("is_zero_outside", TORCH_BOX(&compsparse::is_zero_outside));
  m.impl("zero_outside_", TORCH_BOX(&compsparse::zero_outside));
}
