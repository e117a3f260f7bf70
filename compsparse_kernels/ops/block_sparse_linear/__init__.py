"""Block-sparse linear layers: products and sampled products over a :class:`BlockLayout`."""

from compsparse_kernels.ops.block_sparse_linear.api import block_sparse_linear, sampled_block_matmul

__all__ = ["block_sparse_linear", "sampled_block_matmul"]
