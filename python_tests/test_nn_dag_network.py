"""DAGNetwork: shapes, initialisation, parameters of one node, circuits, and a module among modules."""

import copy
import io
import itertools
import pickle
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compsparse_kernels import DAGNetwork, FunctionGraph, SparseDAGLinear
from compsparse_kernels.graphs.circuits import FAN_IN
from compsparse_kernels.nn.circuits import TRUTH
from compsparse_kernels.testing import dag_node_by_node

READ_SINKS = FunctionGraph(3, [[0, 1], [3, 2], [3, 4]], sinks=[5, 3])


def tree(**options):
    return DAGNetwork(FunctionGraph.tree(8), 6, **options)


def everything(**options):
    """Outputs that are read, hidden units, channels on both sides."""
    return DAGNetwork(READ_SINKS, 4, 5, "silu", in_channels=2, out_channels=3, **options)


def convolution(**options):
    graph = FunctionGraph.conv1d(9, kernel=3, padding=1, depth=2)
    return DAGNetwork(graph, 4, activation="relu", out_channels=2, bias=False, **options)


every_network = pytest.mark.parametrize("make", [tree, everything, convolution], ids=lambda f: f.__name__)


def input_of(net, *lead, dtype=torch.float32, seed=0):
    channels = [net.layout.in_channels] if net.layout.in_channels > 1 else []
    shape = (*lead, net.graph.num_sources, *channels)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---- values


@every_network
@pytest.mark.parametrize("lead", [(7,), (), (2, 3), (0,)], ids=str)
def test_channels_have_an_axis_where_there_are_several(make, lead):
    net = make(dtype=torch.float64)
    layout = net.layout
    act = {"gelu": F.gelu, "silu": F.silu, "relu": F.relu}[net.activation]
    x = input_of(net, *lead, dtype=torch.float64)
    y = net(x)
    channels = [layout.out_channels] if layout.out_channels > 1 else []
    assert y.shape == (*lead, net.graph.num_sinks, *channels)
    expected = dag_node_by_node(x.reshape(-1, layout.in_features), net.weights, layout, net.biases, act)
    torch.testing.assert_close(y.reshape(expected.shape), expected)


@every_network
def test_every_parameter_learns(make):
    net = make()
    net(input_of(net, 50)).square().sum().backward()
    assert all(parameter.grad.abs().amax() > 0 for parameter in net.parameters())


def test_a_stack_of_levels_is_the_network():
    """Where each level reads the one before only, SparseDAGLinear does the same, level by level."""
    graph, width = FunctionGraph.banded(6, depth=3, bandwidth=1), 4
    net = DAGNetwork(graph, width, activation="relu", in_channels=width, out_channels=width)
    layers = []
    for number in range(1, graph.num_levels + 1):
        level = graph.level_edges(number)
        activation = "relu" if number < graph.num_levels else None
        layer = SparseDAGLinear(len(level.columns) * width, len(level.nodes) * width, level, activation=activation)
        dense = torch.zeros(layer.out_features, layer.in_features)
        for row, node in enumerate(level.nodes.tolist()):
            weight, bias = net.constituent(node).first
            columns = np.searchsorted(level.columns, graph.parents_of(node))
            for place, column in enumerate(columns):
                block = weight[:, place * width : (place + 1) * width].detach()
                dense[row * width : (row + 1) * width, column * width : (column + 1) * width] = block
            with torch.no_grad():
                layer.bias[row * width : (row + 1) * width] = bias
        layer.load_state_dict({"weight": dense, "bias": layer.bias})
        layers.append(layer)
    x = input_of(net, 7)
    torch.testing.assert_close(nn.Sequential(*layers)(x.flatten(1)), net(x).flatten(1))


# ---- initialisation


@every_network
def test_initialisation_uses_what_a_node_really_reads(make):
    net = make()
    layout, drawn = net.layout, {}
    for i, (kind, number, *_) in enumerate(layout.nodes.tolist()):
        begin, end = layout.edge_ptr[i : i + 2].tolist()
        drawn.setdefault((kind, number), []).append(layout.edges[begin:end, 1].sum().item() ** -0.5)
    for (kind, number), bounds in drawn.items():
        parameters = [net.weights[kind][number], *([] if net.biases is None else [net.biases[kind][number]])]
        bound = sum(bounds) / len(bounds)
        assert all(parameter.abs().max() <= bound * 1.0001 for parameter in parameters)
        assert net.weights[kind][number].abs().max() > 0.3 * bound or net.weights[kind][number].numel() < 6


