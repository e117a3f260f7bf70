"""Pruning: which weights survive (masks by layer name), and models whose layers store only those."""

from compsparse_kernels.prune.convert import convert, to_dense, update_masks
from compsparse_kernels.prune.drawing import draw_density, draw_displacements, draw_mask, draw_supports
from compsparse_kernels.prune.imp import IMP, Round
from compsparse_kernels.prune.magnitude import magnitude_masks
from compsparse_kernels.prune.masks import masks_from_torch, random_masks
from compsparse_kernels.prune.proximal import BetaLasso, ProximalAdamW, ProximalSGD, freeze
from compsparse_kernels.prune.regrowth import SET, RigL
from compsparse_kernels.prune.reporting import LayerReport, Report, Timing, report
from compsparse_kernels.prune.rewinding import rewind, snapshot
from compsparse_kernels.prune.schedules import GradualPruner, cubic_sparsity

__all__ = [
    "IMP",
    "SET",
    "BetaLasso",
    "GradualPruner",
    "LayerReport",
    "ProximalAdamW",
    "ProximalSGD",
    "Report",
    "RigL",
    "Round",
    "Timing",
    "convert",
    "cubic_sparsity",
    "draw_density",
    "draw_displacements",
    "draw_mask",
    "draw_supports",
    "freeze",
    "magnitude_masks",
    "masks_from_torch",
    "random_masks",
    "report",
    "rewind",
    "snapshot",
    "to_dense",
    "update_masks",
]
