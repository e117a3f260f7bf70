"""Every complaint of FunctionGraph and its builders: the argument, what was wanted, what came, the nodes by name."""

import re
import sys
from itertools import pairwise

import numpy as np
import pytest
import sympy
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from compsparse_kernels import FunctionGraph
from compsparse_kernels.graphs import Parents

X, Y = sympy.symbols("x y")
PAIR = [("x", "u"), ("y", "u")]
CONV = torch.nn.Conv1d(2, 3, 3)


def complaint(error, call):
    with pytest.raises(error) as caught:
        call()
    return str(caught.value)


STRUCTURE = {
    "parents: expected vertices 0..3, got the unknown 4 among the parents of node 3": lambda: FunctionGraph(
        2, [[0, 1], [2, 4]]
    ),
    "parents: expected vertices 0..2, got the unknown -1 among the parents of 'u'": lambda: FunctionGraph(
        2, [[-1, 1]], names=["x", "y", "u"]
    ),
    "parents: expected distinct parents of each node, got 'x' twice for 'u'": lambda: FunctionGraph(
        1, [[0, 0]], names=["x", "u"]
    ),
    "parents: expected at least one parent of each node, got none for 'v'": lambda: FunctionGraph(
        1, [[0], []], names=["x", "u", "v"]
    ),
    "parents: expected at least one parent of each node, got none for node 2, "
    "so that no source reaches the sinks node 3": (lambda: FunctionGraph(1, [[0], [], [2]], sinks=[3, 1])),
    "parents: expected a graph without cycles, got the cycle node 2 -> node 3 -> node 2": lambda: FunctionGraph(
        2, [[3, 0], [2], [3]]
    ),
    "parents: expected a graph without cycles, got the cycle 'u' -> 'u'": lambda: FunctionGraph(
        1, [[0, 1]], names=["x", "u"]
    ),
    "parents: expected at least one node, got none": lambda: FunctionGraph(2, []),
    "parents: expected 1-D integers, got 1-D float64 array [1]": lambda: FunctionGraph(2, [[0.5]]),
    "parents.ptr: expected offsets ascending from 0 to 2, the number of edges, got [0 3 2]": lambda: FunctionGraph(
        2, Parents([0, 3, 2], [0, 1])
    ),
    "parents.ptr: expected 1-D integers, got 2-D int64 array [1, 2]": lambda: FunctionGraph(2, Parents([[0, 1]], [0])),
    "parents.arity: expected one for each of 1 nodes, got 2": lambda: FunctionGraph(
        2, Parents([0, 1], [0], None, [1, 1])
    ),
    "parents.arity: expected numbers in 0..2147483647, got 4294967296..4294967296": lambda: FunctionGraph(
        2, Parents([0, 1], [0], None, [1 << 32])
    ),
    "parents.position: expected one for each of 2 edges, got 1": lambda: FunctionGraph(2, Parents([0, 2], [0, 1], [0])),
    "parents.position: expected ascending positions in 0..1, got 1, 0 for node 2": lambda: FunctionGraph(
        2, Parents([0, 2], [0, 1], [1, 0])
    ),
    "parents.position: expected ascending positions in 0..1, got 1, 2 for node 3": lambda: FunctionGraph(
        2, Parents([0, 2, 4], [0, 1, 0, 1], [0, 1, 1, 2])
    ),
    "num_sources: expected an int of at least 0, got -1": lambda: FunctionGraph(-1, [[0]]),
    "num_sources: expected at most 2147483647 vertices, got 2147483648": lambda: FunctionGraph(2**31 - 1, [[0]]),
    "sinks: expected at least one node, got none": lambda: FunctionGraph(1, [[0]], sinks=[]),
    "sinks: expected ids of nodes, 1..1, got 2": lambda: FunctionGraph(1, [[0]], sinks=[1, 2]),
    "sinks: expected ids of nodes, 1..1, got the sources 'x'": lambda: FunctionGraph(
        1, [[0]], sinks=[1, 0], names=["x", "u"]
    ),
    "sinks: expected each node once, got node 1 twice": lambda: FunctionGraph(1, [[0]], sinks=[1, 1]),
    "sinks: expected nodes to which every node leads, got node 2, which are no sinks and which nothing reads": (
        lambda: FunctionGraph(1, [[0], [0]], sinks=[1])
    ),
    "shares: expected 1 values, one for each node, got 2": lambda: FunctionGraph(1, [[0]], shares=["a", "a"]),
    "shares: expected nodes with the same number of arguments under the name 'a', got 2 for node 2 and 1 for node 4": (
        lambda: FunctionGraph(2, [[0, 1], [0, 1], [0]], shares=["a", "a", "a"])
    ),
    "names: expected 2 names, one for each vertex, got 1": lambda: FunctionGraph(1, [[0]], names=["x"]),
    "names: expected each name once, got 'x' more than once": lambda: FunctionGraph(1, [[0]], names=["x", "x"]),
    "labels: expected 1 values, one for each node, got 0": lambda: FunctionGraph(1, [[0]], labels=[]),
    "vertex: expected an id in 0..1, got 2": lambda: FunctionGraph(1, [[0]]).parents_of(2),
    "name: expected the name of a vertex, got 'u'": lambda: FunctionGraph(1, [[0]]).index("u"),
    "level: expected a level in 1..1, got 2": lambda: FunctionGraph(1, [[0]]).level_edges(2),
    "columns: expected 'read' or 'earlier', got 'all'": lambda: FunctionGraph(1, [[0]]).level_mask(1, "all"),
    "eps: expected a number between 0 and 1, got 1": lambda: FunctionGraph(1, [[0]]).theorem1_bounds(1, 2),
    "smoothness: expected a positive number, or 1 of them, one for each node, got 0": lambda: FunctionGraph(
        1, [[0]]
    ).theorem1_bounds(0.1, 0),
    "smoothness: expected a positive number, or 1 of them, one for each node, got [1, 2]": lambda: FunctionGraph(
        1, [[0]]
    ).theorem1_bounds(0.1, [1, 2]),
}

