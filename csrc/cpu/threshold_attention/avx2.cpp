#include "indexed.h"

namespace compsparse {

extern constinit const AttentionTable attention_avx2 = {
    indexed_kernels<Target<8, 12, 2>>(),
    attention_kernels<double, Target<4, 12, 2>>(),
};

}  // namespace compsparse
