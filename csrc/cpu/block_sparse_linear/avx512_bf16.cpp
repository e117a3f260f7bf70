// bfloat16 on processors that multiply it themselves.
#include "../intrinsics.h"
#include "kernel.h"

namespace {

// An element is a pair of inputs, in the 32 bits of a float. vdpbf16ps adds both products of a pair to a float sum,
// each rounded to nearest even (or both at once, as the processor has it), whatever the rounding mode; it takes
// subnormal inputs and sums as 0.
struct Pairs : Target<BFloat16, 16, 24, 4> {
  static constexpr int NarrowRows = 8;  // packing inputs for more costs what they would gain, in so short sums
  static constexpr int Together = 2;
  static constexpr bool AsStored = true;

  template <int L>
  static COMPSPARSE_INLINE Vec<float, L> multiply_add(Vec<float, L> a, Vec<float, L> b, Vec<float, L> sum) {
    if constexpr (L == 16) return (Vec<float, L>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
    if constexpr (L == 8) return (Vec<float, L>)_mm256_dpbf16_ps((__m256)sum, (__m256bh)a, (__m256bh)b);
    if constexpr (L == 4) return (Vec<float, L>)_mm_dpbf16_ps((__m128)sum, (__m128bh)a, (__m128bh)b);
  }

  template <int L>
  static COMPSPARSE_INLINE Vec<float, L> multiply_add(Vec<float, L> a, float b, Vec<float, L> sum) {
    if constexpr (L == 16) return multiply_add<L>(a, (Vec<float, L>)_mm512_set1_ps(b), sum);
    if constexpr (L == 8) return multiply_add<L>(a, (Vec<float, L>)_mm256_set1_ps(b), sum);
    if constexpr (L == 4) return multiply_add<L>(a, (Vec<float, L>)_mm_set1_ps(b), sum);
  }

  // The instruction broadcasts from memory by itself. GCC 12 writes a broadcast beside it, and they take turns: blocks
  // of 16 are a third slower. Narrower vectors don't mind.
  template <int L>
  static COMPSPARSE_INLINE Vec<float, L> multiply_add_once(Vec<float, L> a, const float* b, Vec<float, L> sum) {
    if constexpr (L == 16) {
      __asm__("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(a), "m"(*b));
      return sum;
    } else {
      return multiply_add<L>(a, *b, sum);
    }
  }

  template <int L>
  static COMPSPARSE_INLINE Vec<float, L> along(const BFloat16* row) {
    return load<float, L>(reinterpret_cast<const float*>(row));
  }

  template <int L>
  static COMPSPARSE_INLINE Vec<float, L> across(const BFloat16* row, const BFloat16* next) {
    const auto words = [](const BFloat16* p) {
      return __builtin_convertvector(load<uint16_t, L>(reinterpret_cast<const uint16_t*>(p)), Words<L>);
    };
    return (Vec<float, L>)(words(row) | (next ? words(next) << 16 : Words<L>{}));
  }
};

}  // namespace

namespace compsparse {

extern const BlockSparseKernels<BFloat16> block_sparse_avx512_bf16 = block_sparse_kernels<Pairs>();

}  // namespace compsparse
