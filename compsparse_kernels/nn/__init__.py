"""Modules: drop-ins for ``nn.Linear`` and ``nn.MultiheadAttention`` that store and compute only a sparse pattern."""

from compsparse_kernels.nn.masked_linear import MaskedLinear
from compsparse_kernels.nn.sparse_dag_linear import SparseDAGLinear
from compsparse_kernels.nn.threshold_attention import ThresholdAttention

__all__ = ["MaskedLinear", "SparseDAGLinear", "ThresholdAttention"]
