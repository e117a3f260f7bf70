// threshold_attention's tables: the forward in all its ways and the backward in both of its, against plain loops.
#include "threshold_attention_exact.h"

namespace {

int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

Range block_at(int64_t begin, int64_t block, int64_t end) { return {begin, std::min(begin + block, end)}; }

// What the kernel says of all rows (b, h, i), one after another.
template <typename T>
struct Support {
  std::vector<int64_t> ptr = {0};
  std::vector<int32_t> columns;
  std::vector<T> weights, log_sums, slopes;
};

// Tokens of all key-value heads in panels, and the norms if these are wanted.
template <typename T>
struct Packed {
  Packed(const AttentionKernels<T>& kernel, const AttentionSizes& s, const Heads<const T>& x, int64_t width,
         bool with_norms)
      : head_size(round_up(s.keys, kernel.panel_keys) * width),
        panels(Buffer<T>::unwritten(s.batch * s.kv_heads * head_size)),
        norms(Buffer<double>::unwritten(
            with_norms ? s.batch * s.kv_heads * round_up(s.keys, kernel.panel_keys) / kernel.panel_keys : 0)) {
    const int64_t head_norms = norms.size() / (s.batch * s.kv_heads);
    for (int64_t head = 0; head < s.batch * s.kv_heads; ++head)
      kernel.pack_keys(x.head(head / s.kv_heads, head % s.kv_heads), x.stride, s.keys, width,
                       panels.data() + head * head_size, with_norms ? norms.data() + head * head_norms : nullptr);
  }