BUILDERS = {
    "n_inputs: expected an int of at least 2, got 1": lambda: FunctionGraph.tree(1),
    "arity: expected an int of at least 2, got 1": lambda: FunctionGraph.tree(4, arity=1),
    "share: expected None, 'level' or 'all', got 'none'": lambda: FunctionGraph.tree(4, share="none"),
    "n: expected a power of two, got 6": lambda: FunctionGraph.butterfly(6),
    "bandwidth: expected an int of at least 0, got -1": lambda: FunctionGraph.banded(4, 1, -1),
    "n_outputs: expected at most n_nodes = 2, got 3": lambda: FunctionGraph.random(4, 2, 2, n_outputs=3),
    "skip: expected a number in 0..1, got 1.5": lambda: FunctionGraph.random(4, 2, 2, skip=1.5),
    "kernel: expected windows that fit into the padded level before, got a window of 5 on 3 + 0 + 0": (
        lambda: FunctionGraph.conv1d(3, kernel=5)
    ),
    "padding: expected windows that each see more than padding, got padding 3 with a window of 3 on 8": (
        lambda: FunctionGraph.conv1d(8, kernel=3, padding=3)
    ),
    "stride: expected 2 values, one for each level, got 3": lambda: FunctionGraph.conv1d(
        16, kernel=3, stride=[1, 1, 1], depth=2
    ),
    "kernel: expected 2 numbers, one for each axis, got (3,)": lambda: FunctionGraph.conv2d((4, 4), kernel=(3,)),
    "dilation: expected an int of at least 1, got 0": lambda: FunctionGraph.conv1d(8, kernel=3, dilation=0),
    "modules: expected at least one convolution, got none": lambda: FunctionGraph.from_conv([], (2, 8)),
    "modules[1]: expected 3 in_channels, got 2": lambda: FunctionGraph.from_conv([CONV, CONV], (2, 8)),
    "modules[0]: expected a convolution (nn.Conv1d, nn.Conv2d), got ConvTranspose1d": lambda: FunctionGraph.from_conv(
        torch.nn.ConvTranspose1d(2, 3, 3), (2, 8)
    ),
    "modules[0].padding_mode: expected 'zeros', got 'circular'": lambda: FunctionGraph.from_conv(
        torch.nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular"), (2, 8)
    ),
    "modules[0]: expected a convolution over 2 axes, as input_shape has, got kernel_size (3,)": (
        lambda: FunctionGraph.from_conv(CONV, (2, 8, 8))
    ),
    "input_shape: expected (channels, *spatial), got (2,)": lambda: FunctionGraph.from_conv(CONV, (2,)),
    "edges: expected at least one edge, got none": lambda: FunctionGraph.from_edges([]),
    "edges: expected pairs (parent, node), got ('x', 'u', 1)": lambda: FunctionGraph.from_edges([("x", "u", 1)]),
    "edges: expected vertices among sources and nodes, got the unknown 'y'": lambda: FunctionGraph.from_edges(
        PAIR, sources=["x"], nodes=["u"]
    ),
    "order: expected one number for each of 2 edges, got list": lambda: FunctionGraph.from_edges(PAIR, order=[1]),
    "sources: expected vertices without parents, got 'u'": lambda: FunctionGraph.from_edges(PAIR, sources=["x", "u"]),
    "sinks: expected names of nodes, got the unknown 'z'": lambda: FunctionGraph.from_edges(PAIR, sinks=["z"]),
    "shares: expected names of nodes, got the unknown 'x'": lambda: FunctionGraph.from_edges(PAIR, shares={"x": "a"}),
    "parents: expected a graph without cycles, got the cycle 'u' -> 'v' -> 'u'": lambda: FunctionGraph.from_edges(
        [("u", "v"), ("v", "u")]
    ),
    "parents: expected at least one parent of each node, got none for 'y', so that no source reaches the sinks 'u'": (
        lambda: FunctionGraph.from_edges(PAIR, sources=["x"], sinks=["u"])
    ),
    "names: expected each name once, got 'u' more than once": lambda: FunctionGraph.from_edges(PAIR, nodes=["u", "u"]),
    "gates: expected at least one gate, got none": lambda: FunctionGraph.from_circuit({}),
    "gates['g']: expected a gate of AND, OR, XOR, NAND, NOR, XNOR, NOT, BUF, got 'MAJ'": lambda: (
        FunctionGraph.from_circuit({"g": ("MAJ", "a", "b")})
    ),
    "gates['g']: expected 1 operand of NOT, got 2": lambda: FunctionGraph.from_circuit({"g": ("NOT", "a", "b")}),
    "gates['g']: expected 2 operands of AND, got 1": lambda: FunctionGraph.from_circuit({"g": ("AND", "a")}),
    "gates: expected operands among inputs and gates, got the unknown 'b'": lambda: FunctionGraph.from_circuit(
        {"g": ("AND", "a", "b")}, inputs=["a"]
    ),
    "expressions: expected at least one expression, got none": lambda: FunctionGraph.from_sympy([]),
    "expressions[1]: expected an expression with symbols, got 2": lambda: FunctionGraph.from_sympy(
        [X, sympy.Integer(2)]
    ),
    "symbols: expected all symbols of the expressions, got none for y": lambda: FunctionGraph.from_sympy(
        X + Y, symbols=[X]
    ),
    "content: expected the keys num_sources, ptr, parents, got none of the name parents": lambda: (
        FunctionGraph.from_dict({"num_sources": 1, "ptr": [0, 1]})
    ),
    "content: expected the keys num_sources, ptr, parents, position, arity, sinks, shares, names, labels, "
    "got the unknown a": (lambda: FunctionGraph.from_dict({**FunctionGraph.tree(2).to_dict(), "a": 1})),
}

