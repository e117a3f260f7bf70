"""FunctionGraph to and from edges, networkx and JSON, and its pictures."""

import json
import random

import matplotlib
import networkx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compsparse_kernels import FunctionGraph
from compsparse_kernels.graphs import Parents
from compsparse_kernels.graphs.drawing import vertical_places
from python_tests.test_graphs import graphs, parent_lists

matplotlib.use("Agg")
from matplotlib import pyplot

PADDED = FunctionGraph.conv1d(6, kernel=3, padding=1, depth=2)
PARTLY_NAMED = FunctionGraph(2, [[1, 0], [2]], names=["x", None, "u", None], labels=["a*b", None])


def assert_same(graph, other):
    """Names and labels too."""
    assert graph == other
    assert (graph.share_names, graph.names, graph.labels) == (other.share_names, other.names, other.labels)


# ---- edges


@given(parent_lists(), st.integers(0, 1000))
def test_edges_in_any_order(drawn, seed):
    """``order`` says what the list's own order otherwise does."""
    num_sources, lists = drawn
    names = [f"v{vertex}" for vertex in range(num_sources + len(lists))]
    edges = [
        (names[parent], names[num_sources + node], place)
        for node, parents in enumerate(lists)
        for place, parent in enumerate(parents)
    ]
    vertices = {"sources": names[:num_sources], "nodes": names[num_sources:]}
    graph = FunctionGraph(num_sources, lists, names=names)
    assert_same(graph, FunctionGraph.from_edges([edge[:2] for edge in edges], **vertices))
    random.Random(seed).shuffle(edges)
    order = [place for _, _, place in edges]
    assert_same(graph, FunctionGraph.from_edges([edge[:2] for edge in edges], order, **vertices))


def test_vertices_are_numbered_as_they_appear():
    graph = FunctionGraph.from_edges([("b", "u"), ("u", "v"), ("a", "v"), ("b", "w")])
    assert graph.names == ("b", "a", "u", "v", "w")
    assert [graph.parents_of(node).tolist() for node in (2, 3, 4)] == [[0], [2, 1], [0]]
    assert graph.sinks.tolist() == [3, 4]


def test_notes_by_name():
    graph = FunctionGraph.from_edges(
        [("x", "u"), ("y", "v"), ("u", "w")], sinks=["w", "v"], shares={"u": "f", "v": "f"}, labels={"w": "sin"}
    )
    assert graph.sinks.tolist() == [graph.index("w"), graph.index("v")]
    assert graph.share_names == ("f", None) and graph.labels == (None, None, "sin")


def test_ids_are_no_names():
    graph = FunctionGraph.from_edges(np.array([[0, 2], [1, 2], [2, 3]]))
    assert graph.names is None
    assert graph == FunctionGraph(2, [[0, 1], [2]])
    assert FunctionGraph.from_edges([(1, 2)]).names == (1, 2)


# ---- networkx


@given(graphs())
def test_networkx_and_back(graph):
    exported = graph.to_networkx()
    assert networkx.is_directed_acyclic_graph(exported)
    assert networkx.dag_longest_path_length(exported) == graph.num_levels
    assert_same(FunctionGraph.from_networkx(exported), _without_empty_notes(graph))


def _without_empty_notes(graph):
    """Labels that are all None are no labels."""
    labels = graph.labels if any(graph.labels) else None
    return FunctionGraph(graph.num_sources, graph.parents, **{**graph._notes(), "labels": labels})


@pytest.mark.parametrize("graph", [PADDED, PARTLY_NAMED, FunctionGraph.tree(5, share="all")], ids=repr)
def test_networkx_keeps_arguments_and_single_names(graph):
    assert_same(FunctionGraph.from_networkx(graph.to_networkx()), graph)


def test_networkx_without_attributes():
    graph = networkx.DiGraph()
    graph.add_nodes_from(["alone", "out"])
    graph.add_edges_from([("y", "out"), ("x", "out")])
    ours = FunctionGraph.from_networkx(graph)
    assert ours.names == ("alone", "y", "x", "out") and ours.parents_of(3).tolist() == [1, 2]


def test_networkx_complaints():
    graph = networkx.DiGraph([("x", "u"), ("y", "u")])
    graph["x"]["u"]["position"] = 0
    with pytest.raises(ValueError, match="'position' on all edges, or on none, got 1 of 2 edges without"):
        FunctionGraph.from_networkx(graph)
    with pytest.raises(
        TypeError, match=r"expected a networkx.DiGraph \(directed, no parallel edges\), got MultiDiGraph"
    ):
        FunctionGraph.from_networkx(networkx.MultiDiGraph(graph))
    with pytest.raises(TypeError, match="got Graph"):
        FunctionGraph.from_networkx(networkx.Graph(graph))
    with pytest.raises(ValueError, match="the cycle 'u' -> 'v' -> 'u'"):
        FunctionGraph.from_networkx(networkx.DiGraph([("x", "u"), ("u", "v"), ("v", "u")]))
    with pytest.raises(ValueError, match=r"sinks: expected ids of nodes, 2..2, got the sources 'x'"):
        graph["y"]["u"]["position"] = 1
        graph.nodes["x"]["sink"] = 0
        FunctionGraph.from_networkx(graph)


