"""Parent lists of a graph: how they are stored, and the checks that need nothing but them."""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np

from compsparse_kernels.graphs.checks import check_integers, describe, freeze, listing, require

INT32_MAX = 2**31 - 1


class Parents(NamedTuple):
    """Ordered parents of all nodes (CSR): node i reads the vertices idx[ptr[i]]..idx[ptr[i + 1] - 1].

    Where nodes share weights but not all of them have every argument, as at the border of a padded convolution,
    ``position`` says which argument of the function each parent is, and ``arity`` how many the function has; arguments
    without a parent count as 0. By default parents are arguments 0, 1, ... and the arity is the in-degree.
    """

    ptr: np.ndarray  # int64 [nodes + 1]
    idx: np.ndarray  # int32 [edges], vertices
    position: np.ndarray | None = None  # int32 [edges], ascending within a node
    arity: np.ndarray | None = None  # int32 [nodes]

    def node_of_edge(self) -> np.ndarray:
        return np.repeat(np.arange(len(self.ptr) - 1), np.diff(self.ptr))


def default_positions(ptr: np.ndarray) -> np.ndarray:
    return np.arange(int(ptr[-1])) - np.repeat(ptr[:-1], np.diff(ptr))


def compress(parents: Sequence[Sequence[int]] | np.ndarray) -> Parents:
    """Lists of parents, or an array ``[nodes, in-degree]``, as CSR."""
    if isinstance(parents, np.ndarray) and parents.ndim == 2:
        nodes, in_degree = parents.shape
        return Parents(np.arange(nodes + 1) * in_degree, parents.reshape(-1))
    try:
        counts = [len(row) for row in parents]
    except TypeError:
        wanted = "a list of the parents of each node (a list of ids), or Parents"
        raise TypeError(f"parents: expected {wanted}, got {describe(parents)}") from None
    flat = list(chain.from_iterable(parents))
    return Parents(
        np.concatenate(([0], np.cumsum(counts, dtype=np.int64))), np.array(flat) if flat else np.array([], int)
    )


def checked_parents(parents: object, num_sources: int, name_of: Callable[[int], str]) -> Parents:
    """Well-formed parent lists, frozen: known, none twice, arguments ascending. A node may still have none."""
    if not isinstance(parents, Parents):
        parents = compress(parents)
    ptr, idx = check_integers("parents.ptr", parents.ptr), check_integers("parents", parents.idx)
    rises = len(ptr) > 0 and ptr[0] == 0 and ptr[-1] == len(idx) and bool((np.diff(ptr) >= 0).all())
    require(
        rises,
        "parents.ptr",
        f"offsets ascending from 0 to {len(idx)}, the number of edges",
        np.array2string(ptr, threshold=8),
    )
    require(len(ptr) > 1, "parents", "at least one node", "none")
    parents = Parents(ptr, idx, *_arguments(parents, np.diff(ptr)))
    _check_range(parents, num_sources, name_of)
    _check_distinct(parents, num_sources, name_of)
    _check_positions(parents, num_sources, name_of)
    return Parents(freeze(ptr, np.int64), *(freeze(part) for part in parents[1:]))


def _arguments(parents: Parents, in_degrees: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions and arities, the default where none were given."""
    _, _, position, arity = parents
    nodes, edges = len(in_degrees), int(in_degrees.sum())
    arity = in_degrees if arity is None else check_integers("parents.arity", arity)
    require(len(arity) == nodes, "parents.arity", f"one for each of {nodes} nodes", len(arity))
    low, high = int(arity.min()), int(arity.max())
    require(low >= 0 and high <= INT32_MAX, "parents.arity", f"numbers in 0..{INT32_MAX}", f"{low}..{high}")
    if position is None:
        position = default_positions(np.concatenate(([0], np.cumsum(in_degrees))))
    position = check_integers("parents.position", position)
    require(len(position) == edges, "parents.position", f"one for each of {edges} edges", len(position))
    return position, arity


def _check_positions(parents: Parents, num_sources: int, name_of: Callable[[int], str]) -> None:
    ptr, _, position, arity = parents
    node = parents.node_of_edge()
    wrong = (position < 0) | (position >= arity[node])
    wrong[1:] |= (np.diff(position) <= 0) & (np.diff(node) == 0)
    if wrong.any():
        bad = int(node[wrong][0])
        came = f"{listing(map(str, position[ptr[bad] : ptr[bad + 1]]))} for {name_of(num_sources + bad)}"
        require(False, "parents.position", f"ascending positions in 0..{arity[bad] - 1}", came)


def _check_range(parents: Parents, num_sources: int, name_of: Callable[[int], str]) -> None:
    last = num_sources + len(parents.ptr) - 2
    unknown = np.flatnonzero((parents.idx < 0) | (parents.idx > last))
    if len(unknown):
        node = int(np.searchsorted(parents.ptr, unknown[0], "right")) - 1
        came = f"the unknown {parents.idx[unknown[0]]} among the parents of {name_of(num_sources + node)}"
        require(False, "parents", f"vertices 0..{last}", came)


def _check_distinct(parents: Parents, num_sources: int, name_of: Callable[[int], str]) -> None:
    num_vertices = num_sources + len(parents.ptr) - 1
    edges = np.sort(parents.node_of_edge() * num_vertices + parents.idx)
    twice = np.flatnonzero(edges[1:] == edges[:-1])
    if len(twice):
        node, parent = divmod(int(edges[twice[0]]), num_vertices)
        came = f"{name_of(parent)} twice for {name_of(num_sources + node)}"
        require(False, "parents", "distinct parents of each node", came)
