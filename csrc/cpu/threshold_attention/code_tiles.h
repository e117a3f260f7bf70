// Products of a block of queries' codes with a panel of 64 keys' codes, exact in 32-bit integers, as this instruction
// set multiplies them.
#pragma once

#if defined(__AVX512VNNI__)
#include "codes_vnni.h"
#else
#include "codes_avx2.h"
#endif

namespace {

template <int M>
void code_rows(const int8_t* codes, const CodedQuery* queries, int64_t count, int64_t padded, const uint8_t* panel,
               const Reach* reach, float* scores, PanelScreen* found) {
  for (; count >= M; count -= M) {
    code_tile<M>(codes, queries, padded, panel, reach, scores, found);
    codes += M * padded, queries += M, reach += M, scores += M * kPanelStride, found += M;
  }
  if constexpr (M > 1) {
    if (count > 0) code_rows<M / 2>(codes, queries, count, padded, panel, reach, scores, found);
  }
}

// A block of queries' codes.
class CodeTiles {
 public:
  CodeTiles(const int8_t* codes, const CodedQuery* queries, int64_t number, int64_t padded)
      : codes_(codes), queries_(queries), number_(number), padded_(padded) {}

  // Bounds of the scores of a panel, before bias and masks.
  void screen(const uint8_t* panel, const Reach* reach, float* scores, PanelScreen* found) const {
    code_rows<kIndexRows>(codes_, queries_, number_, padded_, panel, reach, scores, found);
  }

 private:
  const int8_t* codes_;
  const CodedQuery* queries_;
  int64_t number_, padded_;
};

}  // namespace
