"""dag_network: values and gradients against float64, node by node; memory, threads and instruction sets."""

import functools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from compsparse_kernels import DAGLayout, FunctionGraph, dag_network
from compsparse_kernels.graphs import Parents
from compsparse_kernels.ops import cpu_isa
from compsparse_kernels.testing import (
    DTYPES,
    HALVES,
    ISAS,
    MEMORY_FORMS,
    THREADS,
    assert_within_budget,
    dag_inputs,
    dag_node_by_node,
    num_threads,
    random_tensor,
    run_in_subprocess,
)
from python_tests.test_dag_layout import layouts

ACTIVATIONS = {None: lambda z: z, "relu": F.relu, "gelu": F.gelu, "silu": F.silu}

READ_SINKS = FunctionGraph(3, [[0, 1], [3, 2], [3, 4], [5]], sinks=[6, 3, 5])
BLIND_TAPS = FunctionGraph(3, Parents([0, 2, 4], [0, 1, 1, 2], [1, 2, 1, 2], [4, 4]), shares=["f", "f"])
LAYOUTS = {
    "tree, width 16": DAGLayout(FunctionGraph.tree(8), 16),
    "tree, width 33, hidden 20": DAGLayout(FunctionGraph.tree(5, arity=3), 33, 20, in_channels=3, out_channels=5),
    "one tree for all nodes": DAGLayout(FunctionGraph.tree(7, share="all"), 6, in_channels=6, out_channels=2),
    "skip edges": DAGLayout(FunctionGraph.random(6, 24, 3, 3, seed=1, skip=0.5), 4),
    "skip edges, hidden 7": DAGLayout(FunctionGraph.random(6, 24, 3, 3, seed=2, skip=0.5), 5, 7, in_channels=2),
    "outputs that are read": DAGLayout(READ_SINKS, 9, in_channels=2, out_channels=3),
    "outputs that are read, hidden 4": DAGLayout(READ_SINKS, 3, 4),
    "padded convolution": DAGLayout(FunctionGraph.conv1d(9, kernel=3, padding=1, depth=3), 8, in_channels=2),
    "arguments nobody has": DAGLayout(BLIND_TAPS, 4, in_channels=3, out_channels=7),
    "width 1": DAGLayout(FunctionGraph.butterfly(8), 1),
    "one wide node": DAGLayout(FunctionGraph(2, [[1]]), 1, 130, in_channels=17, out_channels=19),
}
ALL_DTYPES = DTYPES + HALVES
every_layout = pytest.mark.parametrize("name", LAYOUTS)


def as_function(function, layout, with_biases, activation):
    """Of x and parameters in one row, as :func:`dag_inputs` gives them."""
    kinds = len(layout.kinds)
    return lambda x, *parameters: function(
        x, parameters[:kinds], layout, parameters[kinds:] if with_biases else None, activation
    )


def by_node(layout, with_biases, activation):
    function = ACTIVATIONS.get(activation, activation)
    return as_function(dag_node_by_node, layout, with_biases, function)


def output_and_gradients(function, inputs, grad, dtype):
    inputs = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
    y = function(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, grad.to(dtype))]


def clear_of_kinks(function_of, inputs, grad):
    """The gradient, 0 for batch rows where some relu is so near its kink that rounding decides the derivative."""
    nearest = torch.full((len(grad), 1), torch.inf, dtype=torch.float64)

    def relu(z):
        torch.minimum(nearest, z.abs().amin(-1, keepdim=True), out=nearest)
        return F.relu(z)

    function_of(relu)(*(tensor.double() for tensor in inputs))
    return grad * (nearest > 1e-4)


def assert_right(layout, inputs, grad, activation, with_biases=True):
    """Output and every gradient within the error budget."""
    function_of = functools.partial(by_node, layout, with_biases)
    inputs = inputs if with_biases else inputs[: 1 + len(layout.kinds)]
    if activation == "relu":
        grad = clear_of_kinks(function_of, inputs, grad)
    ours = output_and_gradients(as_function(dag_network, layout, with_biases, activation), inputs, grad, grad.dtype)
    dense_dtype = torch.float32 if grad.dtype == torch.float64 else grad.dtype
    dense, exact = (
        output_and_gradients(function_of(activation), inputs, grad, dtype) for dtype in (dense_dtype, torch.float64)
    )
    # What one rounding is relative to: all terms in absolute value; activations are about the identity at most.
    sizes = output_and_gradients(function_of(None), [tensor.abs() for tensor in inputs], grad.abs(), torch.float64)
    parameters = [f"{name} {kind}" for name in ("weights", "biases") for kind in range(len(layout.kinds))]
    names = ["output", *(f"gradient of {name}" for name in ["x", *parameters])]
    for name, result, *others in zip(names, ours, dense, exact, sizes, strict=False):
        assert result.dtype == grad.dtype
        assert_within_budget(result, *others[:2], name, magnitude=others[2])


