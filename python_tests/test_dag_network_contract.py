"""dag_network as a torch op: derivatives of any order, opcheck, compile, export, autocast, backends, errors."""

import re

import pytest
import torch
import torch.nn.functional as F

from compsparse_kernels import DAGLayout, FunctionGraph, dag_network, explain
from compsparse_kernels.ops.dag_network import reference
from compsparse_kernels.testing import assert_within_budget, dag_inputs, dag_node_by_node, random_tensor

ACTIVATIONS = (None, "relu", "gelu", "silu")
READ_SINKS = FunctionGraph(3, [[0, 1], [3, 2], [3, 4]], sinks=[5, 3])
LAYOUTS = {
    "tree": DAGLayout(FunctionGraph.tree(4), 3),
    "outputs that are read, hidden": DAGLayout(READ_SINKS, 2, 3, in_channels=2, out_channels=2),
    "shared": DAGLayout(FunctionGraph.conv1d(4, kernel=3, padding=1, depth=2), 2),
}
LAYOUT = LAYOUTS["tree"]
every_layout = pytest.mark.parametrize("name", LAYOUTS)


def split(layout, parameters):
    kinds = len(layout.kinds)
    return list(parameters[:kinds]), list(parameters[kinds:])


def network(layout, activation="gelu", **options):
    def function(x, *parameters):
        weights, biases = split(layout, parameters)
        return dag_network(x, weights, layout, biases or None, activation, **options)

    return function


def wanting(inputs):
    return [tensor.requires_grad_() for tensor in inputs]


# ---- derivatives of any order


@pytest.mark.parametrize("activation", ACTIVATIONS)
@every_layout
def test_gradcheck_and_gradgradcheck(name, activation):
    inputs = wanting(dag_inputs(LAYOUTS[name], 2, torch.float64, seed=3))
    assert torch.autograd.gradcheck(network(LAYOUTS[name], activation), inputs)
    assert torch.autograd.gradgradcheck(network(LAYOUTS[name], activation), inputs, fast_mode=True)


def test_second_derivatives_of_some_inputs_only():
    layout = LAYOUTS["outputs that are read, hidden"]
    _, *parameters = inputs = dag_inputs(layout, 2, torch.float64)
    wanted = parameters[1].requires_grad_()

    def gradient(function):
        (grad,) = torch.autograd.grad(function(*inputs).square().sum(), wanted, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), wanted)

    torch.testing.assert_close(gradient(network(layout)), gradient(network(layout, backend="reference")))


def test_no_graph_where_no_gradient_is_wanted():
    inputs = dag_inputs(LAYOUT, 3)
    function = network(LAYOUT)
    assert function(*inputs).grad_fn is None
    wanting(inputs)
    with torch.no_grad():
        assert function(*inputs).grad_fn is None
    with torch.inference_mode():
        assert function(*inputs).is_inference()
    assert function(*inputs).grad_fn is not None


def test_forward_mode_is_refused():
    x, *parameters = dag_inputs(LAYOUT, 3)
    weights, biases = split(LAYOUT, parameters)
    with pytest.raises(RuntimeError, match=r"x: expected a tensor without a forward-mode tangent"):
        torch.func.jvp(lambda x: dag_network(x, weights, LAYOUT, biases), (x,), (x,))
    for name, call in (
        ("weights", lambda tensor: dag_network(x, [tensor, *weights[1:]], LAYOUT, biases)),
        ("biases", lambda tensor: dag_network(x, weights, LAYOUT, [tensor, *biases[1:]])),
    ):
        tensor = {"weights": weights, "biases": biases}[name][0]
        with pytest.raises(RuntimeError, match=f"{name}: expected a tensor without a forward-mode tangent"):
            torch.func.jvp(call, (tensor,), (tensor,))


# ---- torch's own machinery


@pytest.mark.parametrize(
    "name, with_biases, batch, memory",
    [
        ("tree", True, 3, "contiguous"),
        ("outputs that are read, hidden", False, 3, "transposed"),
        ("shared", True, 0, "contiguous"),
        ("shared", True, 1, "contiguous"),
    ],
)
def test_opcheck(name, with_biases, batch, memory):
    layout = LAYOUTS[name]
    _, *parameters = dag_inputs(layout, batch)
    x = random_tensor(batch, layout.in_features, memory=memory)
    weights, biases = split(layout, parameters)
    biases = biases if with_biases else []
    grad = random_tensor(batch, layout.out_features)
    index = layout.nodes, layout.edge_ptr, layout.edges
    rest = layout.steps, layout.linear, layout.columns
    forward = (x, weights, biases, *index, *rest, layout.out_features, "silu")
    torch.library.opcheck(torch.ops.compsparse.dag_network.default, forward)
    for needs in ((True, True), (True, False), (False, True)):
        backward = (grad, x, weights, biases, *index, layout.child_ptr, layout.children, *rest, "gelu", *needs)
        torch.library.opcheck(torch.ops.compsparse.dag_network_backward.default, backward)


