"""How a sparse pattern is stored: frozen dataclasses of index tensors, checked once, at construction."""

from compsparse_kernels.layouts.block import BlockLayout, BlockOrder
from compsparse_kernels.layouts.dag import DAGLayout, Kind
from compsparse_kernels.layouts.mask import MaskLayout, MaskOrder
from compsparse_kernels.layouts.nm import NMLayout
from compsparse_kernels.layouts.support import AttentionSupport

__all__ = ["AttentionSupport", "BlockLayout", "BlockOrder", "DAGLayout", "Kind", "MaskLayout", "MaskOrder", "NMLayout"]
