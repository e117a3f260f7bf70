// Which weights dropout keeps: Philox-4x32-10 (Salmon et al., 2011) of the column and the row, keyed by the seed; see
// ops/threshold_attention/dropout.py, whose numbers these are.
#pragma once

#include <stdint.h>

namespace {

// The first word of the counter (column, row, row / 2^32, 0).
inline uint32_t philox(uint64_t seed, uint32_t column, uint64_t row) {
  uint32_t counter[4] = {column, uint32_t(row), uint32_t(row >> 32), 0};
  uint32_t key[2] = {uint32_t(seed), uint32_t(seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t(counter[0]) * 0xD2511F53u, b = uint64_t(counter[2]) * 0xCD9E8D57u;
    const uint32_t next[4] = {uint32_t(b >> 32) ^ counter[1] ^ key[0], uint32_t(b),
                              uint32_t(a >> 32) ^ counter[3] ^ key[1], uint32_t(a)};
    for (int i = 0; i < 4; ++i) counter[i] = next[i];
    key[0] += 0x9E3779B9u;
    key[1] += 0xBB67AE85u;
  }
  return counter[0];
}

// to[e] = from[e] / (1 - p) where the entry is kept, else 0.
template <typename T>
void drop(uint64_t seed, double p, uint64_t row, const int32_t* columns, int64_t count, const T* from, T* to) {
  const auto least = uint64_t(__builtin_nearbyint(p * 0x1p32));
  const T factor = T(1 / (1 - p));
  for (int64_t e = 0; e < count; ++e)
    to[e] = philox(seed, uint32_t(columns[e]), row) >= least ? from[e] * factor : T(0);
}

}  // namespace
