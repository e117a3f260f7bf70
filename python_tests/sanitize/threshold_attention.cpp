// threshold_attention's tables: pack_keys, forward, backward_rows, backward_keys, against plain loops.
#include "harness.h"

namespace {

using namespace compsparse;
using sanitize::Buffer;

struct Case {
  AttentionSizes size;  // batch, heads, kv_heads, queries, keys, width, value_width
  double cut;
  bool absolute, causal, with_bias, with_mask, with_padding;
  std::string name() const {
    return "queries " + std::to_string(size.queries) + " keys " + std::to_string(size.keys) + " width " +
           std::to_string(size.width) + " cut " + std::to_string(cut);
  }
};

const Case cases[] = {
    {{1, 1, 1, 1, 1, 1, 1}, -2, false, false, false, false, false},
    {{2, 2, 2, 7, 9, 8, 5}, -1, false, false, false, false, true},
    {{1, 4, 2, 17, 33, 16, 16}, -0.5, false, true, true, false, false},
    {{2, 2, 1, 40, 70, 20, 24}, 0.3, true, false, false, true, false},
    {{1, 2, 2, 65, 130, 64, 64}, -0.2, false, true, false, false, true},
    {{1, 1, 1, 3, 600, 33, 7}, -30, false, false, true, false, false},  // keeps everything
    {{1, 2, 1, 20, 50, 8, 8}, 30, true, false, false, false, false},    // keeps nothing
    {{1, 1, 1, 5, 0, 8, 8}, -1, false, false, false, false, false},
    {{1, 2, 2, 9, 40, 12, 11}, 0.1, true, true, true, false, true},
};

template <typename T>
Heads<T> heads(T* data, int64_t number, int64_t tokens, int64_t width) {
  return {data, number * tokens * width, tokens * width, width};
}

Buffer<uint8_t> random_flags(int64_t size, double share, std::mt19937& generator) {
  std::bernoulli_distribution set(share);
  Buffer<uint8_t> flags(size);
  for (int64_t i = 0; i < size; ++i) flags[i] = set(generator);
  return flags;
}

template <typename T>
struct Inputs {
  Inputs(const Case& c, std::mt19937& generator)
      : query(Buffer<T>::random(c.size.batch * c.size.heads * c.size.queries * c.size.width, generator)),
        key(Buffer<T>::random(c.size.batch * c.size.kv_heads * c.size.keys * c.size.width, generator)),
        value(Buffer<T>::random(c.size.batch * c.size.kv_heads * c.size.keys * c.size.value_width, generator)),
        bias(Buffer<T>::random(c.size.queries * c.size.keys, generator)),
        mask(random_flags(c.size.queries * c.size.keys, 0.8, generator)),
        padding(random_flags(c.size.batch * c.size.keys, 0.3, generator)) {}

  Attention<T> attention(const Case& c, const Buffer<T>& out) const {
    const AttentionSizes& s = c.size;
    Attention<T> a = {};
    a.size = s;
    a.query = heads<const T>(query.data(), s.heads, s.queries, s.width);
    a.key = heads<const T>(key.data(), s.kv_heads, s.keys, s.width);
    a.value = heads<const T>(value.data(), s.kv_heads, s.keys, s.value_width);
    a.out = heads<T>(out.data(), s.heads, s.queries, s.value_width);
    a.bias = c.with_bias ? bias.data() : nullptr;
    a.mask = c.with_mask ? mask.data() : nullptr;
    a.bias_strides[2] = s.keys;
    a.bias_strides[3] = 1;
    a.padding = c.with_padding ? padding.data() : nullptr;
    a.scale = 0.7;
    a.cut = c.cut;
    a.absolute = c.absolute;
    a.causal = c.causal;
    return a;
  }

