"""Autograd ops, one room each: api (checks, autograd), contract (schemas, fakes), reference (the meaning)."""

from compsparse_kernels.ops.backends import cpu_isa, explain
from compsparse_kernels.ops.block_sparse_linear import block_sparse_linear, sampled_block_matmul
from compsparse_kernels.ops.dag_network import dag_network
from compsparse_kernels.ops.masked_linear import masked_linear, sampled_matmul
from compsparse_kernels.ops.proximal import proximal_adamw_, proximal_sgd_
from compsparse_kernels.ops.threshold_attention import threshold_attention

OPS = (
    "block_sparse_linear",
    "sampled_block_matmul",
    "masked_linear",
    "sampled_matmul",
    "dag_network",
    "threshold_attention",
    "proximal_sgd_",
    "proximal_adamw_",
)
# What masked_linear and sampled_matmul run on a layout of kind nm: they have backends of their own.
NM_OPS = ("nm_linear", "nm_sampled")

__all__ = [
    "NM_OPS",
    "OPS",
    "block_sparse_linear",
    "cpu_isa",
    "dag_network",
    "explain",
    "masked_linear",
    "proximal_adamw_",
    "proximal_sgd_",
    "sampled_block_matmul",
    "sampled_matmul",
    "threshold_attention",
]
