"""SparseDAGLinear on one level of a graph: a block for each edge, shared where the graph shares."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compsparse_kernels import FunctionGraph, SparseDAGLinear

GRAPHS = {
    "tree": FunctionGraph.tree(6),
    "skip edges": FunctionGraph.random(6, 20, 3, 4, seed=1, skip=0.5),
    "convolution": FunctionGraph.conv1d(9, kernel=3, padding=1, depth=2),
}


@pytest.mark.parametrize("columns", ["read", "earlier"])
@pytest.mark.parametrize("name", GRAPHS)
def test_the_weight_has_the_edges_of_the_level(name, columns):
    graph = GRAPHS[name]
    for number in range(1, graph.num_levels + 1):
        level, mask = graph.level_edges(number, columns), torch.from_numpy(graph.level_mask(number, columns))
        layer = SparseDAGLinear(3 * len(level.columns), 5 * len(level.nodes), level, activation="gelu")
        assert layer.layout.block_shape == (5, 3)
        assert layer.layout.num_slots == (len(np.unique(level.slot)) if len(level.slot) else 0)
        assert torch.equal(layer.layout.to_mask(), mask.repeat_interleave(5, 0).repeat_interleave(3, 1))
        x = torch.randn(7, layer.in_features)
        torch.testing.assert_close(layer(x), F.gelu(F.linear(x, layer.weight, layer.bias)))


def test_nodes_that_share_weights_share_blocks():
    level = FunctionGraph.conv1d(8, kernel=3, padding=1).level_edges(1)
    layer = SparseDAGLinear(8 * 4, 8 * 6, level, bias=False)
    assert layer.values.shape == (3, 6, 4) and "slots=3" in repr(layer)
    x = torch.randn(5, 8, 4, requires_grad=True)
    kernel = layer.values.detach().permute(1, 2, 0).clone().requires_grad_()  # [out, in, taps]
    y, expected = layer(x.flatten(1)), F.conv1d(x.mT, kernel, padding=1).mT.flatten(1)
    torch.testing.assert_close(y, expected)
    ours = torch.autograd.grad(y.square().sum(), (x, layer.values))
    theirs = torch.autograd.grad(expected.square().sum(), (x, kernel))
    torch.testing.assert_close(ours[0], theirs[0])
    torch.testing.assert_close(ours[1], theirs[1].permute(2, 0, 1))


def test_from_linear_and_checkpoints():
    level = FunctionGraph.tree(6).level_edges(1)
    linear = nn.Linear(12, 9)
    layer = SparseDAGLinear.from_linear(linear, level, activation="relu")
    mask = layer.layout.to_mask()
    assert torch.equal(layer.weight, linear.weight * mask) and layer.activation == "relu"
    other = SparseDAGLinear(12, 9, level)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.weight, layer.weight)


@pytest.mark.parametrize(
    "features, message",
    [
        ((12, 10), r"over equal blocks of at most 128 a side of a weight \[10, 12\], got 3 by 6 blocks"),
        ((13, 9), r"of a weight \[9, 13\], got 3 by 6 blocks"),
        ((6 * 129, 9), r"got blocks of 3 by 129"),
    ],
)
def test_errors(features, message):
    with pytest.raises(ValueError, match=f"^layout: expected a mask or graph level .*{message}$"):
        SparseDAGLinear(*features, FunctionGraph.tree(6).level_edges(1))
