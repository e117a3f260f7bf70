"""Sparse kernels for PyTorch that train and infer: block-sparse DAG layers, pruned nets, thresholded attention."""

from compsparse_kernels import prune, theory
from compsparse_kernels._version import __version__
from compsparse_kernels.graphs import FunctionGraph
from compsparse_kernels.layouts import AttentionSupport, BlockLayout, DAGLayout, MaskLayout
from compsparse_kernels.nn import (
    DAGNetwork,
    KVCache,
    MaskedLinear,
    SparseDAGLinear,
    ThresholdAttention,
    TransformerBlock,
)
from compsparse_kernels.ops import (
    block_sparse_linear,
    dag_network,
    explain,
    masked_linear,
    sampled_block_matmul,
    sampled_matmul,
    threshold_attention,
)

__all__ = [
    "AttentionSupport",
    "BlockLayout",
    "DAGLayout",
    "DAGNetwork",
    "FunctionGraph",
    "KVCache",
    "MaskLayout",
    "MaskedLinear",
    "SparseDAGLinear",
    "ThresholdAttention",
    "TransformerBlock",
    "__version__",
    "block_sparse_linear",
    "dag_network",
    "explain",
    "masked_linear",
    "prune",
    "sampled_block_matmul",
    "sampled_matmul",
    "theory",
    "threshold_attention",
]
