"""Builders of FunctionGraph: what they compute equals what they are built from, exactly (integers in float64)."""

import itertools

import numpy as np
import pytest
import sympy
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from compsparse_kernels import BlockLayout, FunctionGraph


def evaluate(graph, function, inputs):
    """Values of the sinks; ``function(node, arguments)`` has 0 for arguments that a node leaves out."""
    values = list(inputs)
    values += [None] * graph.num_nodes
    ptr, _, position, arity = graph.parents
    for vertex in np.concatenate(graph.levels[1:]):
        node = vertex - graph.num_sources
        arguments = [0] * arity[node]
        for place, parent in zip(position[ptr[node] : ptr[node + 1]], graph.parents_of(vertex), strict=True):
            arguments[place] = values[parent]
        values[vertex] = function(node, arguments)
    return [values[sink] for sink in graph.sinks]


def linear(weights_of_share):
    """Node function with one row of weights for each of the graph's shared weights."""
    return lambda graph: (
        lambda node, arguments: sum(
            float(weight) * argument
            for weight, argument in zip(weights_of_share[graph.share[node]], arguments, strict=True)
        )
    )


def ancestors(graph, vertex):
    """Sources that reach a vertex."""
    if vertex < graph.num_sources:
        return {int(vertex)}
    return set().union(*(ancestors(graph, parent) for parent in graph.parents_of(vertex)))


def integers(*shape, seed=0):
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).double()


# ---- trees, butterflies, bands


