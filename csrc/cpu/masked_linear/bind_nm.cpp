// nm_linear, nm_linear_transposed and nm_sampled at key CPU: the pattern to CSR entries, then the CSR kernels.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "../kernels.h"
#include "../partition.h"
#include "../scratch.h"
#include "../tensors.h"
#include "csr.h"
#include "nm.h"

namespace compsparse {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kColumnsAtOnce = 64;  // of which the next places, and the rows' positions and values, stay in cache

template <typename T>
const T* data_of(const Tensor& x) {
  return static_cast<const T*>(x.data_ptr());
}

template <typename T>
const T* data_of(const std::optional<Tensor>& x) {
  return x ? data_of<T>(*x) : nullptr;
}

std::optional<Tensor> as_contiguous(const std::optional<Tensor>& x) {
  return x ? std::optional(compsparse::as_contiguous(*x)) : std::nullopt;
}

NMPattern pattern_of(const Tensor& positions, int64_t in_features, int64_t n, int64_t m) {
  return {data_of<uint8_t>(positions), positions.size(0), in_features, (in_features + m - 1) / m, n, m};
}

// Runs body(T{}) for the type of x.
template <class Body>
void with_type(const Tensor& x, const Body& body) {
  x.scalar_type() == ScalarType::Double ? body(double{}) : body(float{});
}

// The pattern as CSR. Without a ragged group the slots are the entries.
struct Rows {
  explicit Rows(const NMPattern& pattern) : pattern(pattern), ptr(make_scratch<int64_t>(pattern.out_features + 1)) {
    nm_row_offsets(pattern, ptr.get());
    idx = make_scratch<int32_t>(entries());
    const auto bases = make_scratch<int32_t>(pattern.slots());
    for (int64_t s = 0; s < pattern.slots(); ++s) bases[s] = static_cast<int32_t>(s / pattern.n * pattern.m);
    const int64_t parts = parts_for(entries());
    for_each_part(parts, [&](int64_t part) {
      nm_columns(pattern, ptr.get(), bases.get(), equal_share(pattern.out_features, part, parts), idx.get());
    });
  }

  int64_t entries() const { return ptr[pattern.out_features]; }

  // Calls move(entry, slot, count) for the entries of each row, which lie side by side in both.
  template <class Move>
  void for_each_row(const Move& move) const {
    for (int64_t r = 0; r < pattern.out_features; ++r) move(ptr[r], r * pattern.slots(), ptr[r + 1] - ptr[r]);
  }

  const NMPattern& pattern;
  Scratch<int64_t> ptr;
  Scratch<int32_t> idx;
};

Tensor nm_linear(const Tensor& x, const Tensor& values, const std::optional<Tensor>& bias, const Tensor& positions,
                 int64_t m) {
  const Tensor input = compsparse::as_contiguous(x), weights = compsparse::as_contiguous(values);
  const std::optional<Tensor> offset = as_contiguous(bias);
  Tensor y = new_tensor(x, {x.size(0), values.size(0)});
  const Tensor packed = compsparse::as_contiguous(positions);
  const NMPattern pattern = pattern_of(packed, x.size(1), values.size(2), m);
  const Rows rows(pattern);
  with_type(x, [&]<typename T>(T) {
    const T* from = data_of<T>(weights);
    Scratch<T> entries;
    if (pattern.is_ragged()) {
      entries = make_scratch<T>(rows.entries());
      rows.for_each_row([&](int64_t entry, int64_t slot, int64_t count) {
        std::copy(from + slot, from + slot + count, entries.get() + entry);
      });
    }
    csr_product<T>(data_of<T>(input), {
                                          .values = entries ? entries.get() : from,
                                          .bias = data_of<T>(offset),
                                          .y = static_cast<T*>(y.data_ptr()),
                                          .ptr = rows.ptr.get(),
                                          .idx = rows.idx.get(),
                                          .batch = x.size(0),
                                          .in_features = x.size(1),
                                          .out_features = values.size(0),
                                      });
  });
  return y;
}

Tensor nm_linear_transposed(const Tensor& x, const Tensor& values, const std::optional<Tensor>& bias,
                            const Tensor& positions, int64_t m, int64_t in_features) {
  const Tensor input = compsparse::as_contiguous(x), weights = compsparse::as_contiguous(values);
  const std::optional<Tensor> offset = as_contiguous(bias);
  Tensor y = new_tensor(x, {x.size(0), in_features});
  const Tensor packed = compsparse::as_contiguous(positions);
  const NMPattern pattern = pattern_of(packed, in_features, values.size(2), m);
  const int64_t slots = pattern.out_features * pattern.slots();
  const auto ptr = make_scratch<int64_t>(in_features + 1);
  const auto idx = make_scratch<int32_t>(slots);
  with_type(x, [&]<typename T>(T) {
    const auto ordered = make_scratch<T>(slots);
    const int64_t at_once = std::max<int64_t>(1, kColumnsAtOnce / m), parts = parts_for(slots);
    for_each_part(parts, [&](int64_t part) {
      int64_t next[std::max<int64_t>(kColumnsAtOnce, 256)];
      const Range mine = equal_share(pattern.groups, part, parts);
      for (int64_t g = mine.begin; g < mine.end; g += at_once)
        nm_by_column(pattern, data_of<T>(weights), {g, std::min(g + at_once, mine.end)}, next, ptr.get(), idx.get(),
                     ordered.get());
    });
    csr_product<T>(data_of<T>(input), {
                                          .values = ordered.get(),
                                          .bias = data_of<T>(offset),
                                          .y = static_cast<T*>(y.data_ptr()),
                                          .ptr = ptr.get(),
                                          .idx = idx.get(),
                                          .batch = x.size(0),
                                          .in_features = pattern.out_features,
                                          .out_features = in_features,
                                      });
  });
  return y;
}

Tensor nm_sampled(const Tensor& a, const Tensor& b, const Tensor& positions, int64_t n, int64_t m) {
  const Tensor left = compsparse::as_contiguous(a), right = compsparse::as_contiguous(b);
  const Tensor packed = compsparse::as_contiguous(positions);
  const NMPattern pattern = pattern_of(packed, b.size(1), n, m);
  Tensor values = new_tensor(a, {pattern.out_features, pattern.groups, n});
  const Rows rows(pattern);
  with_type(a, [&]<typename T>(T) {
    T* to = static_cast<T*>(values.data_ptr());
    Scratch<T> entries;
    if (pattern.is_ragged()) entries = make_scratch<T>(rows.entries());
    csr_sampled<T>(data_of<T>(left), data_of<T>(right),
                   {
                       .values = entries ? entries.get() : to,
                       .ptr = rows.ptr.get(),
                       .idx = rows.idx.get(),
                       .batch = a.size(0),
                       .in_features = b.size(1),
                       .out_features = a.size(1),
                   });
    if (!entries) return;
    rows.for_each_row([&](int64_t entry, int64_t slot, int64_t count) {
      std::copy(entries.get() + entry, entries.get() + entry + count, to + slot);
      std::fill(to + slot + count, to + slot + pattern.slots(), T(0));
    });
  });
  return values;
}

}  // namespace
}  // namespace compsparse

STABLE_TORCH_LIBRARY_IMPL(compsparse, CPU, m) {
  m.impl("nm_linear", TORCH_BOX(&compsparse::nm_linear));
  m.impl("nm_linear_transposed", TORCH_BOX(&compsparse::nm_linear_transposed));
  m.impl("nm_sampled", TORCH_BOX(&compsparse::nm_sampled));
}