  Buffer<T> query, key, value, bias;
  Buffer<uint8_t> mask, padding;
};

// Dense weights [rows, keys] of row (b * heads + h) * queries + i, and the outputs, by the definition.
struct Exact {
  std::vector<double> weights, out;
};

template <typename T>
double score(const Attention<T>& a, int64_t b, int64_t h, int64_t i, int64_t j) {
  if (a.causal && j > i) return -INFINITY;
  if (a.padding && a.padding[b * a.size.keys + j]) return -INFINITY;
  const int64_t at = i * a.bias_strides[2] + j * a.bias_strides[3];
  if (a.mask && !a.mask[at]) return -INFINITY;
  const T* q = a.query.head(b, h) + i * a.query.stride;
  const T* k = a.key.head(b, h / (a.size.heads / a.size.kv_heads)) + j * a.key.stride;
  double sum = 0;
  for (int64_t d = 0; d < a.size.width; ++d) sum += double(q[d]) * k[d];
  return a.scale * sum + (a.bias ? double(a.bias[at]) : 0);
}

template <typename T>
Exact exact_forward(const Attention<T>& a) {
  const AttentionSizes& s = a.size;
  const int64_t rows = s.batch * s.heads * s.queries;
  Exact exact = {std::vector<double>(rows * s.keys), std::vector<double>(rows * s.value_width)};
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t i = row % s.queries, h = row / s.queries % s.heads, b = row / s.queries / s.heads;
    double* weights = exact.weights.data() + row * s.keys;
    double top = -INFINITY, total = 0;
    for (int64_t j = 0; j < s.keys; ++j) top = fmax(top, weights[j] = score(a, b, h, i, j));
    for (int64_t j = 0; j < s.keys; ++j) {
      const bool kept = weights[j] > -INFINITY && weights[j] >= (a.absolute ? a.cut : top + a.cut);
      total += weights[j] = kept ? exp(weights[j] - top) : 0;
    }
    const T* value = a.value.head(b, h / (s.heads / s.kv_heads));
    for (int64_t j = 0; j < s.keys; ++j) {
      if (total > 0) weights[j] /= total;
      for (int64_t d = 0; d < s.value_width; ++d)
        exact.out[row * s.value_width + d] += weights[j] * value[j * a.value.stride + d];
    }
  }
  return exact;
}

// The support as CSR over all rows.
template <typename T>
struct Support {
  std::vector<int64_t> ptr = {0};
  std::vector<int32_t> columns;
  std::vector<T> weights;
};

template <typename T>
Support<T> run_forward(const AttentionKernels<T>& kernel, Attention<T> a) {
  const AttentionSizes& s = a.size;
  const int64_t panels = (s.keys + kernel.panel_keys - 1) / kernel.panel_keys, kv_heads = s.batch * s.kv_heads;
  const int64_t head_size = panels * kernel.panel_keys * s.width, capacity = s.keys + kernel.slack;
  const auto packed = Buffer<T>::unwritten(kv_heads * head_size);
  const auto norms = Buffer<double>::unwritten(kv_heads * panels);
  for (int64_t head = 0; head < kv_heads; ++head)
    for (int64_t part = 0; part < 2; ++part)
      kernel.pack_keys(a, head / s.kv_heads, head % s.kv_heads, {panels * part / 2, panels * (part + 1) / 2},
                       packed.data() + head * head_size, norms.data() + head * panels);
  a.packed_keys = packed.data();
  a.norms = norms.data();
  Support<T> support;
  for (int64_t head = 0; head < s.batch * s.heads; ++head)
    for (int64_t begin = 0; begin < s.queries; begin += kernel.block_queries) {
      const int64_t end = begin + kernel.block_queries < s.queries ? begin + kernel.block_queries : s.queries;
      const auto queries = Buffer<T>::unwritten(kernel.block_queries * s.width);
      const auto scores = Buffer<T>::unwritten(kernel.block_queries * kernel.score_stride);
      const Buffer<int64_t> counts(kernel.block_queries);
      const Buffer<int32_t> columns(kernel.block_queries * capacity);
      const auto weights = Buffer<T>::unwritten(kernel.block_queries * capacity);
      kernel.forward(a, head / s.heads, head % s.heads, {begin, end},
                     {queries.data(), scores.data(), counts.data(), columns.data(), weights.data(), capacity});
      for (int64_t r = 0; r < end - begin; ++r) {
        const int64_t at = r * capacity;
        support.columns.insert(support.columns.end(), columns.data() + at, columns.data() + at + counts[r]);
        support.weights.insert(support.weights.end(), weights.data() + at, weights.data() + at + counts[r]);
        support.ptr.push_back(int64_t(support.columns.size()));
      }
    }
  return support;
}