def test_initialisation_of_a_node_that_reads_everything_is_that_of_linear():
    torch.manual_seed(0)
    net = DAGNetwork(FunctionGraph(300, [list(range(300))]), out_channels=200)
    expected = nn.Linear(300, 200)
    for ours, theirs in ((net.weights[0], expected.weight), (net.biases[0], expected.bias)):
        torch.testing.assert_close(ours.std(), theirs.std(), rtol=0.15, atol=0)
        assert ours.abs().max() <= 300**-0.5
    net.load_state_dict({"weights.0": expected.weight[None], "biases.0": expected.bias[None]})
    x = torch.randn(5, 300)
    torch.testing.assert_close(net(x)[:, 0], expected(x))


def test_nodes_that_share_weights_average_their_bounds():
    graph = FunctionGraph.conv1d(4, kernel=3, padding=1)  # reads 2, 3, 3, 2 channels
    torch.manual_seed(0)
    largest = max(DAGNetwork(graph).weights[0].abs().max().item() for _ in range(50))
    bound = (2**-0.5 + 3**-0.5) / 2
    assert 0.95 * bound < largest <= bound


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_dtype_of_the_parameters(dtype):
    net = tree(dtype=dtype)
    assert all(parameter.dtype == dtype and parameter.isfinite().all() for parameter in net.parameters())


def test_100_000_nodes():
    """Goal: under a second, which the printed time shows; the bound is for a busy machine."""
    graph = FunctionGraph.random(n_inputs=1000, n_nodes=100_000, in_degree=3)
    begin = time.perf_counter()
    DAGNetwork(graph, 4, hidden=3)
    seconds = time.perf_counter() - begin
    print(f"{seconds:.2f} s")
    assert seconds < 10


# ---- the parameters of one node


def test_constituents():
    net = everything()
    first, second, readout = net.constituent(3)
    assert (first.weight.shape, second.weight.shape, readout.weight.shape) == ((5, 4), (4, 5), (3, 4))
    assert (first.bias.shape, second.bias.shape, readout.bias.shape) == ((5,), (4,), (3,))
    assert net.constituent(5).readout is None and net.constituent(5).second.weight.shape == (3, 5)
    assert tree().constituent(8).second is None
    assert convolution().constituent(9).first.bias is None
    # By hand, the output that nobody else reads, then the one that is read.
    x = input_of(net, 2)
    value = {v: x[:, v] for v in range(3)}
    for node in (3, 4, 5):
        first, second, _ = net.constituent(node)
        read = torch.cat([value[v] for v in READ_SINKS.parents_of(node).tolist()], 1)
        value[node] = F.linear(F.silu(F.linear(read, *first)), *second)
    expected = torch.stack((value[5], F.linear(value[3], *net.constituent(3).readout)), 1)
    torch.testing.assert_close(net(x), expected)


def test_constituents_are_views():
    graph = FunctionGraph.from_edges([("a", "f"), ("b", "f"), ("f", "g"), ("a", "g")])
    net = DAGNetwork(graph, 4)
    x = torch.ones(2)
    for layer in (net.constituent("f").first, net.constituent(graph.index("g")).first):
        nn.init.ones_(layer.weight)
        nn.init.zeros_(layer.bias)
    assert torch.allclose(net(x), 4 * F.gelu(torch.tensor(2.0)) + 1)
    net.constituent("g").first.weight.square().sum().backward()  # such as a penalty on one node
    assert net.weights[1].grad.any() and net.weights[0].grad is None


def test_shared_constituents_are_the_same():
    net = convolution()
    pointers = {net.constituent(node).first.weight.data_ptr() for node in net.graph.levels[1]}
    assert len(pointers) == 1


# ---- circuits


def bits(count):
    """All of them, the first varying slowest."""
    return torch.tensor(list(itertools.product((0.0, 1.0), repeat=count)))


def python_gate(name, a, b=None):
    return {
        "AND": lambda: a and b,
        "OR": lambda: a or b,
        "XOR": lambda: a != b,
        "NAND": lambda: not (a and b),
        "NOR": lambda: not (a or b),
        "XNOR": lambda: a == b,
        "NOT": lambda: not a,
        "BUF": lambda: a,
    }[name]()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("gate", FAN_IN)
def test_every_gate(gate, dtype):
    assert set(TRUTH) == set(FAN_IN)
    operands = ("a", "b")[: FAN_IN[gate]]
    net = DAGNetwork.from_circuit(FunctionGraph.from_circuit({"out": (gate, *operands)}), dtype=dtype)
    x = bits(len(operands)).to(dtype)
    assert net(x)[:, 0].tolist() == [float(python_gate(gate, *map(bool, row))) for row in x.tolist()]


