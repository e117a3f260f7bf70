"""DAGLayout: which weight each node has, what it reads, where its channels lie; small graphs by hand, any by a loop."""

import copy
import dataclasses
import pickle
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st

from compsparse_kernels import DAGLayout, FunctionGraph, dag_network
from compsparse_kernels.graphs import Parents
from compsparse_kernels.layouts.dag import INDEX_TENSORS, Kind
from compsparse_kernels.testing import dag_inputs, dag_node_by_node
from python_tests.test_graphs import graphs

SKIP = FunctionGraph(3, [[0, 1], [3, 2], [3, 4]], sinks=[3, 5])  # node 3 is an output and read; 5 skips over 4


@st.composite
def layouts(draw):
    """Of any graph: shared weights, skip edges, outputs that are read."""
    graph = draw(graphs())
    sizes = draw(st.integers(1, 5)), draw(st.one_of(st.none(), st.integers(1, 4))), draw(st.integers(1, 3))
    try:
        return DAGLayout(graph, *sizes, out_channels=draw(st.integers(1, 3)))
    except ValueError as error:  # weights shared between nodes that read sources and nodes that read nodes
        assume(str(error).startswith("in_channels: expected in_channels equal to width"))
        return DAGLayout(graph, *sizes[:2], in_channels=sizes[0])


# ---- by hand


def test_skip_edges_and_an_output_that_is_read():
    layout = DAGLayout(SKIP, width=4, out_channels=2)
    assert layout.kinds == (Kind(4, 2, 1, False), Kind(4, 5, 1, False), Kind(2, 4, 1, True), Kind(2, 8, 1, True))
    assert layout.nodes.tolist() == [[0, 0, 3, -1], [1, 0, 7, -1], [2, 0, 11, 0], [3, 0, 13, 2]]
    assert layout.edge_ptr.tolist() == [0, 2, 4, 5, 7]
    # Columns: sources 0..2, node 3 at 3..6, node 4 at 7..10, the readout of 3 at 11..12, node 5 at 13..14.
    assert layout.edges.tolist() == [[0, 1, 0], [1, 1, 1], [3, 4, 0], [2, 1, 4], [3, 4, 0], [3, 4, 0], [7, 4, 4]]
    assert layout.child_ptr.tolist() == [0, 1, 2, 3, 6, 7, 7, 7]
    assert layout.children.tolist() == [[0, 0], [0, 1], [1, 4], [1, 0], [2, 0], [3, 0], [3, 4]]
    assert layout.parts.tolist() == [[0, -1, 2], [1, -1, -1], [3, -1, -1]]
    assert layout.columns == 15 and layout.steps == (0, 1, 2, 3, 4)
    assert (layout.in_features, layout.out_features) == (3, 4)
    assert layout.multiply_adds == 4 * 2 + 4 * 5 + 2 * 4 + 2 * 8


def test_hidden_units_are_a_node_of_their_own():
    layout = DAGLayout(FunctionGraph(3, [[0, 1], [1, 2], [3, 4]]), width=4, hidden=5, in_channels=2)
    assert layout.kinds == (Kind(5, 4, 2, False), Kind(4, 5, 2, True), Kind(5, 8, 1, False), Kind(1, 5, 1, True))
    assert layout.nodes.tolist() == [
        [0, 0, 6, -1],
        [0, 1, 11, -1],
        [1, 0, 16, -1],
        [1, 1, 20, -1],
        [2, 0, 24, -1],
        [3, 0, 29, 0],
    ]
    assert layout.parts.tolist() == [[0, 2, -1], [1, 3, -1], [4, 5, -1]]
    assert layout.steps == (0, 2, 4, 5, 6) and layout.linear == [0, 1, 0, 1]
    assert layout.edges.tolist()[:4] == [[0, 2, 0], [2, 2, 2], [2, 2, 0], [4, 2, 2]]


def test_arguments_in_the_padding_keep_their_place():
    layout = DAGLayout(FunctionGraph.conv1d(3, kernel=3, padding=1), width=8, in_channels=2, out_channels=4)
    assert layout.kinds == (Kind(4, 6, 1, True),)
    assert layout.nodes[:, 1].tolist() == [0, 0, 0]
    assert layout.edge_ptr.tolist() == [0, 2, 5, 7]
    offsets = layout.edges[:, 2].tolist()
    assert offsets == [2, 4, 0, 2, 4, 0, 2]  # the first window begins, the last one ends in the padding
    assert layout.multiply_adds == 4 * 2 * 7  # and costs nothing there


