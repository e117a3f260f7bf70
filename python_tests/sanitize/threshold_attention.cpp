// threshold_attention's tables: the forward in all its ways, the backward in both of its, and those without a
// support, against plain loops.
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

// Of one block of queries.
template <typename T>
struct BlockScratch {
  BlockScratch(const AttentionKernels<T>& kernel, const AttentionSizes& s)
      : capacity(round_up(s.keys, kernel.panel_keys) + kernel.slack),
        scaled(Buffer<T>::unwritten(kernel.block_queries * s.width)),
        scores(Buffer<T>::unwritten(kernel.block_queries * kernel.score_stride)),
        weights(Buffer<T>::unwritten(kernel.block_queries * capacity)),
        spare(Buffer<T>::unwritten(2 * capacity)),
        log_sums(Buffer<T>::unwritten(kernel.block_queries)),
        slopes(Buffer<T>::unwritten(kernel.block_queries)),
        codes(kernel.block_queries * round_up(s.width, 4)),
        counts(kernel.block_queries),
        columns(kernel.block_queries * capacity) {}

  AttentionScratch<T> of(bool with_support) const {
    return {scaled.data(), codes.data(),    scores.data(), counts.data(), columns.data(), weights.data(),
            spare.data(),  log_sums.data(), slopes.data(), capacity,      with_support};
  }

  int64_t capacity;
  Buffer<T> scaled, scores, weights, spare, log_sums, slopes;
  Buffer<int8_t> codes;
  Buffer<int64_t> counts;
  Buffer<int32_t> columns;
};

