// How the rows of W multiply a panel: as they are, or by blocks of columns where inputs are wide.
#pragma once

#include <algorithm>

#include "../partition.h"
#include "../scratch.h"
#include "table.h"

namespace compsparse {

// Columns of a block, where the entries are multiplied in blocks of columns, and 0 where not: that is for panels too
// wide for the first-level cache, and pays for sums that go to memory and back where a block has so many entries of a
// row, and for its making where the batch has so many rows. It is the order of summation, so it follows from shapes
// alone.
template <typename T, typename Index>
int64_t block_columns(const MaskedProduct<T, Index>& p) {
  constexpr int64_t least_entries = 200, least_in_block = 20;
  const int64_t nnz = p.ptr[p.out_features];
  if (nnz < least_entries * p.out_features) return 0;
  for (const int64_t columns : {256, 512})
    if (p.in_features >= 4 * columns && nnz * columns >= least_in_block * p.in_features * p.out_features)
      return p.batch >= columns / 2 ? columns : 0;
  return 0;
}

// Multiplies panels by the rows of W as they are.
template <typename T, typename Index>
struct PlainRows {
  const IndexedKernels<T, Index>& kernel;
  const MaskedProduct<T, Index>& p;
  int64_t parts;

  // By all rows, or those of the part alone.
  void multiply(int64_t part, bool all, const Sum<T>* panel, Range batch) const {
    kernel.product(p, panel, batch,
                   all ? Range{0, p.out_features} : balanced_rows(p.ptr, p.out_features, 1, part, parts));
  }
};

// Multiplies panels by blocks of columns of W, made once a call in pieces of its rows, as many for each part.
template <typename T, typename Index>
class BlockedRows {
 public:
  BlockedRows(const IndexedKernels<T, Index>& kernel, const MaskedProduct<T, Index>& p, int64_t panel_rows,
              int64_t columns, int64_t parts)
      : kernel_(kernel),
        p_(p),
        parts_(parts),
        pieces_(parts * ((p.out_features + parts * kRows - 1) / (parts * kRows))),
        columns_(columns),
        blocks_((p.in_features + columns - 1) / columns),
        values_(make_scratch<Sum<T>>(p.ptr[p.out_features] + pieces_ * batch_lanes)),
        idx_(make_scratch<Index>(p.ptr[p.out_features] + pieces_ * batch_lanes)),
        segments_(make_scratch<Segment>(blocks_ * p.out_features)),
        next_(make_scratch<int64_t>(p.out_features)),
        counts_(make_scratch<int32_t>(blocks_ * p.out_features)),
        places_(make_scratch<int32_t>(pieces_ * blocks_ * (columns + 1))) {
    int64_t most = 0;
    for (int64_t piece = 0; piece < pieces_; ++piece) most = std::max(most, rows(piece).end - rows(piece).begin);
    sums_size_ = (most + batch_lanes) * panel_rows;
    sums_ = make_scratch<Sum<T>>(parts * sums_size_);
    for_each_part(parts, [&](int64_t part) {
      const Range mine = equal_share(pieces_, part, parts_);
      for (int64_t piece = mine.begin; piece < mine.end; ++piece) kernel_.cut(p_, piece_of(piece));
    });
  }

  void multiply(int64_t part, bool all, const Sum<T>* panel, Range batch) const {
    const Range mine = all ? Range{0, pieces_} : equal_share(pieces_, part, parts_);
    for (int64_t piece = mine.begin; piece < mine.end; ++piece)
      kernel_.product_blocked(p_, piece_of(piece), panel, batch, sums_.get() + part * sums_size_);
  }

 private:
  static constexpr int64_t kRows = 512;  // of a piece: their sums and a block of a panel fit in the second-level cache

  Range rows(int64_t piece) const { return balanced_rows(p_.ptr, p_.out_features, 1, piece, pieces_); }

  ColumnBlocks<Sum<T>, Index> piece_of(int64_t piece) const {
    const Range mine = rows(piece);
    const int64_t entry = p_.ptr[mine.begin] + piece * batch_lanes;
    return {
        .rows = mine,
        .columns = columns_,
        .count = blocks_,
        .values = values_.get() + entry,
        .idx = idx_.get() + entry,
        .segments = segments_.get() + blocks_ * mine.begin,
        .next = next_.get() + mine.begin,
        .counts = counts_.get() + blocks_ * mine.begin,
        .places = places_.get() + piece * blocks_ * (columns_ + 1),
    };
  }

  const IndexedKernels<T, Index>& kernel_;
  const MaskedProduct<T, Index>& p_;
  int64_t parts_, pieces_, columns_, blocks_, sums_size_;
  Scratch<Sum<T>> values_;
  Scratch<Index> idx_;
  Scratch<Segment> segments_;
  Scratch<int64_t> next_;
  Scratch<int32_t> counts_, places_;
  Scratch<Sum<T>> sums_;
};

}  // namespace compsparse
