"""Networks on a graph: which weight each node has, what it reads, and where its channels lie."""

import copy
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from compsparse_kernels.graphs import FunctionGraph
from compsparse_kernels.graphs.order import ranges
from compsparse_kernels.layouts.checks import check_positive_int, require

INDEX_TENSORS = ("nodes", "edge_ptr", "edges", "child_ptr", "children")


class Kind(NamedTuple):
    """Nodes whose weights have one shape, and so are rows of one tensor ``[num_weights, out, fan_in]``."""

    out: int  # channels of a node
    fan_in: int  # channels it reads
    num_weights: int  # nodes that share weights count once
    linear: bool  # without an activation


@dataclass(frozen=True, eq=False)
class DAGLayout:
    r"""How a network on a :class:`FunctionGraph` is computed: its nodes in order, their weights, their channels.

    Node v of the graph becomes :math:`h_v = \mathrm{act}(W_v [h_u]_{u \in \mathrm{parents}(v)} + b_v)` with ``width``
    channels, or, with ``hidden`` units, :math:`h_v = A_v\,\mathrm{act}(W_v [h_u] + b_v) + c_v`: two nodes, the second
    linear. A sink is linear and has ``out_channels``. A sink that another node reads, or that shares its weights with a
    node that is read, is computed as any node, and a linear node with ``out_channels`` reads it out.

    Arguments that a node with shared weights lacks (``graph.parents.position``) count as 0. Nodes that share weights
    share them in every part.

    Args:
        graph: what depends on what.
        width: channels of each node that others read.
        hidden: units of the hidden layer of each node, or None for none.
        in_channels: channels of each source.
        out_channels: channels of each sink.

    Attributes:
        kinds: tuple of :class:`Kind`. Kind k has weights ``[num_weights, out, fan_in]`` and biases
            ``[num_weights, out]``.
        nodes: int32 ``[nodes, 4]``, in the order of execution: kind, weight, first column, first output column or -1.
        edge_ptr, edges: what node i reads, int32 ``[nodes + 1]`` and ``[edges, 3]``: first column of the parent, its
            channels, where they stand in the node's fan-in.
        child_ptr, children: who reads vertex i, sources first, then nodes: int32 ``[sources + nodes + 1]`` and
            ``[edges, 2]``: the node, and where the vertex stands in its fan-in.
        steps: boundaries of runs of nodes of one level and kind.
        columns: channels of all sources and nodes.
        parts: int32 ``[graph nodes, 3]``: the nodes that compute each node of the graph: the layer that reads its
            parents, the linear layer behind ``hidden`` units or -1, the readout or -1.
        in_features, out_features: sources times their channels, sinks times theirs.
        weight_shapes, bias_shapes: of each kind.
        linear: of each kind 1 where its nodes have no activation, else 0.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came; also where nodes that share weights
            read channels of different number at one argument.

    Source: Poggio, "It is Compositional Sparsity: a framework for ML", section 4; Theorem 1 for ``hidden``.

    Example:
        >>> from compsparse_kernels import DAGLayout, FunctionGraph
        >>> layout = DAGLayout(FunctionGraph.tree(8), width=16)
        >>> layout
        DAGLayout(8 -> 1 features, 7 nodes in 3 steps, 3 kinds, 1281 parameters)
        >>> layout.kinds[1]
        Kind(out=16, fan_in=32, num_weights=2, linear=False)
    """

    graph: FunctionGraph
    width: int
    hidden: int | None = None
    in_channels: int = 1
    out_channels: int = 1
    kinds: tuple[Kind, ...] = field(init=False)
    nodes: torch.Tensor = field(init=False)
    edge_ptr: torch.Tensor = field(init=False)
    edges: torch.Tensor = field(init=False)
    child_ptr: torch.Tensor = field(init=False)
    children: torch.Tensor = field(init=False)
    steps: tuple[int, ...] = field(init=False)
    columns: int = field(init=False)
    parts: np.ndarray = field(init=False)
    # Each call asks for these.
    in_features: int = field(init=False)
    out_features: int = field(init=False)
    weight_shapes: list[tuple[int, int, int]] = field(init=False)
    bias_shapes: list[tuple[int, int]] = field(init=False)
    linear: list[int] = field(init=False)

    def __post_init__(self):
        require(isinstance(self.graph, FunctionGraph), "graph", "FunctionGraph", type(self.graph).__name__, TypeError)
        for name in ("width", "in_channels", "out_channels"):
            check_positive_int(name, getattr(self, name))
        if self.hidden is not None:
            check_positive_int("hidden", self.hidden)
        for name, value in _build(self).items():
            object.__setattr__(self, name, value)

    @property
    def multiply_adds(self) -> int:
        """Of one row of the batch, over the edges that are there."""
        kind = self.nodes[:, 0].long()
        out = torch.tensor([kind.out for kind in self.kinds], device=kind.device)[kind]
        return int((out.repeat_interleave(self.edge_ptr.diff()) * self.edges[:, 1]).sum())

    @property
    def device(self) -> torch.device:
        return self.nodes.device

    def to(self, device: torch.device | str) -> "DAGLayout":
        """The same layout with its index tensors on ``device``."""
        if torch.device(device) == self.device:
            return self
        other = copy.copy(self)
        for name in INDEX_TENSORS:
            object.__setattr__(other, name, getattr(self, name).to(device))
        return other

    def __repr__(self) -> str:
        parameters = sum(kind.num_weights * kind.out * (kind.fan_in + 1) for kind in self.kinds)
        return (
            f"DAGLayout({self.in_features} -> {self.out_features} features, {len(self.nodes)} nodes in"
            f" {len(self.steps) - 1} steps, {len(self.kinds)} kinds, {parameters} parameters)"
        )


