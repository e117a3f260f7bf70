"""FunctionGraph: what depends on what."""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from compsparse_kernels.graphs import (
    bounds,
    circuits,
    convolutions,
    drawing,
    formulas,
    interchange,
    random_graphs,
    regular,
)
from compsparse_kernels.graphs.checks import check_int, check_integers, freeze, listing, require
from compsparse_kernels.graphs.order import find_cycle, longest_path_levels, ranges
from compsparse_kernels.graphs.parents import INT32_MAX, Parents, checked_parents, compress


class LevelEdges(NamedTuple):
    """Edges into the nodes of one level, as the entries of a matrix: row r is the node ``nodes[r]``, column c the
    vertex ``columns[c]``, entry e sits at ``(rows[e], cols[e])``, by row and in the order of the parents. Entries of
    equal ``slot`` are the same argument of the same shared function: one weight."""

    nodes: np.ndarray
    columns: np.ndarray
    rows: np.ndarray
    cols: np.ndarray
    slot: np.ndarray


@dataclass(frozen=True, init=False, eq=False, repr=False)
class FunctionGraph:
    r"""Directed acyclic graph of a compositional function: each node is a function of its parents.

    .. math:: h_v = f_v(h_{u_1}, \dots, h_{u_{d_v}}), \qquad (u_1, \dots, u_{d_v}) = \mathrm{parents}(v)

    Vertices are numbered: sources (the input variables) are 0..num_sources - 1, nodes follow. Parents are ordered, are
    distinct, and may lie on any earlier level (skip edges). The level of a vertex is the length of the longest path to
    it from the sources. Sinks are the outputs, in order. All arrays are read-only.

    Args:
        num_sources: number of input variables. One that nothing reads is allowed.
        parents: for each node the list of its parents (ids of vertices, in the order of the function's arguments), an
            integer array ``[nodes, in-degree]``, or :class:`Parents` (CSR).
        sinks: ids of the output nodes; by default the nodes that nothing reads.
        shares: for each node the name of its weights, or None: its own. Nodes of one name are the same function, and
            have the same number of arguments.
        names: for each vertex a name (hashable, used once), or None. Messages, drawings and exports use them.
        labels: for each node what it computes, a string, or None.

    Graphs are equal if what depends on what is equal: sources, ordered parents, sinks, which nodes share. Names and
    labels are notes for the reader and do not count.

    Attributes:
        parents: :class:`Parents`, arrays ``ptr``, ``idx``, ``position``, ``arity``.
        sinks: int32 ``[num_sinks]``, ids.
        share: int32 ``[num_nodes]``, number of the weights of each node.
        share_names: their names, None for weights of a single node without a name.
        level: int32 ``[num_vertices]``; 0 for sources.
        names, labels: tuples, or None.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted, what came, and the nodes: cycles, unknown or
            repeated parents, nodes without parents and the sinks that no source reaches because of them, nodes that
            lead to no sink, repeated names, shared weights for different numbers of arguments.

    Source: Poggio, "It is Compositional Sparsity: a framework for ML", section 4 (the graph is known).

    Example:
        >>> from compsparse_kernels import FunctionGraph
        >>> graph = FunctionGraph(3, [[0, 1], [1, 2], [3, 4, 0]], shares=["pair", "pair", None])
        >>> graph
        FunctionGraph(3 sources, 3 nodes in 2 levels, 1 sink, 7 edges, in-degrees 2..3, 2 weights)
        >>> graph.parents_of(5), graph.levels[1]
        (array([3, 4, 0], dtype=int32), array([3, 4], dtype=int32))
        >>> FunctionGraph.tree(n_inputs=64, arity=2)
        FunctionGraph(64 sources, 63 nodes in 6 levels, 1 sink, 126 edges, in-degree 2, 63 weights)
    """

    num_sources: int
    parents: Parents
    sinks: np.ndarray
    share: np.ndarray
    share_names: tuple[str | None, ...]
    level: np.ndarray
    names: tuple[Hashable, ...] | None
    labels: tuple[str | None, ...] | None

    tree = classmethod(regular.tree)
    butterfly = classmethod(regular.butterfly)
    banded = classmethod(regular.banded)
    random = classmethod(random_graphs.random)
    conv1d = classmethod(convolutions.conv1d)
    conv2d = classmethod(convolutions.conv2d)
    from_conv = classmethod(convolutions.from_conv)
    from_edges = classmethod(interchange.from_edges)
    from_networkx = classmethod(interchange.from_networkx)
    to_networkx = interchange.to_networkx
    from_dict = classmethod(interchange.from_dict)
    to_dict = interchange.to_dict
    from_sympy = classmethod(formulas.from_sympy)
    from_circuit = classmethod(circuits.from_circuit)
    theorem1_bounds = bounds.theorem1_bounds
    draw = drawing.draw

    def __init__(
        self,
        num_sources: int,
        parents: Sequence[Sequence[int]] | np.ndarray | Parents,
        *,
        sinks: Sequence[int] | None = None,
        shares: Sequence[str | None] | None = None,
        names: Sequence[Hashable | None] | None = None,
        labels: Sequence[str | None] | None = None,
    ):
        if not isinstance(parents, Parents):
            parents = compress(parents)
        self._set("num_sources", check_int("num_sources", num_sources, least=0))
        num_vertices = self.num_sources + max(len(parents.ptr) - 1, 0)
        require(num_vertices <= INT32_MAX, "num_sources", f"at most {INT32_MAX} vertices", num_vertices)
        self._set("names", _checked_names(names, num_vertices))
        self._set("parents", checked_parents(parents, self.num_sources, self.name_of))
        self._set("level", self._checked_levels(sinks))
        self._set("sinks", self._checked_sinks(sinks))
        share, share_names = self._checked_shares(shares)
        self._set("share", share)
        self._set("share_names", share_names)
        self._set("labels", self._checked_strings("labels", labels))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _checked_levels(self, sinks: Sequence[int] | None) -> np.ndarray:
        empty = self.num_sources + np.flatnonzero(self.in_degrees == 0)
        level = longest_path_levels(self.num_sources, self.parents.ptr, self.parents.idx)
        if len(empty):
            came = f"none for {self._names_of(empty)}"
            outputs = [] if sinks is None else [s for s in check_integers("sinks", sinks) if 0 <= s < len(level)]
            lost = [sink for sink in outputs if level[sink] < 0]
            came += f", so that no source reaches the sinks {self._names_of(lost)}" if lost else ""
            require(False, "parents", "at least one parent of each node", came)
        if (level < 0).any():
            cycle = find_cycle(level, self.num_sources, self.parents.ptr, self.parents.idx)
            shown = map(self.name_of, cycle if len(cycle) <= 12 else [*cycle[:10], *cycle[-2:]])
            path = list(shown)
            if len(cycle) > 12:
                path[10:10] = [f"... ({len(cycle) - 1} nodes in all) ..."]
            require(False, "parents", "a graph without cycles", f"the cycle {' -> '.join(path)}")
        return freeze(level)

    def _checked_sinks(self, sinks: Sequence[int] | None) -> np.ndarray:
        unread = np.bincount(self.parents.idx, minlength=self.num_vertices) == 0
        unread[: self.num_sources] = False
        if sinks is None:
            return freeze(np.flatnonzero(unread))
        ids = check_integers("sinks", sinks)
        require(len(ids) > 0, "sinks", "at least one node", "none")
        unknown = ids[(ids < 0) | (ids >= self.num_vertices)]
        nodes = f"ids of nodes, {self.num_sources}..{self.num_vertices - 1}"
        require(len(unknown) == 0, "sinks", nodes, listing(map(str, unknown)))
        sources = ids[ids < self.num_sources]
        require(len(sources) == 0, "sinks", nodes, f"the sources {self._names_of(sources)}")
        values, counts = np.unique(ids, return_counts=True)
        require(len(values) == len(ids), "sinks", "each node once", f"{self._names_of(values[counts > 1])} twice")
        unread[ids] = False
        lost = np.flatnonzero(unread)
        came = f"{self._names_of(lost)}, which are no sinks and which nothing reads"
        require(len(lost) == 0, "sinks", "nodes to which every node leads", came)
        return freeze(ids)

    def _checked_shares(self, shares: Sequence[str | None] | None) -> tuple[np.ndarray, tuple[str | None, ...]]:
        names = self._checked_strings("shares", shares)
        if names is None:
            return freeze(np.arange(self.num_nodes)), (None,) * self.num_nodes
        number = {}
        keys = [number.setdefault(name if name is not None else node, len(number)) for node, name in enumerate(names)]
        share = freeze(keys)
        first = np.unique(share, return_index=True)[1]
        arity = self.parents.arity
        wrong = np.flatnonzero(arity != arity[first[share]])
        if len(wrong):
            nodes = [first[share[wrong[0]]], wrong[0]]
            came = " and ".join(f"{arity[node]} for {self.name_of(self.num_sources + node)}" for node in nodes)
            wanted = f"nodes with the same number of arguments under the name {names[wrong[0]]!r}"
            require(False, "shares", wanted, came)
        return share, tuple(key if isinstance(key, str) else None for key in number)

    def _checked_strings(self, argument: str, values: Sequence[str | None] | None) -> tuple[str | None, ...] | None:
        if values is None:
            return None
        values = tuple(values)
        wanted = f"{self.num_nodes} values, one for each node"
        require(len(values) == self.num_nodes, argument, wanted, len(values))
        wrong = next((value for value in values if value is not None and not isinstance(value, str)), None)
        require(wrong is None, argument, "strings, or None", repr(wrong), TypeError)
        return values

    @property
    def num_nodes(self) -> int:
        return len(self.parents.ptr) - 1

    @property
    def num_vertices(self) -> int:
        """Sources and nodes."""
        return self.num_sources + self.num_nodes

    @property
    def num_edges(self) -> int:
        return len(self.parents.idx)

    @property
    def num_sinks(self) -> int:
        return len(self.sinks)

    @cached_property
    def num_levels(self) -> int:
        """Levels of nodes; the sources, level 0, do not count."""
        return int(self.level.max())

    @property
    def num_weights(self) -> int:
        """Number of different functions: nodes that share count once."""
        return len(self.share_names)

    @cached_property
    def in_degrees(self) -> np.ndarray:
        """Number of parents d_v of each node, int32 ``[num_nodes]``."""
        return freeze(np.diff(self.parents.ptr))

    @cached_property
    def levels(self) -> tuple[np.ndarray, ...]:
        """Ids of the vertices of each level, ascending; ``levels[0]`` are the sources."""
        order = np.argsort(self.level, kind="stable")
        ends = np.cumsum(np.bincount(self.level))
        return tuple(freeze(part) for part in np.split(order, ends[:-1]))

    @cached_property
    def shares(self) -> dict[str, np.ndarray]:
        """For each name of shared weights, the ids of its nodes."""
        order = np.argsort(self.share, kind="stable")
        ends = np.cumsum(np.bincount(self.share))
        parts = np.split(order, ends[:-1])
        named = zip(self.share_names, parts, strict=True)
        return {name: freeze(part + self.num_sources) for name, part in named if name is not None}

    @property
    def effective_dimension(self) -> int:
        """Largest in-degree, ``max_v d_v``: the number of variables of the constituent with the most.

        It takes the place of the number of inputs in the exponent of Theorem 1 (see :meth:`theorem1_bounds`), for
        constituents of equal smoothness.

        Source: Poggio, "It is Compositional Sparsity: a framework for ML", section 4; Poggio, Mhaskar, Rosasco, Miranda
        and Liao, "Why and when can deep- but not shallow-networks avoid the curse of dimensionality: a review", 2017.

        Example:
            >>> from compsparse_kernels import FunctionGraph
            >>> FunctionGraph.tree(27, arity=3).effective_dimension
            3
        """
        return int(self.in_degrees.max())

    def parents_of(self, vertex: int) -> np.ndarray:
        """Ids of the parents of a vertex, in order; none for a source."""
        node = self._checked_vertex(vertex) - self.num_sources
        ptr, idx, *_ = self.parents
        return idx[ptr[node] : ptr[node + 1]] if node >= 0 else idx[:0]

    def index(self, name: Hashable) -> int:
        """Id of the vertex of that name."""
        vertex = self._index_of_name.get(name)
        require(vertex is not None, "name", "the name of a vertex", repr(name))
        return vertex

    @cached_property
    def _index_of_name(self) -> dict[Hashable, int]:
        return {name: vertex for vertex, name in enumerate(self.names or ()) if name is not None}

    def name_of(self, vertex: int) -> str:
        """What messages call a vertex: its name in quotes, or its kind and id."""
        if self.names is not None and self.names[vertex] is not None:
            return repr(self.names[vertex])
        return f"source {vertex}" if vertex < self.num_sources else f"node {vertex}"

    def _names_of(self, vertices: Sequence[int]) -> str:
        return listing(map(self.name_of, vertices))

    def _checked_vertex(self, vertex: int) -> int:
        vertex = check_int("vertex", vertex, least=0)
        require(vertex < self.num_vertices, "vertex", f"an id in 0..{self.num_vertices - 1}", vertex)
        return vertex

    def level_edges(self, level: int, columns: str = "read") -> LevelEdges:
        """Edges into the nodes of a level, 1..num_levels.

        ``columns`` are the vertices that the level reads (``"read"``), or all of the levels before it (``"earlier"``).
        Rows, columns and slots are what :meth:`BlockLayout.from_entries` takes.

        Example:
            >>> from compsparse_kernels import FunctionGraph
            >>> edges = FunctionGraph(3, [[0, 2], [3, 0]]).level_edges(2)
            >>> edges.nodes, edges.columns, edges.rows, edges.cols, edges.slot
            (array([4]), array([0, 3]), array([0, 0]), array([1, 0]), array([0, 1]))
        """
        level = check_int("level", level)
        require(level <= self.num_levels, "level", f"a level in 1..{self.num_levels}", level)
        require(columns in ("read", "earlier"), "columns", "'read' or 'earlier'", repr(columns))
        nodes = self.levels[level].astype(np.int64)
        ptr, idx, position, _ = self.parents
        local = nodes - self.num_sources
        counts = np.diff(ptr)[local]
        edges = ranges(ptr[local], counts)
        read = idx[edges].astype(np.int64)
        ids = np.unique(read) if columns == "read" else np.flatnonzero(self.level < level)
        rows = np.repeat(np.arange(len(nodes)), counts)
        # One number for each pair of shared weights and argument that occurs here.
        argument = np.stack((self.share[local][rows], position[edges]))
        slot = np.unique(argument, axis=1, return_inverse=True)[1].reshape(-1)
        return LevelEdges(nodes, ids, rows, np.searchsorted(ids, read), slot)

    def level_mask(self, level: int, columns: str = "read") -> np.ndarray:
        """bool ``[nodes of the level, columns]``: who reads whom; rows and columns as in :meth:`level_edges`.

        Example:
            >>> import torch
            >>> from compsparse_kernels import BlockLayout, FunctionGraph
            >>> mask = FunctionGraph.butterfly(4).level_mask(2)
            >>> mask.astype(int)
            array([[1, 0, 1, 0],
                   [0, 1, 0, 1],
                   [1, 0, 1, 0],
                   [0, 1, 0, 1]])
            >>> BlockLayout.from_mask(torch.from_numpy(mask), block_shape=(16, 16))
            BlockLayout(64 x 64, blocks 16 x 16, 8 entries, density 0.500)
        """
        edges = self.level_edges(level, columns)
        mask = np.zeros((len(edges.nodes), len(edges.columns)), dtype=bool)
        mask[edges.rows, edges.cols] = True
        return mask

    def summary(self) -> str:
        """Table of the levels: nodes, in-degrees, edges, edges that skip levels, different weights, sinks.

        Example:
            >>> from compsparse_kernels import FunctionGraph
            >>> print(FunctionGraph.tree(8, share="level").summary())
            8 sources, 7 nodes in 3 levels, 1 sink, 14 edges, in-degree 2, 3 weights
            level  nodes  in-degree  edges  skipping  weights  sinks
                1      4          2      8         0        1      0
                2      2          2      4         0        1      0
                3      1          2      2         0        1      1
        """
        titles = ("level", "nodes", "in-degree", "edges", "skipping", "weights", "sinks")
        rows = [titles, *(self._summary_row(level) for level in range(1, self.num_levels + 1))]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
        return "\n".join((self._sizes(), *lines))

    def _summary_row(self, level: int) -> tuple[str, ...]:
        local = self.levels[level] - self.num_sources
        degrees = self.in_degrees[local]
        read = self.parents.idx[ranges(self.parents.ptr[local], degrees)]
        skipping = int((self.level[read] < level - 1).sum())
        sinks = int((self.level[self.sinks] == level).sum())
        numbers = (len(read), skipping, len(np.unique(self.share[local])), sinks)
        return (str(level), str(len(local)), _span(degrees), *map(str, numbers))

    def _sizes(self) -> str:
        span = _span(self.in_degrees)
        parts = (
            _count(self.num_sources, "source"),
            f"{_count(self.num_nodes, 'node')} in {_count(self.num_levels, 'level')}",
            _count(self.num_sinks, "sink"),
            _count(self.num_edges, "edge"),
            f"in-degrees {span}" if ".." in span else f"in-degree {span}",
            _count(self.num_weights, "weight"),
        )
        return ", ".join(parts)

    def __repr__(self) -> str:
        return f"FunctionGraph({self._sizes()})"

    def _structure(self) -> tuple[bytes | int, ...]:
        arrays = (*self.parents, self.sinks, self.share)
        return (self.num_sources, *(array.tobytes() for array in arrays))

    def __eq__(self, other: object) -> bool:
        return self._structure() == other._structure() if isinstance(other, FunctionGraph) else NotImplemented

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash(self._structure())

    def __reduce__(self):
        """Pickles and copies go through the checks, and come back read-only."""
        return _restore, (type(self), self.num_sources, self.parents, self._notes())

    def _notes(self) -> dict[str, object]:
        """The keyword arguments that make this graph from its parents."""
        shares = [self.share_names[number] for number in self.share] if self.shares else None
        return {"sinks": self.sinks, "shares": shares, "names": self.names, "labels": self.labels}


def _restore(cls: type[FunctionGraph], num_sources: int, parents: Parents, notes: dict[str, object]) -> FunctionGraph:
    return cls(num_sources, parents, **notes)


def _span(numbers: np.ndarray) -> str:
    low, high = int(numbers.min()), int(numbers.max())
    return str(low) if low == high else f"{low}..{high}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _checked_names(names: Sequence[Hashable | None] | None, num_vertices: int) -> tuple[Hashable, ...] | None:
    if names is None:
        return None
    names = tuple(names)
    require(len(names) == num_vertices, "names", f"{num_vertices} names, one for each vertex", len(names))
    try:
        counts = Counter(names)
    except TypeError as error:
        raise TypeError(f"names: expected hashable names, got an {error}") from None
    twice = [repr(name) for name, count in counts.items() if count > 1 and name is not None]
    require(not twice, "names", "each name once", f"{listing(twice)} more than once")
    return names
