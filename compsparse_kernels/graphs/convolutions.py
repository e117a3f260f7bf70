"""Graphs of convolutions. ``conv1d``, ``conv2d`` and ``from_conv`` are classmethods of FunctionGraph."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from compsparse_kernels.graphs.checks import check_int, describe, require
from compsparse_kernels.graphs.parents import Parents

if TYPE_CHECKING:
    from compsparse_kernels.graphs.function_graph import FunctionGraph

PerLevel = int | tuple[int, ...] | list[int | tuple[int, ...]]


@dataclass(frozen=True)
class Convolution:
    """One layer; ``padding`` is (before, after) for each axis."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    in_channels: int = 1
    out_channels: int = 1
    groups: int = 1


class Level(NamedTuple):
    """Nodes and edges of one layer."""

    in_degrees: np.ndarray
    idx: np.ndarray  # counted within the level before
    position: np.ndarray
    channel: np.ndarray  # of each node


def conv1d(
    cls,
    length: int,
    kernel: int | list[int],
    stride: int | list[int] = 1,
    padding: int | list[int] = 0,
    dilation: int | list[int] = 1,
    depth: int | None = None,
    shared: bool = True,
) -> "FunctionGraph":
    r"""Tower of 1-D convolutions of one channel: node j of a level reads the window at j of the level before,

    .. math:: \{\, s j - p + r t : 0 \le t < k \,\} \cap \{0, \dots, \mathrm{length} - 1\}

    with kernel k, stride s, padding p, dilation r. Sources are positions; channels are the width of a network on it.

    Args:
        length: number of sources.
        kernel, stride, padding, dilation: a number, or a list with one for each level.
        depth: number of levels; by default as many as the lists have, or 1. The sinks are the last level; places of
            the others that no window reads are left out.
        shared: nodes of a level share weights: a convolution. Windows that reach into the padding share too, their
            arguments there count as 0 (``graph.parents.position`` says which are there). Without: locally connected.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came; also where a window would not fit, or
            would see padding only.

    Source: Poggio, "It is Compositional Sparsity: a framework for ML", section 4 (CNNs).

    Example:
        >>> from compsparse_kernels import FunctionGraph
        >>> FunctionGraph.conv1d(16, kernel=3, padding=1, depth=2)
        FunctionGraph(16 sources, 32 nodes in 2 levels, 16 sinks, 92 edges, in-degrees 2..3, 2 weights)
        >>> FunctionGraph.conv1d(16, kernel=[2, 2, 2, 2], stride=2, shared=False) == FunctionGraph.tree(16)
        True
    """
    length = check_int("length", length)
    layers = _tower(1, {"kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation}, depth)
    return _stack(cls, (length,), layers, shared)


def conv2d(
    cls,
    shape: tuple[int, int],
    kernel: PerLevel,
    stride: PerLevel = 1,
    padding: PerLevel = 0,
    dilation: PerLevel = 1,
    depth: int | None = None,
    shared: bool = True,
) -> "FunctionGraph":
    """Tower of 2-D convolutions of one channel: as :meth:`conv1d`, on a grid ``shape = (height, width)``, row by row.

    Args:
        shape: height and width; there are ``height * width`` sources.
        kernel, stride, padding, dilation: a number, a pair (vertical, horizontal), or a *list* of such, one per level.
        depth, shared: as in :meth:`conv1d`.

    Raises:
        TypeError, ValueError: as in :meth:`conv1d`.

    Source: Poggio, "It is Compositional Sparsity: a framework for ML", section 4 (CNNs).

    Example:
        >>> from compsparse_kernels import FunctionGraph
        >>> FunctionGraph.conv2d((8, 8), kernel=3, depth=2)
        FunctionGraph(64 sources, 52 nodes in 2 levels, 16 sinks, 468 edges, in-degree 9, 2 weights)
    """
    pair = isinstance(shape, (tuple, list)) and len(shape) == 2
    require(pair, "shape", "a pair (height, width)", repr(shape), TypeError)
    shape = tuple(check_int(f"shape[{axis}]", size) for axis, size in enumerate(shape))
    layers = _tower(2, {"kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation}, depth)
    return _stack(cls, shape, layers, shared)


def from_conv(cls, modules: object, input_shape: Sequence[int]) -> "FunctionGraph":
    """Graph of one or several ``nn.Conv1d`` or ``nn.Conv2d`` on scalars: a vertex for each channel and position.

    Sources are the input ``[channels, *spatial]``, flattened; sinks the flattened output; what no window between them
    reads is left out. The parents of a node are in
    the order of ``weight[channel].flatten()``, and the nodes of an output channel share weights, so each node computes
    ``weight[channel].flatten() @ parents + bias[channel]``.

    Args:
        modules: a convolution or an iterable of them. ``in_channels``, ``out_channels``, ``kernel_size``, ``stride``,
            ``padding`` (also ``"same"`` and ``"valid"``), ``dilation`` and ``groups`` are read. Activations add no
            edges: leave them out.
        input_shape: (channels, length) or (channels, height, width), without the batch.

    Raises:
        TypeError, ValueError: naming the module, what was wanted and what came: other modules, transposed convolutions,
            padding modes other than zeros, shapes that do not fit.

    Example:
        >>> import torch
        >>> from compsparse_kernels import FunctionGraph
        >>> FunctionGraph.from_conv(torch.nn.Conv2d(4, 8, 3, padding=1, groups=2), input_shape=(4, 6, 6))
        FunctionGraph(144 sources, 288 nodes in 1 level, 288 sinks, 4096 edges, in-degrees 8..18, 8 weights)
    """
    shape = tuple(check_int(f"input_shape[{axis}]", size) for axis, size in enumerate(input_shape))
    require(len(shape) >= 2, "input_shape", "(channels, *spatial)", shape)
    modules = list(modules) if isinstance(modules, Iterable) else [modules]
    require(len(modules) > 0, "modules", "at least one convolution", "none")
    layers, channels = [], shape[0]
    for number, module in enumerate(modules):
        layer = _layer_of(f"modules[{number}]", module, len(shape) - 1)
        require(layer.in_channels == channels, f"modules[{number}]", f"{channels} in_channels", layer.in_channels)
        layers.append(layer)
        channels = layer.out_channels
    return _stack(cls, shape[1:], layers, shared=True)


def _layer_of(argument: str, module: object, axes: int) -> Convolution:
    wanted = "a convolution (nn.Conv1d, nn.Conv2d)"
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
    require(all(hasattr(module, name) for name in names), argument, wanted, describe(module), TypeError)
    require(not getattr(module, "transposed", False), argument, wanted, describe(module))
    mode = getattr(module, "padding_mode", "zeros")
    require(mode == "zeros", f"{argument}.padding_mode", "'zeros'", repr(mode))
    kernel, stride, dilation = (
        _per_axis(getattr(module, name), axes) for name in ("kernel_size", "stride", "dilation")
    )
    wanted = f"a convolution over {axes} axes, as input_shape has"
    require(len(kernel) == axes, argument, wanted, f"kernel_size {tuple(kernel)}")
    if module.padding == "same":  # as torch: the odd one goes after
        totals = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
        padding = tuple((total // 2, total - total // 2) for total in totals)
    else:
        numbers = _per_axis(0 if module.padding == "valid" else module.padding, axes)
        padding = tuple((number, number) for number in numbers)
    return Convolution(kernel, stride, padding, dilation, module.in_channels, module.out_channels, module.groups)


def _per_axis(value: int | tuple[int, ...], axes: int) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,) * axes


def _tower(axes: int, settings: dict[str, PerLevel], depth: int | None) -> list[Convolution]:
    """One layer per level, from settings that are given once or level by level."""
    lengths = {name: len(value) for name, value in settings.items() if isinstance(value, list)}
    if depth is None:
        depth = max(lengths.values(), default=1)
    depth = check_int("depth", depth)
    for name, length in lengths.items():
        require(length == depth, name, f"{depth} values, one for each level", length)
    columns = []
    for name, value in settings.items():
        values = value if isinstance(value, list) else [value] * depth
        columns.append([_checked_axes(name, each, axes) for each in values])
    return [
        Convolution(kernel, stride, tuple((number, number) for number in padding), dilation)
        for kernel, stride, padding, dilation in zip(*columns, strict=True)
    ]


def _checked_axes(name: str, value: int | tuple[int, ...], axes: int) -> tuple[int, ...]:
    if isinstance(value, tuple):
        require(len(value) == axes, name, f"{axes} numbers, one for each axis", value)
    values = value if isinstance(value, tuple) else (value,) * axes
    return tuple(check_int(name, number, least=0 if name == "padding" else 1) for number in values)


def _stack(cls, shape: tuple[int, ...], layers: list[Convolution], shared: bool) -> "FunctionGraph":
    num_sources = layers[0].in_channels * prod(shape)
    levels = []
    for layer in layers:
        level, shape = _windows(layer, shape)
        levels.append(level)
    levels = _without_unread(levels)
    widths = [num_sources, *(len(level.in_degrees) for level in levels)]
    idx = [level.idx + begin for level, begin in zip(levels, accumulate(widths, initial=0), strict=False)]
    in_degrees, position = (np.concatenate([level[part] for level in levels]) for part in (0, 2))
    ptr = np.concatenate(([0], np.cumsum(in_degrees)))
    if not shared:  # what lies in the padding is no argument of a function that nobody shares
        return cls(num_sources, Parents(ptr, np.concatenate(idx)))
    arities = [layer.in_channels // layer.groups * prod(layer.kernel) for layer in layers]
    shares = []
    for number, (level, layer) in enumerate(zip(levels, layers, strict=True), start=1):
        tail = [""] if layer.out_channels == 1 else [f", channel {channel}" for channel in range(layer.out_channels)]
        shares += [f"level {number}{tail[channel]}" for channel in level.channel.tolist()]
    return cls(num_sources, Parents(ptr, np.concatenate(idx), position, np.repeat(arities, widths[1:])), shares=shares)


def _without_unread(levels: list[Level]) -> list[Level]:
    """Without the nodes of inner levels that no later window reads: they would be outputs that nobody asked for."""
    kept = [levels[-1]]
    for level in levels[-2::-1]:
        read = np.zeros(len(level.in_degrees), bool)
        read[kept[0].idx] = True
        edges = np.repeat(read, level.in_degrees)
        kept[0] = kept[0]._replace(idx=(np.cumsum(read) - 1)[kept[0].idx])
        kept.insert(0, Level(level.in_degrees[read], level.idx[edges], level.position[edges], level.channel[read]))
    return kept


def _windows(layer: Convolution, shape: tuple[int, ...]) -> tuple[Level, tuple[int, ...]]:
    """The level of a layer, and its shape.

    Arrays have the axes [out channel, out position per axis..., in channel of the group, kernel position per axis...]
    until they are flattened, edges by node.
    """
    reads, inside = zip(*(_axis(layer, axis, size) for axis, size in enumerate(shape)), strict=True)
    out_shape = tuple(read.shape[0] for read in reads)
    group_in = layer.in_channels // layer.groups
    group_of = np.arange(layer.out_channels) // (layer.out_channels // layer.groups)
    channel = group_of[:, None] * group_in + np.arange(group_in)  # [out channel, in channel of the group]
    axes = 2 + 2 * len(shape)
    flat = _spread(channel, (0, 1 + len(shape)), axes) * prod(shape)
    exists = np.ones((1,) * axes, bool)
    for axis, (read, valid) in enumerate(zip(reads, inside, strict=True)):
        place = (1 + axis, 2 + len(shape) + axis)
        flat = flat + _spread(read, place, axes) * prod(shape[axis + 1 :])
        exists = exists & _spread(valid, place, axes)
    arity = group_in * prod(layer.kernel)
    exists = np.broadcast_to(exists, flat.shape).reshape(-1, arity)
    position = np.broadcast_to(np.arange(arity), exists.shape)[exists]
    channels = np.repeat(np.arange(layer.out_channels), prod(out_shape))
    return Level(exists.sum(axis=1), flat.reshape(-1, arity)[exists], position, channels), out_shape


def _axis(layer: Convolution, axis: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """``[out, kernel]``: which place of the axis each tap of each window reads, and whether it exists."""
    kernel, stride, dilation = layer.kernel[axis], layer.stride[axis], layer.dilation[axis]
    before, after = layer.padding[axis]
    span = dilation * (kernel - 1) + 1
    out = (size + before + after - span) // stride + 1
    came = f"a window of {span} on {size} + {before} + {after}"
    require(out >= 1, "kernel", "windows that fit into the padded level before", came)
    read = np.arange(out)[:, None] * stride - before + np.arange(kernel) * dilation
    inside = (read >= 0) & (read < size)
    blind = f"padding {before} with a window of {span} on {size}"
    require(bool(inside.any(axis=1).all()), "padding", "windows that each see more than padding", blind)
    return read, inside


def _spread(matrix: np.ndarray, places: tuple[int, int], axes: int) -> np.ndarray:
    """A view with ``axes`` axes, those of the matrix at two places, all others of length 1."""
    shape = [1] * axes
    shape[places[0]], shape[places[1]] = matrix.shape
    return matrix.reshape(shape)