class _Layers(NamedTuple):
    """Nodes of the layout before they are put in order; node numbers count them, vertices count sources as well."""

    level: np.ndarray
    out: np.ndarray
    linear: np.ndarray
    fan_in: np.ndarray
    share: np.ndarray
    output: np.ndarray  # first output column or -1
    degree: np.ndarray  # edges of each node
    parent: np.ndarray  # vertex each edge reads
    offset: np.ndarray  # where it stands in the fan-in


def _build(layout: DAGLayout) -> dict[str, object]:
    layers, parts = _layers(layout)
    sources = layout.graph.num_sources
    kind_of_node, kinds, weight = _kinds(layers)
    order = np.lexsort((np.arange(len(kind_of_node)), kind_of_node, layers.level))
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    channels = np.concatenate((np.full(sources, layout.in_channels), layers.out[order]))
    column = np.cumsum(channels) - channels  # of sources, then of nodes as they are executed
    begin = np.cumsum(layers.degree) - layers.degree
    edge = ranges(begin[order], layers.degree[order])
    parent = layers.parent[edge]
    inner = parent >= sources
    parent[inner] = sources + rank[parent[inner] - sources]
    offset = layers.offset[edge]
    reader = np.repeat(np.arange(len(order)), layers.degree[order])
    by_parent = np.argsort(parent, kind="stable")
    nodes = (kind_of_node[order], weight[order], column[sources:], layers.output[order])
    change = np.diff(layers.level[order]) | np.diff(kind_of_node[order])
    require(int(column[-1]) + int(channels[-1]) < 2**31, "graph", "fewer than 2^31 channels in all", column[-1])
    return {
        "kinds": kinds,
        "nodes": _int32(np.stack(nodes, axis=1)),
        "edge_ptr": _int32(_offsets(layers.degree[order])),
        "edges": _int32(np.stack((column[parent], channels[parent], offset), axis=1)),
        "child_ptr": _int32(_offsets(np.bincount(parent, minlength=len(channels)))),
        "children": _int32(np.stack((reader[by_parent], offset[by_parent]), axis=1)),
        "steps": (0, *(np.flatnonzero(change) + 1).tolist(), len(order)),
        "columns": int(channels.sum()),
        "parts": np.where(parts >= 0, rank[parts], -1).astype(np.int32),
        "in_features": sources * layout.in_channels,
        "out_features": layout.graph.num_sinks * layout.out_channels,
        "weight_shapes": [(kind.num_weights, kind.out, kind.fan_in) for kind in kinds],
        "bias_shapes": [(kind.num_weights, kind.out) for kind in kinds],
        "linear": [int(kind.linear) for kind in kinds],
    }


