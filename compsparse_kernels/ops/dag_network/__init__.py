"""Whole networks on a graph: forward one call, backward one call."""

from compsparse_kernels.ops.dag_network.api import dag_network

__all__ = ["dag_network"]
