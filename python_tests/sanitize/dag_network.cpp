// dag_network's schedules and tables: forward, backward and the sum of its parts, against plain loops over nodes.
#include <algorithm>

#include "../../csrc/cpu/dag_network/schedule.h"
#include "harness.h"

namespace {

using namespace compsparse;
using sanitize::Buffer;

struct Shape {
  int64_t sources, channels, width, batch;
  Activation activation;
  bool biases;
};

const Shape shapes[] = {
    {1, 1, 1, 1, Activation::none, true},     {3, 1, 5, 2, Activation::relu, true},
    {2, 3, 8, 17, Activation::gelu, true},    {4, 2, 16, 48, Activation::silu, false},
    {3, 1, 33, 50, Activation::relu, true},   {5, 1, 20, 100, Activation::gelu, true},
    {3, 2, 40, 131, Activation::relu, false},
};

struct Kind {
  int64_t out, fan_in, weights;
  bool linear;
};

// Two nodes that share weights and read all sources (the second lacks the first), one that reads both and a source, and
// a sink of three channels that reads that.
template <typename T>
struct Network {
  explicit Network(const Shape& s, std::mt19937& generator) : shape(s), in_features(s.sources * s.channels) {
    const int64_t w = s.width, c = s.channels;
    kinds = {{w, in_features, 1, false}, {w, 2 * w + c, 1, false}, {3, w, 1, true}};
    const int64_t first = in_features, third = first + 2 * w, sink = third + w;
    nodes = {0, 0, int32_t(first), -1, 0, 0, int32_t(first + w), -1, 1, 0, int32_t(third), -1, 2, 0, int32_t(sink), 0};
    columns = sink + 3;
    read(0, s.sources, 0);
    read(1, s.sources, 1);
    edges = edges_of(0), add(edges, edges_of(1));
    edge_ptr = {0, int32_t(reads[0].size()), int32_t(reads[0].size() + reads[1].size())};
    add(edges,
        {int32_t(first), int32_t(w), 0, int32_t(first + w), int32_t(w), int32_t(w), 0, int32_t(c), int32_t(2 * w)});
    edge_ptr.push_back(edge_ptr.back() + 3);
    add(edges, {int32_t(third), int32_t(w), 0});
    edge_ptr.push_back(edge_ptr.back() + 1);
    list_children();
    for (const Kind& kind : kinds) {
      weights.push_back(Buffer<T>::random(kind.weights * kind.out * kind.fan_in, generator));
      biases.push_back(Buffer<T>::random(kind.weights * kind.out, generator));
    }
  }

  void read(int node, int64_t sources, int64_t from) {
    for (int64_t i = from; i < sources; ++i) reads[node].push_back(i);
  }
  std::vector<int32_t> edges_of(int node) const {
    std::vector<int32_t> result;
    for (const int64_t source : reads[node]) {
      const auto at = int32_t(source * shape.channels);
      add(result, {at, int32_t(shape.channels), at});
    }
    return result;
  }
  static void add(std::vector<int32_t>& to, const std::vector<int32_t>& from) {
    to.insert(to.end(), from.begin(), from.end());
  }
  // The vertex whose channels begin at a column: sources, then nodes.
  int64_t vertex_at(int64_t column) const {
    if (column < in_features) return column / shape.channels;
    for (int64_t i = 0; i < 4; ++i)
      if (nodes[4 * i + 2] == column) return shape.sources + i;
    return -1;
  }
  void list_children() {
    child_ptr = {0};
    for (int64_t vertex = 0; vertex < shape.sources + 4; ++vertex) {
      for (int32_t i = 0; i < 4; ++i)
        for (int32_t e = edge_ptr[i]; e < edge_ptr[i + 1]; ++e)
          if (vertex_at(edges[3 * e]) == vertex) add(children, {i, edges[3 * e + 2]});
      child_ptr.push_back(int32_t(children.size() / 2));
    }
  }

