"""Pruning: which weights survive (masks by layer name), and models whose layers store only those."""

from compsparse_kernels.prune.convert import convert, to_dense
from compsparse_kernels.prune.drawing import draw_density, draw_displacements, draw_mask, draw_supports
from compsparse_kernels.prune.magnitude import magnitude_masks

__all__ = [
    "convert",
    "draw_density",
    "draw_displacements",
    "draw_mask",
    "draw_supports",
    "magnitude_masks",
    "to_dense",
]
