// What threshold_attention is run on: every shape with every rule and weighting.
#pragma once

#include "harness.h"

namespace {

using namespace compsparse;
using sanitize::Buffer;

enum class Bias { none, number, mask };

struct Shape {
  const char* name;
  AttentionSizes size;        // batch, heads, kv_heads, queries, keys, width, value_width
  bool tokens_first = false;  // [batch, tokens, heads, width], else [batch, heads, tokens, width]
  double scale = 0.7;
  bool causal = false;
  int64_t window_left = -1, window_right = -1, query_offset = 0;
  Bias bias = Bias::none;
  bool bias_has[4] = {true, true, true, true};  // dimensions of full size, not 1
  bool padding = false, padding_is_nan = false, alibi = false;
  std::vector<int64_t> query_starts = {}, key_starts = {};
  bool thresholds_by_query = false;
  double dropout = 0;
  double step = 0, factor = 1;  // queries and keys are rounded to multiples of a step, then multiplied
  bool query_is_nan = false;    // the first of each head
  bool keys_grow = false;       // from one panel of the index to the next
};

const Shape shapes[] = {
    {.name = "one key", .size = {1, 1, 1, 1, 1, 1, 1}},
    {.name = "no keys", .size = {1, 2, 1, 5, 0, 8, 8}},
    {.name = "padding", .size = {2, 2, 2, 7, 9, 8, 5}, .padding = true},
    {.name = "causal, bias", .size = {1, 4, 2, 17, 33, 16, 16}, .causal = true, .bias = Bias::number},
    {.name = "mask of each query, tokens first",
     .size = {2, 2, 1, 40, 70, 20, 24},
     .tokens_first = true,
     .bias = Bias::mask,
     .bias_has = {false, false, true, true}},
    {.name = "offset, padding that is not a number",
     .size = {2, 6, 3, 65, 131, 66, 35},
     .causal = true,
     .query_offset = 60,
     .padding = true,
     .padding_is_nan = true},
    {.name = "window, negative scale",
     .size = {1, 2, 2, 50, 400, 13, 9},
     .tokens_first = true,
     .scale = -0.6,
     .window_left = 150,
     .window_right = 11,
     .query_offset = 240},
    {.name = "ALiBi, bias of each query alone",
     .size = {2, 3, 1, 30, 300, 33, 7},
     .query_offset = 100,
     .bias = Bias::number,
     .bias_has = {true, true, true, false},
     .alibi = true},
    {.name = "sequences, some empty",
     .size = {1, 4, 2, 90, 170, 12, 11},
     .causal = true,
     .window_left = 30,
     .query_offset = 5,
     .alibi = true,
     .query_starts = {0, 0, 20, 31, 31, 90},
     .key_starts = {0, 8, 80, 80, 95, 170}},
    {.name = "thresholds, mask of each key",
     .size = {2, 2, 1, 26, 140, 18, 65},
     .bias = Bias::mask,
     .bias_has = {true, false, false, true},
     .thresholds_by_query = true},
    {.name = "dropout, causal",
     .size = {2, 4, 2, 40, 200, 10, 17},
     .causal = true,
     .query_offset = 150,
     .dropout = 0.4},
    {.name = "far from its keys", .size = {1, 1, 1, 8, 80, 6, 6}, .window_left = 2, .query_offset = 79},
    {.name = "several strips",
     .size = {1, 2, 1, 25, 2150, 37, 5},
     .tokens_first = true,
     .padding = true,
     .keys_grow = true},
    {.name = "equal scores", .size = {1, 2, 1, 40, 200, 8, 8}, .scale = 0.5, .step = 0.25},
    {.name = "too large for codes", .size = {1, 2, 1, 12, 70, 50, 6}, .factor = 1.58e18},
    {.name = "no number", .size = {1, 2, 2, 30, 140, 7, 6}, .causal = true, .query_offset = 130, .query_is_nan = true},
    {.name = "several blocks of rows", .size = {1, 2, 1, 200, 135, 5, 3}, .thresholds_by_query = true},
};

struct Manner {
  const char* name;
  Rule rule;
  double threshold;
  Weighting weighting;
};

// Thresholds that some of the equal scores reach exactly, and others that keep nearly nothing or everything.
const Manner manners[] = {
    {"relative", Rule::relative, exp(-1.25), Weighting::softmax},
    {"relative, shrink", Rule::relative, 0.2, Weighting::shrink},
    {"relative, rectified", Rule::relative, 0.2, Weighting::rectified},
    {"relative, keeps everything", Rule::relative, 1e-9, Weighting::shrink},
    {"absolute", Rule::absolute, 0.25, Weighting::softmax},
    {"absolute, shrink", Rule::absolute, -0.25, Weighting::shrink},
    {"absolute, rectified, keeps everything", Rule::absolute, -40, Weighting::rectified},
    {"absolute, keeps nothing", Rule::absolute, 40, Weighting::rectified},
    {"top 1", Rule::topk, 1, Weighting::softmax},
    {"top 19", Rule::topk, 19, Weighting::softmax},
    {"mass 0.6", Rule::topp, 0.6, Weighting::softmax},
    {"mass 1", Rule::topp, 1, Weighting::softmax},
    {"1.5-entmax", Rule::entmax, 1.5, Weighting::softmax},
    {"sparsemax", Rule::entmax, 2, Weighting::softmax},
};

template <typename T>
Heads<T> heads(T* data, int64_t number, int64_t tokens, int64_t width, bool tokens_first) {
  if (tokens_first) return {data, number * tokens * width, width, number * width};
  return {data, number * tokens * width, tokens * width, width};
}

// Where a row of `x` begins.
template <typename T>
int64_t at(const Heads<T>& x, int64_t b, int64_t h, int64_t token) {
  return b * x.batch_stride + h * x.head_stride + token * x.stride;
}

inline Buffer<uint8_t> random_flags(int64_t size, double share, std::mt19937& generator) {
  std::bernoulli_distribution set(share);
  Buffer<uint8_t> flags(size);
  for (int64_t i = 0; i < size; ++i) flags[i] = set(generator);
  return flags;
}

// Of each query its own: no more than the manner's own where it is a share, no less where it is a score.
inline Buffer<double> random_thresholds(const AttentionSizes& size, const Manner& manner, std::mt19937& generator) {
  Buffer<double> thresholds = Buffer<double>::random(size.batch * size.heads * size.queries, generator);
  for (int64_t i = 0; i < thresholds.size(); ++i)
    thresholds[i] = manner.rule == Rule::relative ? manner.threshold * (0.6 + 0.4 * thresholds[i])
                                                  : manner.threshold + 0.5 + 0.5 * thresholds[i];
  return thresholds;
}

inline int64_t bias_size(const Shape& c) {
  const int64_t sizes[] = {c.size.batch, c.size.heads, c.size.queries, c.size.keys};
  int64_t size = 1;
  for (int d = 0; d < 4; ++d) size *= c.bias_has[d] ? sizes[d] : 1;
  return size;
}

template <typename T>
struct Inputs {
  Inputs(const Shape& c, const Manner& manner, std::mt19937& generator)
      : shape(c),
        manner(manner),
        query(Buffer<T>::random(c.size.batch * c.size.heads * c.size.queries * c.size.width, generator)),
        key(Buffer<T>::random(c.size.batch * c.size.kv_heads * c.size.keys * c.size.width, generator)),
        value(Buffer<T>::random(c.size.batch * c.size.kv_heads * c.size.keys * c.size.value_width, generator)),
        bias(Buffer<T>::random(c.bias == Bias::number ? bias_size(c) : 0, generator)),
        mask(random_flags(c.bias == Bias::mask ? bias_size(c) : 0, 0.8, generator)),
        padding(random_flags(c.padding ? c.size.batch * c.size.keys : 0, 0.3, generator)),
        alibi(Buffer<float>::random(c.alibi ? c.size.heads : 0, generator)),
        thresholds(random_thresholds(c.size, manner, generator)),
        query_starts(Buffer<int64_t>::copy(c.query_starts)),
        key_starts(Buffer<int64_t>::copy(c.key_starts)) {
    for (int64_t h = 0; h < alibi.size(); ++h) alibi[h] *= 0.1f;
    resize(query), resize(key);
    if (c.keys_grow) grow_keys();
    if (c.padding_is_nan) spoil_padding();
    if (c.query_is_nan) spoil_queries();
  }

