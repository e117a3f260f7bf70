#include "kernel.h"

namespace compsparse {

extern const BlockSparseTable block_sparse_avx512 = {
    block_sparse_kernels<float, Target<float, 16, 24, 4>>(),
    block_sparse_kernels<double, Target<double, 8, 24, 4>>(),
};

}  // namespace compsparse