@given(st.integers(2, 60), st.integers(2, 5), st.sampled_from([None, "level", "all"]))
def test_tree(n_inputs, arity, share):
    graph = FunctionGraph.tree(n_inputs, arity, share)
    assert evaluate(graph, lambda node, arguments: sum(arguments), np.eye(n_inputs))[0].tolist() == [1] * n_inputs
    assert graph.num_sinks == 1 and graph.num_edges == n_inputs + graph.num_nodes - 1
    for below, level in itertools.pairwise(graph.levels):
        degrees = graph.in_degrees[level - n_inputs]
        assert len(level) == -(-len(below) // arity) and set(degrees[:-1]) <= {arity} and degrees[-1] <= arity
    assert graph.num_weights == {None: graph.num_nodes, "level": graph.num_levels, "all": 1}[share]


@given(st.integers(1, 6))
def test_every_output_of_a_butterfly_reads_every_input(log_n):
    n = 1 << log_n
    graph = FunctionGraph.butterfly(n)
    sums = np.array(evaluate(graph, lambda node, arguments: sum(arguments), np.eye(n)))
    np.testing.assert_array_equal(sums, np.ones((n, n)))  # each input by exactly one path
    assert graph.num_levels == log_n and graph.num_edges == 2 * n * log_n
    assert set(graph.level[graph.sinks]) == {log_n} and graph.num_sinks == n


@given(st.integers(1, 12), st.integers(1, 3), st.integers(0, 14))
def test_banded(width, depth, bandwidth):
    graph = FunctionGraph.banded(width, depth, bandwidth)
    band = np.abs(np.subtract.outer(np.arange(width), np.arange(width))) <= bandwidth
    for level in range(1, depth + 1):
        np.testing.assert_array_equal(graph.level_mask(level, "read"), band)
    assert graph.num_weights == graph.num_nodes == width * depth


# ---- random graphs


@given(st.integers(1, 9), st.integers(1, 60), st.integers(1, 5), st.data())
def test_random(n_inputs, n_nodes, in_degree, data):
    n_outputs = data.draw(st.integers(1, n_nodes))
    skip = data.draw(st.sampled_from([0, 0.3, 1]))
    seed = data.draw(st.integers(0, 1000))
    graph = FunctionGraph.random(n_inputs, n_nodes, in_degree, n_outputs, seed, skip)
    assert (graph.num_sources, graph.num_nodes, graph.num_sinks) == (n_inputs, n_nodes, n_outputs)
    assert graph.sinks.tolist() == list(range(graph.num_vertices - n_outputs, graph.num_vertices))
    for level, vertices in enumerate(graph.levels[1:], start=1):
        assert len(vertices) <= max(n_inputs, n_outputs)
        before = len(graph.levels[level - 1])
        room = before if skip == 0 else sum(map(len, graph.levels[:level]))
        for vertex in vertices:
            parents = graph.parents_of(vertex)
            assert len(parents) == min(in_degree, room)
            assert skip > 0 or set(graph.level[parents]) == {level - 1}
    assert graph == FunctionGraph.random(n_inputs, n_nodes, in_degree, n_outputs, seed, skip)


def test_random_graphs_differ_and_skip_as_often_as_told():
    graphs = [FunctionGraph.random(50, 2000, 5, 10, seed=seed, skip=0.3) for seed in (0, 1)]
    assert graphs[0] != graphs[1]
    for graph in graphs:
        later = np.flatnonzero(graph.level[graph.num_sources :] > 1)  # level 1 has nothing to skip
        edges = np.concatenate([graph.level[node + 50] - graph.level[graph.parents_of(node + 50)] for node in later])
        share = (edges > 1).mean() / (4 / 5)  # one edge of each five never skips
        assert abs(share - 0.3) < 0.05  # 10 standard deviations


def test_random_sources_are_drawn_evenly():
    """Each pair of sources is as likely as any other: 2000 nodes on one level, 45 pairs, 44 degrees of freedom."""
    graph = FunctionGraph.random(10, 2000, 2, n_outputs=2000, skip=0)
    pairs = np.sort(graph.parents.idx.reshape(-1, 2), axis=1)
    counts = np.bincount(pairs[:, 0] * 10 + pairs[:, 1], minlength=100)
    counts = counts[np.triu(np.ones((10, 10), bool), 1).reshape(-1)]
    assert counts.sum() == 2000
    assert ((counts - 2000 / 45) ** 2 / (2000 / 45)).sum() < 100  # p = 3e-6


# ---- convolutions


@st.composite
def conv_settings(draw, axes, depth):
    """Kernel, stride, padding, dilation for each level, and a size on which all windows fit."""
    levels = []
    for _ in range(depth):
        kernel = [draw(st.integers(1, 3)) for _ in range(axes)]
        dilation = [draw(st.integers(1, 2)) if size > 1 else 1 for size in kernel]
        padding = [draw(st.integers(0, size - 1)) for size in kernel]
        stride = [draw(st.integers(1, 3)) for _ in range(axes)]
        levels.append([tuple(values) for values in (kernel, stride, padding, dilation)])
    sizes = [1] * axes
    for kernel, stride, padding, dilation in reversed(levels):
        for axis in range(axes):
            window = dilation[axis] * (kernel[axis] - 1) + 1
            # At least the window, so that no padding hides all of it.
            sizes[axis] = max(window, (sizes[axis] - 1) * stride[axis] + window - 2 * padding[axis])
    sizes = tuple(size + draw(st.integers(0, 3)) for size in sizes)
    return sizes, [list(values) for values in zip(*levels, strict=True)]


def conv_tower(x, weights, stride, padding, dilation):
    function = {3: F.conv1d, 4: F.conv2d}[x.dim()]
    for weight, *settings in zip(weights, stride, padding, dilation, strict=True):
        x = function(x, weight, None, *settings)
    return x


@pytest.mark.parametrize("depth", [1, 2, 3])
@given(st.data())
def test_conv1d_is_a_convolution(depth, data):
    (length,), settings = data.draw(conv_settings(1, depth))
    kernel, stride, padding, dilation = ([value[0] for value in values] for values in settings)
    graph = FunctionGraph.conv1d(length, kernel, stride, padding, dilation)
    weights = [integers(1, 1, size, seed=level) for level, size in enumerate(kernel)]
    x = integers(4, 1, length, seed=9)
    expected = conv_tower(x, weights, stride, padding, dilation)[:, 0]
    function = linear([weight.flatten() for weight in weights])(graph)
    outputs = evaluate(graph, function, x[:, 0].T)
    assert graph.num_weights == graph.num_levels == depth
    assert torch.equal(torch.stack(outputs, dim=1), expected)


@pytest.mark.parametrize("depth", [1, 2])
@given(st.data())
def test_conv2d_is_a_convolution(depth, data):
    shape, (kernel, stride, padding, dilation) = data.draw(conv_settings(2, depth))
    graph = FunctionGraph.conv2d(shape, kernel, stride, padding, dilation)
    weights = [integers(1, 1, *size, seed=level) for level, size in enumerate(kernel)]
    x = integers(3, 1, *shape, seed=9)
    expected = conv_tower(x, weights, stride, padding, dilation).flatten(1)
    outputs = evaluate(graph, linear([weight.flatten() for weight in weights])(graph), x.flatten(1).T)
    assert torch.equal(torch.stack(outputs, dim=1), expected)


def test_receptive_field():
    """Five levels of kernel 3 see 11 places, as the gradient of torch's convolutions says."""
    graph = FunctionGraph.conv1d(32, kernel=3, padding=1, depth=5)
    x = torch.ones(1, 1, 32, requires_grad=True)
    y = conv_tower(x, [torch.ones(1, 1, 3)] * 5, [1] * 5, [1] * 5, [1] * 5)
    for sink, output in zip(graph.sinks, y[0, 0], strict=True):
        (gradient,) = torch.autograd.grad(output, x, retain_graph=True)
        assert ancestors(graph, sink) == set(gradient.flatten().nonzero().flatten().tolist())


def test_what_no_window_reads_is_left_out():
    graph = FunctionGraph.conv1d(8, kernel=[1, 2], stride=[1, 3])
    assert graph.num_sinks == 3 and set(graph.level[graph.sinks]) == {2}
    assert [graph.parents_of(node).tolist() for node in graph.levels[1]] == [[0], [1], [3], [4], [6], [7]]


def test_locally_connected():
    shared = FunctionGraph.conv2d((5, 5), kernel=(3, 2), padding=(1, 0))
    own = FunctionGraph.conv2d((5, 5), kernel=(3, 2), padding=(1, 0), shared=False)
    assert own != shared and own.num_weights == own.num_nodes
    np.testing.assert_array_equal(own.parents.idx, shared.parents.idx)
    assert own.parents.arity.tolist() == own.in_degrees.tolist()


def test_depth_repeats_a_level():
    assert FunctionGraph.conv1d(20, 3, depth=3) == FunctionGraph.conv1d(20, [3, 3, 3])
    assert FunctionGraph.conv2d((9, 9), (3, 1), stride=[1, 2]) == FunctionGraph.conv2d(
        (9, 9), [(3, 1)] * 2, [1, (2, 2)]
    )


def test_a_padded_convolution_is_a_block_layout_with_shared_slots():
    graph = FunctionGraph.conv1d(9, kernel=3, padding=1, dilation=1)
    edges = graph.level_edges(1)
    rows, columns, slot = (torch.from_numpy(part) for part in (edges.rows, edges.cols, edges.slot))
    layout = BlockLayout.from_entries(rows, columns, (1, 1), out_features=9, in_features=9, slot=slot)
    weight, x = integers(3), integers(5, 9, seed=1)
    dense = layout.unpack(weight.reshape(3, 1, 1))
    assert torch.equal(x @ dense.T, F.conv1d(x[:, None], weight[None, None], padding=1)[:, 0])


MODULES = {
    "conv1d": (lambda: torch.nn.Conv1d(3, 4, 3, stride=2, padding=1, dilation=2), (3, 9)),
    "conv2d": (lambda: torch.nn.Conv2d(2, 3, (3, 2), padding=(1, 0)), (2, 4, 5)),
    "groups": (lambda: torch.nn.Conv1d(4, 6, 3, groups=2), (4, 6)),
    "depthwise": (lambda: torch.nn.Conv2d(3, 3, 3, padding=1, groups=3), (3, 4, 4)),
    "same": (lambda: torch.nn.Conv1d(1, 2, 4, padding="same"), (1, 7)),
    "valid": (lambda: torch.nn.Conv1d(1, 2, 4, padding="valid", bias=False), (1, 7)),
    "tower": (
        lambda: torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3, padding=1), torch.nn.Conv2d(2, 3, 2, stride=3)),
        (1, 4, 7),
    ),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", MODULES)
