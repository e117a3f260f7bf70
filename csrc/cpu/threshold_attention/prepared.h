// What the forward ops prepare for the kernels: buffers of a thread, and keys packed to panels.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

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

// What the kernels need of the keys, made when a block of queries first asks for it: of all heads, for all threads, or
// where heads are many of one at a time for each thread, in whose cache it stays.
template <typename T>
class PreparedKeys {
 public:
  PreparedKeys(const AttentionKernels<T>& kernel, Attention<T>& a, int64_t parts)
      : kernel_(kernel),
        a_(a),
        heads_(a.size.batch * a.size.kv_heads),
        panels_((a.size.keys + kernel.panel_keys - 1) / kernel.panel_keys),
        head_size_(panels_ * kernel.panel_keys * a.size.width),
        one_at_a_time_(heads_ >= kHeadsEach * parts),
        at_hand_(parts, -1) {
    packed_ = make_scratch<T>((one_at_a_time_ ? parts : heads_) * head_size_);
    norms_.reset(new double[heads_ * panels_]);
    finite_.reset(new uint8_t[heads_]);
    if (!one_at_a_time_) once_.reset(new std::once_flag[heads_]);
    a.packed_keys = packed_.get();
    a.packed_stride = one_at_a_time_ ? 0 : head_size_;
    a.norms = norms_.get();
    a.finite_values = finite_.get();
  }

  // Blocks of queries, of `group` heads of `per_head` each, that a thread takes together.
  int64_t blocks_together(int64_t group, int64_t per_head) const { return one_at_a_time_ ? group * per_head : 1; }

  // `mine` is the thread's own copy of what the constructor got.
  void need(int64_t part, int64_t b, int64_t kv_head, Attention<T>& mine) {
    const int64_t head = b * a_.size.kv_heads + kv_head;
    if (!one_at_a_time_) {
      std::call_once(once_[head], [&] { prepare(b, kv_head, packed_.get() + head * head_size_); });
    } else if (at_hand_[part] != head) {
      at_hand_[part] = head;
      T* packed = packed_.get() + part * head_size_;
      prepare(b, kv_head, packed);
      mine.packed_keys = packed;
    }
  }

 private:
  static constexpr int64_t kHeadsEach = 8;  // of a thread at least: the last to end keeps the others waiting for little

  void prepare(int64_t b, int64_t kv_head, T* packed) {
    const int64_t head = b * a_.size.kv_heads + kv_head;
    kernel_.pack_keys(a_.key.head(b, kv_head), a_.key.stride, a_.size.keys, a_.size.width, packed,
                      norms_.get() + head * panels_);
    finite_[head] = all_finite(a_.value.head(b, kv_head), a_.value.stride, a_.size.keys, a_.size.value_width);
  }

  const AttentionKernels<T>& kernel_;
  Attention<T>& a_;
  int64_t heads_, panels_, head_size_;
  bool one_at_a_time_;
  std::vector<int64_t> at_hand_;
  Scratch<T> packed_;
  std::unique_ptr<double[]> norms_;
  std::unique_ptr<uint8_t[]> finite_;
  std::unique_ptr<std::once_flag[]> once_;
};

}  // namespace compsparse
