// How work is split over threads. A part owns its outputs alone, so results do not depend on the number of parts.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "types.h"

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

// Runs body(ptr, rows) on equal shares of the entries, one a thread. Each gets `ptr` clamped to its own share, and the
// rows that have entries in it: unlike `balanced_rows` this divides a row that is longer than a share.
template <class Body>
void for_each_entry_share(const int64_t* ptr, int64_t rows, int64_t parts, const Body& body) {
  if (parts == 1) return body(ptr, Range{0, rows});
  for_each_part(parts, [&](int64_t part) {
    const Range mine = equal_share(ptr[rows], part, parts);
    if (mine.begin == mine.end) return;
    const auto row_of = [&](int64_t entry) { return std::upper_bound(ptr, ptr + rows, entry) - ptr - 1; };
    const Range mine_rows = {row_of(mine.begin), row_of(mine.end - 1) + 1};
    std::vector<int64_t> clamped(ptr, ptr + mine_rows.end + 1);
    for (int64_t& offset : clamped) offset = std::clamp(offset, mine.begin, mine.end);
    body(clamped.data(), mine_rows);
  });
}

// Parts worth starting for `work` multiply-adds: a thread that gets less than its start costs is not started.
inline int64_t parts_for(int64_t work) {
  constexpr int64_t least = 1 << 16;
  return std::clamp<int64_t>(work / least, 1, torch::stable::get_num_threads());
}

}  // namespace compsparse
