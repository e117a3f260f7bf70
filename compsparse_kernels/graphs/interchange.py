"""Graphs from and to edge lists, networkx and JSON: methods of FunctionGraph."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from compsparse_kernels.graphs.checks import describe, import_extra, listing, require
from compsparse_kernels.graphs.parents import Parents, default_positions

if TYPE_CHECKING:
    import networkx

    from compsparse_kernels.graphs.function_graph import FunctionGraph

KEYS = ("num_sources", "ptr", "parents", "position", "arity", "sinks", "shares", "names", "labels")
NEEDED = ("num_sources", "ptr", "parents")


def from_edges(
    cls,
    edges: Iterable[tuple[Hashable, Hashable]],
    order: Sequence[float] | None = None,
    *,
    sources: Iterable[Hashable] | None = None,
    nodes: Iterable[Hashable] | None = None,
    sinks: Iterable[Hashable] | None = None,
    shares: Mapping[Hashable, str] | None = None,
    labels: Mapping[Hashable, str] | None = None,
) -> "FunctionGraph":
    """Graph of edges (parent, node) between vertices of any hashable names.

    Args:
        edges: pairs of names, or an array ``[edges, 2]``.
        order: one number for each edge, by which the parents of a node are ordered; by default as the edges are listed.
        sources: names of the inputs in the order of their ids; by default the vertices without parents, as they appear.
            If given, any other vertex without parents is an error.
        nodes: names of the nodes in the order of their ids; by default the vertices with parents, as they appear. If
            given, any other name in an edge is an error.
        sinks: names of the outputs, in order; by default the nodes that nothing reads.
        shares: names of weights, by node.
        labels: what nodes compute, by node.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted, what came and the nodes.

    Example:
        >>> from compsparse_kernels import FunctionGraph
        >>> graph = FunctionGraph.from_edges([("x", "u"), ("y", "u"), ("u", "v"), ("x", "v")])
        >>> graph.names, graph.parents_of(graph.index("v"))
        (('x', 'y', 'u', 'v'), array([2, 0], dtype=int32))
    """
    tails, heads = _columns(edges)
    heads_seen = dict.fromkeys(heads)
    if sources is None:
        sources = [name for name in dict.fromkeys(tails) if name not in heads_seen]
    sources = list(sources)
    known = set(sources)
    both = [repr(name) for name in known if name in heads_seen]
    require(not both, "sources", "vertices without parents", listing(both))
    if nodes is None:
        nodes = [
            name for name in dict.fromkeys(chain.from_iterable(zip(tails, heads, strict=True))) if name not in known
        ]
    return _build(cls, sources, list(nodes), (tails, heads), order, sinks, shares, labels)


def _columns(edges: Iterable[tuple[Hashable, Hashable]]) -> tuple[tuple[Hashable, ...], tuple[Hashable, ...]]:
    edges = edges.tolist() if isinstance(edges, np.ndarray) else list(edges)
    require(len(edges) > 0, "edges", "at least one edge", "none")
    wrong = next((edge for edge in edges if not isinstance(edge, (tuple, list)) or len(edge) != 2), None)
    require(wrong is None, "edges", "pairs (parent, node)", repr(wrong))
    tails, heads = zip(*edges, strict=True)
    return tails, heads


def _build(cls, sources, nodes, edges, order, sinks, shares, labels, arity=None) -> "FunctionGraph":
    """``order`` sorts the parents of a node; with ``arity`` it is also which argument each parent is."""
    vertices = sources + nodes
    index = {name: vertex for vertex, name in enumerate(vertices)}
    tails, heads = (_ids(index, names, "edges", "vertices among sources and nodes") for names in edges)
    rank = np.arange(len(heads)) if order is None else np.asarray(order)
    numbers = rank.shape == (len(heads),) and np.issubdtype(rank.dtype, np.number)
    require(numbers, "order", f"one number for each of {len(heads)} edges", describe(order))
    by_node = np.lexsort((rank, heads))
    ptr = np.concatenate(([0], np.cumsum(np.bincount(heads - len(sources), minlength=len(nodes)))))
    position = None if arity is None else rank[by_node]
    named = vertices if any(type(name) is not int or name != vertex for vertex, name in enumerate(vertices)) else None
    return cls(
        len(sources),
        Parents(ptr, tails[by_node], position, arity),
        sinks=None if sinks is None else _ids(index, sinks, "sinks", "names of nodes"),
        shares=_by_node("shares", shares, nodes),
        names=named,
        labels=_by_node("labels", labels, nodes),
    )


def _ids(index: dict[Hashable, int], names: Iterable[Hashable], argument: str, wanted: str) -> np.ndarray:
    names = list(names)
    ids = np.array([index.get(name, -1) for name in names], dtype=np.int64)
    unknown = dict.fromkeys(repr(names[place]) for place in np.flatnonzero(ids < 0))
    require(not unknown, argument, wanted, f"the unknown {listing(unknown)}")
    return ids


def _by_node(argument: str, values: Mapping[Hashable, str] | None, nodes: list[Hashable]) -> list[str | None] | None:
    if values is None:
        return None
    require(isinstance(values, Mapping), argument, "a mapping from names of nodes", describe(values), TypeError)
    known = set(nodes)
    unknown = [repr(name) for name in values if name not in known]
    require(not unknown, argument, "names of nodes", f"the unknown {listing(unknown)}")
    return [values.get(node) for node in nodes]


def from_networkx(cls, graph: "networkx.DiGraph") -> "FunctionGraph":
    """Graph of a ``networkx.DiGraph`` whose edges go from parent to node; vertices without parents are the sources.

    Attributes that are read, all optional: ``position`` of edges, which orders the parents of a node (on all edges, or
    on none: then as the graph lists them); of nodes ``share``, ``label``, ``sink`` (its number among the outputs),
    ``arity``, and ``name`` where vertices are plain numbers.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted, what came and the nodes.

    Example:
        >>> import networkx
        >>> from compsparse_kernels import FunctionGraph
        >>> graph = networkx.DiGraph([("x", "u"), ("y", "u"), ("x", "v"), ("u", "v")])
        >>> FunctionGraph.from_networkx(graph)
        FunctionGraph(2 sources, 2 nodes in 2 levels, 1 sink, 4 edges, in-degree 2, 2 weights)
    """
    simple = hasattr(graph, "pred") and not graph.is_multigraph()
    require(simple, "graph", "a networkx.DiGraph (directed, no parallel edges)", describe(graph), TypeError)
    sources = [vertex for vertex in graph if not graph.pred[vertex]]
    nodes = [vertex for vertex in graph if graph.pred[vertex]]
    edges = [(tail, head, data.get("position")) for head in nodes for tail, data in graph.pred[head].items()]
    tails, heads, order = zip(*edges, strict=True) if edges else ((), (), ())
    missing = sum(position is None for position in order)
    wanted = "the attribute 'position' on all edges, or on none"
    require(missing in (0, len(order)), "graph", wanted, f"{missing} of {len(order)} edges without")
    data = dict(graph.nodes(data=True))
    outputs = [vertex for vertex in graph if "sink" in data[vertex]]
    arity = [data[node].get("arity", len(graph.pred[node])) for node in nodes]
    gaps = any("arity" in data[node] for node in nodes)
    built = _build(
        cls,
        sources,
        nodes,
        (tails, heads),
        None if missing else order,
        sorted(outputs, key=lambda vertex: data[vertex]["sink"]) or None,
        {node: data[node]["share"] for node in nodes if "share" in data[node]} or None,
        {node: data[node]["label"] for node in nodes if "label" in data[node]} or None,
        arity if gaps else None,
    )
    names = [data[vertex].get("name") for vertex in sources + nodes]
    if built.names is None and any(name is not None for name in names):
        return cls(built.num_sources, built.parents, **{**built._notes(), "names": names})
    return built


def to_networkx(self) -> "networkx.DiGraph":
    """As a ``networkx.DiGraph`` with the attributes that :meth:`from_networkx` reads.

    Its vertices are the names where every vertex has one, and ids otherwise.

    Raises:
        ImportError: where networkx is missing.

    Example:
        >>> from compsparse_kernels import FunctionGraph
        >>> graph = FunctionGraph.tree(4)
        >>> graph.to_networkx().edges(data="position")
        OutEdgeDataView([(0, 4, 0), (1, 4, 1), (2, 5, 0), (3, 5, 1), (4, 6, 0), (5, 6, 1)])
        >>> FunctionGraph.from_networkx(graph.to_networkx()) == graph
        True
    """
    networkx = import_extra("networkx")
    named = self.names is not None and None not in self.names
    keys = self.names if named else range(self.num_vertices)
    graph = networkx.DiGraph()
    graph.add_nodes_from((key, _attributes(self, vertex, named)) for vertex, key in enumerate(keys))
    for number, sink in enumerate(self.sinks):
        graph.nodes[keys[sink]]["sink"] = number
    _, idx, position, _ = self.parents
    heads = self.parents.node_of_edge() + self.num_sources
    edges = zip(idx.tolist(), heads.tolist(), position.tolist(), strict=True)
    graph.add_edges_from((keys[tail], keys[head], {"position": place}) for tail, head, place in edges)
    return graph


def _attributes(graph: "FunctionGraph", vertex: int, named: bool) -> dict[str, object]:
    attributes = {}
    if not named and graph.names is not None:
        attributes["name"] = graph.names[vertex]
    node = vertex - graph.num_sources
    if node >= 0:
        attributes["share"] = graph.share_names[graph.share[node]]
        attributes["label"] = None if graph.labels is None else graph.labels[node]
        if graph.parents.arity[node] != graph.in_degrees[node]:
            attributes["arity"] = int(graph.parents.arity[node])
    return {name: value for name, value in attributes.items() if value is not None}


def to_dict(self) -> dict[str, Any]:
    """Plain lists, numbers and strings, for JSON; :meth:`from_dict` reads them.

    Raises:
        TypeError: for names that are no strings, ints, or tuples of such.

    Example:
        >>> import json
        >>> from compsparse_kernels import FunctionGraph
        >>> text = json.dumps(FunctionGraph.tree(3).to_dict())
        >>> text
        '{"num_sources": 3, "ptr": [0, 2, 3, 5], "parents": [0, 1, 2, 3, 4], "sinks": [5]}'
        >>> FunctionGraph.from_dict(json.loads(text)) == FunctionGraph.tree(3)
        True
    """
    ptr, idx, position, arity = self.parents
    notes = self._notes()
    content = {
        "num_sources": self.num_sources,
        "ptr": ptr.tolist(),
        "parents": idx.tolist(),
        "position": None if np.array_equal(position, default_positions(ptr)) else position.tolist(),
        "arity": None if np.array_equal(arity, self.in_degrees) else arity.tolist(),
        "sinks": self.sinks.tolist(),
        "shares": notes["shares"],
        "names": None if self.names is None else [_plain(name) for name in self.names],
        "labels": None if self.labels is None else list(self.labels),
    }
    return {key: value for key, value in content.items() if value is not None}


def _plain(name: Hashable) -> object:
    if isinstance(name, tuple):
        return [_plain(part) for part in name]
    require(name is None or type(name) in (str, int), "names", "strings, ints or tuples of such", repr(name), TypeError)
    return name


def from_dict(cls, content: Mapping[str, Any]) -> "FunctionGraph":
    """The graph that :meth:`to_dict` wrote.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.
    """
    require(isinstance(content, Mapping), "content", "a mapping, as to_dict gives", describe(content), TypeError)
    missing = [key for key in NEEDED if key not in content]
    require(not missing, "content", f"the keys {', '.join(NEEDED)}", f"none of the name {listing(missing)}")
    unknown = [str(key) for key in content if key not in KEYS]
    require(not unknown, "content", f"the keys {', '.join(KEYS)}", f"the unknown {listing(unknown)}")
    parents = Parents(content["ptr"], content["parents"], content.get("position"), content.get("arity"))
    names = content.get("names")
    return cls(
        content["num_sources"],
        parents,
        sinks=content.get("sinks"),
        shares=content.get("shares"),
        names=None if names is None else [_hashable(name) for name in names],
        labels=content.get("labels"),
    )


def _hashable(name: object) -> Hashable:
    return tuple(_hashable(part) for part in name) if isinstance(name, list) else name