# ---- JSON


@given(graphs())
def test_json_and_back(graph):
    assert_same(FunctionGraph.from_dict(json.loads(json.dumps(graph.to_dict()))), graph)


NAMED_BY_PLACES = FunctionGraph(1, [[0]], names=[(0, "a"), (1, (2, 3))])


@pytest.mark.parametrize("graph", [PADDED, PARTLY_NAMED, NAMED_BY_PLACES], ids=repr)
def test_json_keeps_arguments_and_names(graph):
    assert_same(FunctionGraph.from_dict(json.loads(json.dumps(graph.to_dict()))), graph)


# ---- pictures

DRAWN = {
    "tree": FunctionGraph.tree(16, share="level"),
    "butterfly": FunctionGraph.butterfly(16),
    "tower": FunctionGraph.conv1d(20, kernel=[5, 3, 3], padding=[2, 0, 0]),
    "random": FunctionGraph.random(12, 60, 3, 2, skip=0.3),
    "arguments left out": FunctionGraph(2, Parents([0, 1, 3], [1, 0, 1], [1, 0, 1], [2, 2]), shares=["f", "f"]),
}


@pytest.fixture
def axes():
    figure, axes = pyplot.subplots()
    yield axes
    pyplot.close(figure)


@pytest.mark.parametrize("name", DRAWN)
def test_vertices_of_a_column_keep_apart(name):
    graph = DRAWN[name]
    places = vertical_places(graph)
    for vertices in graph.levels:
        assert (np.diff(np.sort(places[vertices])) > 1 - 1e-9).all()


def test_a_node_of_a_tree_stands_in_the_middle_of_its_parents():
    graph = DRAWN["tree"]
    places = vertical_places(graph)
    for node in range(graph.num_sources, graph.num_vertices):
        assert places[node] == pytest.approx(places[graph.parents_of(node)].mean())


def test_a_butterfly_keeps_its_rows():
    places = vertical_places(DRAWN["butterfly"]).reshape(5, 16)
    np.testing.assert_allclose(places, np.tile(places[0], (5, 1)))


def test_a_column_is_reordered_where_that_shortens_edges():
    graph = FunctionGraph(4, [[3], [2], [1], [0]])
    assert vertical_places(graph)[4:].tolist() == [-3, -2, -1, 0]


def drawn_points(axes):
    return [tuple(point) for points in axes.collections[2:] for point in points.get_offsets()]


@pytest.mark.parametrize("name", DRAWN)
def test_drawing(name, axes):
    graph = DRAWN[name]
    assert graph.draw(axes) is axes
    expected = [(graph.level[vertex], place) for vertex, place in enumerate(vertical_places(graph))]
    assert set(drawn_points(axes)) == set(expected)
    near, skipping = axes.collections[:2]
    assert len(near.get_paths()) + len(skipping.get_paths()) == graph.num_edges
    heads = graph.parents.node_of_edge() + graph.num_sources
    skips = graph.level[heads] - graph.level[graph.parents.idx] > 1
    assert len(skipping.get_paths()) == skips.sum()
    for path, parent, head in zip(near.get_paths(), graph.parents.idx[~skips], heads[~skips], strict=True):
        np.testing.assert_allclose(path.vertices[[0, -1]], [expected[parent], expected[head]])
    assert len(axes.texts) == (graph.num_vertices if graph.num_vertices <= 40 else 0)
    axes.figure.canvas.draw()


def test_shared_weights_have_one_colour_and_a_legend(axes):
    graph = DRAWN["tree"]
    graph.draw(axes)
    colours = axes.collections[-1].get_facecolors()
    for number in range(4):
        assert len(np.unique(colours[graph.share == number], axis=0)) == 1
    assert len(np.unique(colours, axis=0)) == 4
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["level 1", "level 2", "level 3"]


def test_names_and_labels_are_written(axes):
    FunctionGraph.from_circuit({"s": ("XOR", "a", "b"), "n": ("NOT", "s")}).draw(axes)
    assert [text.get_text() for text in axes.texts] == ["a", "b", "s XOR", "n NOT"]
    assert axes.get_legend() is None


def test_many_shared_weights(axes):
    graph = FunctionGraph.tree(2**13, share="level")
    assert graph.num_levels > 10
    graph.draw(axes)
    assert axes.get_legend() is None
    assert len(np.unique(axes.collections[-1].get_facecolors(), axis=0)) == 13


def test_a_figure_of_its_own():
    axes = FunctionGraph.conv1d(8, 3).draw()
    assert axes.figure.get_layout_engine() is not None
    pyplot.close(axes.figure)