def _layers(layout: DAGLayout) -> tuple[_Layers, np.ndarray]:
    """The layers of the graph's nodes: those that read parents, those behind hidden units, readouts."""
    graph = layout.graph
    sources, count = graph.num_sources, graph.num_nodes
    is_sink = np.zeros(count, bool)
    is_sink[graph.sinks - sources] = True
    is_read = np.bincount(graph.parents.idx, minlength=graph.num_vertices)[sources:] > 0
    shares_with_read = np.bincount(graph.share, weights=is_read) > 0
    plain_sink = is_sink & ~shares_with_read[graph.share]
    output = np.full(count, -1)
    output[graph.sinks - sources] = np.arange(graph.num_sinks) * layout.out_channels
    value_out = np.where(plain_sink, layout.out_channels, layout.width)  # channels of the node's value
    two = layout.hidden is not None
    value = np.arange(count) + two * count  # the layer that gives it
    read_out = np.flatnonzero(is_sink & ~plain_sink)
    value_level = graph.level[sources:] * (1 + two)
    offset, fan_in = _arguments(layout)
    parent = graph.parents.idx.astype(np.int64)
    inner = parent >= sources
    parent[inner] = sources + value[parent[inner] - sources]
    own_output = np.where(plain_sink, output, -1)
    reading = _Layers(
        level=value_level - two,
        out=np.full(count, layout.hidden) if two else value_out,
        linear=np.zeros(count, bool) if two else plain_sink,
        fan_in=fan_in[graph.share],
        share=graph.share,
        output=np.full(count, -1) if two else own_output,
        degree=graph.in_degrees,
        parent=parent,
        offset=offset,
    )
    groups = [reading]
    if two:
        groups.append(_linear(value_level, value_out, layout.hidden, graph.share, own_output, sources, range(count)))
    groups.append(
        _linear(
            value_level[read_out] + 1,
            np.full(len(read_out), layout.out_channels),
            layout.width,
            graph.share[read_out],
            output[read_out],
            sources,
            value[read_out],
        )
    )
    # Weights are shared within a group of layers, never across.
    groups = [group._replace(share=group.share + i * graph.num_weights) for i, group in enumerate(groups)]
    parts = np.full((count, 3), -1)
    parts[:, 0] = np.arange(count)
    if two:
        parts[:, 1] = value
    parts[read_out, 2] = (1 + two) * count + np.arange(len(read_out))
    return _Layers(*(np.concatenate(arrays).astype(np.int64) for arrays in zip(*groups, strict=True))), parts


def _linear(level, out, fan_in, share, output, sources, reads) -> _Layers:
    """Linear layers that read one layer each."""
    ones = np.ones(len(level), np.int64)
    parent = sources + np.asarray(reads, dtype=np.int64)
    return _Layers(level, out, ones, fan_in * ones, share, output, ones, parent, 0 * ones)


def _arguments(layout: DAGLayout) -> tuple[np.ndarray, np.ndarray]:
    """Where each edge's channels stand in the fan-in of its node, and the fan-in of each weight of the graph."""
    graph = layout.graph
    _, idx, position, arity = graph.parents
    share_of_edge = graph.share[graph.parents.node_of_edge()]
    arity_of = np.zeros(graph.num_weights, np.int64)
    arity_of[graph.share] = arity
    first = np.cumsum(arity_of) - arity_of
    argument = first[share_of_edge] + position
    channels = np.where(idx < graph.num_sources, layout.in_channels, layout.width)
    of_argument = np.zeros(int(arity_of.sum()), np.int64)
    of_argument[argument] = channels
    wrong = np.flatnonzero(of_argument[argument] != channels)
    if len(wrong):
        edge, share = wrong[0], share_of_edge[wrong[0]]
        wanted = f"in_channels equal to width ({layout.width}), because nodes that share the weights"
        wanted += f" {graph.share_names[share]!r} read a source and a node at argument {position[edge]}"
        require(False, "in_channels", wanted, layout.in_channels)
    # An argument that no node has (a convolution's tap that always falls into the padding) looks like the others.
    reads_node = np.bincount(share_of_edge, weights=idx >= graph.num_sources, minlength=graph.num_weights) > 0
    usual = np.repeat(np.where(reads_node, layout.width, layout.in_channels), arity_of)
    of_argument = np.where(of_argument == 0, usual, of_argument)
    before = _offsets(of_argument)
    return before[argument] - before[first[share_of_edge]], before[first + arity_of] - before[first]


def _kinds(layers: _Layers) -> tuple[np.ndarray, tuple[Kind, ...], np.ndarray]:
    """Kind of each node, the kinds, and the number of each node's weight within its kind, in order of appearance."""
    shapes = np.stack((layers.out, layers.fan_in, layers.linear), axis=1)
    rows, first, kind = np.unique(shapes, axis=0, return_index=True, return_inverse=True)
    by_level = np.argsort(np.lexsort((first, layers.level[first])))
    kind, rows = by_level[kind.reshape(-1)], rows[np.argsort(by_level)]
    shares, first, share = np.unique(layers.share, return_index=True, return_inverse=True)
    kind_of_share = kind[first]
    order = np.argsort(kind_of_share, kind="stable")
    counts = np.bincount(kind_of_share, minlength=len(rows))
    number = np.empty(len(shares), np.int64)
    number[order] = np.arange(len(shares)) - np.repeat(np.cumsum(counts) - counts, counts)
    kinds = tuple(
        Kind(out, fan_in, int(count), bool(linear))
        for (out, fan_in, linear), count in zip(rows.tolist(), counts, strict=True)
    )
    return kind, kinds, number[share.reshape(-1)]


def _offsets(counts: np.ndarray) -> np.ndarray:
    return np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))


def _int32(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int32))
