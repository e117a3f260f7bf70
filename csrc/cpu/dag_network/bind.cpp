// dag_network and its backward at key CPU: unpack, split the batch over threads, call the chosen table.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>
#include <type_traits>
#include <vector>

#include "../kernels.h"
#include "../partition.h"
#include "../scratch.h"
#include "../tensors.h"
#include "schedule.h"

namespace compsparse {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const int32_t* indices(const Tensor& t) { return static_cast<const int32_t*>(t.data_ptr()); }

std::vector<Tensor> all_contiguous(const std::vector<Tensor>& tensors) {
  std::vector<Tensor> result;
  for (const Tensor& tensor : tensors) result.push_back(as_contiguous(tensor));
  return result;
}

template <class Run>
void for_dtype(ScalarType dtype, const Run& run) {
  const DagTable& table = *kernels().dag;
  if (dtype == ScalarType::Double) return run(table.f64);
  if (dtype == ScalarType::BFloat16) return run(table.bf16);
  if (dtype == ScalarType::Half) return run(table.f16);
  run(table.f32);
}

// The kinds of nodes, with weights and biases in the type of sums: as they are, or widened once for all tiles.
template <typename T>
class Kinds {
 public:
  using S = Sum<T>;

  Kinds(const DagKernels<T>& kernel, const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
        const std::vector<int64_t>& linear) {
    for (size_t k = 0; k < weights.size(); ++k)
      all.push_back({.weights = widened(kernel, weights[k]),
                     .biases = biases.empty() ? nullptr : widened(kernel, biases[k]),
                     .num_weights = weights[k].size(0),
                     .out = weights[k].size(1),
                     .fan_in = weights[k].size(2),
                     .linear = linear[k] != 0});
  }

  std::vector<DagKind<S>> all;

 private:
  const S* widened(const DagKernels<T>& kernel, const Tensor& tensor) {
    if constexpr (std::is_same_v<T, S>) return static_cast<const T*>(tensor.data_ptr());
    const int64_t size = tensor.numel(), parts = parts_for(size);
    S* to = copies_.emplace_back(make_scratch<S>(size)).get();
    for_each_part(parts, [&](int64_t part) {
      kernel.widen(static_cast<const T*>(tensor.data_ptr()), equal_share(size, part, parts), to);
    });
    return to;
  }