// One block of queries on scratch of its own; false where the index has left it undone.
template <typename T>
bool run_block(const AttentionKernels<T>& kernel, const Attention<T>& a, int64_t head, Range queries, bool with_support,
               Support<T>& support) {
  const BlockScratch<T> buffers(kernel, a.size);
  const AttentionScratch<T> scratch = buffers.of(with_support);
  const int64_t b = head / a.size.heads, h = head % a.size.heads;
  for (const double share : {kernel.head_share(a, b, h, scratch), kernel.true_share(a, b, h, scratch)})
    if (!(share >= 0 && share <= 1)) {
      fprintf(stderr, "%g of the keys\n", share);
      ++sanitize::mismatches();
    }
  if (a.index && !kernel.forward_indexed(a, b, h, queries, scratch)) return false;
  if (!a.index) kernel.forward(a, b, h, queries, scratch);
  if (!with_support) return true;
  for (int64_t r = 0; r < queries.end - queries.begin; ++r) {
    const int64_t first = r * scratch.row_capacity, last = first + scratch.counts[r];
    support.columns.insert(support.columns.end(), scratch.columns + first, scratch.columns + last);
    support.weights.insert(support.weights.end(), scratch.weights + first, scratch.weights + last);
    support.ptr.push_back(int64_t(support.columns.size()));
    support.log_sums.push_back(scratch.log_sums[r]);
    support.slopes.push_back(scratch.slopes[r]);
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
  a.packed_keys = packed.panels.data(), a.packed_stride = packed.head_size, a.norms = packed.norms.data();
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

// What takes the place of a support, on numbers that are finite.
template <typename T>
struct Bits {
  Bits(const AttentionSizes& s, int64_t rows)
      : row_words(round_up(s.keys, 64) / 64),
        words(Buffer<uint64_t>(rows * row_words)),
        tops(Buffer<T>::unwritten(rows)),
        inverses(Buffer<T>::unwritten(rows)),
        out(Buffer<T>::unwritten(rows * s.value_width)) {
    for (int64_t w = 0; w < words.size(); ++w) words[w] = ~uint64_t{0};
  }

  KeptBits<T> of() const { return {words.data(), row_words, tops.data(), inverses.data()}; }
  bool kept(int64_t row, int64_t key) const { return words[row * row_words + key / 64] >> (key % 64) & 1; }

  int64_t row_words;
  Buffer<uint64_t> words;
  Buffer<T> tops, inverses, out;
};

template <typename T>
void run_forward_bits(const AttentionKernels<T>& kernel, const Inputs<T>& inputs, const Bits<T>& bits) {
  const AttentionSizes& s = inputs.shape.size;
  const Packed<T> packed(kernel, s, inputs.keys(), s.width, true);
  Buffer<uint8_t> finite(s.batch * s.kv_heads);
  for (int64_t head = 0; head < finite.size(); ++head) finite[head] = 1;
  Attention<T> a = inputs.attention(bits.out);
  a.packed_keys = packed.panels.data(), a.packed_stride = packed.head_size;
  a.norms = packed.norms.data(), a.finite_values = finite.data();
  for (int64_t head = 0; head < s.batch * s.heads; ++head)
    for (int64_t begin = 0; begin < s.queries; begin += kernel.block_queries) {
      const BlockScratch<T> scratch(kernel, s);
      kernel.forward_bits(a, bits.of(), head / s.heads, head % s.heads,
                          block_at(begin, kernel.block_queries, s.queries), scratch.of(false));
    }
}

template <typename T>
void check_forward_bits(const Inputs<T>& inputs, const Bits<T>& bits) {
  const Exact exact = exact_forward(inputs.attention(bits.out));
  const std::string name = inputs.name() + "; bits";
  const int64_t keys = inputs.shape.size.keys, rows = int64_t(exact.slopes.size());
  bool same = true;
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t key = 0; key < bits.row_words * 64; ++key)
      same &= bits.kept(row, key) == (key < keys && exact.kept[row * keys + key]);
  sanitize::expect_equal(bits.out.data(), exact.out.data(), bits.out.size(), "out " + name);
  if (same) return;
  fprintf(stderr, "%s: not the exact support\n", name.c_str());
  ++sanitize::mismatches();
}

// `range` keys at a time; the gradients of the queries of all ranges are added up.
template <typename T>
std::vector<T> run_backward_bits(const AttentionKernels<T>& kernel, BitsGradient<T> g, int64_t query_numbers,
                                 int64_t range) {
  const AttentionSizes& s = g.of.size;
  std::vector<T> query_grad(query_numbers);
  for (int64_t first = 0; first == 0 || first < s.keys; first += range) {
    const auto part = Buffer<T>::unwritten(query_numbers);
    g.query_grad.data = part.data();
    for (int64_t head = 0; head < s.batch * s.kv_heads; ++head) {
      const auto queries = Buffer<T>::unwritten(recompute_queries * s.width),
                 grads = Buffer<T>::unwritten(recompute_queries * s.value_width),
                 weights = Buffer<T>::unwritten(recompute_queries * recompute_keys),
                 score_grads = Buffer<T>::unwritten(recompute_queries * recompute_keys),
                 packed_keys = Buffer<T>::unwritten(recompute_keys * s.width),
                 packed_values = Buffer<T>::unwritten(recompute_keys * s.value_width);
      kernel.backward_bits(
          g, head / s.kv_heads, head % s.kv_heads, block_at(first, range, s.keys),
          {queries.data(), grads.data(), weights.data(), score_grads.data(), packed_keys.data(), packed_values.data()});
    }
    for (int64_t e = 0; e < query_numbers; ++e) query_grad[e] += part[e];
  }
  return query_grad;
}

// Against the gradients that `like` has of the same support. Keys of 1e18 make 0 of a row with one key a number: what
// is computed again and again from the rounded output is not exact there.
template <typename T>
void check_bits(const AttentionKernels<T>& kernel, const Inputs<T>& inputs, const AttentionGradient<T>& like,
                const ExactGradient& exact) {
  const AttentionSizes& s = like.size;
  const bool has_cut = like.rule == Rule::relative || like.rule == Rule::absolute;
  if (!has_cut || like.weighting != Weighting::softmax || like.dropout > 0) return;
  const Bits<T> bits(s, s.batch * s.heads * s.queries);
  run_forward_bits(kernel, inputs, bits);
  check_forward_bits(inputs, bits);
  if (inputs.shape.factor > 1) return;
  for (const int64_t range : {recompute_keys, 2 * recompute_keys, int64_t{1} << 40}) {
    const Gradients<T> to(s, 0, false);
    BitsGradient<T> g = {inputs.attention(bits.out), bits.of()};
    g.out = heads<const T>(bits.out.data(), s.heads, s.queries, s.value_width, inputs.shape.tokens_first);
    g.grad = like.grad;
    g.query_grad = like.query_grad, g.key_grad = like.key_grad, g.value_grad = like.value_grad;
    g.key_grad.data = to.key.data(), g.value_grad.data = to.value.data();
    const std::vector<T> query_grad = run_backward_bits(kernel, g, to.query.size(), range);
    const std::string name = inputs.name() + "; bits";
    sanitize::expect_equal(query_grad.data(), exact.query_grad.data(), to.query.size(), "query_grad " + name);
    sanitize::expect_equal(to.key.data(), exact.key_grad.data(), to.key.size(), "key_grad " + name);
    sanitize::expect_equal(to.value.data(), exact.value_grad.data(), to.value.size(), "value_grad " + name);
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
    if (dense) check_bits(kernel, inputs, g, exact);
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