template <typename T>
void check_backward(const AttentionKernels<T>& kernel, const Case& c, const Attention<T>& a, const Support<T>& support,
                    std::mt19937& generator) {
  const AttentionSizes& s = c.size;
  const int64_t rows = s.batch * s.heads * s.queries, kv_tokens = s.batch * s.kv_heads * s.keys;
  const auto grad = Buffer<T>::random(rows * s.value_width, generator);
  const auto ptr = Buffer<int64_t>::copy(support.ptr);
  const auto columns = Buffer<int32_t>::copy(support.columns);
  const auto weights = Buffer<T>::copy(support.weights);
  const auto score_grad = Buffer<T>::unwritten(weights.size()), query_grad = Buffer<T>::unwritten(rows * s.width),
             key_grad = Buffer<T>::unwritten(kv_tokens * s.width),
             value_grad = Buffer<T>::unwritten(kv_tokens * s.value_width);
  AttentionGradient<T> g = {};
  g.size = s;
  g.query = a.query, g.key = a.key, g.value = a.value;
  g.grad = heads<const T>(grad.data(), s.heads, s.queries, s.value_width);
  g.row_ptr = ptr.data(), g.col_idx = columns.data(), g.weights = weights.data();
  g.score_grad = score_grad.data();
  g.query_grad = heads<T>(query_grad.data(), s.heads, s.queries, s.width);
  g.key_grad = heads<T>(key_grad.data(), s.kv_heads, s.keys, s.width);
  g.value_grad = heads<T>(value_grad.data(), s.kv_heads, s.keys, s.value_width);
  g.scale = a.scale;
  for (int64_t part = 0; part < 2; ++part) kernel.backward_rows(g, {rows * part / 2, rows * (part + 1) / 2});
  for (int64_t head = 0; head < s.batch * s.kv_heads; ++head)
    for (int64_t part = 0; part < 2; ++part)
      kernel.backward_keys(g, head / s.kv_heads, head % s.kv_heads, {s.keys * part / 2, s.keys * (part + 1) / 2});

  std::vector<double> dq(query_grad.size()), dk(key_grad.size()), dv(value_grad.size()), ds(score_grad.size());
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t kv_head = row / s.queries / s.heads * s.kv_heads + row / s.queries % s.heads / (s.heads / s.kv_heads);
    double inner = 0;
    for (int64_t e = ptr[row]; e < ptr[row + 1]; ++e) {
      const int64_t j = kv_head * s.keys + columns[e];
      for (int64_t d = 0; d < s.value_width; ++d) {
        dv[j * s.value_width + d] += double(weights[e]) * grad[row * s.value_width + d];
        ds[e] += double(grad[row * s.value_width + d]) * a.value.data[j * s.value_width + d];
      }
      inner += ds[e] * weights[e];
    }
    for (int64_t e = ptr[row]; e < ptr[row + 1]; ++e) {
      const int64_t j = kv_head * s.keys + columns[e];
      ds[e] = weights[e] * (ds[e] - inner);
      for (int64_t d = 0; d < s.width; ++d) {
        dq[row * s.width + d] += a.scale * ds[e] * a.key.data[j * s.width + d];
        dk[j * s.width + d] += a.scale * ds[e] * a.query.data[row * s.width + d];
      }
    }
  }
  sanitize::expect_equal(score_grad.data(), ds.data(), score_grad.size(), "score_grad " + c.name());
  sanitize::expect_equal(query_grad.data(), dq.data(), query_grad.size(), "query_grad " + c.name());
  sanitize::expect_equal(key_grad.data(), dk.data(), key_grad.size(), "key_grad " + c.name());
  sanitize::expect_equal(value_grad.data(), dv.data(), value_grad.size(), "value_grad " + c.name());
}

template <typename T>
void check_kernels(const AttentionKernels<T>& kernel) {
  std::mt19937 generator(0);
  for (const Case& c : cases) {
    const Inputs<T> inputs(c, generator);
    const auto out = Buffer<T>::unwritten(c.size.batch * c.size.heads * c.size.queries * c.size.value_width);
    const Attention<T> a = inputs.attention(c, out);
    const Support<T> support = run_forward(kernel, a);
    const Exact exact = exact_forward(a);
    sanitize::expect_equal(out.data(), exact.out.data(), out.size(), "forward " + c.name());
    std::vector<T> weights(exact.weights.size());
    for (size_t row = 0; row + 1 < support.ptr.size(); ++row)
      for (int64_t e = support.ptr[row]; e < support.ptr[row + 1]; ++e)
        weights[row * c.size.keys + support.columns[e]] = support.weights[e];
    sanitize::expect_equal(weights.data(), exact.weights.data(), int64_t(weights.size()), "weights " + c.name());
    check_backward(kernel, c, a, support, generator);
  }
}

std::function<void()> check(const AttentionTable& table) {
  return [&table] {
    check_kernels(table.f32);
    check_kernels(table.f64);
  };
}

RUN_UNDER_SANITIZERS(threshold_attention, scalar, true, check(attention_scalar));
#if defined(__x86_64__)
RUN_UNDER_SANITIZERS(threshold_attention, avx2, sanitize::has_avx2(), check(attention_avx2));
RUN_UNDER_SANITIZERS(threshold_attention, avx512, sanitize::has_avx512(), check(attention_avx512));
#endif

}  // namespace
