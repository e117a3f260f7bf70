"""Random graphs. ``random`` is a classmethod of FunctionGraph."""

from typing import TYPE_CHECKING

import numpy as np

from compsparse_kernels.graphs.checks import check_int, check_share, require
from compsparse_kernels.graphs.parents import Parents

if TYPE_CHECKING:
    from compsparse_kernels.graphs.function_graph import FunctionGraph


def random(
    cls, n_inputs: int, n_nodes: int, in_degree: int, n_outputs: int = 1, seed: int = 0, skip: float = 0.2
) -> "FunctionGraph":
    """Random graph: levels of at most ``max(n_inputs, n_outputs)`` nodes, which narrow down to the outputs.

    Each node reads ``in_degree`` vertices: at least one from the level before, and each of the others, with probability
    ``skip``, from any level before that (fewer where there are not as many vertices). Every node is read, or an output.

    Args:
        n_inputs: sources. Some are read by nothing if the first level has too few edges.
        n_nodes: nodes, outputs included.
        in_degree: parents of a node, drawn without repetition.
        n_outputs: sinks, the last level.
        seed: the same seed gives the same graph.
        skip: probability in 0..1 of an edge that skips levels.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.

    Example:
        >>> from compsparse_kernels import FunctionGraph
        >>> graph = FunctionGraph.random(n_inputs=8, n_nodes=20, in_degree=2, n_outputs=2, seed=1)
        >>> graph
        FunctionGraph(8 sources, 20 nodes in 4 levels, 2 sinks, 40 edges, in-degree 2, 20 weights)
        >>> graph == FunctionGraph.random(8, 20, 2, 2, seed=1), graph == FunctionGraph.random(8, 20, 2, 2, seed=2)
        (True, False)
    """
    n_inputs, n_nodes = check_int("n_inputs", n_inputs), check_int("n_nodes", n_nodes)
    in_degree, n_outputs = check_int("in_degree", in_degree), check_int("n_outputs", n_outputs)
    require(n_outputs <= n_nodes, "n_outputs", f"at most n_nodes = {n_nodes}", n_outputs)
    rng = np.random.default_rng(check_int("seed", seed, least=0))
    skip = check_share("skip", skip)
    begin, before = 0, n_inputs  # the level before is begin..begin + before - 1
    in_degrees, idx = [], []
    for width in _level_widths(n_nodes, n_outputs, in_degree, max(n_inputs, n_outputs)):
        counts, parents = _level_parents(rng, width, begin, before, in_degree, skip)
        in_degrees.append(counts)
        idx.append(parents)
        begin, before = begin + before, width
    ptr = np.concatenate(([0], np.cumsum(np.concatenate(in_degrees))))
    return cls(n_inputs, Parents(ptr, np.concatenate(idx)))


def _level_widths(n_nodes: int, n_outputs: int, in_degree: int, most: int) -> list[int]:
    """From the outputs back: a level is no wider than the edges of the next can read."""
    widths, left = [n_outputs], n_nodes - n_outputs
    while left and widths[-1] * in_degree < most:
        widths.append(min(widths[-1] * in_degree, left))
        left -= widths[-1]
    levels = -(-left // most)
    wider = left % levels if levels else 0
    widths += [left // levels + (level < wider) for level in range(levels)]
    return widths[::-1]


def _level_parents(
    rng: np.random.Generator, width: int, begin: int, before: int, in_degree: int, skip: float
) -> tuple[np.ndarray, np.ndarray]:
    """In-degrees ``[width]`` and parents of a level's nodes; the level before is ``begin..begin + before - 1``."""
    near_most, far_most = min(in_degree, before), min(in_degree - 1, begin)
    near_least = min(-(-before // width), near_most)  # enough edges to read every node of the level before
    far = np.minimum(rng.binomial(in_degree - near_least, skip, size=width), far_most)
    if skip > 0:  # the level before is too narrow
        far = np.maximum(far, min(in_degree - near_most, far_most))
    near = np.minimum(in_degree - far, near_most)
    near_ids = _subsets(rng, width, before, near_most) + begin
    far_ids = _subsets(rng, width, begin, far_most)
    near_ids[np.arange(near_most) >= near[:, None]] = -1
    far_ids[np.arange(far_most) >= far[:, None]] = -1
    _read_all(rng, near_ids, begin, before)
    parents = np.concatenate((near_ids, far_ids), axis=1)
    return near + far, parents[parents >= 0]


def _subsets(rng: np.random.Generator, rows: int, size: int, picks: int) -> np.ndarray:
    """``[rows, picks]``: in each row distinct numbers below ``size``, in random order (Floyd's algorithm, all rows)."""
    chosen = np.empty((rows, picks), np.int64)
    for column, top in enumerate(range(size - picks, size)):
        drawn = rng.integers(0, top + 1, size=rows)
        taken = (chosen[:, :column] == drawn[:, None]).any(axis=1)
        chosen[:, column] = np.where(taken, top, drawn)
    return rng.permuted(chosen, axis=1)


def _read_all(rng: np.random.Generator, near_ids: np.ndarray, begin: int, before: int) -> None:
    """Moves edges from vertices that several nodes read to those that none reads, as far as there are such edges."""
    flat = near_ids.reshape(-1)
    used = rng.permutation(np.flatnonzero(flat >= 0))
    readers = np.bincount(flat[used] - begin, minlength=before)
    unread = np.flatnonzero(readers == 0).tolist()
    for edge in used:
        if not unread:
            break
        old = flat[edge] - begin
        if readers[old] > 1:
            readers[old] -= 1
            flat[edge] = unread.pop() + begin  # nobody read it, so it is new to this node too
