// Launches of the kernels of kernel.cuh on row-major matrices: transposes to panels, picks the shape of the warps.
// Scratch comes from the caller, whose allocator knows the stream.
#pragma once

#include "../transpose.cuh"
#include "kernel.cuh"

namespace compsparse::cuda {

// Columns of a panel: the batch, in whole vectors. A batch of one is its own panel.
template <typename T>
int64_t panel_stride(int64_t batch) {
  return batch == 1 ? 1 : ceil_div(batch, WidestVector<T>) * WidestVector<T>;
}

// Elements of the scratch that a panel of these features needs.
template <typename T>
int64_t panel_size(int64_t batch, int64_t features) {
  return batch == 1 ? 0 : panel_stride<T>(batch) * features;
}

// Sums of the scratch for rows that are cut, which only a wide matrix has.
template <typename T>
int64_t pieces_size(int64_t batch, int64_t in_features, int64_t out_features, int64_t entries) {
  return pieces_of(in_features) == 1 ? 0 : blocks_for(out_features, entries) * panel_stride<T>(batch);
}

// Calls visit.template operator()<V, Group>() with the shape of a warp for this panel; see kernel.cuh.
template <typename T, typename Visit>
void with_warp_shape(int64_t stride, const Visit& visit) {
  constexpr int Widest = WidestVector<T>;
  if (stride == 1) return visit.template operator()<1, 1>();
  if (stride <= Widest) return visit.template operator()<Widest, 1>();
  if (stride <= 8 * Widest) return visit.template operator()<Widest, 4>();
  return visit.template operator()<Widest, 16>();
}

// x [batch, features] as a panel, in `scratch` where the batch is not one.
template <typename T, typename Stream>
const T* to_panel(const T* x, int64_t batch, int64_t features, T* scratch, Stream stream) {
  if (batch == 1) return x;
  launch_transpose<T>({x, scratch, batch, features, features, panel_stride<T>(batch)}, stream);
  return scratch;
}

template <typename T, typename Index>
struct MaskedLinearCall {
  const T* x;       // [batch, in]
  const T* values;  // [entries], in the order of the entries
  const T* bias;    // [out] or null
  T* y;             // [batch, out]
  const int64_t* ptr;
  const Index* idx;
  int64_t batch;
  int64_t in_features;
  int64_t out_features;
  int64_t entries;
  T* x_scratch;            // panel_size(batch, in)
  T* y_scratch;            // panel_size(batch, out)
  Sum<T>* pieces_scratch;  // pieces_size(batch, in, out, entries)
};

template <typename T, typename Index, typename Stream>
void launch_masked_linear(const MaskedLinearCall<T, Index>& call, Stream stream) {
  if (call.batch == 0 || call.out_features == 0) return;
  const MaskedProduct<T, Index> p = {
      .x = to_panel(call.x, call.batch, call.in_features, call.x_scratch, stream),
      .values = call.values,
      .bias = call.bias,
      .y = call.batch == 1 ? call.y : call.y_scratch,
      .ptr = call.ptr,
      .idx = call.idx,
      .rows = call.out_features,
      .entries = call.entries,
      .stride = panel_stride<T>(call.batch),
      .pieces = pieces_of(call.in_features) == 1 ? nullptr : call.pieces_scratch,
  };
  with_warp_shape<T>(p.stride, [&]<int V, int Group>() {
    const int64_t pieces = ceil_div(p.stride, Place<V, Group>::Width);
    const dim3 grid = grid_of(blocks_for(p.rows, p.entries) * pieces);
    CS_LAUNCH((product<T, Index, V, Group>), grid, dim3(BlockThreads), 0, stream, p);
  });
  if (p.pieces) {
    const dim3 grid = grid_of(blocks_for(p.rows, p.entries) * ceil_div(p.stride, BlockThreads));
    CS_LAUNCH((add_pieces<T, Index>), grid, dim3(BlockThreads), 0, stream, p);
  }
  if (call.batch > 1)
    launch_transpose<T>({p.y, call.y, call.out_features, call.batch, p.stride, call.out_features}, stream);
}

template <typename T, typename Index>
struct SampledMatmulCall {
  const T* a;  // [batch, out]
  const T* b;  // [batch, in]
  T* values;   // [entries]
  const int64_t* ptr;
  const Index* idx;
  int64_t batch;
  int64_t in_features;
  int64_t out_features;
  int64_t entries;
  T* a_scratch;  // panel_size(batch, out)
  T* b_scratch;  // panel_size(batch, in)
};

template <typename T, typename Index, typename Stream>
void launch_sampled_matmul(const SampledMatmulCall<T, Index>& call, Stream stream) {
  if (call.entries == 0) return;
  const SampledProduct<T, Index> s = {
      .a = to_panel(call.a, call.batch, call.out_features, call.a_scratch, stream),
      .b = to_panel(call.b, call.batch, call.in_features, call.b_scratch, stream),
      .values = call.values,
      .ptr = call.ptr,
      .idx = call.idx,
      .rows = call.out_features,
      .entries = call.entries,
      .stride = panel_stride<T>(call.batch),
  };
  with_warp_shape<T>(s.stride, [&]<int V, int Group>() {
    const dim3 grid = grid_of(blocks_for(s.rows, s.entries));
    CS_LAUNCH((sampled<T, Index, V, Group>), grid, dim3(BlockThreads), 0, stream, s);
  });
}

template <typename T, typename Position, typename Stream>
void launch_gather(const T* values, const Position* perm, int64_t count, T* ordered, Stream stream) {
  if (count == 0) return;
  const dim3 grid = grid_of(ceil_div(count, BlockThreads));
  CS_LAUNCH((gather<T, Position>), grid, dim3(BlockThreads), 0, stream, values, perm, count, ordered);
}

}  // namespace compsparse::cuda
