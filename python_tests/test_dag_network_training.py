"""Training in lockstep: a DAG network and its dense masked twin have the same losses over 200 steps, within rounding.

Rounding grows along a trajectory, and how much is a matter of chance, so dense float32 itself is asked: twins that add
up in other orders (batch rows and columns permuted) give the largest deviation from the float64 trajectory; ours may
deviate twice as much.
"""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compsparse_kernels import DAGNetwork, FunctionGraph
from compsparse_kernels.testing import assert_within_budget

GRAPH = FunctionGraph.random(n_inputs=8, n_nodes=24, in_degree=3, n_outputs=4, seed=3, skip=0.4)
WIDTH, BATCH, STEPS, PEERS = 8, 64, 200, 3
OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.1),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.03, momentum=0.9, weight_decay=1e-3),
}


class DenseTwin(nn.Module):
    """One masked ``nn.Linear`` for each level of the graph, over the channels of all levels before."""

    def __init__(self, net: DAGNetwork, seed: int | None):
        """``seed`` orders the columns that are added up."""
        super().__init__()
        graph, width = net.graph, net.layout.width
        assert graph.level[graph.sinks].min() == graph.num_levels
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        self.linears, self.masks, self.orders = nn.ModuleList(), [], []
        column_of, columns = {source: [source] for source in range(graph.num_sources)}, graph.num_sources
        for level in range(1, graph.num_levels + 1):
            nodes = graph.levels[level].tolist()
            out = 1 if level == graph.num_levels else width
            linear = nn.Linear(columns, out * len(nodes))
            mask = torch.zeros_like(linear.weight)
            for row, node in zip(range(0, out * len(nodes), out), nodes, strict=True):
                read = [column for parent in graph.parents_of(node).tolist() for column in column_of[parent]]
                weight, bias = net.constituent(node).first
                with torch.no_grad():
                    linear.weight[row : row + out, read], linear.bias[row : row + out] = weight, bias
                mask[row : row + out, read] = 1
                column_of[node] = list(range(columns + row, columns + row + out))
            order = torch.arange(columns) if seed is None else torch.randperm(columns, generator=generator)
            self.linears.append(linear)
            self.masks.append(mask)
            self.orders.append(order)
            columns += out * len(nodes)

    def forward(self, x):
        for number, (linear, mask, order) in enumerate(zip(self.linears, self.masks, self.orders, strict=True)):
            weight = (linear.weight * mask.to(linear.weight.dtype))[:, order]
            z = F.linear(x[:, order], weight, linear.bias)
            if number == len(self.linears) - 1:
                return z
            x = torch.cat((x, F.gelu(z)), 1)


@functools.cache
def data():
    """A batch for each step, and as targets a compositional function: another network on the graph."""
    torch.manual_seed(1)
    teacher = DAGNetwork(GRAPH, WIDTH)
    for weight in teacher.weights:
        nn.init.normal_(weight, std=2 * weight.shape[-1] ** -0.5)
    x = torch.randn(STEPS, BATCH, GRAPH.num_sources)
    with torch.no_grad():
        return x, teacher(x)


def losses(model, optimizer, dtype=torch.float32, autocast=False, rows=slice(None)):
    """Of each step."""
    step_of = OPTIMIZERS[optimizer](model.parameters())
    history = []
    for x, target in zip(*data(), strict=True):
        x, target = x[rows].to(dtype), target[rows].to(dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            y = model(x)
        loss = F.mse_loss(y.to(dtype), target)
        step_of.zero_grad()
        loss.backward()
        step_of.step()
        history.append(loss.detach())
    return torch.stack(history)


@functools.cache
def exact_losses(optimizer):
    return losses(DenseTwin(student(), None).double(), optimizer, torch.float64)


def student():
    torch.manual_seed(0)
    return DAGNetwork(GRAPH, WIDTH)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16 autocast"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_losses_of_200_steps_are_those_of_the_dense_twin(optimizer, autocast):
    exact, ours = exact_losses(optimizer), losses(student(), optimizer, autocast=autocast)
    assert exact[-20:].mean() < 0.5 * exact[:20].mean()  # it did learn
    orders = torch.rand(PEERS, BATCH, generator=torch.Generator().manual_seed(2)).argsort(1)
    twins = [
        losses(DenseTwin(student(), seed), optimizer, autocast=autocast, rows=orders[seed]) for seed in range(PEERS)
    ]
    allowed, deviation = (torch.stack(twins).double() - exact).abs().amax(0), ours.double() - exact
    for steps in (1, 10, 50, STEPS):
        differences = deviation[:steps].float(), allowed[:steps].float(), torch.zeros(steps, dtype=torch.float64)
        assert_within_budget(*differences, f"losses of {steps} steps", magnitude=exact[:steps])