@pytest.mark.parametrize("batch", [0, 1, 5])
@every_layout
def test_the_reference_of_the_backward_is_the_gradient_of_that_of_the_forward(name, batch):
    """It runs on devices without kernels; what it returns is its own memory."""
    layout = LAYOUTS[name]
    inputs = wanting(dag_inputs(layout, batch, torch.float64))
    weights, biases = split(layout, inputs[1:])
    index, rest = (layout.nodes, layout.edge_ptr, layout.edges), (layout.steps, layout.linear, layout.columns)
    y = reference.dag_network(inputs[0], weights, biases, *index, *rest, layout.out_features, "gelu")
    grad = random_tensor(*y.shape, dtype=y.dtype)
    arguments = (*index, layout.child_ptr, layout.children, *rest, "gelu", True, True)
    with torch.no_grad():
        grads = reference.dag_network_backward(grad, inputs[0], weights, biases, *arguments)
    torch.testing.assert_close(grads, list(torch.autograd.grad(y, inputs, grad)))
    assert all(each.is_contiguous() and each.storage_offset() == 0 for each in grads)


@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "silu"])
@pytest.mark.parametrize("with_biases", [True, False])
def test_flags_reach_the_kernel(with_biases, activation):
    """Boxing does not check: each number, flag and name, straight through the registered ops, against the reference."""
    layout = LAYOUTS["outputs that are read, hidden"]
    x, *parameters = dag_inputs(layout, 5)
    weights, biases = split(layout, parameters)
    biases = biases if with_biases else []
    index = layout.nodes, layout.edge_ptr, layout.edges
    rest = layout.steps, layout.linear, layout.columns
    forward = (x, weights, biases, *index, *rest, layout.out_features, activation)
    torch.testing.assert_close(torch.ops.compsparse.dag_network(*forward), reference.dag_network(*forward))
    grad = random_tensor(5, layout.out_features)
    for needs in ((True, True), (True, False), (False, True)):
        backward = (grad, x, weights, biases, *index, layout.child_ptr, layout.children, *rest, activation, *needs)
        ours, wanted = torch.ops.compsparse.dag_network_backward(*backward), reference.dag_network_backward(*backward)
        assert len(ours) == len(wanted) == (1 + len(weights) + len(biases) if needs[1] else 1)
        torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@every_layout
