// Matrix transposition through shared memory, so that both sides are read and written along their rows.
#pragma once

#include "numbers.cuh"

namespace compsparse::cuda {

constexpr int TransposeTile = 32;
constexpr int TransposeRows = 8;  // rows of a tile that a block moves at a time

// from [rows, columns], rows `from_stride` apart -> to [columns, to_stride], zero beyond `rows`.
template <typename T>
struct Transposition {
  const T* from;
  T* to;
  int64_t rows;
  int64_t columns;
  int64_t from_stride;
  int64_t to_stride;
};

template <typename T>
__global__ void __launch_bounds__(TransposeTile* TransposeRows) transpose(Transposition<T> t) {
  constexpr int Pitch = TransposeTile + 1;  // odd, so that a column of the tile lies in different banks
  CS_SHARED(T, tile, TransposeTile * Pitch);
  const int64_t tiles_down = ceil_div(t.to_stride, TransposeTile);
  const int64_t first_row = blockIdx.x % tiles_down * TransposeTile;
  const int64_t first_column = blockIdx.x / tiles_down * TransposeTile;
  const int across = threadIdx.x;

  for (int down = threadIdx.y; down < TransposeTile; down += TransposeRows) {
    const int64_t row = first_row + down, column = first_column + across;
    const bool exists = row < t.rows && column < t.columns;
    tile[down * Pitch + across] = exists ? t.from[row * t.from_stride + column] : narrow<T>(0);
  }
  __syncthreads();
  for (int down = threadIdx.y; down < TransposeTile; down += TransposeRows) {
    const int64_t row = first_column + down, column = first_row + across;
    if (row < t.columns && column < t.to_stride) t.to[row * t.to_stride + column] = tile[across * Pitch + down];
  }
}

template <typename T, typename Stream>
void launch_transpose(const Transposition<T>& t, Stream stream) {
  const int64_t tiles_down = ceil_div(t.to_stride, TransposeTile);
  const int64_t blocks = tiles_down * ceil_div(t.columns, TransposeTile);
  if (blocks == 0) return;
  CS_LAUNCH(transpose<T>, grid_of(blocks), dim3(TransposeTile, TransposeRows), 0, stream, t);
}

}  // namespace compsparse::cuda