def output_gradient(layout, batch, dtype=torch.float32):
    return random_tensor(batch, layout.out_features, dtype=dtype, seed=5000)


# ---- shapes


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@every_layout
def test_networks(name, activation, dtype):
    layout = LAYOUTS[name]
    assert_right(layout, dag_inputs(layout, 21, dtype), output_gradient(layout, 21, dtype), activation)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("batch", [1, 2, 7, 48, 100, 250])
@pytest.mark.parametrize("name", ["skip edges, hidden 7", "padded convolution", "outputs that are read"])
def test_batches(name, batch, dtype):
    """Whole and partly filled tiles of the batch."""
    layout = LAYOUTS[name]
    assert_right(layout, dag_inputs(layout, batch, dtype), output_gradient(layout, batch, dtype), "gelu")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@every_layout
def test_no_batch_at_all(name, activation):
    layout = LAYOUTS[name]
    function = as_function(dag_network, layout, True, activation)
    y, grad_x, *others = output_and_gradients(
        function, dag_inputs(layout, 0), torch.empty(0, layout.out_features), torch.float32
    )
    assert y.shape == (0, layout.out_features) and grad_x.shape == (0, layout.in_features)
    assert not any(gradient.any() for gradient in others)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@every_layout
def test_without_biases(name, activation):
    layout = LAYOUTS[name]
    assert_right(layout, dag_inputs(layout, 13), output_gradient(layout, 13), activation, with_biases=False)


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (0, 3)], ids=str)
def test_leading_dimensions(lead):
    layout = LAYOUTS["skip edges"]
    _, *parameters = dag_inputs(layout, 1)
    function = as_function(dag_network, layout, True, "gelu")
    x = random_tensor(*lead, layout.in_features, requires_grad=True)
    y = function(x, *parameters)
    flat = function(x.reshape(-1, layout.in_features), *parameters)
    assert y.shape == (*lead, layout.out_features) and torch.equal(y.reshape(flat.shape), flat)
    grads = (torch.autograd.grad(out.square().sum(), x)[0] for out in (y, flat))
    assert torch.equal(*grads)


