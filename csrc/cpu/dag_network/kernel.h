// A tile of the batch goes through every node of a graph, with the batch as the vector axis: nodes of any width fill
// whole vectors, and a tile's activations stay in cache.
//
// forward:   the outputs of a node, O at a time, stay in registers over all that it reads.
// backward:  the forward again; then from the last vertex to the first: its gradient is the sum over its children, in
//            registers, and takes the place of its activation, which nobody needs any more; weight gradients are summed
//            over the tile in registers, and over tiles in a buffer.
//
// Half precision is widened where it enters a tile, and rounded where results leave it; between them all is float.
//
// Lanes are independent, and tiles are added in a fixed order, so results do not depend on the number of threads.
#pragma once

#include "../activations.h"
#include "../panels.h"
#include "table.h"

namespace {

using namespace compsparse;

template <typename T, int Lanes_, int Accumulators_>
struct Target {
  static constexpr int Lanes = Lanes_;
  static constexpr int MaxVectors = 3;
  static constexpr int MinLanes = 16 / sizeof(T);
  // Outputs at a time for tiles of B vectors: a power of two, since widths usually are multiples of one.
  template <int B>
  static constexpr int outputs() {
    int fit = 1;
    while (2 * fit * B <= Accumulators_) fit *= 2;
    return fit;
  }
};

template <typename T, int L, int B>
struct Tile {
  static constexpr int64_t Rows = B * L;
  const DagNodes<T>& net;
  T* values;      // [columns][Rows]
  T* slopes;      // [columns][Rows]: the activation's derivative, or null where nobody asks for it
  int64_t valid;  // batch rows that exist
  T* sums;