def ripple_adder(width):
    """Sum of two numbers of ``width`` bits, lowest first."""
    gates = {"s0": ("XOR", "a0", "b0"), "c0": ("AND", "a0", "b0")}
    for i in range(1, width):
        gates[f"p{i}"] = ("XOR", f"a{i}", f"b{i}")
        gates[f"s{i}"] = ("XOR", f"p{i}", f"c{i - 1}")
        gates[f"g{i}"] = ("AND", f"a{i}", f"b{i}")
        gates[f"t{i}"] = ("AND", f"p{i}", f"c{i - 1}")
        gates[f"c{i}"] = ("OR", f"g{i}", f"t{i}")
    inputs = [f"{name}{i}" for name in "ab" for i in range(width)]
    return FunctionGraph.from_circuit(gates, inputs, [*(f"s{i}" for i in range(width)), f"c{width - 1}"])


def test_a_6_bit_adder():
    net = DAGNetwork.from_circuit(ripple_adder(6))
    x = bits(12)
    assert len(x) == 4096
    powers = 2.0 ** torch.arange(7)
    total = x[:, :6] @ powers[:6] + x[:, 6:] @ powers[:6]
    y = net(x)
    assert ((y - y.round()).abs() <= 1e-6).all() and torch.equal(y.round() @ powers, total)


def test_8_bit_parity():
    gates = {"p1": ("XOR", "x0", "x1")} | {f"p{i}": ("XOR", f"p{i - 1}", f"x{i}") for i in range(2, 8)}
    net = DAGNetwork.from_circuit(FunctionGraph.from_circuit(gates))
    x = bits(8)
    assert len(x) == 256 and net.graph.names[:8] == tuple(f"x{i}" for i in range(8))
    assert ((net(x)[:, 0] - x.sum(1) % 2).abs() <= 1e-6).all()


def test_outputs_that_are_read_and_gates_of_one_operand():
    gates = {"n": ("NOT", "a"), "m": ("BUF", "n"), "o": ("NOR", "m", "b"), "z": ("XNOR", "o", "a")}
    net = DAGNetwork.from_circuit(FunctionGraph.from_circuit(gates, outputs=["z", "n", "m", "o"]))
    for a, b in ((False, False), (False, True), (True, False), (True, True)):
        o = not (not a or b)
        assert net(torch.tensor([float(a), float(b)])).tolist() == [o == a, not a, not a, o]
    only_inverters = FunctionGraph.from_circuit({"n": ("NOT", "a"), "m": ("NOT", "n")})
    assert DAGNetwork.from_circuit(only_inverters)(torch.tensor([[0.0], [1.0]])).tolist() == [[0], [1]]


def test_a_circuit_with_shared_gates():
    graph = FunctionGraph(4, [[0, 1], [2, 3], [4, 5]], shares=["and", "and", None], labels=["AND", "AND", "OR"])
    x = bits(4)
    expected = ((x[:, 0] * x[:, 1]) + (x[:, 2] * x[:, 3])).clamp(max=1)
    assert torch.equal(DAGNetwork.from_circuit(graph)(x)[:, 0], expected)


@pytest.mark.parametrize(
    "graph, error, message",
    [
        ({"a": ("AND", "b", "c")}, TypeError, r"^graph: expected FunctionGraph, got dict$"),
        (FunctionGraph.tree(4), ValueError, r"^graph: expected labels of gates .*, got a graph without labels$"),
        (
            FunctionGraph(2, [[0, 1]], labels=["+"]),
            ValueError,
            r"^graph: expected labels among AND, OR, .*, got '\+' for node 2$",
        ),
        (
            FunctionGraph(2, [[0, 1], [2]], labels=["AND", "XOR"], names=["a", "b", "c", "d"]),
            ValueError,
            r"^graph: expected 2 parents of each XOR, got 1 of 1 arguments for 'd'$",
        ),
        (
            FunctionGraph(2, [[0, 1], [1, 2]], labels=["AND", "OR"], shares=["f", "f"]),
            ValueError,
            r"^graph: expected one gate where nodes share weights, got AND and, for node 3, OR$",
        ),
    ],
)
def test_no_circuit(graph, error, message):
    with pytest.raises(error, match=message):
        DAGNetwork.from_circuit(graph)


# ---- a module among modules