  Heads<const T> queries() const {
    return heads<const T>(query.data(), shape.size.heads, shape.size.queries, shape.size.width, shape.tokens_first);
  }
  Heads<const T> keys() const { return of_keys(key, shape.size.width); }
  Heads<const T> values() const { return of_keys(value, shape.size.value_width); }

  // Without a way through the keys: these, an index or neither are set by who calls the kernel.
  Attention<T> attention(const Buffer<T>& out) const {
    const AttentionSizes& s = shape.size;
    Attention<T> a = {};
    a.size = s;
    a.query = queries();
    a.key = keys();
    a.value = values();
    a.out = heads<T>(out.data(), s.heads, s.queries, s.value_width, shape.tokens_first);
    set_bias(a);
    if (shape.padding) a.padding = padding.data();
    if (shape.alibi) a.alibi_slopes = alibi.data();
    if (shape.thresholds_by_query && (manner.rule == Rule::relative || manner.rule == Rule::absolute)) {
      a.thresholds = thresholds.data();
      a.threshold_strides[0] = s.heads * s.queries, a.threshold_strides[1] = s.queries, a.threshold_strides[2] = 1;
    }
    if (query_starts.size() > 0) {
      a.query_starts = query_starts.data(), a.key_starts = key_starts.data();
      a.sequences = query_starts.size() - 1;
    }
    a.threshold = manner.threshold, a.rule = manner.rule, a.weighting = manner.weighting;
    a.causal = shape.causal, a.window_left = shape.window_left, a.window_right = shape.window_right;
    a.query_offset = shape.query_offset, a.scale = shape.scale;
    a.dropout = shape.dropout, a.seed = 0x123456789abcdef;
    return a;
  }