  int64_t head_size;
  Buffer<T> panels;
  Buffer<double> norms;
};

// One block of queries on scratch of its own; false where the index has left it undone.
template <typename T>
bool run_block(const AttentionKernels<T>& kernel, const Attention<T>& a, int64_t head, Range queries, bool with_support,
               Support<T>& support) {
  const int64_t block = kernel.block_queries, capacity = round_up(a.size.keys, kernel.panel_keys) + kernel.slack;
  const auto scaled = Buffer<T>::unwritten(block * a.size.width),
             scores = Buffer<T>::unwritten(block * kernel.score_stride),
             weights = Buffer<T>::unwritten(block * capacity), spare = Buffer<T>::unwritten(2 * capacity),
             log_sums = Buffer<T>::unwritten(block), slopes = Buffer<T>::unwritten(block);
  const Buffer<int8_t> codes(block * round_up(a.size.width, 4));
  const Buffer<int64_t> counts(block);
  const Buffer<int32_t> columns(block * capacity);
  const AttentionScratch<T> scratch = {scaled.data(),  codes.data(),   scores.data(), counts.data(),
                                       columns.data(), weights.data(), spare.data(),  log_sums.data(),
                                       slopes.data(),  capacity,       with_support};
  const int64_t b = head / a.size.heads, h = head % a.size.heads;
  const double share = kernel.head_share(a, b, h, scratch);
  if (!(share >= 0 && share <= 1)) {
    fprintf(stderr, "head_share: %g of the keys\n", share);
    ++sanitize::mismatches();
  }
  if (a.index && !kernel.forward_indexed(a, b, h, queries, scratch)) return false;
  if (!a.index) kernel.forward(a, b, h, queries, scratch);
  if (!with_support) return true;
  for (int64_t r = 0; r < queries.end - queries.begin; ++r) {
    const int64_t first = r * capacity, last = first + counts[r];
    support.columns.insert(support.columns.end(), columns.data() + first, columns.data() + last);
    support.weights.insert(support.weights.end(), weights.data() + first, weights.data() + last);
    support.ptr.push_back(int64_t(support.columns.size()));
    support.log_sums.push_back(log_sums[r]);
    support.slopes.push_back(slopes[r]);
  }
  return true;
}

// All blocks of queries; those that the index leaves undone without it. `indexed` counts the others.
template <typename T>
Support<T> run_forward(const AttentionKernels<T>& kernel, const Attention<T>& a, bool with_support, int64_t& indexed) {
  Support<T> support;
  Attention<T> without_index = a;
  without_index.index = nullptr;
  for (int64_t head = 0; head < a.size.batch * a.size.heads; ++head)
    for (int64_t begin = 0; begin < a.size.queries; begin += kernel.block_queries) {
      const Range queries = block_at(begin, kernel.block_queries, a.size.queries);
      const bool done = run_block(kernel, a, head, queries, with_support, support);
      if (!done) run_block(kernel, without_index, head, queries, with_support, support);
      indexed += done && a.index;
    }
  return support;
}

template <typename T>
void expect_support(const Support<T>& support, const Exact& exact, int64_t keys, Rule rule, const std::string& name) {
  const int64_t rows = int64_t(exact.slopes.size());
  std::vector<T> weights(exact.weights.size());
  std::vector<uint8_t> kept(exact.kept.size());
  std::vector<double> log_sums(rows);
  for (int64_t row = 0; row < rows; ++row) {
    int64_t after = 0;
    for (int64_t e = support.ptr[row]; e < support.ptr[row + 1]; ++e) {
      const int64_t column = support.columns[e];
      if (column < after || column >= keys) {
        fprintf(stderr, "%s: column %lld of row %lld\n", name.c_str(), (long long)column, (long long)row);
        ++sanitize::mismatches();
        return;
      }
      weights[row * keys + column] = support.weights[e], kept[row * keys + column] = 1;
      after = column + 1;
    }
    log_sums[row] = exact_log_sum(exact.scores.data() + row * keys, support.columns.data() + support.ptr[row],
                                  support.ptr[row + 1] - support.ptr[row]);
  }
  sanitize::expect_equal(weights.data(), exact.weights.data(), int64_t(weights.size()), "weights " + name);
  sanitize::expect_equal(support.log_sums.data(), log_sums.data(), rows, "log_sums " + name);
  sanitize::expect_equal(support.slopes.data(), exact.slopes.data(), rows, "slopes " + name);
  // The weights of entmax end at 0 without a step, wherever rounding says.
  if (rule == Rule::entmax || kept == exact.kept) return;
  fprintf(stderr, "support %s: not the exact one\n", name.c_str());
  ++sanitize::mismatches();
}

template <typename T>
Support<T> check_way(const AttentionKernels<T>& kernel, const Inputs<T>& inputs, Attention<T> a, const Exact& exact,
                     const std::string& way, int64_t& indexed) {
  const AttentionSizes& s = a.size;
  const std::string name = inputs.name() + "; " + way;
  Support<T> support;
  for (const bool with_support : {false, true}) {
    const auto out = Buffer<T>::unwritten(s.batch * s.heads * s.queries * s.value_width);
    a.out.data = out.data();
    support = run_forward(kernel, a, with_support, indexed);
    sanitize::expect_equal(out.data(), exact.out.data(), out.size(), "out " + name);
  }
  expect_support(support, exact, s.keys, a.rule, name);
  return support;
}

// Keys of all heads in an index; `pieces`: a few keys at a time.
template <typename T>
Buffer<uint8_t> pack_index(const AttentionKernels<T>& kernel, const Inputs<T>& inputs, int64_t stride, bool pieces) {
  const AttentionSizes& s = inputs.shape.size;
  const Heads<const T> keys = inputs.keys();
  Buffer<uint8_t> index(s.batch * s.kv_heads * stride);
  for (int64_t head = 0; head < s.batch * s.kv_heads; ++head)
    for (int64_t begin = 0, piece = 1; begin < s.keys; begin += piece, piece = piece % 67 + 11) {
      const Range which = block_at(begin, pieces ? piece : s.keys, s.keys);
      kernel.pack_index(keys.head(head / s.kv_heads, head % s.kv_heads) + which.begin * keys.stride, keys.stride,
                        s.width, which, index.data() + head * stride);
      if (!pieces) break;
    }
  return index;
}

template <typename T>
void check_index(const AttentionKernels<T>& kernel, const Inputs<T>& inputs, Attention<T> a, const Exact& exact,
                 int64_t& indexed) {
  a.index_stride = round_up(a.size.keys, index_panel_keys) / index_panel_keys * index_panel_bytes(a.size.width);
  const Buffer<uint8_t> index = pack_index(kernel, inputs, a.index_stride, false);
  const Buffer<uint8_t> by_pieces = pack_index(kernel, inputs, a.index_stride, true);
  if (memcmp(index.data(), by_pieces.data(), size_t(index.size())) != 0) {
    fprintf(stderr, "index %s: not the same by pieces\n", inputs.name().c_str());
    ++sanitize::mismatches();
  }
  a.index = index.data();
  check_way(kernel, inputs, a, exact, "indexed", indexed);
}

// The forward in each way that these inputs allow; returns the support.
template <typename T>
Support<T> check_forward(const AttentionKernels<T>& kernel, const Inputs<T>& inputs, int64_t& indexed) {
  const AttentionSizes& s = inputs.shape.size;
  const auto nowhere = Buffer<T>(0);
  Attention<T> a = inputs.attention(nowhere);
  const Exact exact = exact_forward(a);
  check_way(kernel, inputs, a, exact, "direct", indexed);
  const Packed<T> packed(kernel, s, inputs.keys(), s.width, true);
  a.packed_keys = packed.panels.data(), a.norms = packed.norms.data();
  if (kernel.forward_indexed) check_index(kernel, inputs, a, exact, indexed);
  Support<T> support = check_way(kernel, inputs, a, exact, "sparse", indexed);
  Buffer<uint8_t> finite(s.batch * s.kv_heads);
  for (int64_t head = 0; head < finite.size(); ++head) finite[head] = !inputs.shape.padding_is_nan;
  a.finite_values = finite.data();
  check_way(kernel, inputs, a, exact, "dense where most is kept", indexed);
  return support;
}

template <typename T>
struct Gradients {
  Gradients(const AttentionSizes& s, int64_t nnz, bool dropout)
      : query(Buffer<T>::unwritten(s.batch * s.heads * s.queries * s.width)),
        key(Buffer<T>::unwritten(s.batch * s.kv_heads * s.keys * s.width)),
        value(Buffer<T>::unwritten(s.batch * s.kv_heads * s.keys * s.value_width)),
        score(Buffer<T>::unwritten(nnz)),
        cut(Buffer<T>::unwritten(s.batch * s.heads * s.queries)),
        dropped(Buffer<T>::unwritten(dropout ? nnz : 0)) {}