  T* column(int64_t c) const { return values + c * Rows; }
  const DagKind<T>& kind(const int32_t* node) const { return net.kinds[node[0]]; }
  const int32_t* node(int64_t i) const { return net.nodes + 4 * i; }
};

// Outputs o .. o + O of a node.
template <typename T, int L, int B, int O>
void node_outputs(const Tile<T, L, B>& t, int64_t i, int64_t o, bool relu) {
  const int32_t* node = t.node(i);
  const DagKind<T>& kind = t.kind(node);
  const T* weights = kind.weights + (node[1] * kind.out + o) * kind.fan_in;
  Vec<T, L> acc[O][B] = {};
  if (kind.biases) {
    const T* bias = kind.biases + node[1] * kind.out + o;
    COMPSPARSE_UNROLL for (int j = 0; j < O; ++j) COMPSPARSE_UNROLL for (int b = 0; b < B; ++b) acc[j][b] += bias[j];
  }
  for (int64_t e = t.net.edge_ptr[i]; e < t.net.edge_ptr[i + 1]; ++e) {
    const int32_t* edge = t.net.edges + 3 * e;
    multiply_panel<T, L, B, O>(weights + edge[2], kind.fan_in, 1, t.column(edge[0]), edge[1], acc);
  }
  T* out = t.column(node[2] + o);
  COMPSPARSE_UNROLL for (int j = 0; j < O; ++j) COMPSPARSE_UNROLL for (int b = 0; b < B; ++b) {
    if (relu) acc[j][b] = activate<T, L>(acc[j][b], Activation::relu);
    store<T, L>(out + (j * B + b) * L, acc[j][b]);
  }
}

template <typename T, int L, int B, int O>
void node_forward(const Tile<T, L, B>& t, int64_t i, int64_t o, int64_t out, bool relu) {
  for (; o + O <= out; o += O) node_outputs<T, L, B, O>(t, i, o, relu);
  if constexpr (O > 1) {
    if (o < out) node_forward<T, L, B, O / 2>(t, i, o, out, relu);
  }
}

template <typename T, int L, int B, class Target>
void tile_forward(const Tile<T, L, B>& t, bool for_backward) {
  for (int64_t i = 0; i < t.net.num_nodes; ++i) {
    if (for_backward && t.node(i)[3] >= 0) continue;  // nobody reads a sink
    const DagKind<T>& kind = t.kind(t.node(i));
    const Activation activation = kind.linear ? Activation::none : t.net.activation;
    node_forward<T, L, B, Target::template outputs<B>()>(t, i, 0, kind.out, activation == Activation::relu);
    if (activation == Activation::none || activation == Activation::relu) continue;
    const int64_t begin = t.node(i)[2] * t.Rows, count = kind.out * t.Rows;
    if (t.slopes)
      activate_with_slope<T, L>(t.values + begin, t.slopes + begin, count, activation);
    else
      activate_row<T, L>(t.values + begin, count, activation);
  }
}

// Channels c .. c + O of the gradient of a vertex: what its children send back, times the slope where it has one.
template <typename T, int L, int B, int O>
void vertex_gradient(const Tile<T, L, B>& t, int64_t vertex, int64_t column, int64_t c, Activation activation) {
  Vec<T, L> acc[O][B] = {};
  for (int64_t e = t.net.child_ptr[vertex]; e < t.net.child_ptr[vertex + 1]; ++e) {
    const int32_t *child = t.net.children + 2 * e, *node = t.node(child[0]);
    const DagKind<T>& kind = t.kind(node);
    const T* weights = kind.weights + node[1] * kind.out * kind.fan_in + child[1] + c;
    multiply_panel<T, L, B, O>(weights, 1, kind.fan_in, t.column(node[2]), kind.out, acc);
  }
  T* out = t.column(column + c);
  const T* slope = t.slopes ? t.slopes + (column + c) * t.Rows : nullptr;
  COMPSPARSE_UNROLL for (int j = 0; j < O * B; ++j) {
    Vec<T, L> gradient = acc[j / B][j % B];
    if (activation == Activation::relu)
      gradient = load<T, L>(out + j * L) <= 0 ? Vec<T, L>{} : gradient;  // NaN lets it through, as in torch
    else if (activation != Activation::none)
      gradient *= load<T, L>(slope + j * L);
    store<T, L>(out + j * L, gradient);
  }
}

template <typename T, int L, int B, int O>
void vertex_backward(const Tile<T, L, B>& t, int64_t vertex, int64_t column, int64_t c, int64_t channels,
                     Activation activation) {
  for (; c + O <= channels; c += O) vertex_gradient<T, L, B, O>(t, vertex, column, c, activation);
  if constexpr (O > 1) {
    if (c < channels) vertex_backward<T, L, B, O / 2>(t, vertex, column, c, channels, activation);
  }
}

// sums[k][v] += sum over batch rows n of x[k][n] * gradient[n][v], k = 0 .. K, for V vectors of outputs.
template <typename T, int L, int V, int K>
COMPSPARSE_INLINE void add_outer(const T* x, int64_t rows, int64_t valid, const T* gradient, T* sums, int64_t stride) {
  Vec<T, L> acc[K][V] = {};
  for (int64_t n = 0; n < valid; ++n) {
    Vec<T, L> g[V];
    COMPSPARSE_UNROLL for (int v = 0; v < V; ++v) g[v] = load<T, L>(gradient + (n * V + v) * L);
    COMPSPARSE_UNROLL for (int k = 0; k < K; ++k) {
      const T input = x[k * rows + n];
      COMPSPARSE_UNROLL for (int v = 0; v < V; ++v) acc[k][v] += g[v] * input;
    }
  }
  COMPSPARSE_UNROLL for (int k = 0; k < K; ++k) COMPSPARSE_UNROLL for (int v = 0; v < V; ++v) {
    T* sum = sums + k * stride + v * L;
    store<T, L>(sum, load<T, L>(sum) + acc[k][v]);
  }
}

template <typename T, int L, int V, int K>
void add_outers(const T* x, int64_t rows, int64_t valid, int64_t k, int64_t channels, const T* gradient, T* sums,
                int64_t stride) {
  for (; k + K <= channels; k += K)
    add_outer<T, L, V, K>(x + k * rows, rows, valid, gradient, sums + k * stride, stride);
  if constexpr (K > 1) {
    if (k < channels) add_outers<T, L, V, K / 2>(x, rows, valid, k, channels, gradient, sums, stride);
  }
}

// Gradients of V vectors of a node's outputs, from `o` on; `stride` is the width of a row of sums.
template <typename T, int L, int V, class Tile>
void weight_panel(const Tile& t, int64_t i, int64_t o, int64_t outputs, T* sums, int64_t stride) {
  constexpr int K = V == 1 ? 16 : 8;  // 16 sums in flight hide the multiplier's latency
  const int32_t* node = t.node(i);
  alignas(64) T gradient[Tile::Rows * V * L];
  pack_panel<T, L>(t.column(node[2] + o), t.Rows, outputs, t.Rows, V * L, gradient);
  Vec<T, L> bias[V] = {};
  for (int64_t n = 0; n < t.valid; ++n)
    COMPSPARSE_UNROLL for (int v = 0; v < V; ++v) bias[v] += load<T, L>(gradient + (n * V + v) * L);
  T* bias_sums = sums + t.kind(node).fan_in * stride + o;
  COMPSPARSE_UNROLL for (int v = 0; v < V; ++v) store<T, L>(bias_sums + v * L, load<T, L>(bias_sums + v * L) + bias[v]);
  for (int64_t e = t.net.edge_ptr[i]; e < t.net.edge_ptr[i + 1]; ++e) {
    const int32_t* edge = t.net.edges + 3 * e;
    add_outers<T, L, V, K>(t.column(edge[0]), t.Rows, t.valid, 0, edge[1], gradient, sums + edge[2] * stride + o,
                           stride);
  }
}

// The narrowest vector that holds `out` values, or the widest there is.
template <typename T, int L, class Target>
int64_t gradient_lanes(int64_t out) {
  if constexpr (L > Target::MinLanes) {
    if (out <= L / 2) return gradient_lanes<T, L / 2, Target>(out);
  }
  return L;
}

template <typename T, class Target>
int64_t gradient_width(int64_t out) {
  return round_up(out, gradient_lanes<T, Target::Lanes, Target>(out));
}

template <typename T, int L, class Target, class Tile>
void weight_gradients(const Tile& t, int64_t i) {
  const DagKind<T>& kind = t.kind(t.node(i));
  if constexpr (L > Target::MinLanes) {
    if (kind.out <= L / 2) return weight_gradients<T, L / 2, Target>(t, i);
  }
  const int64_t stride = round_up(kind.out, L);
  T* sums = t.sums + kind.gradient_offset + t.node(i)[1] * (kind.fan_in + 1) * stride;
  int64_t o = 0;
  for (; o + L < kind.out; o += 2 * L) weight_panel<T, L, 2>(t, i, o, kind.out - o, sums, stride);
  if (o < kind.out) weight_panel<T, L, 1>(t, i, o, kind.out - o, sums, stride);
}

// grad [valid, out_features]
template <typename T, int L, int B, class Target>
void tile_backward(const Tile<Sum<T>, L, B>& t, const T* grad, bool wants_x) {
  constexpr int O = Target::template outputs<B>();
  const DagNodes<Sum<T>>& net = t.net;
  for (int64_t i = net.num_nodes - 1; i >= 0; --i) {
    const int32_t* node = t.node(i);
    const DagKind<Sum<T>>& kind = t.kind(node);
    if (node[3] >= 0)  // a sink: nobody reads it
      pack_panel<T, L>(grad + node[3], net.out_features, t.valid, kind.out, t.Rows, t.column(node[2]));
    else
      vertex_backward<Sum<T>, L, B, O>(t, net.num_sources + i, node[2], 0, kind.out,
                                       kind.linear ? Activation::none : net.activation);
    if (t.sums) weight_gradients<Sum<T>, L, Target>(t, i);
  }
  if (!wants_x) return;
  const int64_t channels = net.in_features / net.num_sources;
  for (int64_t s = 0; s < net.num_sources; ++s)
    vertex_backward<Sum<T>, L, B, O>(t, s, s * channels, 0, channels, Activation::none);
}

// Calls the body made for tiles of this many vectors.
template <int B, class Visit>
COMPSPARSE_INLINE void with_vectors(int64_t vectors, const Visit& visit) {
  if constexpr (B > 1) {
    if (vectors < B) return with_vectors<B - 1>(vectors, visit);
  }
  visit.template operator()<B>();
}

template <typename T, class Target>
void forward(const DagNetwork<T>& net, Range batch, int64_t rows, Sum<T>* values) {
  constexpr int L = Target::Lanes;
  const int64_t in_features = net.graph.in_features, out_features = net.graph.out_features;
  with_vectors<Target::MaxVectors>(rows / L, [&]<int B>() {
    for (int64_t n = batch.begin; n < batch.end; n += rows) {
      const Tile<Sum<T>, L, B> t = {net.graph, values, nullptr, min64(rows, batch.end - n), nullptr};
      pack_panel<T, L>(net.x + n * in_features, in_features, t.valid, in_features, rows, values);
      tile_forward<Sum<T>, L, B, Target>(t, false);
      for (int64_t i = 0; i < t.net.num_nodes; ++i) {
        const int32_t* node = t.node(i);
        if (node[3] >= 0)
          unpack_panel<T, L>(t.column(node[2]), rows, t.valid, t.kind(node).out, out_features,
                             net.y + n * out_features + node[3]);
      }
    }
  });
}

template <typename T, class Target>
void backward(const DagNetwork<T>& net, Range batch, int64_t rows, Sum<T>* values, Sum<T>* slopes, Sum<T>* sums) {
  constexpr int L = Target::Lanes;
  const int64_t in_features = net.graph.in_features;
  with_vectors<Target::MaxVectors>(rows / L, [&]<int B>() {
    for (int64_t n = batch.begin; n < batch.end; n += rows) {
      const Tile<Sum<T>, L, B> t = {net.graph, values, slopes, min64(rows, batch.end - n), sums};
      pack_panel<T, L>(net.x + n * in_features, in_features, t.valid, in_features, rows, values);
      tile_forward<Sum<T>, L, B, Target>(t, true);
      tile_backward<T, L, B, Target>(t, net.grad + n * net.graph.out_features, net.grad_x != nullptr);
      if (net.grad_x) unpack_panel<T, L>(values, rows, t.valid, in_features, in_features, net.grad_x + n * in_features);
    }
  });
}

template <typename T, int L, class Target>
void reduce_with_lanes(const DagKind<Sum<T>>& kind, Sum<T>* sums, int64_t stride, int64_t parts, Range weights,
                       const DagGradients<T>& gradients) {
  using S = Sum<T>;
  if constexpr (L > Target::MinLanes) {
    if (kind.out <= L / 2) return reduce_with_lanes<T, L / 2, Target>(kind, sums, stride, parts, weights, gradients);
  }
  const int64_t width = round_up(kind.out, L), size = (kind.fan_in + 1) * width;
  for (int64_t w = weights.begin; w < weights.end; ++w) {
    S* total = sums + kind.gradient_offset + w * size;
    for (int64_t part = 1; part < parts; ++part)
      for (int64_t i = 0; i < size; i += L)
        store<S, L>(total + i, load<S, L>(total + i) + load<S, L>(total + part * stride + i));
    unpack_panel<T, L>(total, width, kind.out, kind.fan_in, kind.fan_in,
                       gradients.weights + w * kind.out * kind.fan_in);
    if (gradients.biases)
      unpack_panel<T, L>(total + kind.fan_in * width, width, kind.out, 1, 1, gradients.biases + w * kind.out);
  }
}

template <typename T, class Target>
void reduce(const DagKind<Sum<T>>& kind, Sum<T>* sums, int64_t stride, int64_t parts, Range weights,
            const DagGradients<T>& gradients) {
  reduce_with_lanes<T, Target::Lanes, Target>(kind, sums, stride, parts, weights, gradients);
}

template <typename T, class Target>
void widen_all(const T* from, Range elements, Sum<T>* to) {
  constexpr int L = Target::Lanes;
  int64_t i = elements.begin;
  for (; i + L <= elements.end; i += L) store<Sum<T>, L>(to + i, load_wide<T, L>(from + i));
  for (; i < elements.end; ++i) store<Sum<T>, 1>(to + i, load_wide<T, 1>(from + i));
}

template <typename T, class Target>
constexpr DagKernels<T> dag_kernels() {
  return {Target::Lanes,        Target::MaxVectors, gradient_width<Sum<T>, Target>,
          widen_all<T, Target>, forward<T, Target>, backward<T, Target>,
          reduce<T, Target>};
}

}  // namespace
