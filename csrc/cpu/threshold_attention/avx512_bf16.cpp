#include "indexed.h"

namespace compsparse {

extern constinit const AttentionKernels<float> attention_avx512_bf16 = indexed_kernels<Target<16, 24, 4>>();

}  // namespace compsparse