  std::string name() const { return std::string(shape.name) + "; " + manner.name; }

  const Shape& shape;
  const Manner& manner;
  Buffer<T> query, key, value, bias;
  Buffer<uint8_t> mask, padding;
  Buffer<float> alibi;
  Buffer<double> thresholds;
  Buffer<int64_t> query_starts, key_starts;

 private:
  Heads<const T> of_keys(const Buffer<T>& x, int64_t width) const {
    return heads<const T>(x.data(), shape.size.kv_heads, shape.size.keys, width, shape.tokens_first);
  }

  void set_bias(Attention<T>& a) const {
    if (shape.bias == Bias::number) a.bias = bias.data();
    if (shape.bias == Bias::mask) a.mask = mask.data();
    const int64_t sizes[] = {a.size.batch, a.size.heads, a.size.queries, a.size.keys};
    int64_t stride = 1;
    for (int d = 3; d >= 0; --d) {
      a.bias_strides[d] = shape.bias_has[d] ? stride : 0;
      stride *= shape.bias_has[d] ? sizes[d] : 1;
    }
  }

  void resize(const Buffer<T>& x) {
    for (int64_t e = 0; e < x.size(); ++e)
      x[e] = T((shape.step > 0 ? nearbyint(x[e] / shape.step) * shape.step : x[e]) * shape.factor);
  }

  void grow_keys() {
    const AttentionSizes& s = shape.size;
    for (int64_t b = 0; b < s.batch; ++b)
      for (int64_t h = 0; h < s.kv_heads; ++h)
        for (int64_t j = 0; j < s.keys; ++j)
          for (int64_t d = 0; d < s.width; ++d)
            key[at(keys(), b, h, j) + d] *= T(0.1 + double(j / index_panel_keys * index_panel_keys) / double(s.keys));
  }

  void spoil_queries() {
    for (int64_t b = 0; b < shape.size.batch; ++b)
      for (int64_t h = 0; h < shape.size.heads; ++h) query[at(queries(), b, h, 0)] = NAN;
  }

  void spoil_padding() {
    const AttentionSizes& s = shape.size;
    for (int64_t b = 0; b < s.batch; ++b)
      for (int64_t h = 0; h < s.kv_heads; ++h)
        for (int64_t j = 0; j < s.keys; ++j) {
          if (!padding[b * s.keys + j]) continue;
          for (int64_t d = 0; d < s.width; ++d) key[at(keys(), b, h, j) + d] = NAN;
          for (int64_t d = 0; d < s.value_width; ++d) value[at(values(), b, h, j) + d] = NAN;
        }
  }
};

}  // namespace
