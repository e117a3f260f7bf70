// Picks one kernel table at load: the widest instruction set this processor has, or the one COMPSPARSE_CPU caps it to.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace compsparse {
namespace {

constexpr Kernels scalar = {"scalar",          &block_sparse_scalar, &masked_scalar,  &dag_scalar,
                            &attention_scalar, &nm_scalar,           &proximal_scalar};
#if defined(COMPSPARSE_X86)
constexpr Kernels avx2 = {"avx2",          &block_sparse_avx2, &masked_avx2,  &dag_avx2,
                          &attention_avx2, &nm_avx2,           &proximal_avx2};
constexpr Kernels avx512 = {"avx512",          &block_sparse_avx512, &masked_avx512,  &dag_avx512,
                            &attention_avx512, &nm_avx512,           &proximal_avx512};

// avx512 but for products of bfloat16, and attention whose screen multiplies bytes.
Kernels avx512_bf16() {
  static const BlockSparseTable table = {block_sparse_avx512.f32, block_sparse_avx512.f64, block_sparse_avx512_bf16,
                                         block_sparse_avx512.f16};
  static const AttentionTable attention = {attention_avx512_bf16, attention_avx512.f64};
  return {"avx512_bf16", &table, &masked_avx512, &dag_avx512, &attention, &nm_avx512, &proximal_avx512};
}

bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif

Kernels choose() {
#if defined(COMPSPARSE_X86)
  const char* cap = std::getenv("COMPSPARSE_CPU");
  const auto capped_to = [&](const char* isa) { return cap && !std::strcmp(cap, isa); };
  if (capped_to("scalar") || !has_avx2()) return scalar;
  if (capped_to("avx2") || !has_avx512()) return avx2;
  const bool more = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  if (capped_to("avx512") || !more) return avx512;
  return avx512_bf16();
#else
  return scalar;
#endif
}

}  // namespace

const Kernels& kernels() {
  static const Kernels chosen = choose();
  return chosen;
}

}  // namespace compsparse
