// What the forward ops prepare for the kernels: buffers of a thread, and keys packed to panels.
#pragma once

#include <memory>
#include <mutex>

#include "../scratch.h"
#include "unpack.h"

namespace compsparse {

// Buffers of one thread, for blocks of queries against `keys` keys. Pages that no candidate reaches are never touched.
template <typename T>
struct Buffers {
  Buffers(const AttentionKernels<T>& kernel, const AttentionSizes& size)
      : row_capacity(round_up(size.keys, kernel.panel_keys) + kernel.slack),
        queries(make_scratch<T>(kernel.block_queries * size.width)),
        codes(make_scratch<int8_t>(kernel.block_queries * round_up(size.width, 4))),
        scores(make_scratch<T>(kernel.block_queries * kernel.score_stride)),
        counts(new int64_t[kernel.block_queries]),
        columns(new int32_t[kernel.block_queries * row_capacity]),
        weights(make_scratch<T>(kernel.block_queries * row_capacity)),
        spare(make_scratch<T>(2 * row_capacity)),
        sums(new T[2 * kernel.block_queries]),
        slopes(sums.get() + kernel.block_queries) {}

  AttentionScratch<T> scratch(bool with_support) const {
    return {queries.get(), codes.get(), scores.get(), counts.get(), columns.get(), weights.get(),
            spare.get(),   sums.get(),  slopes,       row_capacity, with_support};
  }

  int64_t row_capacity;
  Scratch<T> queries;
  Scratch<int8_t> codes;
  Scratch<T> scores;
  std::unique_ptr<int64_t[]> counts;
  std::unique_ptr<int32_t[]> columns;
  Scratch<T> weights, spare;
  std::unique_ptr<T[]> sums;
  T* slopes;
};

// What the kernels need of the keys, made when a block of queries first asks for it.
template <typename T>
class PreparedKeys {
 public:
  PreparedKeys(const AttentionKernels<T>& kernel, Attention<T>& a)
      : kernel_(kernel), a_(a), heads_(a.size.batch * a.size.kv_heads), panels_(panels_of(kernel, a.size)) {
    const int64_t head_size = panels_ * kernel.panel_keys * a.size.width;
    packed_ = make_scratch<T>(heads_ * head_size);
    norms_.reset(new double[heads_ * panels_]);
    finite_.reset(new uint8_t[heads_]);
    once_.reset(new std::once_flag[heads_]);
    a.packed_keys = packed_.get();
    a.norms = norms_.get();
    a.finite_values = finite_.get();
  }

  void need(int64_t b, int64_t kv_head) {
    const int64_t head = b * a_.size.kv_heads + kv_head;
    std::call_once(once_[head], [&] {
      T* packed = packed_.get() + head * panels_ * kernel_.panel_keys * a_.size.width;
      kernel_.pack_keys(a_.key.head(b, kv_head), a_.key.stride, a_.size.keys, a_.size.width, packed,
                        norms_.get() + head * panels_);
      finite_[head] = all_finite(a_.value.head(b, kv_head), a_.value.stride, a_.size.keys, a_.size.value_width);
    });
  }

 private:
  static int64_t panels_of(const AttentionKernels<T>& kernel, const AttentionSizes& size) {
    return (size.keys + kernel.panel_keys - 1) / kernel.panel_keys;
  }

  const AttentionKernels<T>& kernel_;
  Attention<T>& a_;
  int64_t heads_, panels_;
  Scratch<T> packed_;
  std::unique_ptr<double[]> norms_;
  std::unique_ptr<uint8_t[]> finite_;
  std::unique_ptr<std::once_flag[]> once_;
};

}  // namespace compsparse
