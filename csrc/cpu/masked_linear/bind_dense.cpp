// What kind dense needs beside a dense product, at key CPU: is a weight zero where its mask drops, and making it so.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

#include "../kernels.h"
#include "../partition.h"

namespace compsparse {
namespace {

using torch::stable::Tensor;

// Calls body(kernel) with the kernels for elements as wide as those of `values`.
template <class Body>
void with_kernels_for(const Tensor& values, const Body& body) {
  const MaskedTable& table = *kernels().masked;
  switch (values.element_size()) {
    case 2:
      return body(table.masking16);
    case 4:
      return body(table.masking32);
    default:
      return body(table.masking64);
  }
}

bool is_zero_outside(const Tensor& values, const Tensor& mask) {
  const int64_t size = values.numel(), parts = parts_for(size);
  const auto* kept = static_cast<const uint8_t*>(mask.data_ptr());
  std::vector<char> found(parts);
  with_kernels_for(values, [&]<typename Bits>(const MaskingKernels<Bits>& kernel) {
    const auto* bits = static_cast<const Bits*>(values.data_ptr());
    for_each_part(parts,
                  [&](int64_t part) { found[part] = kernel.any_outside(bits, kept, equal_share(size, part, parts)); });
  });
  return std::find(found.begin(), found.end(), 1) == found.end();
}

void zero_outside(const Tensor& values, const Tensor& mask) {
  const int64_t size = values.numel(), parts = parts_for(size);
  const auto* kept = static_cast<const uint8_t*>(mask.data_ptr());
  with_kernels_for(values, [&]<typename Bits>(const MaskingKernels<Bits>& kernel) {
    auto* bits = static_cast<Bits*>(values.data_ptr());
    for_each_part(parts, [&](int64_t part) { kernel.zero_outside(bits, kept, equal_share(size, part, parts)); });
  });
}

}  // namespace
}  // namespace compsparse

STABLE_TORCH_LIBRARY_IMPL(compsparse, CPU, m) {
  m.impl("is_zero_outside", TORCH_BOX(&compsparse::is_zero_outside));
  m.impl("zero_outside_", TORCH_BOX(&compsparse::zero_outside));
}
