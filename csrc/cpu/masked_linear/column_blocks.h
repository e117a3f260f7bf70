// The entries of some rows, block of columns by block of columns, for the product of wide inputs. A row has few entries
// in a block, so that the processor would guess wrongly where they end nearly every time; so rows with as many of them
// follow each other.
#pragma once

#include "../simd.h"
#include "table.h"

namespace {

using namespace compsparse;

// How many of the entries, in ascending order, lie in columns below `limit`. `some` at a time without a branch.
template <typename Index>
COMPSPARSE_INLINE int64_t count_below(const Index* idx, int64_t count, int64_t limit, int64_t some) {
  for (int64_t found = 0;;) {
    const int64_t looked_at = min64(some, count - found);
    Index below = 0;
    for (int64_t i = 0; i < looked_at; ++i) below += idx[found + i] < Index(limit);
    found += below;
    if (below < looked_at || found == count) return found;
  }
}

// Whole vectors where the `room` elements from `from` on allow it: what is too much is written over by what follows.
template <typename T, int L>
COMPSPARSE_INLINE void copy_entries(const T* from, int64_t count, int64_t room, T* to) {
  if (round_up(count, L) > room) {
    for (int64_t i = 0; i < count; ++i) to[i] = from[i];
    return;
  }
  for (int64_t i = 0; i < count; i += L) store<T, L>(to + i, load<T, L>(from + i));
}

// How many entries each row has in each block, and in `places` how many rows have as many of them.
template <typename T, typename Index>
void count_entries(const MaskedProduct<T, Index>& p, const ColumnBlocks<Sum<T>, Index>& blocks) {
  const int64_t rows = blocks.rows.end - blocks.rows.begin, last = blocks.count - 1;
  const int64_t* ptr = p.ptr + blocks.rows.begin;
  const int64_t mean = (ptr[rows] - ptr[0]) / max64(rows * blocks.count, 1);
  const int64_t some = round_up(min64(mean + mean / 2, blocks.columns) + 1, 16);
  for (int64_t i = 0; i < blocks.count * (blocks.columns + 1); ++i) blocks.places[i] = 0;
  for (int64_t row = 0; row < rows; ++row) {
    int64_t entry = ptr[row];
    for (int64_t block = 0; block <= last; ++block) {
      const int64_t left = ptr[row + 1] - entry, limit = (block + 1) * blocks.columns;
      const int64_t count = block < last ? count_below(p.idx + entry, left, limit, some) : left;
      blocks.counts[block * rows + row] = count;
      ++blocks.places[block * (blocks.columns + 1) + min64(count, blocks.columns)];
      entry += count;
    }
  }
}

// The rows of one block by their number of entries.
inline void sort_segments(const int32_t* counts, int64_t rows, int64_t columns, int32_t* places, Segment* sorted) {
  int32_t place = 0;
  for (int64_t i = 0; i <= columns; ++i) {
    const int32_t size = places[i];
    places[i] = place;
    place += size;
  }
  for (int64_t row = 0; row < rows; ++row) sorted[places[min64(counts[row], columns)]++] = {int32_t(row), counts[row]};
}

template <typename T, int L, typename Index>
void cut_rows(const MaskedProduct<T, Index>& p, const ColumnBlocks<Sum<T>, Index>& blocks) {
  const int64_t rows = blocks.rows.end - blocks.rows.begin, nnz = p.ptr[p.out_features];
  count_entries(p, blocks);
  for (int64_t row = 0; row < rows; ++row) blocks.next[row] = p.ptr[blocks.rows.begin + row];
  Sum<T>* values = blocks.values;
  Index* idx = blocks.idx;
  for (int64_t block = 0; block < blocks.count; ++block) {
    Segment* const segments = blocks.segments + block * rows;
    sort_segments(blocks.counts + block * rows, rows, blocks.columns, blocks.places + block * (blocks.columns + 1),
                  segments);
    for (const Segment* s = segments; s < segments + rows; ++s) {
      int64_t& from = blocks.next[s->row];
      copy_entries<Sum<T>, L>(p.values + from, s->count, nnz - from, values);
      copy_entries<Index, L>(p.idx + from, s->count, nnz - from, idx);
      from += s->count, values += s->count, idx += s->count;
    }
  }
}

}  // namespace
