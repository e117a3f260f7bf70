"""Modules: drop-ins for ``nn.Linear`` and ``nn.MultiheadAttention`` that store and compute only a sparse pattern."""

from compsparse_kernels.nn.sparse_dag_linear import SparseDAGLinear

__all__ = ["SparseDAGLinear"]
