// Unstructured sparse products. The batch is the vector axis: matrices come transposed, as panels [features, stride]
// with a batch row in each column, so that one entry of the weight multiplies a contiguous piece of a panel row.
//
// A warp is Slices x Group lanes: the Group lanes of a slice hold V batch columns each, and the slices share the
// entries of a row. A wide batch takes few slices with long loads; a batch of one is 32 slices of one lane, a reduction
// over the entries.
//
// product:  each row is summed by the warp in whose window it begins (partition.cuh). A row of WarpWork entries or more
//           is the last of its window; the warps of the block share it. One with the work of several blocks is cut
//           into pieces, whose sums a second launch adds.
// sampled:  entries do not depend on each other, so windows cut through rows.
//
// The order in which an element is summed depends on its row's length and the batch alone: results are the same, bit
// for bit, from run to run. There are no atomics.
#pragma once

#include "partition.cuh"

namespace compsparse::cuda {

// y = x W^T + b on panels: x [in, stride], y [rows, stride], W [rows, in] in CSR, with columns of int16 or int32.
template <typename T, typename Index>
struct MaskedProduct {
  const T* x;
  const T* values;  // [entries]
  const T* bias;    // [rows] or null
  T* y;
  const int64_t* ptr;  // [rows + 1]
  const Index* idx;    // [entries]
  int64_t rows;
  int64_t entries;
  int64_t stride;
  Sum<T>* pieces;  // [blocks_for(rows, entries), stride], or null where no row is so long that it is cut
};

// values[p] = sum over n of a[row of p, n] b[idx[p], n] on panels a [rows, stride], b [in, stride]; the columns of the
// panels beyond the batch are zero.
template <typename T, typename Index>
struct SampledProduct {
  const T* a;
  const T* b;
  T* values;           // [entries]
  const int64_t* ptr;  // [rows + 1]
  const Index* idx;    // [entries]
  int64_t rows;
  int64_t entries;
  int64_t stride;
};

// The place of a thread in its block and warp.
template <int V, int Group_>
struct Place {
  static constexpr int Group = Group_;
  static constexpr int Slices = WarpSize / Group;
  static constexpr int Width = Group * V;  // batch columns of a warp
  int warp = threadIdx.x / WarpSize;
  int lane = threadIdx.x % WarpSize;
  int slice = lane / Group;
  int column = lane % Group * V;  // first of the thread's
};

// Adds the slice's share of the entries [begin, end) to the sums of V batch columns.
template <int V, int Slices, typename T, typename Index>
__device__ inline void add_entries(const MaskedProduct<T, Index>& p, int64_t begin, int64_t end, int slice,
                                   int64_t column, Sum<T> (&sums)[V]) {
  constexpr int Ahead = 4;  // loads in flight
  const T* const x = p.x + column;
  int64_t entry = begin + slice;
  for (; entry + (Ahead - 1) * Slices < end; entry += Ahead * Slices) {
    Vector<T, V> inputs[Ahead];
    Sum<T> weights[Ahead];
#pragma unroll
    for (int k = 0; k < Ahead; ++k) {
      inputs[k] = load<V>(x + p.idx[entry + k * Slices] * p.stride);
      weights[k] = widen(p.values[entry + k * Slices]);
    }
#pragma unroll
    for (int k = 0; k < Ahead; ++k)
#pragma unroll
      for (int i = 0; i < V; ++i) sums[i] += weights[k] * widen(inputs[k].at[i]);
  }
  for (; entry < end; entry += Slices) {
    const Vector<T, V> inputs = load<V>(x + p.idx[entry] * p.stride);
    const Sum<T> weight = widen(p.values[entry]);
#pragma unroll
    for (int i = 0; i < V; ++i) sums[i] += weight * widen(inputs.at[i]);
  }
}

// Sums over the slices of a warp; every lane gets the sums of its columns.
template <int Group, int V, typename S>
__device__ inline void add_slices(S (&sums)[V]) {
#pragma unroll
  for (int distance = WarpSize / 2; distance >= Group; distance /= 2)
#pragma unroll
    for (int i = 0; i < V; ++i) sums[i] += __shfl_xor_sync(WholeWarp, sums[i], distance);
}

// One row, or a piece of it, summed by all warps of the block: each takes a stretch, and one thread per column adds up.
template <int V, int Group, typename T, typename Index>
__device__ inline void product_long_row(const MaskedProduct<T, Index>& p, int64_t block, Piece piece,
                                        const Place<V, Group>& place, int64_t first_column, int64_t column,
                                        Sum<T>* partial) {
  constexpr int Width = Place<V, Group>::Width;
  const int64_t length = p.ptr[piece.row + 1] - p.ptr[piece.row], share = ceil_div(length, piece.count);
  const int64_t begin = p.ptr[piece.row] + piece.number * share;
  const int64_t end = min(begin + share, p.ptr[piece.row + 1]), stretch = ceil_div(share, Warps);
  const int64_t from = begin + place.warp * stretch;
  Sum<T> sums[V] = {};
  add_entries<V, Place<V, Group>::Slices>(p, from, min(from + stretch, end), place.slice, column, sums);
  add_slices<Group>(sums);
  if (place.slice == 0)
#pragma unroll
    for (int i = 0; i < V; ++i) partial[place.warp * Width + place.column + i] = sums[i];
  __syncthreads();
  const int mine = threadIdx.x;
  if (mine < Width && first_column + mine < p.stride) {
    Sum<T> sum = p.bias && piece.number == 0 ? widen(p.bias[piece.row]) : Sum<T>(0);
    for (int warp = 0; warp < Warps; ++warp) sum += partial[warp * Width + mine];
    if (piece.count > 1)
      p.pieces[block * p.stride + first_column + mine] = sum;
    else
      p.y[piece.row * p.stride + first_column + mine] = narrow<T>(sum);
  }
  __syncthreads();
}

// The rows that begin in the warp's window, but for a last one that is long, which is returned; -1 if there is none.
template <int V, int Group, typename T, typename Index>
__device__ inline int64_t product_window(const MaskedProduct<T, Index>& p, int64_t window, const Place<V, Group>& place,
                                         bool has_columns, int64_t column) {
  const int64_t end = (window + 1) * WarpWork;
  for (int64_t row = first_row_from(p.ptr, p.rows, window * WarpWork); row < p.rows; ++row) {
    const int64_t from = p.ptr[row], to = p.ptr[row + 1];
    if (from + row >= end) break;
    if (to - from >= WarpWork) return row;
    Sum<T> sums[V] = {};
    add_entries<V, Place<V, Group>::Slices>(p, from, to, place.slice, column, sums);
    add_slices<Group>(sums);
    if (place.slice != 0 || !has_columns) continue;
    const Sum<T> bias = p.bias ? widen(p.bias[row]) : Sum<T>(0);
#pragma unroll
    for (int i = 0; i < V; ++i) sums[i] += bias;
    store<V>(p.y + row * p.stride + column, sums);
  }
  return -1;
}

template <typename T, typename Index, int V, int Group>
__global__ void __launch_bounds__(BlockThreads) product(MaskedProduct<T, Index> p) {
  CS_SHARED(Sum<T>, partial, Warps * Group * V);
  CS_SHARED(int64_t, long_rows, Warps);
  const Place<V, Group> place;
  // Blocks that follow each other share a piece of the batch, which stays in the L2 cache.
  const int64_t blocks = blocks_for(p.rows, p.entries);
  const int64_t block = blockIdx.x % blocks, first_column = blockIdx.x / blocks * place.Width;
  const bool has_columns = first_column + place.column < p.stride;
  const int64_t column = has_columns ? first_column + place.column : 0;  // a load in bounds, for nothing

  const int64_t long_row = product_window<V, Group>(p, block * Warps + place.warp, place, has_columns, column);
  if (place.lane == 0) long_rows[place.warp] = long_row;
  __syncthreads();
  for (int warp = 0; warp < Warps; ++warp) {
    const int64_t row = long_rows[warp];
    if (row < 0) continue;
    const Piece whole_or_first = {row, 0, pieces_of(p.ptr[row + 1] - p.ptr[row])};
    product_long_row<V, Group>(p, block, whole_or_first, place, first_column, column, partial);
  }
  if (!p.pieces) return;
  const Piece later = later_piece(p.ptr, p.rows, block);
  if (later.row >= 0) product_long_row<V, Group>(p, block, later, place, first_column, column, partial);
}

// The rows that were cut: each block has the one that begins in its windows, if there is one, and a piece of the batch.
template <typename T, typename Index>
__global__ void __launch_bounds__(BlockThreads) add_pieces(MaskedProduct<T, Index> p) {
  const int64_t blocks = blocks_for(p.rows, p.entries);
  const int64_t block = blockIdx.x % blocks, column = blockIdx.x / blocks * BlockThreads + threadIdx.x;
  const int64_t row = first_row_from(p.ptr, p.rows, (block + 1) * BlockWork) - 1;
  const int64_t count = pieces_of(p.ptr[row + 1] - p.ptr[row]);
  if (count == 1 || first_unit(p.ptr, row) / BlockWork != block || column >= p.stride) return;
  Sum<T> sum(0);
  for (int64_t piece = 0; piece < count; ++piece) sum += p.pieces[(block + piece) * p.stride + column];
  p.y[row * p.stride + column] = narrow<T>(sum);
}

// Sums each of Count values over Width lanes. Lane l of them gets value l / (Width / Count): at each step half of the
// lanes keeps half of the values, which takes fewer shuffles than a sum of each.
template <int Width, int Count, typename S>
__device__ inline S fold(const S (&sums)[Count], int lane) {
  static_assert(Width >= Count);
  if constexpr (Count == 1) {
    S sum = sums[0];
#pragma unroll
    for (int distance = Width / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(WholeWarp, sum, distance);
    return sum;
  } else {
    constexpr int Half = Count / 2;
    const bool is_upper = lane & (Width / 2);
    S kept[Half];
#pragma unroll
    for (int k = 0; k < Half; ++k) {
      const S given = is_upper ? sums[k] : sums[Half + k];
      kept[k] = (is_upper ? sums[Half + k] : sums[k]) + __shfl_xor_sync(WholeWarp, given, Width / 2);
    }
    return fold<Width / 2>(kept, lane);
  }
}

constexpr int SampledAtOnce = 4;  // entries of a slice

// The products of the row with the panel rows columns[0 .. SampledAtOnce), as far as the batch columns of the thread
// go.
template <int V, int Group, typename T, typename Index>
__device__ inline void multiply_rows(const SampledProduct<T, Index>& s, int64_t row,
                                     const int32_t (&columns)[SampledAtOnce], int column,
                                     Sum<T> (&sums)[SampledAtOnce]) {
#pragma unroll 1  // the loads of one step are enough in flight, and more of them would spill
  for (int64_t n = column; n < s.stride; n += Place<V, Group>::Width) {
    const Vector<T, V> a = load<V>(s.a + row * s.stride + n);
    Vector<T, V> b[SampledAtOnce];
#pragma unroll
    for (int k = 0; k < SampledAtOnce; ++k) b[k] = load<V>(s.b + columns[k] * s.stride + n);
#pragma unroll
    for (int k = 0; k < SampledAtOnce; ++k)
#pragma unroll
      for (int i = 0; i < V; ++i) sums[k] += widen(a.at[i]) * widen(b[k].at[i]);
  }
}

// The entries first, first + Slices, ... of the slice, of which those before `end` exist.
template <int V, int Group, typename T, typename Index>
__device__ inline void sample_entries(const SampledProduct<T, Index>& s, int64_t row, int64_t first, int64_t end,
                                      const Place<V, Group>& place) {
  constexpr int Slices = Place<V, Group>::Slices;
  int32_t columns[SampledAtOnce];
#pragma unroll
  for (int k = 0; k < SampledAtOnce; ++k) columns[k] = s.idx[min(first + k * Slices, end - 1)];
  Sum<T> sums[SampledAtOnce] = {};
  multiply_rows<V, Group>(s, row, columns, place.column, sums);
  if constexpr (Group == 1) {
#pragma unroll
    for (int k = 0; k < SampledAtOnce; ++k)
      if (first + k * Slices < end) s.values[first + k * Slices] = narrow<T>(sums[k]);
  } else {
    constexpr int Owners = Group / SampledAtOnce;  // lanes that get the same sum
    const Sum<T> sum = fold<Group>(sums, place.lane);
    const int64_t entry = first + place.lane % Group / Owners * Slices;
    if (place.lane % Owners == 0 && entry < end) s.values[entry] = narrow<T>(sum);
  }
}

template <typename T, typename Index, int V, int Group>
__global__ void __launch_bounds__(BlockThreads, BlocksAtOnce) sampled(SampledProduct<T, Index> s) {
  const Place<V, Group> place;
  const int64_t begin = (int64_t{blockIdx.x} * Warps + place.warp) * WarpWork, end = begin + WarpWork;
  for (int64_t row = row_at(s.ptr, s.rows, begin); row < s.rows; ++row) {
    if (first_unit(s.ptr, row) >= end) break;
    const int64_t from = max(s.ptr[row], begin - row), to = min(s.ptr[row + 1], end - row);
    for (int64_t entry = from; entry < to; entry += SampledAtOnce * place.Slices)
      sample_entries<V, Group>(s, row, entry + place.slice, to, place);
  }
}

// ordered[p] = values[perm[p]]: once a call, since every piece of the batch reads the values.
template <typename T, typename Position>
__global__ void __launch_bounds__(BlockThreads)
    gather(const T* values, const Position* perm, int64_t count, T* ordered) {
  const int64_t p = int64_t{blockIdx.x} * BlockThreads + threadIdx.x;
  if (p < count) ordered[p] = values[perm[p]];
}

}  // namespace compsparse::cuda
