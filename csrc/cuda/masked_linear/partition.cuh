// How the work on a CSR matrix is split over warps: evenly, whatever the lengths of its rows, without preprocessing.
//
// A unit of work is an entry or the end of a row (empty rows cost something too), in the order of the matrix: row r
// begins at unit ptr[r] + r. Every warp takes a window of WarpWork units and finds its first row by a search.
//
// A row with the work of several blocks is cut into pieces of about one block's. The blocks that follow the one in
// which it begins have no other row, so they take the pieces after the first.
#pragma once

#include "../numbers.cuh"

namespace compsparse::cuda {

constexpr int Warps = 8;  // of a block
constexpr int BlockThreads = Warps * WarpSize;
constexpr int BlocksAtOnce =
    4;  // half of the warps of a multiprocessor: a kernel that would take more registers is held to that
constexpr int64_t WarpWork = 256;
constexpr int64_t BlockWork = Warps * WarpWork;

// Blocks whose warps together have a window for every unit.
__host__ __device__ constexpr int64_t blocks_for(int64_t rows, int64_t entries) {
  return ceil_div(rows + entries, BlockWork);
}

// Into how many pieces a row of so many entries is cut. The windows of that many blocks lie between its ends, but for
// the first, in which it begins.
__host__ __device__ constexpr int64_t pieces_of(int64_t length) { return length < BlockWork ? 1 : length / BlockWork; }

__device__ inline int64_t first_unit(const int64_t* ptr, int64_t row) { return ptr[row] + row; }

// The first row that begins at `unit` or later, `rows` if none does. The lanes of the warp probe together: three loads
// find one row of 32768 where a binary search waits for fifteen.
__device__ inline int64_t first_row_from(const int64_t* ptr, int64_t rows, int64_t unit) {
  const int lane = threadIdx.x % WarpSize;
  int64_t low = 0, high = rows;
  while (low < high) {
    const int64_t step = ceil_div(high - low, WarpSize), probe = low + lane * step;
    const bool is_before = probe < high && first_unit(ptr, probe) < unit;
    const int before = __popc(__ballot_sync(WholeWarp, is_before));
    if (before == 0) break;
    high = min(high, low + before * step);
    low += (before - 1) * step + 1;
  }
  return low;
}

// The row whose entries or end are at `unit`; the last one beyond all.
__device__ inline int64_t row_at(const int64_t* ptr, int64_t rows, int64_t unit) {
  return first_row_from(ptr, rows, unit + 1) - 1;
}

// A piece of a row that other blocks have pieces of.
struct Piece {
  int64_t row;  // -1: none
  int64_t number;
  int64_t count;
};

// The piece of `block` that is not the first one of its row.
__device__ inline Piece later_piece(const int64_t* ptr, int64_t rows, int64_t block) {
  const int64_t row = row_at(ptr, rows, block * BlockWork);
  const int64_t number = block - first_unit(ptr, row) / BlockWork, count = pieces_of(ptr[row + 1] - ptr[row]);
  return number > 0 && number < count ? Piece{row, number, count} : Piece{-1, 0, 1};
}

}  // namespace compsparse::cuda