@given(
    layout=layouts(),
    batch=st.integers(1, 70),
    dtype=st.sampled_from(ALL_DTYPES),
    activation=st.sampled_from(list(ACTIVATIONS)),
    with_biases=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_any_graph(layout, batch, dtype, activation, with_biases, seed):
    inputs, grad = dag_inputs(layout, batch, dtype, seed), output_gradient(layout, batch, dtype)
    assert_right(layout, inputs, grad, activation, with_biases)


def test_a_chain_is_as_deep_as_it_has_nodes():
    """Its columns are used again and again, and nothing recurses."""
    layout = DAGLayout(FunctionGraph(1, [[vertex] for vertex in range(5000)]), 1)
    ones = [torch.ones(shape, requires_grad=True) for shape in layout.weight_shapes]
    x = torch.arange(-5.0, 20.0)[:, None].requires_grad_()  # of which every sum is exact
    y = dag_network(x, ones, layout, None, None)
    assert torch.equal(y, x)
    grad_x, *grads = torch.autograd.grad(y.sum(), [x, *ones])
    assert torch.equal(grad_x, torch.ones_like(x))
    assert all((grad == x.sum()).all() for grad in grads)


# ---- memory


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("memory", MEMORY_FORMS)
@pytest.mark.parametrize("name", ["skip edges", "outputs that are read"])
def test_memory_of_inputs_and_gradients(name, memory, dtype):
    layout = LAYOUTS[name]
    x, *parameters = dag_inputs(layout, 6, dtype)
    if memory != "expanded":
        parameters = [with_memory(tensor, memory) for tensor in parameters]
    inputs, grad = [with_memory(x, memory), *parameters], with_memory(output_gradient(layout, 6, dtype), memory)
    assert inputs[0].is_contiguous() == grad.is_contiguous() == (memory == "contiguous")
    assert_right(layout, inputs, grad, "relu")


def with_memory(tensor, memory):
    """The same numbers lying as asked; expanded has the first row throughout."""
    if memory == "expanded":
        return tensor[:1].expand_as(tensor)
    place = random_tensor(*tensor.shape, dtype=tensor.dtype, memory=memory)
    return place.copy_(tensor)


def test_expanded_gradient_of_a_sum():
    layout = LAYOUTS["skip edges"]
    assert_right(layout, dag_inputs(layout, 6), torch.ones(()).expand(6, layout.out_features), "gelu")


def test_inputs_stay_as_they_are():
    layout = LAYOUTS["skip edges, hidden 7"]
    inputs = dag_inputs(layout, 6)
    before = [tensor.clone() for tensor in inputs]
    output_and_gradients(
        as_function(dag_network, layout, True, "relu"), inputs, output_gradient(layout, 6), torch.float32
    )
    assert all(map(torch.equal, inputs, before))


# ---- what is computed, and what is not


@pytest.mark.parametrize("frozen", [(0,), (1,), (0, 2, 3), "parameters"], ids=str)
def test_frozen_inputs_get_no_gradient_and_change_no_other(frozen):
    layout = LAYOUTS["skip edges"]
    inputs, grad = dag_inputs(layout, 6), output_gradient(layout, 6)
    function = as_function(dag_network, layout, True, "gelu")
    _, *wanted = output_and_gradients(function, inputs, grad, torch.float32)
    frozen = range(1, len(inputs)) if frozen == "parameters" else frozen
    for i, tensor in enumerate(inputs):
        tensor.requires_grad_(i not in frozen)
    function(*inputs).backward(grad)
    for i, (tensor, gradient) in enumerate(zip(inputs, wanted, strict=True)):
        assert tensor.grad is None if i in frozen else torch.equal(tensor.grad, gradient)


def test_only_what_a_node_depends_on_is_read():
    """0 * NaN is NaN: what is not NaN was not multiplied. A dense network would spoil everything."""
    graph = FunctionGraph(4, [[0, 1], [2, 3], [4, 0], [5]])
    layout = DAGLayout(graph, 5)
    inputs, grad = dag_inputs(layout, 30), output_gradient(layout, 30)
    inputs[0][:, 3] = float("nan")  # source 3 reaches node 5, and sink 7 through it
    y, grad_x, *_ = output_and_gradients(as_function(dag_network, layout, True, "gelu"), inputs, grad, torch.float32)
    assert torch.isfinite(y[:, 0]).all() and y[:, 1].isnan().all()
    assert torch.isfinite(grad_x[:, :2]).all() and grad_x[:, 2:].isnan().all()


def test_relu_lets_nan_through_to_the_gradient():
    layout = DAGLayout(FunctionGraph(1, [[0], [1]]), 1)
    x = torch.tensor([[float("nan")], [-1.0], [0.0], [2.0]], requires_grad=True)
    y = dag_network(x, [torch.ones(1, 1, 1)] * 2, layout, None, "relu")
    ours, theirs = (torch.autograd.grad(out.sum(), x)[0] for out in (y, torch.relu(x)))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@every_layout
def test_every_output_is_written(name, dtype):
    """Deterministic mode fills every new tensor with NaN: what a kernel did not write shows."""
    layout = LAYOUTS[name]
    inputs, grad = dag_inputs(layout, 11, dtype), output_gradient(layout, 11, dtype)
    function = as_function(dag_network, layout, True, "silu")
    expected = output_and_gradients(function, inputs, grad, dtype)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        results = output_and_gradients(function, inputs, grad, dtype)
    finally:
        torch.use_deterministic_algorithms(False)
    for result, before in zip(results, expected, strict=True):
        torch.testing.assert_close(result, before)


# ---- threads and instruction sets


@pytest.mark.skipif(not ISAS, reason="the reference adds up as torch does: no compiled kernels here")
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("name", ["tree, width 33, hidden 20", "skip edges", "padded convolution"])
def test_bitwise_equal_for_any_number_of_threads(name, dtype):
    layout = LAYOUTS[name]
    for batch, activation in ((1000, "gelu"), (61, "relu"), (3, None)):
        inputs, grad = dag_inputs(layout, batch, dtype), output_gradient(layout, batch, dtype)
        function = as_function(dag_network, layout, True, activation)
        results = []
        for threads in THREADS:
            with num_threads(threads):
                results.append(output_and_gradients(function, inputs, grad, dtype))
        for other in results[1:]:
            assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa != cpu_isa()])
def test_every_instruction_set(isa):
    """What depends on it, here and in half precision, in a process whose kernels are capped to a narrower one."""
    tests = "networks or batches or without_biases or memory or any_graph or threads or written or rounded"
    files = [__file__, str(Path(__file__).with_name("test_dag_network_half.py"))]
    code = f"""
import sys
import pytest
from compsparse_kernels.ops import cpu_isa
assert cpu_isa() == {isa!r}
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-k", {tests!r}, *{files!r}]))
"""
    run_in_subprocess(code, isa=isa)
