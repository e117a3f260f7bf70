// Picks one kernel table at load: the widest instruction set this processor has, or the one COMPSPARSE_CPU caps it to.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace compsparse {
namespace {

constexpr Kernels scalar = {"scalar", &block_sparse_scalar, &masked_scalar, &dag_scalar, &attention_scalar};
#if defined(COMPSPARSE_X86)
constexpr Kernels avx2 = {"avx2", &block_sparse_avx2, &masked_avx2, &dag_avx2, &attention_avx2};
constexpr Kernels avx512 = {"avx512", &block_sparse_avx512, &masked_avx512, &dag_avx512, &attention_avx512};

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif

Kernels choose() {
#if defined(COMPSPARSE_X86)
  const char* cap = std::getenv("COMPSPARSE_CPU");
  const bool scalar_only = cap && !std::strcmp(cap, "scalar");
  const bool at_most_avx2 = cap && !std::strcmp(cap, "avx2");
  if (!scalar_only && !at_most_avx2 && has_avx512()) return avx512;
  if (!scalar_only && has_avx2()) return avx2;
#endif
  return scalar;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels chosen = choose();
  return chosen;
}

}  // namespace compsparse
