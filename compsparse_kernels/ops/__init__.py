"""Autograd ops, one room each: api (checks, autograd), contract (schemas, fakes), reference (the meaning)."""

from compsparse_kernels.ops.backends import cpu_isa, explain
from compsparse_kernels.ops.block_sparse_linear import block_sparse_linear, sampled_block_matmul
from compsparse_kernels.ops.masked_linear import masked_linear, sampled_matmul

OPS = ("block_sparse_linear", "sampled_block_matmul", "masked_linear", "sampled_matmul")

__all__ = [
    "OPS",
    "block_sparse_linear",
    "cpu_isa",
    "explain",
    "masked_linear",
    "sampled_block_matmul",
    "sampled_matmul",
]
