"""Modules that store and compute only a sparse pattern: networks on a graph, drop-ins for ``nn.Linear`` and
``nn.MultiheadAttention``."""

from compsparse_kernels.nn.calibration import calibrate
from compsparse_kernels.nn.dag_network import DAGNetwork
from compsparse_kernels.nn.kv_cache import KVCache
from compsparse_kernels.nn.masked_linear import MaskedLinear
from compsparse_kernels.nn.sparse_dag_linear import SparseDAGLinear
from compsparse_kernels.nn.support_graph import draw_support_graph, support_graph
from compsparse_kernels.nn.threshold_attention import ThresholdAttention
from compsparse_kernels.nn.threshold_schedule import ThresholdSchedule
from compsparse_kernels.nn.transformer_block import TransformerBlock

__all__ = [
    "DAGNetwork",
    "KVCache",
    "MaskedLinear",
    "SparseDAGLinear",
    "ThresholdAttention",
    "ThresholdSchedule",
    "TransformerBlock",
    "calibrate",
    "draw_support_graph",
    "support_graph",
]