  std::vector<Scratch<S>> copies_;
};

DagGraph graph_of(const Tensor& nodes, const Tensor& edge_ptr, const Tensor& edges, int64_t in_features,
                  int64_t columns, const std::vector<Tensor>& weights) {
  DagGraph graph = {indices(nodes), indices(edge_ptr), indices(edges), nodes.size(0), in_features, columns, {}};
  for (const Tensor& weight : weights) graph.outs.push_back(weight.size(1));
  return graph;
}

// Rows of a tile: the number of vectors with which a row makes the least traffic. Vectors share what is read of the
// weights, but not where the batch is short, nor if the tile then no longer stays in cache and that is worth more.
// Never a choice by threads, which would show in sums.
template <typename T>
int64_t tile_rows(const DagKernels<T>& kernel, const Kinds<T>& kinds, int64_t batch, int64_t columns) {
  constexpr int64_t least_tiles = 4, cache = (int64_t(1) << 21) / sizeof(Sum<T>);
  int64_t weights = 0;
  for (const DagKind<Sum<T>>& kind : kinds.all) weights += kind.num_weights * kind.out * kind.fan_in;
  const auto traffic = [&](int64_t rows) { return weights / rows + (columns * rows > cache ? columns : 0); };
  int64_t best = kernel.lanes;
  for (int64_t vectors = 2; vectors <= kernel.max_vectors; ++vectors) {
    const int64_t rows = vectors * kernel.lanes;
    if (batch >= least_tiles * rows && traffic(rows) <= traffic(best)) best = rows;
  }
  return best;
}

template <typename T>
int64_t work_of(const DagNodes<T>& graph, int64_t batch) {
  int64_t per_row = graph.in_features;
  for (int64_t i = 0; i < graph.num_nodes; ++i) {
    const DagKind<T>& kind = graph.kinds[graph.nodes[4 * i]];
    per_row += kind.out * kind.fan_in;
  }
  return batch * per_row;
}

// Tiles `part` of `parts`, in batch rows.
Range tiles_of(int64_t batch, int64_t rows, int64_t part, int64_t parts) {
  const Range tiles = equal_share((batch + rows - 1) / rows, part, parts);
  return {tiles.begin * rows, std::min(tiles.end * rows, batch)};
}

Tensor dag_network(const Tensor& x, std::vector<Tensor> weights, std::vector<Tensor> biases, const Tensor& nodes,
                   const Tensor& edge_ptr, const Tensor& edges, std::vector<int64_t> steps, std::vector<int64_t> linear,
                   int64_t columns, int64_t out_features, std::string activation) {
  const Tensor input = as_contiguous(x);
  weights = all_contiguous(weights), biases = all_contiguous(biases);
  Tensor y = new_tensor(x, {x.size(0), out_features});
  const Schedule plan = schedule(graph_of(nodes, edge_ptr, edges, x.size(1), columns, weights), false);
  const auto run = [&]<typename T>(const DagKernels<T>& kernel) {
    const Kinds<T> kinds(kernel, weights, biases, linear);
    const DagNetwork<T> net = {.x = static_cast<const T*>(input.data_ptr()),
                               .y = static_cast<T*>(y.data_ptr()),
                               .graph = {.kinds = kinds.all.data(),
                                         .nodes = plan.nodes.data(),
                                         .edge_ptr = plan.edge_ptr.data(),
                                         .edges = plan.edges.data(),
                                         .num_nodes = nodes.size(0),
                                         .in_features = x.size(1),
                                         .out_features = out_features,
                                         .activation = activation_from(activation)}};
    const int64_t batch = x.size(0), rows = tile_rows(kernel, kinds, batch, plan.columns);
    const int64_t parts = std::clamp<int64_t>((batch + rows - 1) / rows, 1, parts_for(work_of(net.graph, batch)));
    for_each_part(parts, [&](int64_t part) {
      const auto values = make_scratch<Sum<T>>(plan.columns * rows);
      kernel.forward(net, tiles_of(batch, rows, part, parts), rows, values.get());
    });
  };
  for_dtype(x.scalar_type(), run);
  return y;
}

// Parts of the batch that sum the parameters' gradients apart: at least four, so that four threads have work; more
// where the batch is long or the sums are few, so that adding them up costs little. They depend on the problem alone,
// so the result does not depend on the number of threads.
int64_t gradient_parts(int64_t batch, int64_t tiles, int64_t sums) {
  constexpr int64_t least = 4, most = 64, rows_of_a_part = 256, few = int64_t(1) << 18;
  const int64_t wanted = std::max(batch / rows_of_a_part, few / std::max<int64_t>(sums, 1));
  return std::min(std::clamp(wanted, least, most), std::max<int64_t>(tiles, 1));
}

// Gives each kind its place among the sums; returns the size of all.
template <typename T>
int64_t place_sums(const DagKernels<T>& kernel, Kinds<T>& kinds) {
  int64_t size = 0;
  for (DagKind<Sum<T>>& kind : kinds.all) {
    kind.gradient_offset = size;
    size += kind.num_weights * (kind.fan_in + 1) * kernel.gradient_width(kind.out);
  }
  return size;
}

// Activations are computed again: a tile is back in cache sooner than it would come from memory. `gradients` of each
// kind, or none.
template <typename T>
void run_backward(const DagKernels<T>& kernel, const DagNetwork<T>& net, Kinds<T>& kinds, int64_t batch,
                  int64_t columns, const std::vector<DagGradients<T>>& gradients) {
  using S = Sum<T>;
  const int64_t rows = tile_rows(kernel, kinds, batch, columns), tiles = (batch + rows - 1) / rows;
  const int64_t tile = columns * rows, size = gradients.empty() ? 0 : place_sums(kernel, kinds);
  const int64_t parts = gradient_parts(batch, tiles, size);
  const bool slopes = net.graph.activation == Activation::gelu || net.graph.activation == Activation::silu;
  const auto sums = make_scratch<S>(parts * size);
  const auto body = [&](int64_t part) {
    const auto values = make_scratch<S>(slopes ? 2 * tile : tile);
    S* mine = gradients.empty() ? nullptr : sums.get() + part * size;
    std::fill(mine, mine + size, S(0));
    kernel.backward(net, tiles_of(batch, rows, part, parts), rows, values.get(), slopes ? values.get() + tile : nullptr,
                    mine);
  };
  if (parts_for(work_of(net.graph, batch)) == 1)
    for (int64_t part = 0; part < parts; ++part) body(part);
  else
    for_each_part(parts, body);
  if (gradients.empty()) return;
  const int64_t threads = parts_for(parts * size);
  for_each_part(threads, [&](int64_t thread) {
    for (size_t k = 0; k < gradients.size(); ++k)
      kernel.reduce(kinds.all[k], sums.get(), size, parts, equal_share(kinds.all[k].num_weights, thread, threads),
                    gradients[k]);
  });
}

std::vector<Tensor> dag_network_backward(const Tensor& grad, const Tensor& x, std::vector<Tensor> weights,
                                         std::vector<Tensor> biases, const Tensor& nodes, const Tensor& edge_ptr,
                                         const Tensor& edges, const Tensor& child_ptr, const Tensor& children,
                                         std::vector<int64_t> steps, std::vector<int64_t> linear, int64_t columns,
                                         std::string activation, bool needs_x, bool needs_parameters) {
  const Tensor input = as_contiguous(x), grad_y = as_contiguous(grad);
  weights = all_contiguous(weights), biases = all_contiguous(biases);
  std::vector<Tensor> grads = {needs_x ? new_tensor(x, {x.size(0), x.size(1)}) : new_tensor(x, {0})};
  if (needs_parameters) {
    for (const Tensor& weight : weights)
      grads.push_back(new_tensor(x, {weight.size(0), weight.size(1), weight.size(2)}));
    for (const Tensor& bias : biases) grads.push_back(new_tensor(x, {bias.size(0), bias.size(1)}));
  }
  const int64_t num_sources = child_ptr.size(0) - 1 - nodes.size(0);
  const DagGraph graph = graph_of(nodes, edge_ptr, edges, x.size(1), columns, weights);
  const Schedule plan = schedule_of_backward(graph, num_sources, indices(child_ptr), indices(children));
  const auto run = [&]<typename T>(const DagKernels<T>& kernel) {
    Kinds<T> kinds(kernel, weights, biases, linear);
    std::vector<DagGradients<T>> gradients;
    const auto place = [&](size_t number) { return static_cast<T*>(grads[1 + number].data_ptr()); };
    if (needs_parameters)
      for (size_t k = 0; k < weights.size(); ++k)
        gradients.push_back({place(k), biases.empty() ? nullptr : place(weights.size() + k)});
    const DagNetwork<T> net = {.x = static_cast<const T*>(input.data_ptr()),
                               .grad = static_cast<const T*>(grad_y.data_ptr()),
                               .grad_x = needs_x ? static_cast<T*>(grads[0].data_ptr()) : nullptr,
                               .graph = {.kinds = kinds.all.data(),
                                         .nodes = plan.nodes.data(),
                                         .edge_ptr = plan.edge_ptr.data(),
                                         .edges = plan.edges.data(),
                                         .child_ptr = plan.child_ptr.data(),
                                         .children = plan.children.data(),
                                         .num_sources = num_sources,
                                         .num_nodes = nodes.size(0),
                                         .in_features = x.size(1),
                                         .out_features = grad.size(1),
                                         .activation = activation_from(activation)}};
    run_backward(kernel, net, kinds, x.size(0), columns, gradients);
  };
  for_dtype(x.scalar_type(), run);
  return grads;
}

}  // namespace
}  // namespace compsparse

STABLE_TORCH_LIBRARY_IMPL(compsparse, CPU, m) {
  m.impl("dag_network", TORCH_BOX(&compsparse::dag_network));
  m.impl("dag_network_backward", TORCH_BOX(&compsparse::dag_network_backward));
}
