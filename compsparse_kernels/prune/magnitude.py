"""Magnitude pruning: the largest weights survive, alone, by blocks, or N of every M."""

from collections.abc import Callable, Collection

import torch
from torch import nn
from torch.nn import functional as F

from compsparse_kernels.layouts.block import check_block_shape
from compsparse_kernels.layouts.checks import require
from compsparse_kernels.prune.layers import chosen_layers, weight_layout, weight_parameter
from compsparse_kernels.prune.state import remap

SCOPES = ("global", "layer")
NORMS = ("l2", "l1")
DEFAULT_SPARSITY = 0.9
DEAD = -1.0  # less than any magnitude


def magnitude_masks(
    model: nn.Module,
    sparsity: float | None = None,
    scope: str | None = None,
    skip: Collection[str] | Callable[[str, nn.Module], bool] = (),
    include_last: bool = False,
    *,
    block_shape: tuple[int, int] | None = None,
    norm: str | None = None,
    nm: tuple[int, int] | None = None,
) -> dict[str, torch.Tensor]:
    r"""Masks that keep the weights of largest magnitude in the linear layers of a model.

    Of n weights, exactly ``n - round(sparsity * n)`` survive; of equal magnitudes the earlier ones (by layer, row,
    column) do. In a :class:`MaskedLinear`, or under a mask of ``torch.nn.utils.prune``, all ``out * in`` weights count,
    and only those still there compete: dead ones stay dead, and what is sparser than asked already keeps its mask. So
    the rounds of iterative magnitude pruning are calls with rising ``sparsity``.

    With ``block_shape`` the same is done with blocks in place of weights: the magnitude of a block is
    :math:`\sqrt{\mathrm{mean}\, w^2}` (``norm="l2"``) or :math:`\mathrm{mean}\, |w|` (``"l1"``) over its elements, dead
    ones counting as 0; means order whole blocks as the norms do, and are fair to ragged ones. With ``nm=(n, m)`` the n
    largest of every m consecutive inputs of an output survive.

    Args:
        model: its layers of type ``nn.Linear`` (not subclasses) and :class:`MaskedLinear` are pruned.
        sparsity: share of weights to remove, in [0, 1); 0.9 by default. None with ``nm``, which fixes it.
        scope: ``"global"`` (default) compares the weights of all layers with each other, ``"layer"`` prunes each by
            ``sparsity``. None with ``nm``.
        skip: names of layers, or of modules that hold them, to leave out; or a function ``(name, layer) -> bool``.
        include_last: prune the last layer (in order of definition) too; by default the model's read-out stays dense.
        block_shape: ``(outputs, inputs)`` of a block; give it to :func:`convert` too.
        norm: of a block, ``"l2"`` (default) or ``"l1"``.
        nm: ``(n, m)`` with ``1 <= n <= m``; the last group of a row is ragged where m does not divide ``in``.

    Returns:
        ``{name: bool [out, in]}``, True where a weight survives, for :func:`convert`.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.

    Source: Frankle and Carbin, "The Lottery Ticket Hypothesis" (2019), iterative magnitude pruning; blocks: Narang,
    Undersander, Diamos, "Block-Sparse Recurrent Neural Networks" (2017); N:M: Mishra et al., "Accelerating Sparse Deep
    Neural Networks" (2021), section 4.

    Example:
        >>> import torch
        >>> from compsparse_kernels import prune
        >>> model = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.ReLU(), torch.nn.Linear(30, 10))
        >>> masks = prune.magnitude_masks(model, sparsity=0.9)
        >>> {name: int(mask.sum()) for name, mask in masks.items()}
        {'0': 60}
        >>> int(prune.magnitude_masks(model, sparsity=0.5, block_shape=(10, 5))["0"].sum())
        300
        >>> prune.magnitude_masks(model, nm=(2, 4))["0"].view(30, 5, 4).sum(-1).unique().tolist()
        [2]
    """
    require(isinstance(model, nn.Module), "model", "nn.Module", type(model).__name__, TypeError)
    sparsity, scope, norm = _checked_options(sparsity, scope, block_shape, norm, nm)
    layers = chosen_layers(model, skip, include_last)
    magnitudes = {name: magnitude_of(name, layer) for name, layer in layers.items()}
    if nm is not None:
        return {name: _largest_of_groups(magnitude, *nm) for name, magnitude in magnitudes.items()}
    if block_shape is None:
        return _select(magnitudes, sparsity, scope)
    kept = _select({name: _block_norms(m, block_shape, norm) for name, m in magnitudes.items()}, sparsity, scope)
    return {name: _expand(kept[name], m.shape, block_shape) & (m != DEAD) for name, m in magnitudes.items()}


def check_share(argument: str, value: object) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    require(is_number, argument, "a number in [0, 1)", repr(value), TypeError)
    require(0 <= value < 1, argument, "a number in [0, 1)", value)


