"""Convolutions are networks on a graph with shared weights; a locally connected layer is its dense Toeplitz matrix."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compsparse_kernels import DAGLayout, FunctionGraph, dag_network
from compsparse_kernels.testing import DTYPES, assert_within_budget, random_tensor
from python_tests.test_dag_network import ACTIVATIONS, output_and_gradients

BATCH = 5


def assert_equal(ours, dense, shapes, dtype, activation):
    """Output and gradients of functions of (act, x, weight, bias, weight, bias, ...) within the error budget."""
    act = ACTIVATIONS[activation]
    inputs = [random_tensor(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate(shapes)]
    with torch.no_grad():
        grad = random_tensor(*dense(act, *inputs).shape, dtype=dtype, seed=100)
    results = output_and_gradients(lambda *each: ours(activation, *each), inputs, grad, dtype)
    peers, exact = (output_and_gradients(lambda *each: dense(act, *each), inputs, grad, d) for d in DTYPES)
    absolute = [tensor.abs() for tensor in inputs]
    sizes = output_and_gradients(lambda *each: dense(ACTIVATIONS[None], *each), absolute, grad.abs(), torch.float64)
    for number, (result, *others) in enumerate(zip(results, peers, exact, sizes, strict=True)):
        name = f"gradient of input {number - 1}" if number else "output"
        assert_within_budget(result, *others[:2], name, magnitude=others[2])


def tower(convolution, layers):
    """Convolutions with the activation between them, as functions of (act, x, weight, bias, weight, bias, ...)."""

    def function(act, x, *parameters):
        for number, (weight, bias) in enumerate(zip(parameters[::2], parameters[1::2], strict=True)):
            x = convolution(act(x) if number else x, weight, bias, **layers[number])
        return x

    return function


TOWERS = [
    ("conv1d", (17,), {"kernel": [3, 3]}),
    ("conv1d", (16,), {"kernel": [4, 3, 3], "stride": [2, 1, 1], "padding": [2, 1, 0]}),
    ("conv1d", (19,), {"kernel": [3, 2], "dilation": [2, 3], "padding": [2, 1]}),
    ("conv1d", (12,), {"kernel": [5], "padding": [4]}),
    ("conv2d", (7, 6), {"kernel": [(3, 2), (2, 3)]}),
    (
        "conv2d",
        (6, 7),
        {"kernel": [(3, 3), (3, 3)], "padding": [(1, 1), (1, 2)], "stride": [(1, 2), (2, 1)]},
    ),
    ("conv2d", (7, 8), {"kernel": [(2, 3)], "dilation": [(2, 1)], "padding": [(1, 0)]}),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [(1, 4, 1), (3, 8, 5)], ids=str)
@pytest.mark.parametrize("build, size, settings", TOWERS, ids=str)
def test_a_tower_of_convolutions(build, size, settings, channels, dtype):
    """Channels are the width of the network; one kernel of weights for each level."""
    graph = getattr(FunctionGraph, build)(size[0] if len(size) == 1 else size, **settings)
    depth = len(settings["kernel"])
    sizes = [channels[0], *[channels[1]] * (depth - 1), channels[2]]
    layout = DAGLayout(graph, channels[1], in_channels=channels[0], out_channels=channels[2])
    assert len(layout.kinds) == depth and all(kind.num_weights == 1 for kind in layout.kinds)

    def ours(activation, x, *parameters):
        positions = x.flatten(2).mT.flatten(1)  # [batch, positions * channels]
        # [out, in, *taps] as [1, out, taps * in]: a node's parents are the taps, their channels lie together
        weights = [weight.flatten(2).mT.flatten(1)[None] for weight in parameters[::2]]
        y = dag_network(positions, weights, layout, [bias[None] for bias in parameters[1::2]], activation)
        return y.unflatten(1, (graph.num_sinks, channels[2])).mT

    def dense(act, x, *parameters):
        layers = [
            {name: values[level] for name, values in settings.items() if name != "kernel"} for level in range(depth)
        ]
        return tower(getattr(F, build), layers)(act, x, *parameters).flatten(2)

    shapes = [(BATCH, channels[0], *size)]
    for (before, after), kernel in zip(itertools.pairwise(sizes), settings["kernel"], strict=True):
        shapes += [(after, before, *(kernel if isinstance(kernel, tuple) else (kernel,))), (after,)]
    for activation in ("gelu", None):
        assert_equal(ours, dense, shapes, dtype, activation)


MODULES = [
    ([nn.Conv1d(4, 6, 3, groups=2, padding=1)], (4, 9)),
    ([nn.Conv1d(2, 4, 3, padding="same"), nn.Conv1d(4, 8, 2, stride=2, groups=4)], (2, 9)),
    ([nn.Conv2d(2, 4, 3, padding=1, stride=2), nn.Conv2d(4, 4, 2, groups=2, dilation=(1, 2))], (2, 6, 7)),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("modules, input_shape", MODULES, ids=lambda value: str(value)[:60])
def test_the_graph_of_convolution_modules(modules, input_shape, dtype):
    """One node for each channel and position, groups included; the rows of ``weight.flatten(1)`` are its weights."""
    graph = FunctionGraph.from_conv(modules, input_shape)
    layout = DAGLayout(graph, width=1)
    levels = [[name for name in graph.share_names if name.startswith(f"level {n + 1}")] for n in range(len(modules))]
    rows = {}  # (kind, number of weights) -> (level, channel)
    for level, names in enumerate(levels):
        for channel, name in enumerate(names):
            part = layout.parts[graph.shares[name][0] - graph.num_sources, 0]
            rows[tuple(layout.nodes[part, :2].tolist())] = (level, channel)

    def gathered(tensors):
        return [
            torch.stack([tensors[level][channel].flatten() for level, channel in map(rows.get, numbers)])
            for numbers in ([(k, w) for w in range(kind.num_weights)] for k, kind in enumerate(layout.kinds))
        ]

    def ours(activation, x, *parameters):
        weights = [weight[:, None] for weight in gathered(parameters[::2])]
        return dag_network(x.flatten(1), weights, layout, gathered(parameters[1::2]), activation)

    def dense(act, x, *parameters):
        names = ("stride", "padding", "dilation", "groups")
        layers = [{name: getattr(module, name) for name in names} for module in modules]
        return tower(F.conv1d if len(input_shape) == 2 else F.conv2d, layers)(act, x, *parameters).flatten(1)

    shapes = [(BATCH, *input_shape), *(tensor.shape for module in modules for tensor in (module.weight, module.bias))]
    for activation in ("silu", None):
        assert_equal(ours, dense, shapes, dtype, activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 6])
def test_a_locally_connected_layer_is_its_dense_matrix(channels, dtype):
    """Without sharing: block row i of the matrix has the weights of node i at its window, and zeros elsewhere."""
    length, kernel, stride = 14, 3, 2
    graph = FunctionGraph.conv1d(length, kernel, stride, shared=False)
    layout = DAGLayout(graph, 1, in_channels=channels, out_channels=channels)
    nodes = graph.num_nodes
    assert [(kind.num_weights, kind.fan_in) for kind in layout.kinds] == [(nodes, kernel * channels)]

    def ours(activation, x, weight, bias):
        return dag_network(x, [weight], layout, [bias], activation)

    def dense(act, x, weight, bias):
        before = [stride * i * channels for i in range(nodes)]
        rows = [
            F.pad(w, (start, (length - kernel) * channels - start)) for w, start in zip(weight, before, strict=True)
        ]
        return F.linear(x, torch.cat(rows), bias.flatten())

    shapes = [(BATCH, length * channels), *layout.weight_shapes, *layout.bias_shapes]
    assert_equal(ours, dense, shapes, dtype, None)


def test_a_locally_connected_layer_with_equal_weights_is_the_convolution():
    shared = FunctionGraph.conv1d(10, kernel=3, padding=1)
    local = FunctionGraph.conv1d(10, kernel=3, padding=1, shared=False)
    x, weight = random_tensor(BATCH, 10), random_tensor(3)
    y = dag_network(x, [weight.view(1, 1, 3)], DAGLayout(shared, 1))
    inner, border = torch.stack([weight] * 8)[:, None], torch.stack((weight[1:], weight[:2]))[:, None]
    layout = DAGLayout(local, 1)
    weights = [{3: inner, 2: border}[kind.fan_in] for kind in layout.kinds]
    torch.testing.assert_close(dag_network(x, weights, layout), y)
    torch.testing.assert_close(y, F.conv1d(x[:, None], weight.view(1, 1, 3), padding=1)[:, 0])