  Buffer<T> query, key, value, score, cut, dropped;
};

// The gradients of all rows, then those of all keys, `range` of them at a time (a multiple of 64).
template <typename T>
void run_backward(const AttentionKernels<T>& kernel, const AttentionGradient<T>& g, const Packed<T>* values,
                  int64_t range) {
  const AttentionSizes& s = g.size;
  const int64_t dense_stride = values ? round_up(s.keys, kernel.panel_keys) : 0;
  for (int64_t head = 0; head < s.batch * s.heads; ++head) {
    const int64_t b = head / s.heads, h = head % s.heads, kv_head = b * s.kv_heads + h / (s.heads / s.kv_heads);
    const T* packed = values ? values->panels.data() + kv_head * values->head_size : nullptr;
    for (int64_t begin = 0; begin < s.queries; begin += kernel.block_queries) {
      const auto rows = Buffer<T>::unwritten(kernel.block_queries * s.value_width),
                 dense = Buffer<T>::unwritten(kernel.block_queries * std::max<int64_t>(dense_stride, 64)),
                 block = Buffer<T>::unwritten(2 * 64 * 64);
      kernel.backward_rows(g, packed, b, h, block_at(begin, kernel.block_queries, s.queries),
                           {rows.data(), dense.data(), dense_stride, block.data()});
    }
  }
  for (int64_t head = 0; head < s.batch * s.kv_heads; ++head)
    for (int64_t begin = 0; begin < s.keys; begin += range) {
      const auto block = Buffer<T>::unwritten(2 * 64 * 64);
      kernel.backward_keys(g, head / s.kv_heads, head % s.kv_heads, block_at(begin, range, s.keys),
                           {nullptr, nullptr, 0, block.data()});
    }
}

template <typename T>
void check_backward(const AttentionKernels<T>& kernel, const Inputs<T>& inputs, const Support<T>& support,
                    std::mt19937& generator) {
  const AttentionSizes& s = inputs.shape.size;
  const bool tokens_first = inputs.shape.tokens_first,
             finite = !inputs.shape.padding_is_nan && !inputs.shape.query_is_nan;
  const auto grad = Buffer<T>::random(s.batch * s.heads * s.queries * s.value_width, generator);
  const auto ptr = Buffer<int64_t>::copy(support.ptr);
  const auto columns = Buffer<int32_t>::copy(support.columns);
  const auto weights = Buffer<T>::copy(support.weights), slopes = Buffer<T>::copy(support.slopes);
  const Packed<T> values(kernel, s, inputs.values(), s.value_width, false);
  for (const bool dense : {false, true}) {
    if (dense && !finite) continue;
    const Gradients<T> to(s, weights.size(), inputs.shape.dropout > 0);
    AttentionGradient<T> g = {};
    const Attention<T> a = inputs.attention(to.query);
    g.size = s;
    g.query = a.query, g.key = a.key, g.value = a.value;
    g.grad = heads<const T>(grad.data(), s.heads, s.queries, s.value_width, tokens_first);
    g.row_ptr = ptr.data(), g.col_idx = columns.data(), g.weights = weights.data(), g.slopes = slopes.data();
    g.dropped = a.dropout > 0 ? to.dropped.data() : nullptr;
    g.shares = a.dropout > 0 ? g.dropped : g.weights;
    g.score_grad = to.score.data(), g.cut_grad = to.cut.data();
    g.query_grad = heads<T>(to.query.data(), s.heads, s.queries, s.width, tokens_first);
    g.key_grad = heads<T>(to.key.data(), s.kv_heads, s.keys, s.width, tokens_first);
    g.value_grad = heads<T>(to.value.data(), s.kv_heads, s.keys, s.value_width, tokens_first);
    g.threshold = a.threshold, g.rule = a.rule, g.weighting = a.weighting;
    g.scale = a.scale, g.dropout = a.dropout, g.seed = a.seed, g.finite = dense;
    run_backward(kernel, g, dense ? &values : nullptr, dense ? 64 : 128);
    const ExactGradient exact = exact_backward(g);
    const std::string name = inputs.name() + (dense ? "; dense" : "; sparse");
    sanitize::expect_equal(to.score.data(), exact.score_grad.data(), to.score.size(), "score_grad " + name);
    sanitize::expect_equal(to.cut.data(), exact.cut_grad.data(), to.cut.size(), "cut_grad " + name);
    sanitize::expect_equal(to.query.data(), exact.query_grad.data(), to.query.size(), "query_grad " + name);
    sanitize::expect_equal(to.key.data(), exact.key_grad.data(), to.key.size(), "key_grad " + name);
    sanitize::expect_equal(to.value.data(), exact.value_grad.data(), to.value.size(), "value_grad " + name);
    sanitize::expect_equal(to.dropped.data(), exact.shares.data(), to.dropped.size(), "dropped " + name);
  }
}

template <typename T>
void check_kernels(const AttentionKernels<T>& kernel) {
  std::mt19937 generator(0);
  int64_t indexed = 0;
  for (const Shape& shape : shapes)
    for (const Manner& manner : manners) {
      const Inputs<T> inputs(shape, manner, generator);
      const Support<T> support = check_forward(kernel, inputs, indexed);
      check_backward(kernel, inputs, support, generator);
    }
  if (!kernel.forward_indexed || indexed > 0) return;
  fprintf(stderr, "the index was never used\n");
  ++sanitize::mismatches();
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
RUN_UNDER_SANITIZERS(threshold_attention, avx512_bf16,
                     __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni"),
                     [] { check_kernels(attention_avx512_bf16); });
#endif

}  // namespace
