"""Pruning: which weights survive (masks by layer name), and models whose layers store only those."""

from compsparse_kernels.prune.convert import convert, to_dense
from compsparse_kernels.prune.magnitude import magnitude_masks
from compsparse_kernels.prune.proximal import BetaLasso, ProximalAdamW, ProximalSGD, freeze

__all__ = ["BetaLasso", "ProximalAdamW", "ProximalSGD", "convert", "freeze", "magnitude_masks", "to_dense"]
