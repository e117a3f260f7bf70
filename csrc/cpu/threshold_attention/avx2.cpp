#include "kernel.h"

namespace compsparse {

extern const AttentionTable attention_avx2 = {
    attention_kernels<float, Target<8, 12, 2>>(),
    attention_kernels<double, Target<4, 12, 2>>(),
};

}  // namespace compsparse
