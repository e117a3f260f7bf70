// The order in which the CPU runs the nodes of a graph, and where their channels lie in a tile.
//
// A layout's order is by level, as a GPU wants it. Here nodes run depth first: each soon after what it reads, while
// that is in the nearest cache. In a forward alone, columns that nobody will read again go to later nodes, so that the
// tile of a tree is as large as its depth, not as its number of nodes. Both cost a few steps an edge.
#pragma once

#include <map>
#include <vector>

#include "../scratch.h"

namespace compsparse {

// Index arrays of a DAGLayout.
struct DagGraph {
  const int32_t* nodes;
  const int32_t* edge_ptr;
  const int32_t* edges;
  int64_t num_nodes;
  int64_t in_features;
  int64_t columns;
  std::vector<int64_t> outs;  // of each kind
};

// The same arrays in another order and with other columns.
struct Schedule {
  std::vector<int32_t> order;  // node i is the graph's order[i]
  std::vector<int32_t> nodes, edge_ptr, edges, child_ptr, children;
  int64_t columns;
};

// Of each node of the graph, at its first column.
inline Scratch<int32_t> nodes_by_column(const DagGraph& graph) {
  auto node_at = make_scratch<int32_t>(graph.columns);
  for (int32_t i = 0; i < graph.num_nodes; ++i) node_at[graph.nodes[4 * i + 2]] = i;
  return node_at;
}

// Each node behind all that it reads. From the last one back, so that what nobody reads comes too.
inline std::vector<int32_t> depth_first(const DagGraph& graph, const int32_t* node_at) {
  struct Visit {
    int32_t node, edge;
  };
  std::vector<int32_t> order;
  std::vector<Visit> path;
  std::vector<bool> seen(graph.num_nodes);
  const auto enter = [&](int32_t node) {
    if (seen[node]) return;
    seen[node] = true;
    path.push_back({node, graph.edge_ptr[node]});
  };
  for (int64_t root = graph.num_nodes - 1; root >= 0; --root) {
    enter(root);
    while (!path.empty()) {
      Visit& visit = path.back();
      if (visit.edge == graph.edge_ptr[visit.node + 1]) {
        order.push_back(visit.node);
        path.pop_back();
        continue;
      }
      const int32_t column = graph.edges[3 * visit.edge++];
      if (column >= graph.in_features) enter(node_at[column]);
    }
  }
  return order;
}

// Columns behind the sources': those given back by a node of the same width, or new ones.
class Columns {
 public:
  explicit Columns(int64_t begin) : end_(begin) {}

  int32_t take(int64_t out) {
    std::vector<int32_t>& free = free_[out];
    if (free.empty()) return (end_ += out) - out;
    const int32_t column = free.back();
    free.pop_back();
    return column;
  }
  void give_back(int32_t column, int64_t out) { free_[out].push_back(column); }
  int64_t end() const { return end_; }

 private:
  std::map<int64_t, std::vector<int32_t>> free_;  // by width
  int64_t end_;
};

// A node takes its columns before it gives back its parents': it writes while it reads. Sinks, whom nobody reads, keep
// theirs; where `keeps`, as the backward needs it, all do.
inline Schedule schedule(const DagGraph& graph, bool keeps) {
  const auto node_at = nodes_by_column(graph);
  Schedule result = {.order = depth_first(graph, node_at.get()), .edge_ptr = {0}};
  std::vector<int32_t> place(graph.num_nodes), readers(graph.num_nodes);
  for (int64_t e = 0; e < graph.edge_ptr[graph.num_nodes]; ++e)
    if (graph.edges[3 * e] >= graph.in_features) ++readers[node_at[graph.edges[3 * e]]];
  Columns columns(graph.in_features);
  for (const int32_t i : result.order) {
    const int32_t* node = graph.nodes + 4 * i;
    place[i] = columns.take(graph.outs[node[0]]);
    result.nodes.insert(result.nodes.end(), {node[0], node[1], place[i], node[3]});
    for (int32_t e = graph.edge_ptr[i]; e < graph.edge_ptr[i + 1]; ++e) {
      const int32_t* edge = graph.edges + 3 * e;
      const bool of_node = edge[0] >= graph.in_features;
      const int32_t parent = of_node ? node_at[edge[0]] : 0, column = of_node ? place[parent] : edge[0];
      result.edges.insert(result.edges.end(), {column, edge[1], edge[2]});
      if (of_node && --readers[parent] == 0 && !keeps) columns.give_back(column, edge[1]);
    }
    result.edge_ptr.push_back(result.edges.size() / 3);
  }
  result.columns = columns.end();
  return result;
}

// The schedule of a backward, with what reads each vertex: `children` of the layout, sources first, then nodes.
inline Schedule schedule_of_backward(const DagGraph& graph, int64_t num_sources, const int32_t* child_ptr,
                                     const int32_t* children) {
  Schedule result = schedule(graph, true);
  std::vector<int32_t> number(graph.num_nodes);
  for (size_t i = 0; i < result.order.size(); ++i) number[result.order[i]] = i;
  result.child_ptr.push_back(0);
  for (int64_t v = 0; v < num_sources + graph.num_nodes; ++v) {
    const int64_t vertex = v < num_sources ? v : num_sources + result.order[v - num_sources];
    for (int32_t c = child_ptr[vertex]; c < child_ptr[vertex + 1]; ++c)
      result.children.insert(result.children.end(), {number[children[2 * c]], children[2 * c + 1]});
    result.child_ptr.push_back(result.children.size() / 2);
  }
  return result;
}

}  // namespace compsparse
