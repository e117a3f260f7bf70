"""Pruning: which weights survive, and models that store, compute and train only those.

Masks come from :func:`magnitude_masks`, :func:`random_masks`, :func:`masks_from_torch`, or anyone's bool tensors.
:func:`convert` puts :class:`MaskedLinear` layers in place, :func:`update_masks` changes their masks, :func:`to_dense`
goes back; :func:`snapshot` and :func:`rewind` take weights back in time. Optimizer state follows the weights through
all of these, to the bit. :class:`IMP`, :class:`GradualPruner`, :class:`RigL` and :class:`SET` are ways to train made of
them, :class:`ProximalSGD`, :class:`ProximalAdamW` and :class:`BetaLasso` make weights exactly zero, which
:func:`freeze` turns into masks. :func:`report` measures what was won, the ``draw_`` functions show what was found.
"""

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
