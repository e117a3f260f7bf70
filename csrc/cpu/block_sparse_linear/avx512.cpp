#include "kernel.h"

namespace compsparse {

extern const BlockSparseTable block_sparse_avx512 = {
    block_sparse_kernels<Target<float, 16, 24, 4>>(),
    block_sparse_kernels<Target<double, 8, 24, 4>>(),
    block_sparse_kernels<Target<BFloat16, 16, 24, 2>>(),
    block_sparse_kernels<Target<Float16, 16, 24, 2>>(),
};

}  // namespace compsparse
