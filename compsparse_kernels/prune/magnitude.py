"""Magnitude pruning: the largest weights survive."""

from collections.abc import Callable, Collection

import torch
from torch import nn

from compsparse_kernels.layouts.checks import require
from compsparse_kernels.nn import MaskedLinear
from compsparse_kernels.prune.layers import prunable_layers

SCOPES = ("global", "layer")
DEAD = -1.0  # less than any magnitude


def magnitude_masks(
    model: nn.Module,
    sparsity: float = 0.9,
    scope: str = "global",
    skip: Collection[str] | Callable[[str, nn.Module], bool] = (),
    include_last: bool = False,
) -> dict[str, torch.Tensor]:
    r"""Masks that keep the weights of largest magnitude in the linear layers of a model.

    Of n weights, exactly ``n - round(sparsity * n)`` survive; of equal magnitudes the earlier ones (by layer, row,
    column) do. In a :class:`MaskedLinear` all ``out * in`` weights count, and only those still stored compete: dead
    ones stay dead, and what is sparser than asked already keeps its mask. So the rounds of iterative magnitude pruning
    are calls with rising ``sparsity``.

    Args:
        model: its layers of type ``nn.Linear`` (not subclasses) and :class:`MaskedLinear` are pruned.
        sparsity: share of weights to remove, in [0, 1).
        scope: ``"global"`` compares the weights of all layers with each other, ``"layer"`` prunes each by ``sparsity``.
        skip: names of layers, or of modules that hold them, to leave out; or a function ``(name, layer) -> bool``.
        include_last: prune the last layer (in order of definition) too; by default the model's read-out stays dense.

    Returns:
        ``{name: bool [out, in]}``, True where a weight survives, for :func:`convert`.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.

    Source: Frankle and Carbin, "The Lottery Ticket Hypothesis" (2019), iterative magnitude pruning.

    Example:
        >>> import torch
        >>> from compsparse_kernels import prune
        >>> model = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.ReLU(), torch.nn.Linear(30, 10))
        >>> masks = prune.magnitude_masks(model, sparsity=0.9)
        >>> {name: int(mask.sum()) for name, mask in masks.items()}
        {'0': 60}
    """
    require(isinstance(model, nn.Module), "model", "nn.Module", type(model).__name__, TypeError)
    is_number = isinstance(sparsity, (int, float)) and not isinstance(sparsity, bool)
    require(is_number, "sparsity", "a number in [0, 1)", repr(sparsity), TypeError)
    require(0 <= sparsity < 1, "sparsity", "a number in [0, 1)", sparsity)
    require(scope in SCOPES, "scope", "'global' or 'layer'", repr(scope))
    layers = _chosen(model, skip, include_last)
    magnitudes = {name: _magnitude(name, layer) for name, layer in layers.items()}
    if scope == "layer":
        return {name: _largest(m.flatten(), sparsity).view_as(m) for name, m in magnitudes.items()}
    device = next(iter(magnitudes.values())).device
    kept = _largest(torch.cat([m.flatten().to(device) for m in magnitudes.values()]), sparsity)
    parts = kept.split([m.numel() for m in magnitudes.values()])
    return {name: part.view_as(m).to(m.device) for (name, m), part in zip(magnitudes.items(), parts, strict=True)}


def _chosen(model, skip, include_last):
    layers = prunable_layers(model)
    names = list(layers)
    if callable(skip):
        skipped = {name for name in names if skip(name, layers[name])}
    else:
        is_collection = isinstance(skip, Collection) and not isinstance(skip, str)
        require(is_collection, "skip", "a collection of names or a function", repr(skip), TypeError)
        wanted = f"names of linear layers or of modules that hold them ({', '.join(names)})"
        for module in skip:
            require(any(_is_under(name, module) for name in names), "skip", wanted, repr(module))
        skipped = {name for name in names if any(_is_under(name, module) for module in skip)}
    if not include_last:
        skipped.update(names[-1:])
    chosen = {name: layer for name, layer in layers.items() if name not in skipped}
    hint = "a linear layer to prune (include_last=True takes the last one too)"
    require(len(chosen) > 0, "model", hint, f"{len(names)} linear layers, all of them left out")
    return chosen


def _is_under(name, module):
    return name == module or name.startswith(f"{module}.")


def _magnitude(name, layer):
    """``|W|`` as ``[out, in]``, ``DEAD`` where a mask has removed the weight."""
    weight = layer.weight.detach()
    require(not bool(weight.isnan().any()), f"model: weight of {name!r}", "no NaN", "NaN")
    if isinstance(layer, MaskedLinear):
        return weight.abs().where(layer.layout.to_mask(), DEAD)
    return weight.abs()


def _largest(magnitude, sparsity):
    """bool: the largest that ``sparsity`` leaves, the earlier of equal ones."""
    count = len(magnitude) - round(sparsity * len(magnitude))
    alive = magnitude != DEAD
    if count >= int(alive.sum()):
        return alive
    if count == 0:
        return torch.zeros_like(alive)
    smallest = magnitude.kthvalue(len(magnitude) - count + 1).values
    kept = magnitude > smallest
    ties = magnitude == smallest
    return kept | (ties & (ties.cumsum(0) <= count - kept.sum()))
