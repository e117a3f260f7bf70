// How work is split over threads. A part owns its outputs alone, so results do not depend on the number of parts.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "kernels.h"

namespace compsparse {

// Runs body(part) for part = 0 .. parts, one part a thread.
template <class Body>
void for_each_part(int64_t parts, const Body& body) {
  if (parts == 1) return body(0);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) body(part);
  });
}

inline Range equal_share(int64_t total, int64_t part, int64_t parts) {
  return {total * part / parts, total * (part + 1) / parts};
}

// Rows of a compressed pattern such that every part has about the same number of entries plus `row_cost` per row.
inline Range balanced_rows(const int64_t* ptr, int64_t rows, int64_t row_cost, int64_t part, int64_t parts) {
  const auto cost = [&](int64_t row) { return ptr[row] + row * row_cost; };
  const auto boundary = [&](int64_t k) {
    if (k == parts) return rows;
    const int64_t wanted = cost(rows) / parts * k;
    int64_t low = 0, high = rows;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (cost(middle) < wanted)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  };
  return {boundary(part), boundary(part + 1)};
}

// Parts worth starting for `work` multiply-adds: a thread that gets less than its start costs is not started.
inline int64_t parts_for(int64_t work) {
  constexpr int64_t least = 1 << 16;
  return std::clamp<int64_t>(work / least, 1, torch::stable::get_num_threads());
}

}  // namespace compsparse
