"""Measures of what a network has found: how local the supports of its units are."""

from compsparse_kernels.theory.locality import (
    adjacency_lift,
    displacement_map,
    grid_distance,
    inverse_participation_ratio,
    ring_distance,
)

__all__ = [
    "adjacency_lift",
    "displacement_map",
    "grid_distance",
    "inverse_participation_ratio",
    "ring_distance",
]