TYPES = {
    "num_sources: expected an int of at least 0, got 2.0": lambda: FunctionGraph(2.0, [[0]]),
    "parents: expected a list of the parents of each node (a list of ids), or Parents, got int": lambda: FunctionGraph(
        2, 3
    ),
    "parents: expected a list of the parents of each node (a list of ids), or Parents, got list": lambda: FunctionGraph(
        2, [0, 1]
    ),
    "names: expected hashable names, got an unhashable type: 'list'": lambda: FunctionGraph(1, [[0]], names=["x", []]),
    "shares: expected strings, or None, got 3": lambda: FunctionGraph(1, [[0]], shares=[3]),
    "labels: expected a mapping from names of nodes, got list": lambda: FunctionGraph.from_edges(PAIR, labels=["+"]),
    "n: expected an int of at least 2, got True": lambda: FunctionGraph.butterfly(True),
    "shape: expected a pair (height, width), got 8": lambda: FunctionGraph.conv2d(8, 3),
    "modules[1]: expected a convolution (nn.Conv1d, nn.Conv2d), got ReLU": lambda: FunctionGraph.from_conv(
        torch.nn.Sequential(CONV, torch.nn.ReLU()), (2, 8)
    ),
    "gates: expected a mapping from names to (gate, operands...), got list": lambda: FunctionGraph.from_circuit([1]),
    "gates['g']: expected (gate, operand) or (gate, operand, operand), got 'AND'": lambda: FunctionGraph.from_circuit(
        {"g": "AND"}
    ),
    "expressions[0]: expected sums, products, powers and functions of scalars (sympy), got str 'x + y'": (
        lambda: FunctionGraph.from_sympy(["x + y"])
    ),
    "expressions[0]: expected sums, products, powers and functions of scalars (sympy), got Tuple (x, 0, 1) in "
    "Integral(y*sin(x), (x, 0, 1))": lambda: FunctionGraph.from_sympy(sympy.Integral(sympy.sin(X) * Y, (X, 0, 1))),
    "graph: expected a networkx.DiGraph (directed, no parallel edges), got list": lambda: FunctionGraph.from_networkx(
        []
    ),
    "content: expected a mapping, as to_dict gives, got list": lambda: FunctionGraph.from_dict([]),
    "names: expected strings, ints or tuples of such, got 0.5": lambda: FunctionGraph(
        1, [[0]], names=[0.5, "u"]
    ).to_dict(),
}


