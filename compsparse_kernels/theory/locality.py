"""Locality: do the inputs that a unit has kept lie close together?

The distance between inputs is a matrix, so any geometry will do; those of a ring and of a grid are here.
"""

import math
from collections.abc import Sequence

import torch

from compsparse_kernels.layouts.checks import check_bool_matrix, check_positive_int, describe, require

METRICS = ("chebyshev", "manhattan")


def ring_distance(n: int) -> torch.Tensor:
    r"""Distances of n inputs on a ring: :math:`D_{ij} = \min(|i - j|,\ n - |i - j|)`.

    Args:
        n: inputs on the ring, at least 1.

    Returns:
        int64 ``[n, n]``, for :func:`adjacency_lift`.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.

    Example:
        >>> from compsparse_kernels import theory
        >>> theory.ring_distance(5)[0].tolist()
        [0, 1, 2, 2, 1]
    """
    check_positive_int("n", n)
    return grid_distance((n,), wrap=True)


def grid_distance(shape: Sequence[int], metric: str = "chebyshev", wrap: bool = False) -> torch.Tensor:
    r"""Distances of inputs on a grid, flattened row by row as ``torch.flatten`` does.

    With :math:`\delta_a` the distance along axis a, ``"chebyshev"`` is :math:`\max_a \delta_a` (a pixel has 8
    neighbours at distance 1) and ``"manhattan"`` :math:`\sum_a \delta_a` (it has 4).

    Args:
        shape: length of each axis: ``(n,)`` for a line, ``(height, width)`` for an image, or three lengths.
        metric: ``"chebyshev"`` or ``"manhattan"``.
        wrap: the grid is periodic: each axis is a ring.

    Returns:
        int64 ``[n, n]``, where n is the product of the lengths.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.

    Example:
        >>> from compsparse_kernels import theory
        >>> theory.grid_distance((2, 3))[0].view(2, 3).tolist()
        [[0, 1, 2], [1, 1, 2]]
        >>> theory.grid_distance((2, 3), metric="manhattan")[0].view(2, 3).tolist()
        [[0, 1, 2], [1, 2, 3]]
    """
    _check_shape("shape", shape, range(1, 4))
    require(metric in METRICS, "metric", " or ".join(map(repr, METRICS)), repr(metric))
    places = torch.cartesian_prod(*(torch.arange(length) for length in shape)).view(-1, len(shape))  # [n, axes]
    along = (places[:, None] - places).abs()  # [n, n, axes]
    if wrap:
        along = torch.minimum(along, torch.tensor(tuple(shape)) - along)
    return along.amax(-1) if metric == "chebyshev" else along.sum(-1)


def adjacency_lift(mask_or_masks: torch.Tensor | Sequence[torch.Tensor], distance: torch.Tensor) -> torch.Tensor:
    r"""How much likelier than chance two inputs at distance d are kept by the same unit, for every d.

    Let :math:`S_h` be the inputs that unit h (a row of a mask) has kept, :math:`k_h = |S_h|`, and N(d) the number of
    unordered pairs of distinct inputs at distance d, of all n inputs. Then

    .. math:: \mathrm{lift}(d) = \frac{\sum_h \#\{\{i, j\} \subseteq S_h : i \ne j,\ D_{ij} = d\}}
                                      {\sum_h \binom{k_h}{2}\, N(d) \big/ \binom{n}{2}}

    The denominator is what to expect if each unit kept as many inputs as it does, but drew them at random without
    replacement. So 1 is chance, at any density and for any spread of degrees; a convolution has a large lift at small d
    and 0 beyond its kernel. A unit with fewer than two inputs has no pairs and does not count.

    Args:
        mask_or_masks: bool ``[out, in]``, True where a weight survives (:meth:`MaskLayout.to_mask` gives one); or a
            sequence of such masks over the same inputs (seeds, say), whose units are pooled.
        distance: integers ``[in, in]``, at least 0, symmetric, 0 on the diagonal; distinct inputs may be at distance 0,
            as the channels of a pixel are.

    Returns:
        float64 ``[max(distance) + 1]``: entry d is lift(d); NaN where there are no pairs at that distance, and
        everywhere if no unit has two inputs.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.

    Source: the question is that of Pellegrini and Biroli, "Neural Network Pruning Denoises the Features and Makes Local
    Connectivity Emerge in Visual Tasks" (ICML 2022; arXiv 2104.13343, 2021), who look at where the surviving weights of
    a unit lie relative to each other; the division by chance makes different densities comparable.

    Example:
        >>> import torch
        >>> from compsparse_kernels import theory
        >>> ring = theory.ring_distance(8)
        >>> theory.adjacency_lift(ring <= 1, ring).tolist()  # three neighbours each: only distances 1 and 2 occur
        [nan, 2.333..., 1.166..., 0.0, 0.0]
    """
    masks = _masks(mask_or_masks)
    n = masks[0].shape[1]
    distance = _check_distance(distance, n).to(masks[0].device)
    together = torch.zeros(n, n, dtype=torch.float64, device=distance.device)  # exact: counts below 2**53
    for mask in masks:
        mask = mask.to(together)
        together += mask.T @ mask  # [in, in]: how many units keep both
    degrees = torch.cat([mask.sum(1).to(distance.device) for mask in masks])
    where = distance.flatten()
    kept = torch.bincount(where, weights=together.flatten())  # each pair twice
    possible = torch.bincount(where).double()  # each pair twice
    kept[0] -= degrees.sum()  # the diagonal: an input is no pair with itself
    possible[0] -= n
    ordered_pairs = (degrees * (degrees - 1)).sum()
    return (kept * (n * (n - 1))) / (possible * ordered_pairs)  # 0 / 0 where there are no pairs