def test_from_conv_computes_what_the_modules_compute(name):
    make, input_shape = MODULES[name]
    module = make().double()
    layers = module if isinstance(module, torch.nn.Sequential) else [module]
    rows, biases = [], []
    for number, layer in enumerate(layers):
        layer.weight.data = integers(*layer.weight.shape, seed=number)
        if layer.bias is not None:
            layer.bias.data = integers(layer.out_channels, seed=number + 5)
        rows += list(layer.weight.detach().flatten(1))
        biases += [0.0] * layer.out_channels if layer.bias is None else layer.bias.tolist()
    graph = FunctionGraph.from_conv(module, input_shape)
    products = linear(rows)(graph)
    x = integers(2, *input_shape, seed=11)
    outputs = evaluate(
        graph, lambda node, arguments: products(node, arguments) + biases[graph.share[node]], x.flatten(1).T
    )
    assert graph.num_weights == len(rows)
    assert torch.equal(torch.stack(outputs, dim=1), module(x).detach().flatten(1))


# ---- formulas

X, Y, Z = SYMBOLS = sympy.symbols("x y z")
FORMULAS = {
    "polynomial": [3 * X**2 * Y + 2 * X * Y - Z + 5],
    "functions": [sympy.sin(X * Y) + sympy.exp(sympy.cos(X * Y) - Z) / (1 + X**2)],
    "many outputs": [X + Y + Z, (X + Y + Z) ** 2, sympy.sqrt(X + Y + Z) * X],
    "quotients": [X / Y - Y / X, X / (Y * Z) + sympy.pi * X],
    "more arguments": [sympy.Max(X, Y, Z / 2) + sympy.atan2(Y, X) ** sympy.Rational(3, 2)],
    "a symbol, and twice the same": [X, X * Y, X * Y, Y],
    "powers of powers": [(X**Y) ** Z + X**Z],
}