@pytest.mark.parametrize("message", STRUCTURE)
def test_structure(message):
    assert complaint(ValueError, STRUCTURE[message]) == message


@pytest.mark.parametrize("message", BUILDERS)
def test_builders(message):
    assert complaint(ValueError, BUILDERS[message]) == message


@pytest.mark.parametrize("message", TYPES)
def test_types(message):
    assert complaint(TypeError, TYPES[message]) == message


@given(st.integers(2, 30), st.integers(0, 10**6), st.integers(1, 4))
def test_the_cycle_that_is_named_is_one(num_nodes, seed, in_degree):
    rng = np.random.default_rng(seed)
    in_degree = min(in_degree, num_nodes)
    lists = [rng.choice(num_nodes + 1, in_degree, replace=False).tolist() for _ in range(num_nodes)]
    try:
        FunctionGraph(1, lists)
    except ValueError as error:
        message = str(error)
    else:
        message = ""
    assume("cycle " in message and "..." not in message)
    path = [int(number) for number in re.findall(r"node (\d+)", message)]
    assert path[0] == path[-1] and len(set(path)) == len(path) - 1
    for parent, node in pairwise(path):
        assert parent in lists[node - 1]


def test_a_long_cycle_is_cut():
    ring = np.arange(100)
    message = complaint(ValueError, lambda: FunctionGraph(1, np.roll(ring, 1)[:, None] + 1))
    names = re.findall(r"node \d+", message)
    assert len(names) == 12 and names[0] == names[-1] and "... (100 nodes in all) ..." in message


@pytest.mark.parametrize(
    "name, call",
    [
        ("networkx", lambda: FunctionGraph.tree(4).to_networkx()),
        ("sympy", lambda: FunctionGraph.from_sympy(X)),
        ("matplotlib", lambda: FunctionGraph.tree(4).draw()),
    ],
)
def test_a_missing_library_is_named(name, call, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    assert complaint(ImportError, call) == f"{name} is needed here: pip install compsparse_kernels[graphs]"