def test_an_argument_that_no_node_has():
    """Only taps 1 and 2 of 4 ever see something; the others look like them."""
    parents = Parents([0, 2, 4], [0, 1, 1, 2], [1, 2, 1, 2], [4, 4])
    layout = DAGLayout(FunctionGraph(3, parents, shares=["f", "f"]), width=8, in_channels=3)
    assert layout.kinds == (Kind(1, 12, 1, True),)
    assert layout.edges[:, 2].tolist() == [3, 6, 3, 6]


def test_weights_shared_across_levels():
    graph = FunctionGraph.tree(8, share="all")
    layout = DAGLayout(graph, width=4, in_channels=4, out_channels=3)
    # The root shares with nodes that are read, so it has width channels, and a readout.
    assert layout.kinds == (Kind(4, 8, 1, False), Kind(3, 4, 1, True))
    assert layout.nodes[:, :2].tolist() == [[0, 0]] * 7 + [[1, 0]]
    assert layout.nodes[:, 3].tolist() == [-1] * 7 + [0]
    assert layout.steps == (0, 4, 6, 7, 8)


def test_mixed_widths_are_grouped():
    """No node pays for another's fan-in: 2, 3 and 1 parents are kinds of their own."""
    graph = FunctionGraph(3, [[0, 1], [0, 1, 2], [1, 2], [2], [3, 4, 5, 6]])
    layout = DAGLayout(graph, width=4)
    assert layout.kinds[:3] == (Kind(4, 2, 2, False), Kind(4, 3, 1, False), Kind(4, 1, 1, False))
    assert layout.nodes[:4, :2].tolist() == [[0, 0], [0, 1], [1, 0], [2, 0]]
    assert layout.parts[:4, 0].tolist() == [0, 2, 1, 3]


# ---- any graph


@given(layouts(), st.integers(0, 2**20))
def test_the_reference_on_it_equals_a_loop_over_the_nodes(layout, seed):
    x, *parameters = dag_inputs(layout, batch=3, dtype=torch.float64, seed=seed)
    weights, biases = parameters[: len(layout.kinds)], parameters[len(layout.kinds) :]
    y = dag_network(x, weights, layout, biases, "silu", backend="reference")
    torch.testing.assert_close(y, dag_node_by_node(x, weights, layout, biases, F.silu), rtol=1e-10, atol=1e-12)
    without = dag_network(x, weights, layout, None, "relu", backend="reference")
    torch.testing.assert_close(without, dag_node_by_node(x, weights, layout, None, F.relu), rtol=1e-10, atol=1e-12)


@given(layouts())
def test_nodes_have_the_same_weights_where_the_graph_says_so(layout):
    share = layout.graph.share
    for part in layout.parts.T:
        there = np.flatnonzero(part >= 0)
        weight_of = {}
        for node in there:
            weight = tuple(layout.nodes[part[node], :2].tolist())
            assert weight_of.setdefault(share[node], weight) == weight
        assert len(set(weight_of.values())) == len(weight_of)
    used = {tuple(pair) for pair in layout.nodes[:, :2].tolist()}
    assert used == {(k, w) for k, kind in enumerate(layout.kinds) for w in range(kind.num_weights)}


@given(layouts())
def test_index_tensors_agree_with_each_other(layout):
    """What kernels rely on without a check."""
    kinds, nodes = layout.kinds, layout.nodes.tolist()
    sources, c = layout.graph.num_sources, layout.in_channels
    channels = [c] * sources + [kinds[kind].out for kind, *_ in nodes]
    columns = [source * c for source in range(sources)] + [column for _, _, column, _ in nodes]
    assert columns == [sum(channels[:i]) for i in range(len(channels))]  # one after another, without gaps
    assert layout.columns == sum(channels)
    children = {vertex: [] for vertex in range(len(channels))}
    for i, (kind, _, column, _) in enumerate(nodes):
        end = 0
        for start, count, offset in layout.edges[layout.edge_ptr[i] : layout.edge_ptr[i + 1]].tolist():
            vertex = columns.index(start)
            assert count == channels[vertex] and start + count <= column  # whole vertices that are there by then
            assert end <= offset and offset + count <= kinds[kind].fan_in
            end = offset + count
            children[vertex].append([i, offset])
    found = [layout.children[a:b].tolist() for a, b in zip(layout.child_ptr[:-1], layout.child_ptr[1:], strict=True)]
    assert found == list(children.values())
    for begin, end in zip(layout.steps[:-1], layout.steps[1:], strict=True):
        first = nodes[begin]
        assert begin < end and all(nodes[i][0] == first[0] for i in range(begin, end))
        read = layout.edges[layout.edge_ptr[begin] : layout.edge_ptr[end]]
        assert (read[:, 0] + read[:, 1] <= first[2]).all()  # nodes of a step do not wait for each other
    assert (layout.steps[0], layout.steps[-1]) == (0, len(nodes))
    written = sorted((output, kinds[kind].out) for kind, _, _, output in nodes if output >= 0)
    assert written == [(i * layout.out_channels, layout.out_channels) for i in range(layout.graph.num_sinks)]
    assert all(getattr(layout, name).dtype == torch.int32 for name in INDEX_TENSORS)