@pytest.mark.parametrize("name", FORMULAS)
def test_a_formula_and_its_graph_have_the_same_value(name):
    formulas = FORMULAS[name]
    graph = FunctionGraph.from_sympy(formulas, symbols=SYMBOLS)
    letters = sympy.symbols("a b c d e")
    inputs = dict(zip(SYMBOLS, map(sympy.Rational, ("3/7", "11/5", "13/10")), strict=True))

    def function(node, arguments):
        label = sympy.sympify(graph.labels[node], locals={letter.name: letter for letter in letters})
        assert label.free_symbols == set(letters[: len(arguments)])
        return label.subs(dict(zip(letters, arguments, strict=False)), simultaneous=True).evalf(30)

    values = evaluate(graph, function, inputs.values())
    assert graph.num_sinks == len(formulas)
    for value, formula in zip(values, formulas, strict=True):
        assert abs(value - formula.evalf(30, subs=inputs)) < 1e-25


def test_common_subexpressions_are_there_once():
    graph = FunctionGraph.from_sympy([sympy.sin(X + Y) * Z + sympy.cos(X + Y), (X + Y) ** 2])
    assert sorted(graph.labels) == ["a + b", "a + b", "a**2", "a*b", "cos(a)", "sin(a)"]
    assert (graph.names[:3], graph.effective_dimension) == (("x", "y", "z"), 2)
    assert graph.sinks.tolist() == [graph.num_sources + graph.labels.index("a + b", 1), graph.labels.index("a**2") + 3]