@every_network
def test_state_dict_copies_and_files(make):
    net, other = make(), make()
    state = net.state_dict()
    wanted = [f"weights.{k}" for k in range(len(net.weights))]
    assert list(state) == wanted + ([] if net.biases is None else [f"biases.{k}" for k in range(len(net.biases))])
    x = input_of(net, 3)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    for copied in (other, copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert copied.weights[0] is not net.weights[0] and torch.equal(copied(x), net(x)) and repr(copied) == repr(net)
    with pytest.raises(RuntimeError, match="size mismatch for weights"):
        DAGNetwork(net.graph, 7, net.layout.hidden).load_state_dict(state, strict=False)


@every_network
def test_state_dict_through_safetensors(make, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    net, other = make(), make()
    safetensors.save_model(net, str(tmp_path / "net.safetensors"))
    safetensors.load_model(other, str(tmp_path / "net.safetensors"))
    x = input_of(net, 3)
    assert torch.equal(other(x), net(x))


@every_network
def test_the_graph_comes_back_from_its_dictionary(make):
    net = make()
    graph, layout = FunctionGraph.from_dict(net.graph.to_dict()), net.layout
    sizes = layout.width, layout.hidden, net.activation, layout.in_channels, layout.out_channels, net.biases is not None
    other = DAGNetwork(graph, *sizes)
    other.load_state_dict(net.state_dict())
    x = input_of(net, 3)
    assert torch.equal(other(x), net(x))


@every_network
def test_meta_device_and_moves(make):
    net = make()
    x = input_of(net, 3)
    empty = make(device="meta")
    assert all(parameter.is_meta for parameter in empty.parameters())
    empty.load_state_dict(net.state_dict(), assign=True)
    back = copy.deepcopy(net).to("meta").to_empty(device="cpu")
    back.load_state_dict(net.state_dict())
    assert torch.equal(empty(x), net(x)) and torch.equal(back(x), net(x))
    torch.testing.assert_close(net.double()(x.double()).float(), back(x))
    assert net.layout.device.type == "cpu"


@every_network
def test_autocast(make):
    net = make()
    x = input_of(net, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = net(x)
        assert make().weights[0].dtype == torch.float32  # drawn in full precision all the same
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in net.parameters())


def test_functional_call_and_gradcheck():
    net = everything(dtype=torch.float64)
    names, x = list(net.state_dict()), input_of(net, 2, dtype=torch.float64)

    def function(*parameters):
        return torch.func.functional_call(net, dict(zip(names, parameters, strict=True)), (x,))

    parameters = [parameter.detach().clone().requires_grad_() for parameter in net.parameters()]
    assert torch.equal(function(*parameters), net(x))
    assert torch.autograd.gradcheck(function, parameters, fast_mode=True)
    doubled = [parameter * 2 for parameter in parameters]
    assert not torch.equal(function(*doubled), net(x))


def test_repr():
    assert repr(tree()) == (
        "DAGNetwork(8 sources, 7 nodes in 3 levels, 1 sink, 14 edges, in-degree 2, 7 weights; width=6, activation=gelu)"
    )
    assert repr(nn.Sequential(everything(bias=False))).count("\n") == 2
    assert repr(everything(bias=False)).endswith(
        "; width=4, hidden=5, activation=silu, in_channels=2, out_channels=3, bias=False)"
    )


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: DAGNetwork([[0]]), TypeError, r"^graph: expected FunctionGraph, got list$"),
        (lambda: tree(hidden=0), ValueError, r"^hidden: expected a positive int, got 0$"),
        (
            lambda: tree(activation="tanh"),
            ValueError,
            r"^activation: expected None, 'relu', 'gelu' or 'silu', got 'tan",
        ),
        (lambda: tree()(torch.zeros(3, 7)), ValueError, r"^x: expected tensor \[\.\.\., 8\], got 2-D float32 tensor"),
        (
            lambda: tree()(torch.zeros(3, 8, 1)),
            ValueError,
            r"^x: expected tensor \[\.\.\., 8\], got 3-D float32 tensor",
        ),
        (lambda: everything()(torch.zeros(3, 6)), ValueError, r"^x: expected tensor \[\.\.\., 3, 2\], got 2-D float32"),
        (lambda: everything()(None), ValueError, r"^x: expected tensor \[\.\.\., 3, 2\], got NoneType$"),
        (
            lambda: tree()(torch.zeros(3, 8).double()),
            TypeError,
            r"^weights\[0\]: expected float64, like x, got 3-D float32",
        ),
        (lambda: tree().constituent(7), ValueError, r"^node: expected a node, 8\.\.14, or its name, got 7$"),
        (lambda: tree().constituent(15), ValueError, r"^node: expected a node, 8\.\.14, or its name, got 15$"),
        (lambda: tree().constituent("root"), ValueError, r"^node: expected a node, 8\.\.14, or its name, got 'root'$"),
        (lambda: tree().constituent([8]), ValueError, r"^node: expected a node, 8\.\.14, or its name, got \[8\]$"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
