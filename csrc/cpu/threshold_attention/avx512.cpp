#include "kernel.h"

namespace compsparse {

extern const AttentionTable attention_avx512 = {
    attention_kernels<float, Target<16, 24, 4>>(),
    attention_kernels<double, Target<8, 24, 4>>(),
};

}  // namespace compsparse