def test_part_of_a_sum_may_be_common():
    graph = FunctionGraph.from_sympy([X + Y + Z, X + Y])
    assert graph.num_nodes == 2 and graph.in_degrees.tolist() == [2, 2]


def test_symbols_set_the_order_of_the_sources():
    graph = FunctionGraph.from_sympy(X - Y, symbols=[Z, Y, X])
    assert graph.names[:3] == ("z", "y", "x")


def test_more_than_26_arguments():
    many = sympy.symbols("x:30")
    graph = FunctionGraph.from_sympy(sympy.Add(*many))
    assert graph.in_degrees.tolist() == [30]
    label = sympy.sympify(graph.labels[0])
    assert len(label.free_symbols) == 30


# ---- circuits

GATES = {
    "AND": lambda a, b: a & b,
    "OR": lambda a, b: a | b,
    "XOR": lambda a, b: a ^ b,
    "NAND": lambda a, b: 1 - (a & b),
    "NOR": lambda a, b: 1 - (a | b),
    "XNOR": lambda a, b: 1 - (a ^ b),
    "NOT": lambda a: 1 - a,
    "BUF": lambda a: a,
}


def run_circuit(graph, bits):
    return evaluate(graph, lambda node, arguments: GATES[graph.labels[node]](*arguments), bits)


def ripple_adder(bits):
    gates, carry = {}, None
    for bit in range(bits):
        a, b = f"a{bit}", f"b{bit}"
        half, both = ("sum0", "carry0") if carry is None else (f"half{bit}", f"both{bit}")
        gates[half], gates[both] = ("XOR", a, b), ("AND", a, b)
        if carry is not None:
            gates[f"sum{bit}"] = ("XOR", half, carry)
            gates[f"ripple{bit}"] = ("AND", half, carry)
            gates[f"carry{bit}"] = ("OR", both, f"ripple{bit}")
        carry = f"carry{bit}"
    return gates


def test_an_adder_adds():
    bits = 3
    inputs = [f"{number}{bit}" for number in "ab" for bit in range(bits)]
    outputs = [f"sum{bit}" for bit in range(bits)] + [f"carry{bits - 1}"]
    graph = FunctionGraph.from_circuit(ripple_adder(bits), inputs=inputs, outputs=outputs)
    assert graph.effective_dimension == 2
    for a, b in itertools.product(range(1 << bits), repeat=2):
        read = run_circuit(graph, [number >> bit & 1 for number in (a, b) for bit in range(bits)])
        assert sum(value << bit for bit, value in enumerate(read)) == a + b


@given(st.data())
def test_random_circuits(data):
    """Every truth table, against the gates evaluated by name; the order in which gates are listed is of no concern."""
    gates, names = {}, ["x", "y", "z"]
    for number in range(data.draw(st.integers(1, 8))):
        gate = data.draw(st.sampled_from(sorted(GATES)))
        fan_in = 1 if gate in ("NOT", "BUF") else 2
        operands = data.draw(st.lists(st.sampled_from(names), min_size=fan_in, max_size=fan_in, unique=True))
        gates[f"g{number}"] = (gate, *operands)
        names.append(f"g{number}")
    shuffled = dict(data.draw(st.permutations(list(gates.items()))))
    graph = FunctionGraph.from_circuit(shuffled, inputs=["x", "y", "z"])
    for bits in itertools.product((0, 1), repeat=3):
        value = dict(zip("xyz", bits, strict=True))
        for name, (gate, *operands) in gates.items():
            value[name] = GATES[gate](*(value[operand] for operand in operands))
        assert run_circuit(graph, bits) == [value[graph.names[sink]] for sink in graph.sinks]
    assert [graph.labels[graph.index(name) - 3] for name in gates] == [gate for gate, *_ in gates.values()]
