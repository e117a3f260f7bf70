#include "kernel.h"

namespace compsparse {

extern const BlockSparseTable block_sparse_avx2 = {
    block_sparse_kernels<float, Target<float, 8, 12, 2>>(),
    block_sparse_kernels<double, Target<double, 4, 12, 2>>(),
};

}  // namespace compsparse
