"""dag_network in float16 and bfloat16 on the CPU: float32 inside, one rounding of each result."""

import pytest
import torch

from compsparse_kernels import DAGLayout, DAGNetwork, FunctionGraph, dag_network
from compsparse_kernels.testing import HALVES, ISAS, dag_inputs
from python_tests.test_dag_network import (
    ACTIVATIONS,
    LAYOUTS,
    as_function,
    every_layout,
    output_and_gradients,
    output_gradient,
)

pytestmark = pytest.mark.skipif(not ISAS, reason="the reference rounds channels of each node: no compiled kernels here")
every_half = pytest.mark.parametrize("half", HALVES, ids=str)


@every_half
@pytest.mark.parametrize("activation", ACTIVATIONS)
@every_layout
def test_results_are_those_of_float32_rounded_once(name, activation, half):
    """Bit for bit, outputs and gradients; what follows from float32 is tested there."""
    layout = LAYOUTS[name]
    function = as_function(dag_network, layout, True, activation)
    for batch in (3, 61, 200):
        inputs, grad = dag_inputs(layout, batch, half), output_gradient(layout, batch, half)
        ours = output_and_gradients(function, inputs, grad, half)
        wide = output_and_gradients(function, [tensor.float() for tensor in inputs], grad.float(), torch.float32)
        for result, exact in zip(ours, wide, strict=True):
            assert result.dtype == half and torch.equal(result, exact.to(half))


@every_half
def test_half_precision_may_begin_anywhere(half):
    """A view that begins at an odd element is contiguous, but its numbers lie across words."""
    layout = LAYOUTS["skip edges, hidden 7"]
    inputs, grad = dag_inputs(layout, 50, half), output_gradient(layout, 50, half)
    shifted = [torch.cat([tensor.new_ones(1), tensor.flatten()])[1:].view(tensor.shape) for tensor in inputs]
    assert all(tensor.is_contiguous() and tensor.data_ptr() % 4 == 2 for tensor in shifted)
    function = as_function(dag_network, layout, True, "gelu")
    results = (output_and_gradients(function, each, grad, half) for each in (inputs, shifted))
    assert all(map(torch.equal, *results))


@every_half
def test_gradients_are_summed_before_they_are_rounded(half):
    """Of 3000 ones: a running sum in half precision would stop growing at 256 or 2048."""
    layout = DAGLayout(FunctionGraph(1, [[0], [1]]), 1)
    parameters = [torch.ones(shape, dtype=half, requires_grad=True) for shape in layout.weight_shapes]
    y = dag_network(torch.ones(3000, 1, dtype=half), parameters, layout, None, None)
    for gradient in torch.autograd.grad(y, parameters, torch.ones_like(y)):
        assert torch.equal(gradient.flatten(), torch.tensor([3000.0]).to(half))


@every_half
def test_channels_between_nodes_may_exceed_half_precision(half):
    """Inside all is float32: 300 * 300 is beyond float16, but not the output."""
    layout = DAGLayout(FunctionGraph(1, [[0], [1]]), 1)
    weights = [torch.full((1, 1, 1), scale, dtype=half) for scale in (300, 1 / 512)]
    y = dag_network(torch.full((1, 1), 300.0, dtype=half), weights, layout, None, None)
    assert torch.equal(y, torch.full((1, 1), 300 * 300 / 512).to(half))


@every_half
def test_nan_and_infinity_stay_in_their_rows(half):
    layout = LAYOUTS["skip edges"]
    x, *parameters = dag_inputs(layout, 40, half)
    function = as_function(dag_network, layout, True, "relu")
    clean = function(x, *parameters)
    x[7], x[33] = float("nan"), float("inf")
    dirty = function(x, *parameters)
    others = [row for row in range(40) if row not in (7, 33)]
    assert torch.equal(clean[others], dirty[others])
    assert dirty[7].isnan().all() and not dirty[33].isfinite().all()


@every_half
def test_under_autocast_it_computes_in_half_precision(half):
    """As the same numbers, rounded by hand; what training keeps is half as large."""
    net = DAGNetwork(FunctionGraph.tree(8), 16)
    x, saved = torch.randn(30, 8), []
    with torch.autocast("cpu", dtype=half), torch.autograd.graph.saved_tensors_hooks(saved.append, lambda t: t):
        y = net(x)
    assert y.dtype == half and saved and all(tensor.dtype == half for tensor in saved)
    rounded = DAGNetwork(net.graph, 16, dtype=half)
    rounded.load_state_dict(net.state_dict())
    assert torch.equal(y, rounded(x.to(half)))