  Shape shape;
  int64_t in_features, columns;
  std::vector<Kind> kinds;
  std::vector<int64_t> reads[2];
  std::vector<int32_t> nodes, edge_ptr, edges, child_ptr, children;
  std::vector<Buffer<T>> weights, biases;
};

double act(double z, Activation activation) {
  if (activation == Activation::relu) return z < 0 ? 0 : z;
  if (activation == Activation::gelu) return z * 0.5 * (1 + erf(z * M_SQRT1_2));
  if (activation == Activation::silu) return z / (1 + exp(-z));
  return z;
}

double slope(double z, Activation activation) {
  if (activation == Activation::none) return 1;
  if (activation == Activation::relu) return z > 0;
  if (activation == Activation::gelu) return 0.5 * (1 + erf(z * M_SQRT1_2)) + z * exp(-z * z / 2) / sqrt(2 * M_PI);
  const double share = 1 / (1 + exp(-z));
  return share * (1 + z * (1 - share));
}

// z and h of one batch row, in double.
template <typename T>
void exact_forward(const Network<T>& net, const T* x, std::vector<double>& z, std::vector<double>& h) {
  const auto value = [](T number) { return sanitize::Number<T>::value(number); };
  z.resize(net.columns), h.resize(net.columns);
  std::transform(x, x + net.in_features, h.begin(), value);
  for (int64_t i = 0; i < 4; ++i) {
    const int32_t* node = &net.nodes[4 * i];
    const Kind& kind = net.kinds[node[0]];
    for (int64_t o = 0; o < kind.out; ++o) {
      double sum = net.shape.biases ? value(net.biases[node[0]][o]) : 0;
      for (int32_t e = net.edge_ptr[i]; e < net.edge_ptr[i + 1]; ++e)
        for (int32_t k = 0; k < net.edges[3 * e + 1]; ++k)
          sum += value(net.weights[node[0]][o * kind.fan_in + net.edges[3 * e + 2] + k]) * h[net.edges[3 * e] + k];
      z[node[2] + o] = sum;
      h[node[2] + o] = kind.linear ? sum : act(sum, net.shape.activation);
    }
  }
}

// A gradient, 0 for batch rows where some relu is so near its kink that rounding decides the derivative.
template <typename T>
Buffer<T> random_gradient(const Network<T>& net, const Buffer<T>& x, std::mt19937& generator) {
  auto grad = Buffer<T>::random(net.shape.batch * 3, generator);
  std::vector<double> z, h;
  for (int64_t n = 0; n < net.shape.batch && net.shape.activation == Activation::relu; ++n) {
    exact_forward(net, x.data() + n * net.in_features, z, h);
    const bool near = std::any_of(z.begin() + net.in_features, z.end() - 3, [](double v) { return fabs(v) < 1e-5; });
    if (near) std::fill_n(grad.data() + 3 * n, 3, sanitize::Number<T>::from(0));
  }
  return grad;
}

// Forward and backward of all batch rows, in double.
struct Exact {
  std::vector<std::vector<double>> grad_weights, grad_biases;
};

template <typename T>
void add_exact(const Network<T>& net, const T* x, const T* grad, Exact& exact, double* y, double* grad_x) {
  const auto value = [](T number) { return sanitize::Number<T>::value(number); };
  std::vector<double> h, z, g(net.columns);
  exact_forward(net, x, z, h);
  std::copy(h.end() - 3, h.end(), y);
  std::transform(grad, grad + 3, g.end() - 3, value);
  for (int64_t i = 3; i >= 0; --i) {
    const int32_t* node = &net.nodes[4 * i];
    const Kind& kind = net.kinds[node[0]];
    for (int64_t o = 0; o < kind.out; ++o) {
      const int64_t column = node[2] + o;
      const double d = g[column] * (kind.linear ? 1 : slope(z[column], net.shape.activation));
      exact.grad_biases[node[0]][o] += d;
      for (int32_t e = net.edge_ptr[i]; e < net.edge_ptr[i + 1]; ++e)
        for (int32_t k = 0; k < net.edges[3 * e + 1]; ++k) {
          const int64_t at = o * kind.fan_in + net.edges[3 * e + 2] + k;
          exact.grad_weights[node[0]][at] += d * h[net.edges[3 * e] + k];
          g[net.edges[3 * e] + k] += d * value(net.weights[node[0]][at]);
        }
    }
  }
  std::copy(g.begin(), g.begin() + net.in_features, grad_x);
}

// In two parts, as threads do it.
template <typename T>
Buffer<Sum<T>> widened(const DagKernels<T>& kernel, const Buffer<T>& from) {
  auto to = Buffer<Sum<T>>::unwritten(from.size());
  kernel.widen(from.data(), {0, from.size() / 2}, to.data());
  kernel.widen(from.data(), {from.size() / 2, from.size()}, to.data());
  return to;
}

template <typename T>
void check_network(const DagKernels<T>& kernel, const Shape& s, int64_t vectors, std::mt19937& generator) {
  using S = Sum<T>;
  const Network<T> net(s, generator);
  const int64_t rows = vectors * kernel.lanes, parts = s.batch > rows ? 2 : 1;
  const auto x = Buffer<T>::random(s.batch * net.in_features, generator);
  const auto grad = random_gradient(net, x, generator);
  const auto y = Buffer<T>::unwritten(s.batch * 3), grad_x = Buffer<T>::unwritten(s.batch * net.in_features);
  std::vector<Buffer<S>> weights, biases;
  std::vector<Buffer<T>> weight_gradients, bias_gradients;
  std::vector<DagKind<S>> kinds;
  int64_t size = 0;
  for (size_t k = 0; k < net.kinds.size(); ++k) {
    const Kind& kind = net.kinds[k];
    weights.push_back(widened(kernel, net.weights[k])), biases.push_back(widened(kernel, net.biases[k]));
    weight_gradients.push_back(Buffer<T>::unwritten(net.weights[k].size()));
    bias_gradients.push_back(Buffer<T>::unwritten(net.biases[k].size()));
    kinds.push_back({weights[k].data(), s.biases ? biases[k].data() : nullptr, kind.weights, kind.out, kind.fan_in,
                     size, kind.linear});
    size += kind.weights * (kind.fan_in + 1) * kernel.gradient_width(kind.out);
  }
  const DagGraph index = {net.nodes.data(), net.edge_ptr.data(), net.edges.data(),     4,
                          net.in_features,  net.columns,         {s.width, s.width, 3}};
  const Schedule once = schedule(index, false);
  const Schedule both = schedule_of_backward(index, s.sources, net.child_ptr.data(), net.children.data());
  const auto graph = [&](const Schedule& plan) {
    return DagNodes<S>{kinds.data(),
                       plan.nodes.data(),
                       plan.edge_ptr.data(),
                       plan.edges.data(),
                       plan.child_ptr.data(),
                       plan.children.data(),
                       s.sources,
                       4,
                       net.in_features,
                       3,
                       s.activation};
  };
  const bool slopes = s.activation == Activation::gelu || s.activation == Activation::silu;
  Buffer<S> sums(parts * size);
  std::fill(sums.data(), sums.data() + sums.size(), S(0));
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t half = (s.batch / 2 + rows - 1) / rows * rows;
    const Range mine = parts == 1 ? Range{0, s.batch} : part == 0 ? Range{0, half} : Range{half, s.batch};
    const auto values = Buffer<S>::unwritten(once.columns * rows);
    kernel.forward({x.data(), y.data(), nullptr, nullptr, graph(once)}, mine, rows, values.data());
    const auto again = Buffer<S>::unwritten(net.columns * rows);
    const auto derivative = Buffer<S>::unwritten(slopes ? net.columns * rows : 0);
    kernel.backward({x.data(), nullptr, grad.data(), grad_x.data(), graph(both)}, mine, rows, again.data(),
                    slopes ? derivative.data() : nullptr, sums.data() + part * size);
  }
  for (size_t k = 0; k < kinds.size(); ++k)
    kernel.reduce(kinds[k], sums.data(), size, parts, {0, kinds[k].num_weights},
                  {weight_gradients[k].data(), s.biases ? bias_gradients[k].data() : nullptr});