def displacement_map(
    mask: torch.Tensor, in_shape: Sequence[int], out_shape: Sequence[int] | None = None
) -> torch.Tensor:
    r"""Where surviving weights lie relative to their unit: a histogram over displacements in the plane.

    .. math:: \mathrm{map}[H - 1 + \Delta y,\ W - 1 + \Delta x] =
              \#\{(h, i) : M_{hi},\ \mathrm{position}(i) - \mathrm{centre}(h) = (\Delta y, \Delta x)\}

    A layer whose units have places (``out_shape``) is centred on them: on the input position in the middle of unit
    (y, x)'s cell, :math:`\lfloor (y + 1/2)\, H / H_{out} \rfloor`, and likewise for x. The map of a convolution is its
    kernel. Units of a fully connected layer have no places; with ``out_shape=None`` each of the inputs that a unit has
    kept is its centre in turn, so the map is the sum of the supports' autocorrelations: it counts ordered pairs, and is
    symmetric. The middle counts the pairs at one position: each weight with itself, and with those of other channels.

    Args:
        mask: bool ``[out, in]``, True where a weight survives.
        in_shape: ``(height, width)`` or ``(channels, height, width)`` of the inputs (H, W above); channels are summed.
        out_shape: likewise of the units, or None.

    Returns:
        int64 ``[2 H - 1, 2 W - 1]``, displacement (0, 0) in the middle.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.

    Source: after the maps of local connectivity in Pellegrini and Biroli, "Neural Network Pruning Denoises the Features
    and Makes Local Connectivity Emerge in Visual Tasks" (ICML 2022; arXiv 2104.13343, 2021).

    Example:
        >>> import torch
        >>> from compsparse_kernels import theory
        >>> near = theory.grid_distance((2, 2), metric="manhattan") <= 1  # each pixel sees itself and two neighbours
        >>> theory.displacement_map(near, (2, 2), (2, 2)).tolist()
        [[0, 2, 0], [2, 4, 2], [0, 2, 0]]
    """
    check_bool_matrix("mask", mask)
    height, width = _plane("in_shape", in_shape, mask.shape[1], "columns of mask")
    places = torch.cartesian_prod(torch.arange(height), torch.arange(width))  # [positions, 2]
    if out_shape is None:
        counts = _count_pairs(mask, height * width)
        centres = places
    else:
        rows, columns = _plane("out_shape", out_shape, mask.shape[0], "rows of mask")
        counts = _sum_channels(mask.long(), rows * columns, height * width)
        y, x = ((2 * torch.arange(many) + 1) * size // (2 * many) for many, size in ((rows, height), (columns, width)))
        centres = torch.cartesian_prod(y, x)
    shift = places - centres[:, None] + torch.tensor([height - 1, width - 1])  # [centres, positions, 2]
    index = shift[..., 0] * (2 * width - 1) + shift[..., 1]
    size = (2 * height - 1) * (2 * width - 1)
    flat = torch.zeros(size, dtype=torch.int64).index_add_(0, index.flatten(), counts.cpu().flatten())
    return flat.view(2 * height - 1, 2 * width - 1).to(mask.device)


def inverse_participation_ratio(weights: torch.Tensor, dim: int = -1) -> torch.Tensor:
    r"""How concentrated weights are: :math:`\mathrm{IPR}(w) = \sum_i w_i^4 \big/ \big(\sum_i w_i^2\big)^2`.

    It is 1 for a single weight other than 0, 1/k for k weights of equal magnitude, and about 3/n for n Gaussian ones;
    scaling changes nothing. It does not see *where* the weights are: :func:`adjacency_lift` does.

    Args:
        weights: floating-point tensor; the rows of a dense ``[out, in]`` weight are units.
        dim: over which dimension.

    Returns:
        The shape of ``weights`` without ``dim``, same dtype; NaN where all weights are 0.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.

    Source: Ingrosso and Goldt, "Data-driven emergence of convolutional structure in neural networks" (PNAS 2022), who
    follow the localisation of receptive fields with it.

    Example:
        >>> import torch
        >>> from compsparse_kernels import theory
        >>> theory.inverse_participation_ratio(torch.tensor([[0.0, 3.0, 0.0, 0.0], [2.0, -2.0, 2.0, 2.0]])).tolist()
        [1.0, 0.25]
    """
    is_float = isinstance(weights, torch.Tensor) and weights.is_floating_point()
    require(is_float, "weights", "a floating-point tensor", describe(weights), TypeError)
    is_int = isinstance(dim, int) and not isinstance(dim, bool)
    require(is_int, "dim", "an int", repr(dim), TypeError)
    require(weights.dim() > 0, "weights", "at least one dimension", describe(weights))
    wanted = f"a dimension of weights, -{weights.dim()}..{weights.dim() - 1}"
    require(-weights.dim() <= dim < weights.dim(), "dim", wanted, dim)
    if weights.shape[dim] == 0:
        return weights.sum(dim) / 0
    wide = weights.float() if weights.element_size() == 2 else weights  # sums of half precision leave its range
    squares = (wide / wide.abs().amax(dim, keepdim=True)).square()  # fourth powers stay within range
    return (squares.square().sum(dim) / squares.sum(dim).square()).to(weights.dtype)


def _masks(mask_or_masks):
    if isinstance(mask_or_masks, torch.Tensor):
        check_bool_matrix("mask_or_masks", mask_or_masks)
        return [mask_or_masks]
    is_sequence = isinstance(mask_or_masks, Sequence) and not isinstance(mask_or_masks, str)
    require(is_sequence, "mask_or_masks", "a mask or a sequence of masks", describe(mask_or_masks), TypeError)
    require(len(mask_or_masks) > 0, "mask_or_masks", "at least one mask", "none")
    for number, mask in enumerate(mask_or_masks):
        argument = f"mask_or_masks[{number}]"
        check_bool_matrix(argument, mask)
        columns = mask_or_masks[0].shape[1]
        require(mask.shape[1] == columns, argument, f"{columns} columns, as the first mask", mask.shape[1])
    return list(mask_or_masks)


def _check_distance(distance, n):
    is_tensor = isinstance(distance, torch.Tensor)
    wanted = f"an integer tensor [{n}, {n}], as mask has {n} columns"
    require(is_tensor, "distance", wanted, describe(distance), TypeError)
    is_integer = not (distance.is_floating_point() or distance.is_complex() or distance.dtype == torch.bool)
    require(is_integer and distance.shape == (n, n), "distance", wanted, describe(distance))
    require(n > 0, "distance", "at least one input", "none")
    require(int(distance.min()) >= 0, "distance", "no negative entries", int(distance.min()))
    require(torch.equal(distance, distance.T), "distance", "a symmetric matrix", "an asymmetric one")
    require(not distance.diagonal().any(), "distance", "0 on the diagonal", int(distance.diagonal().max()))
    return distance.long()


def _check_shape(argument, shape, lengths):
    wanted = f"{lengths[0]} to {lengths[-1]} positive ints"
    is_sequence = isinstance(shape, Sequence) and not isinstance(shape, str)
    require(is_sequence, argument, wanted, repr(shape), TypeError)
    require(len(shape) in lengths, argument, wanted, tuple(shape))
    for axis, length in enumerate(shape):
        check_positive_int(f"{argument}[{axis}]", length)


def _plane(argument, shape, features, of):
    _check_shape(argument, shape, range(2, 4))
    require(math.prod(shape) == features, argument, f"a shape of {features} features ({of})", tuple(shape))
    return tuple(shape)[-2:]


def _sum_channels(counts, rows, columns):
    """``[C * rows, c * columns]`` -> ``[rows, columns]``, channels first on either side."""
    out_features, in_features = counts.shape
    return counts.view(out_features // rows, rows, in_features // columns, columns).sum((0, 2))


def _count_pairs(mask, positions):
    """``[positions, positions]``: pairs of weights of one unit, a weight with itself included."""
    mask = mask.double()  # exact: counts below 2**53
    return _sum_channels((mask.T @ mask).long(), positions, positions)
