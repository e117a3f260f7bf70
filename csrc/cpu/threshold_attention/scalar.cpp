#include "kernel.h"

namespace compsparse {

extern const AttentionTable attention_scalar = {
    attention_kernels<float, Target<4, 12, 2>>(),
    attention_kernels<double, Target<2, 12, 2>>(),
};

}  // namespace compsparse
