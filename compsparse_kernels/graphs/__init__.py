"""Graphs of compositional functions: what depends on what."""

from compsparse_kernels.graphs.bounds import ComplexityBounds
from compsparse_kernels.graphs.function_graph import FunctionGraph, LevelEdges
from compsparse_kernels.graphs.parents import Parents

__all__ = ["ComplexityBounds", "FunctionGraph", "LevelEdges", "Parents"]
