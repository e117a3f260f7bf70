#include "kernel.h"

namespace compsparse {

extern const BlockSparseTable block_sparse_avx2 = {
    block_sparse_kernels<Target<float, 8, 12, 2>>(),
    block_sparse_kernels<Target<double, 4, 12, 2>>(),
    block_sparse_kernels<Target<BFloat16, 8, 12, 2>>(),
    block_sparse_kernels<Target<Float16, 8, 12, 2>>(),
};

}  // namespace compsparse
