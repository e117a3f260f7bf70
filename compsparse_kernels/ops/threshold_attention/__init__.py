"""Thresholded attention: each query attends to the keys whose score reaches a threshold, exactly those."""

from compsparse_kernels.ops.threshold_attention.api import threshold_attention

__all__ = ["threshold_attention"]
