// The boundary between torch and the arithmetic of dag_network.
#pragma once

#include "../types.h"

namespace compsparse {

// Everything between a network's input and its output is computed in the type of sums, T below: half precision is
// widened where it enters a tile, weights once a call, and results are rounded once.

// Nodes whose weights have one shape. Their gradients are summed in a buffer of all kinds: for each weight
// [fan_in + 1][gradient_width(out)], transposed, the bias last.
template <typename T>
struct DagKind {
  const T* weights;  // [num_weights, out, fan_in]
  const T* biases;   // [num_weights, out] or null
  int64_t num_weights;
  int64_t out;
  int64_t fan_in;
  int64_t gradient_offset;  // where the sums of this kind begin
  bool linear;
};

// A tile of the batch is `values` [columns][rows]: the channels of the sources, then of the nodes as they are executed.
template <typename T>
struct DagNodes {
  const DagKind<T>* kinds;
  const int32_t* nodes;      // [num_nodes, 4]: kind, weight, column, output column or -1
  const int32_t* edge_ptr;   // [num_nodes + 1]
  const int32_t* edges;      // [.., 3]: column, channels, where they stand in the fan-in
  const int32_t* child_ptr;  // [num_sources + num_nodes + 1]; null in the forward
  const int32_t* children;   // [.., 2]: node, where the vertex stands in its fan-in
  int64_t num_sources;       // in the backward
  int64_t num_nodes;
  int64_t in_features;
  int64_t out_features;
  Activation activation;
};

template <typename T>
struct DagNetwork {
  const T* x;     // [batch, in_features]
  T* y;           // [batch, out_features]; null in the backward
  const T* grad;  // [batch, out_features]; null in the forward
  T* grad_x;      // [batch, in_features] or null
  DagNodes<Sum<T>> graph;
};

// Of the weights [num_weights, out, fan_in] and, unless null, the biases [num_weights, out] of a kind.
template <typename T>
struct DagGradients {
  T* weights;
  T* biases;
};

template <typename T>
struct DagKernels {
  int64_t lanes;  // a tile has lanes, 2 lanes, .. max_vectors lanes rows
  int64_t max_vectors;
  int64_t (*gradient_width)(int64_t out);
  void (*widen)(const T* from, Range elements, Sum<T>* to);
  void (*forward)(const DagNetwork<T>&, Range batch, int64_t rows, Sum<T>* values);
  // `slopes` is as large as `values`, or null for relu, whose values tell; adds to the sums of the parameters'
  // gradients unless they are null.
  void (*backward)(const DagNetwork<T>&, Range batch, int64_t rows, Sum<T>* values, Sum<T>* slopes, Sum<T>* sums);
  // The sums of all parts, which are `stride` apart, to the gradients of some weights of a kind; overwrites the sums.
  void (*reduce)(const DagKind<Sum<T>>&, Sum<T>* sums, int64_t stride, int64_t parts, Range weights,
                 const DagGradients<T>&);
};

struct DagTable {
  DagKernels<float> f32;
  DagKernels<double> f64;
  DagKernels<BFloat16> bf16;
  DagKernels<Float16> f16;
};

extern const DagTable dag_scalar, dag_avx2, dag_avx512;

}  // namespace compsparse