  Exact exact;
  for (size_t k = 0; k < net.kinds.size(); ++k) {
    exact.grad_weights.emplace_back(net.weights[k].size());
    exact.grad_biases.emplace_back(net.biases[k].size());
  }
  std::vector<double> exact_y(y.size()), exact_grad_x(grad_x.size());
  for (int64_t n = 0; n < s.batch; ++n)
    add_exact(net, x.data() + n * net.in_features, grad.data() + n * 3, exact, &exact_y[n * 3],
              &exact_grad_x[n * net.in_features]);
  const std::string name = "width " + std::to_string(s.width) + " batch " + std::to_string(s.batch);
  sanitize::expect_equal(y.data(), exact_y.data(), y.size(), "forward " + name);
  sanitize::expect_equal(grad_x.data(), exact_grad_x.data(), grad_x.size(), "grad_x " + name);
  for (size_t k = 0; k < net.kinds.size(); ++k) {
    const auto& weight = weight_gradients[k];
    sanitize::expect_equal(weight.data(), exact.grad_weights[k].data(), weight.size(), "grad_weights " + name);
    const auto& bias = bias_gradients[k];
    if (s.biases) sanitize::expect_equal(bias.data(), exact.grad_biases[k].data(), bias.size(), "grad_biases " + name);
  }
}

template <typename T>
void check_kernels(const DagKernels<T>& kernel) {
  std::mt19937 generator(0);
  for (const Shape& s : shapes)
    for (int64_t vectors = 1; vectors <= kernel.max_vectors; ++vectors) check_network(kernel, s, vectors, generator);
}

std::function<void()> check(const DagTable& table) {
  return [&table] {
    check_kernels(table.f32);
    check_kernels(table.f64);
    check_kernels(table.bf16);
    check_kernels(table.f16);
  };
}

RUN_UNDER_SANITIZERS(dag_network, scalar, true, check(dag_scalar));
#if defined(__x86_64__)
RUN_UNDER_SANITIZERS(dag_network, avx2, sanitize::has_avx2(), check(dag_avx2));
RUN_UNDER_SANITIZERS(dag_network, avx512, sanitize::has_avx512(), check(dag_avx512));
#endif

}  // namespace
