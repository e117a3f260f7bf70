#include "indexed.h"
#include "kernel.h"

namespace compsparse {

extern constinit const AttentionKernels<float> attention_avx512_bf16 = [] {
  AttentionKernels<float> kernels = attention_kernels<float, Target<16, 24, 4>>();
  kernels.forward_indexed = forward_indexed<Target<16, 24, 4>>;
  kernels.pack_index = pack_index;
  return kernels;
}();

}  // namespace compsparse
