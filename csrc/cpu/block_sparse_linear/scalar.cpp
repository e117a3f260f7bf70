#include "kernel.h"

namespace compsparse {

extern const BlockSparseTable block_sparse_scalar = {
    block_sparse_kernels<Target<float, 4, 12, 2>>(),
    block_sparse_kernels<Target<double, 2, 12, 2>>(),
    block_sparse_kernels<Target<BFloat16, 4, 12, 2>>(),
    block_sparse_kernels<Target<Float16, 4, 12, 2>>(),
};

}  // namespace compsparse