def largest(magnitude: torch.Tensor, count: int) -> torch.Tensor:
    """bool ``[n]``: the ``count`` largest that are not ``DEAD``, of equal ones the earlier."""
    alive = magnitude != DEAD
    values = magnitude[alive]
    if count >= len(values):
        return alive
    if count == 0:
        return torch.zeros_like(alive)
    smallest = values.kthvalue(len(values) - count + 1).values
    kept = magnitude > smallest
    missing = count - int(kept.count_nonzero())
    kept[(magnitude == smallest).nonzero().flatten()[:missing]] = True
    return kept


def _checked_options(sparsity, scope, block_shape, norm, nm):
    if nm is not None:
        for name, value in (("sparsity", sparsity), ("scope", scope), ("block_shape", block_shape), ("norm", norm)):
            require(value is None, name, "None with nm, which says how many survive where", repr(value))
        ok = isinstance(nm, tuple) and len(nm) == 2 and all(type(size) is int for size in nm)
        require(ok, "nm", "(n, m), two ints", repr(nm), TypeError)
        require(1 <= nm[0] <= nm[1], "nm", "(n, m) with 1 <= n <= m", nm)
    sparsity = DEFAULT_SPARSITY if sparsity is None else sparsity
    check_share("sparsity", sparsity)
    scope = SCOPES[0] if scope is None else scope
    require(scope in SCOPES, "scope", "'global' or 'layer'", repr(scope))
    if block_shape is None:
        require(norm is None, "norm", "None without block_shape", repr(norm))
    else:
        check_block_shape(block_shape)
    norm = NORMS[0] if norm is None else norm
    require(norm in NORMS, "norm", "'l2' or 'l1'", repr(norm))
    return sparsity, scope, norm


def magnitude_of(name: str, layer: nn.Module) -> torch.Tensor:
    """``|W|`` as ``[out, in]``, ``DEAD`` where a mask has removed the weight."""
    parameter, layout = weight_parameter(layer), weight_layout(layer)
    # Where torch's pruning computes layer.weight, that is of the last forward pass.
    weight = layer.weight.detach() if parameter is None else remap(parameter.detach(), layout, None)
    require(not bool(weight.isnan().any()), f"model: weight of {name!r}", "no NaN", "NaN")
    return weight.abs() if layout is None else weight.abs().where(layout.to_mask(), DEAD)


def _select(magnitudes, sparsity, scope):
    """bool tensors in the shapes of ``magnitudes``: what survives."""
    if scope == "layer":
        return {name: _survivors(m.flatten(), sparsity).view_as(m) for name, m in magnitudes.items()}
    device = next(iter(magnitudes.values())).device
    kept = _survivors(torch.cat([m.flatten().to(device) for m in magnitudes.values()]), sparsity)
    parts = kept.split([m.numel() for m in magnitudes.values()])
    return {name: part.view_as(m).to(m.device) for (name, m), part in zip(magnitudes.items(), parts, strict=True)}


def _survivors(magnitude, sparsity):
    return largest(magnitude, len(magnitude) - round(sparsity * len(magnitude)))


def _block_norms(magnitude, block_shape, norm):
    """``[out, in]`` -> ``[out / bo, in / bi]`` (rounded up), ``DEAD`` where nothing of a block is left."""
    alive = magnitude != DEAD
    value = torch.where(alive, magnitude, 0).double()  # squares of a half would overflow
    value, inside, alive = (
        _sum_of_blocks(part, block_shape)
        for part in (value.square() if norm == "l2" else value, torch.ones_like(value), alive.double())
    )
    mean = value / inside
    return torch.where(alive > 0, mean.sqrt() if norm == "l2" else mean, DEAD)


def _sum_of_blocks(tensor, block_shape):
    bo, bi = block_shape
    rows, columns = tensor.shape
    padded = F.pad(tensor, (0, -columns % bi, 0, -rows % bo))
    return padded.unflatten(1, (-1, bi)).unflatten(0, (-1, bo)).sum((1, 3))


def _expand(blocks, shape, block_shape):
    rows, columns = shape
    return blocks.repeat_interleave(block_shape[0], 0).repeat_interleave(block_shape[1], 1)[:rows, :columns]


def _largest_of_groups(magnitude, n, m):
    """bool ``[out, in]``: of every m columns of a row the n largest, of equal ones the earlier."""
    columns = magnitude.shape[1]
    groups = F.pad(magnitude, (0, -columns % m), value=DEAD).unflatten(1, (-1, m))  # [out, groups, m]
    order = groups.argsort(dim=-1, descending=True, stable=True)
    kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order[..., :n], True)
    return kept.flatten(1)[:, :columns] & (magnitude != DEAD)