def test_compile_forward_and_backward(name, activation):
    torch._dynamo.reset()  # which counts the compilations of `function` over all tests
    inputs = wanting(dag_inputs(LAYOUTS[name], 3))
    function = network(LAYOUTS[name], activation)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected = function(*inputs)
    torch.testing.assert_close(compiled(*inputs), expected)
    ours, theirs = (torch.autograd.grad(y.square().sum(), inputs) for y in (compiled(*inputs), expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_compile_with_any_batch():
    torch._dynamo.reset()
    compiled = torch.compile(network(LAYOUT), fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (3, 5, 8):
        inputs = dag_inputs(LAYOUT, batch)
        torch.testing.assert_close(compiled(*inputs), network(LAYOUT)(*inputs))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
@every_layout
def test_autocast_errs_no_more_than_dense_torch_under_autocast(name, half):
    layout = LAYOUTS[name]
    inputs = wanting(dag_inputs(layout, 40))
    for given in (inputs, [tensor.detach().to(half) for tensor in inputs]):
        exact = by_node(layout, *(tensor.double() for tensor in given))
        with torch.autocast("cpu", dtype=half):
            y, dense = network(layout)(*given), by_node(layout, *given)
        assert y.dtype == half
        assert_within_budget(y, dense, exact, "output")
    with torch.autocast("cpu", dtype=half):
        y = network(layout)(*inputs)
    grads = torch.autograd.grad(y.float().sum(), inputs)
    assert all(grad.dtype == torch.float32 and torch.isfinite(grad).all() for grad in grads)


def by_node(layout, x, *parameters):
    weights, biases = split(layout, parameters)
    return dag_node_by_node(x, weights, layout, biases, F.gelu)


def test_autocast_leaves_float64_alone():
    inputs = dag_inputs(LAYOUT, 4, torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = network(LAYOUT)(*inputs)
    assert torch.equal(y, network(LAYOUT)(*inputs))


# ---- backends


def test_explicit_backends():
    inputs = wanting(dag_inputs(LAYOUT, 3))
    expected = network(LAYOUT)(*inputs)
    states = explain("dag_network", inputs[0])
    backends = [backend for backend, state in states.items() if state in ("runs", "available")]
    assert "reference" in backends
    for backend in backends:
        y = network(LAYOUT, backend=backend)(*inputs)
        torch.testing.assert_close(y, expected)
        torch.autograd.grad(y.sum(), inputs)


# ---- errors

X, *PARAMETERS = dag_inputs(LAYOUT, 3)
WEIGHTS, BIASES = split(LAYOUT, PARAMETERS)


def call(x=X, weights=WEIGHTS, layout=LAYOUT, biases=BIASES, **options):
    return dag_network(x, weights, layout, biases, **options)


MESSAGES = [
    (lambda: call(x=None), ValueError, "x: expected tensor [..., 4], got NoneType"),
    (lambda: call(x=X[:, :3]), ValueError, "x: expected tensor [..., 4], got 2-D float32 tensor [3, 3]"),
    (lambda: call(x=torch.tensor(1.0)), ValueError, "x: expected tensor [..., 4], got 0-D float32 tensor []"),
    (lambda: call(layout=LAYOUT.graph), TypeError, "layout: expected DAGLayout, got FunctionGraph"),
    (
        lambda: call(layout=LAYOUT.to("meta")),
        ValueError,
        "layout: expected on cpu, like x (layout.to(device)), got one",
    ),
    (lambda: call(weights=None), TypeError, "weights: expected 2 tensors, one for each kind, got NoneType"),
    (lambda: call(weights=WEIGHTS[:1]), ValueError, "weights: expected 2 tensors, one for each kind, got 1"),
    (lambda: call(biases=BIASES * 2), ValueError, "biases: expected 2 tensors, one for each kind, got 4"),
    (
        lambda: call(weights=[WEIGHTS[0], WEIGHTS[0]]),
        ValueError,
        "weights[1]: expected tensor [1, 1, 6], got 3-D float32 tensor [2, 3, 2]",
    ),
    (lambda: call(weights=[1, 2]), ValueError, "weights[0]: expected tensor [2, 3, 2], got int"),
    (
        lambda: call(weights=[WEIGHTS[0], WEIGHTS[1].double()]),
        TypeError,
        "weights[1]: expected float32, like x, got 3-D float64 tensor [1, 1, 6]",
    ),
    (
        lambda: call(biases=[BIASES[0].to("meta"), BIASES[1]]),
        ValueError,
        "biases[0]: expected a tensor on cpu, like x, got one on meta",
    ),
    (
        lambda: call(X.int(), [w.int() for w in WEIGHTS], biases=None),
        TypeError,
        "x: expected float32, float64, float16 or bfloat16, got 2-D int32 tensor [3, 4]",
    ),
    (lambda: call(activation="tanh"), ValueError, "activation: expected None, 'relu', 'gelu' or 'silu', got 'tanh'"),
    (lambda: call(activation="none"), ValueError, "activation: expected None, 'relu', 'gelu' or 'silu', got 'none'"),
    (
        lambda: call(backend="gpu"),
        ValueError,
        "backend: expected one of cpu, triton, cuda, reference or None, got 'gpu'",
    ),
    (
        lambda: call(backend="triton"),
        ValueError,
        "backend: expected one that can run here (triton can't), got ",
    ),
]


@pytest.mark.parametrize("wrong, error, message", MESSAGES, ids=[message for *_, message in MESSAGES])
def test_errors_name_the_argument_what_was_wanted_and_what_came(wrong, error, message):
    with pytest.raises(error, match="^" + re.escape(message)):
        wrong()


def test_errors_under_autocast_are_the_same_of_its_dtype():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for wrong, error, message in MESSAGES:
            if "expected float32, like x" in message:
                continue  # autocast makes both bfloat16
            with pytest.raises(error, match="^" + re.escape(message.replace("-D float32", "-D bfloat16"))):
                wrong()


def test_second_derivatives_do_not_obey_the_autocast_around_them():
    inputs = [tensor.requires_grad_() for tensor in dag_inputs(LAYOUT, 4)]
    plain = torch.autograd.grad(network(LAYOUT)(*inputs).sum(), inputs[0])[0]
    y = network(LAYOUT)(*inputs).sum()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = torch.autograd.grad(y, inputs[0], create_graph=True)[0]
    assert again.dtype == torch.float32 and torch.allclose(again, plain, rtol=1e-4, atol=1e-6)