@given(layouts())
def test_multiply_adds_are_those_of_the_edges(layout):
    total, nodes = 0, layout.nodes.tolist()
    for i, (kind, *_) in enumerate(nodes):
        begin, end = layout.edge_ptr[i : i + 2].tolist()
        total += layout.kinds[kind].out * sum(count for _, count, _ in layout.edges[begin:end].tolist())
    assert layout.multiply_adds == total


# ---- an object among objects


def test_moves_copies_and_repr():
    layout = DAGLayout(SKIP, 4)
    assert layout.to("cpu") is layout and layout.device.type == "cpu"
    away = layout.to("meta")
    assert away.device.type == "meta" and layout.device.type == "cpu" and away.kinds == layout.kinds
    assert all(getattr(away, name).is_meta for name in INDEX_TENSORS)
    for other in (copy.deepcopy(layout), pickle.loads(pickle.dumps(layout))):
        assert other.graph == layout.graph and other.kinds == layout.kinds and repr(other) == repr(layout)
        assert all(torch.equal(getattr(other, name), getattr(layout, name)) for name in INDEX_TENSORS)
    wanted = "DAGLayout(3 -> 2 features, 4 nodes in 4 steps, 4 kinds, 50 parameters)"
    assert repr(layout) == wanted
    with pytest.raises(dataclasses.FrozenInstanceError):
        layout.width = 5
    assert layout.weight_shapes == [(1, 4, 2), (1, 4, 5), (1, 1, 4), (1, 1, 8)]
    assert layout.bias_shapes == [(1, 4), (1, 4), (1, 1), (1, 1)]


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"graph": [[0, 1]]}, TypeError, r"^graph: expected FunctionGraph, got list$"),
        ({"width": 0}, ValueError, r"^width: expected a positive int, got 0$"),
        ({"width": 2.0}, TypeError, r"^width: expected a positive int, got float$"),
        ({"hidden": 0}, ValueError, r"^hidden: expected a positive int, got 0$"),
        ({"in_channels": -1}, ValueError, r"^in_channels: expected a positive int, got -1$"),
        ({"out_channels": True}, TypeError, r"^out_channels: expected a positive int, got bool$"),
        (
            {"graph": FunctionGraph.tree(4, share="all")},
            ValueError,
            r"^in_channels: expected in_channels equal to width \(4\), because nodes that share the weights 'all' read"
            r" a source and a node at argument 0, got 1$",
        ),
        (
            {"width": 2**27, "in_channels": 2**27, "graph": FunctionGraph.tree(16)},
            ValueError,
            r"^graph: expected fewer than 2\^31 channels in all, got",
        ),
    ],
)
def test_errors(options, error, message):
    with pytest.raises(error, match=message):
        DAGLayout(**{"graph": SKIP, "width": 4} | options)


@pytest.mark.parametrize("hidden", [None, 3])
def test_100_000_nodes(hidden):
    """Goal: under a second, which the printed time shows; the bound is for a busy machine."""
    graph = FunctionGraph.random(n_inputs=1000, n_nodes=100_000, in_degree=3)
    begin = time.perf_counter()
    layout = DAGLayout(graph, width=4, hidden=hidden)
    seconds = time.perf_counter() - begin
    print(f"hidden {hidden}: {seconds:.2f} s")
    assert len(layout.nodes) == 100_000 * (1 if hidden is None else 2)
    assert seconds < 5
