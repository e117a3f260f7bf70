"""Pictures of what pruning has found. Each draws on one pair of axes and returns it; matplotlib is imported then."""

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from compsparse_kernels.graphs.checks import import_extra
from compsparse_kernels.layouts.checks import check_bool_matrix, check_positive_int, describe, require

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK = "#44546a"
GAP = "#dfe3ea"
MASKS = "Greys"
COUNTS = "magma_r"
MOST_CELLS = 512  # per side: more than that no screen shows in one picture
MOST_UNITS = 64


def draw_mask(mask: torch.Tensor, ax: "Axes | None" = None) -> "Axes":
    """Draws a mask, outputs downward and inputs to the right: dark where a weight survives.

    A mask of more than 512 rows or columns is averaged over blocks, as small as fits (the last may be ragged); colours
    then tell the density of a block, as the colour bar says.

    Args:
        mask: bool ``[out, in]``, True where a weight survives.
        ax: matplotlib axes to draw on; by default those of a new figure.

    Returns:
        The axes.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.
        ImportError: where matplotlib is missing.

    Example:
        >>> import matplotlib, torch
        >>> matplotlib.use("Agg")
        >>> from compsparse_kernels import prune
        >>> prune.draw_mask(torch.eye(600, 40).bool()).get_title(loc="left")
        '600 x 40, density 0.17%, blocks of 2 x 1'
    """
    check_bool_matrix("mask", mask)
    require(mask.numel() > 0, "mask", "at least one row and column", describe(mask))
    block = tuple(-(-size // MOST_CELLS) for size in mask.shape)
    averaged = block != (1, 1)
    shown = _block_means(mask, block)
    ax = _axes(ax, (6, 6 * min(max(mask.shape[0] / mask.shape[1], 0.3), 1.6) + 0.6))
    down, right = (many * size for many, size in zip(shown.shape, block, strict=True))
    extent = (-0.5, right - 0.5, down - 0.5, -0.5)  # so that ticks count weights, not blocks
    most = float(shown.max()) or 1
    image = ax.imshow(shown, cmap=MASKS, vmin=0, vmax=most, extent=extent, aspect="auto", interpolation="nearest")
    ax.set(xlim=(-0.5, mask.shape[1] - 0.5), ylim=(mask.shape[0] - 0.5, -0.5))  # cuts what a ragged block lacks
    if averaged:
        _colour_bar(image, "density of a block")
    density = mask.sum().item() / mask.numel()
    blocks = f", blocks of {block[0]} x {block[1]}" if averaged else ""
    _caption(ax, f"{mask.shape[0]} x {mask.shape[1]}, density {density:.2%}{blocks}")
    ax.set_xlabel("input", fontsize=8)
    ax.set_ylabel("output", fontsize=8)
    return ax


def draw_supports(
    mask: torch.Tensor, in_shape: Sequence[int], units: Sequence[int] | None = None, ax: "Axes | None" = None
) -> "Axes":
    """Draws what single units look at: rows of a mask as images, dark where a weight survives.

    Args:
        mask: bool ``[out, in]``, True where a weight survives.
        in_shape: ``(height, width)`` or ``(channels, height, width)`` of the inputs; colours then count the channels.
        units: which rows, at most 64; by default the 16 with most inputs, of equal ones the earlier.
        ax: matplotlib axes to draw on; by default those of a new figure.

    Returns:
        The axes. Each image has the number of its unit and, behind it, how many inputs the unit has kept.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.
        ImportError: where matplotlib is missing.

    Example:
        >>> import matplotlib, torch
        >>> matplotlib.use("Agg")
        >>> from compsparse_kernels import prune
        >>> ax = prune.draw_supports(torch.rand(30, 64) < 0.1, (8, 8), units=[3, 5])
        >>> len(ax.texts)
        2
    """
    check_bool_matrix("mask", mask)
    channels, height, width = _image_shape(in_shape, mask.shape[1])
    degrees = mask.sum(1)
    if units is None:
        units = degrees.argsort(descending=True, stable=True)[:16].tolist()
    units = _check_units(units, len(mask))
    images = mask[units].view(-1, channels, height, width).sum(1).cpu()  # [units, height, width]
    across = min(len(units), math.ceil(math.sqrt(len(units) * height / width)))
    down = -(-len(units) // across)
    gap = max(1, height // 6)  # above each image, for its label
    sheet = torch.full((down * (height + gap) - gap, across * (width + 1) - 1), float("nan"))
    ax = _axes(ax, (min(1.3 * across + 0.4, 12), min(max(1.3 * down * height / width, 0.3 * down) + 0.6, 12)))
    for place, (unit, image) in enumerate(zip(units, images, strict=True)):
        top, left = place // across * (height + gap), place % across * (width + 1)
        sheet[top : top + height, left : left + width] = image
        text = f"{unit}: {int(degrees[unit])}"
        ax.text(left - 0.4, top - 0.6, text, fontsize=6, color=INK, va="bottom", ha="left")
    aspect = "equal" if height > 1 else "auto"  # strips of one row need room for their labels
    shown = ax.imshow(sheet.numpy(), cmap=MASKS, vmin=0, vmax=channels, aspect=aspect, interpolation="nearest")
    ax.set_facecolor(GAP)  # what is NaN is transparent
    if channels > 1:
        _colour_bar(shown, f"of {channels} channels")
    _bare(ax)
    _caption(ax, f"inputs of {len(units)} of {len(mask)} units", pad=12)
    return ax


def draw_density(history: Sequence[Mapping[str, float]], ax: "Axes | None" = None) -> "Axes":
    """Draws the density of each layer over the rounds of pruning.

    Args:
        history: ``{layer: density in 0..1}`` for each round, the same layers in each.
        ax: matplotlib axes to draw on; by default those of a new figure.

    Returns:
        The axes; the scale of densities is logarithmic unless one of them is 0.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.
        ImportError: where matplotlib is missing.

    Example:
        >>> import matplotlib
        >>> matplotlib.use("Agg")
        >>> from compsparse_kernels import prune
        >>> ax = prune.draw_density([{"0": 1.0, "2": 1.0}, {"0": 0.6, "2": 0.8}, {"0": 0.3, "2": 0.6}])
        >>> [line.get_label() for line in ax.lines], ax.get_yscale()
        (['0', '2'], 'log')
    """
    lines = _check_history(history)
    ax = _axes(ax, (6, 3.4))
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    rounds = range(len(history))
    for name, densities in lines.items():
        ax.plot(rounds, densities, "o-", markersize=4, linewidth=1.4, label=name)
    if all(density > 0 for densities in lines.values() for density in densities):
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_minor_formatter(NullFormatter())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}%"))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("round", fontsize=8)
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=8, frameon=False)
    _caption(ax, f"density of {len(lines)} layers")
    return ax


def draw_displacements(counts: torch.Tensor, ax: "Axes | None" = None) -> "Axes":
    """Draws a map of displacements (:func:`theory.displacement_map`): how many weights lie where, seen from their unit.

    Colours end at the largest count beside the middle: where each weight was counted with itself, the middle would
    outshine the rest.

    Args:
        counts: ``[2 * height - 1, 2 * width - 1]``, real, at least 0; displacement (0, 0) in the middle.
        ax: matplotlib axes to draw on; by default those of a new figure.

    Returns:
        The axes, with displacements as coordinates.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.
        ImportError: where matplotlib is missing.

    Example:
        >>> import matplotlib, torch
        >>> matplotlib.use("Agg")
        >>> from compsparse_kernels import prune, theory
        >>> near = theory.grid_distance((8, 8)) <= 1
        >>> prune.draw_displacements(theory.displacement_map(near, (8, 8), (8, 8))).get_title(loc="left")
        '484 displacements'
    """
    wanted = "a real tensor with an odd number of rows and of columns"
    is_tensor = isinstance(counts, torch.Tensor)
    require(is_tensor, "counts", wanted, describe(counts), TypeError)
    is_map = counts.dim() == 2 and not counts.is_complex() and all(size % 2 == 1 for size in counts.shape)
    require(is_map, "counts", wanted, describe(counts))
    counts = counts.detach().cpu().double()
    require(bool((counts >= 0).all()), "counts", "no negative numbers and no NaN", float(counts.min()))
    ax = _axes(ax, (5, 4.2))
    down, right = (size // 2 for size in counts.shape)
    beside = counts.clone()
    beside[down, right] = 0
    most = float(beside.max()) or float(counts.max()) or 1
    extent = (-right - 0.5, right + 0.5, down + 0.5, -down - 0.5)
    image = ax.imshow(counts.numpy(), cmap=COUNTS, vmin=0, vmax=most, extent=extent, interpolation="nearest")
    _colour_bar(image, "weights", extend="max" if counts[down, right] > most else "neither")
    ax.set_xlabel("right of the unit", fontsize=8)
    ax.set_ylabel("below the unit", fontsize=8)
    _caption(ax, f"{counts.sum():.0f} displacements")
    return ax


def _axes(ax, size):
    import_extra("matplotlib")
    if ax is None:
        from matplotlib import pyplot

        ax = pyplot.subplots(figsize=size, layout="constrained")[1]
    else:
        from matplotlib.axes import Axes

        require(isinstance(ax, Axes), "ax", "matplotlib Axes or None", type(ax).__name__, TypeError)
    ax.tick_params(labelsize=8, colors=INK)
    return ax


def _caption(ax, text, pad=None):
    ax.set_title(text, loc="left", fontsize=9, color=INK, pad=pad)


def _bare(ax):
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)


def _colour_bar(image, label, extend="neither"):
    bar = image.axes.figure.colorbar(image, ax=image.axes, shrink=0.8, extend=extend)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)


def _block_means(mask, block):
    """``[ceil(out / rows), ceil(in / columns)]``: share of weights kept; a ragged last block by what it has."""
    cells = mask.detach().cpu().float()[None]
    return F.avg_pool2d(cells, block, ceil_mode=True)[0].numpy()


def _image_shape(in_shape, features):
    is_sequence = isinstance(in_shape, Sequence) and not isinstance(in_shape, str)
    wanted = "(height, width) or (channels, height, width)"
    require(is_sequence, "in_shape", wanted, repr(in_shape), TypeError)
    require(len(in_shape) in (2, 3), "in_shape", wanted, tuple(in_shape))
    for axis, length in enumerate(in_shape):
        check_positive_int(f"in_shape[{axis}]", length)
    require(math.prod(in_shape) == features, "in_shape", f"a shape of {features} inputs", tuple(in_shape))
    return (1, *in_shape)[-3:]


def _check_units(units, rows):
    is_sequence = isinstance(units, Sequence) and not isinstance(units, str)
    require(is_sequence, "units", "a sequence of row numbers", describe(units), TypeError)
    require(1 <= len(units) <= MOST_UNITS, "units", f"1 to {MOST_UNITS} row numbers", len(units))
    for place, unit in enumerate(units):
        ok = isinstance(unit, int) and not isinstance(unit, bool) and 0 <= unit < rows
        require(ok, f"units[{place}]", f"a row number in 0..{rows - 1}", repr(unit))
    return list(units)


def _check_history(history):
    """``{layer: its densities, round by round}``."""
    is_sequence = isinstance(history, Sequence) and not isinstance(history, str)
    require(is_sequence, "history", "a sequence of {layer: density}", describe(history), TypeError)
    require(len(history) > 0, "history", "at least one round", "none")
    lines = {}
    for number, layers in enumerate(history):
        argument = f"history[{number}]"
        require(isinstance(layers, Mapping), argument, "{layer: density}", describe(layers), TypeError)
        names = list(history[0])
        require(len(names) > 0 and set(layers) == set(names), argument, f"the layers {names}", list(layers))
        for name in names:
            density = layers[name]
            ok = isinstance(density, Real) and 0 <= density <= 1
            require(ok, f"{argument}[{name!r}]", "a density in 0..1", repr(density))
            lines.setdefault(name, []).append(float(density))
    return lines
