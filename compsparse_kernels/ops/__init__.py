"""Autograd ops, one room each: api (checks, autograd), contract (schemas, fakes), reference (the meaning)."""

from compsparse_kernels.ops.backends import cpu_isa, explain
from compsparse_kernels.ops.block_sparse_linear import block_sparse_linear, sampled_block_matmul
from compsparse_kernels.ops.dag_network import dag_network
from compsparse_kernels.ops.masked_linear import masked_linear, sampled_matmul
from compsparse_kernels.ops.threshold_attention import threshold_attention

# As `explain` and the command line name them. masked_linear and sampled_matmul run nm_linear and nm_sampled on a layout
# of kind nm.
OPS = (
    "block_sparse_linear",
    "sampled_block_matmul",
    "masked_linear",
    "sampled_matmul",
    "nm_linear",
    "nm_sampled",
    "dag_network",
    "threshold_attention",
)

__all__ = [
    "OPS",
    "block_sparse_linear",
    "cpu_isa",
    "dag_network",
    "explain",
    "masked_linear",
    "sampled_block_matmul",
    "sampled_matmul",
    "threshold_attention",
]
