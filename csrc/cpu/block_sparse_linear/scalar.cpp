#include "kernel.h"

namespace compsparse {

extern const BlockSparseTable block_sparse_scalar = {
    block_sparse_kernels<float, Target<float, 4, 12, 2>>(),
    block_sparse_kernels<double, Target<double, 2, 12, 2>>(),
};

}  // namespace compsparse
