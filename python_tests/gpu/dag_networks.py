"""Networks on graphs for the kernels of dag_network, the float64 reference, and dense torch as the yardstick."""

from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

from compsparse_kernels import DAGLayout, FunctionGraph
from compsparse_kernels.ops.dag_network import triton as shipped
from compsparse_kernels.testing import random_tensor
from python_tests.gpu.interpreter.cases import PRECISIONS
from python_tests.gpu.interpreter.rounding import to_tf32

GRAPHS = {
    "tree": FunctionGraph.tree(8),
    "ternary": FunctionGraph.tree(9, arity=3, share="level"),
    "shared, padded": FunctionGraph.conv1d(9, kernel=3, padding=1, depth=2),
    "skip edges": FunctionGraph.random(6, 12, in_degree=3, n_outputs=3, seed=1, skip=0.5),
    # Node 3 is read and a sink, nodes 3 and 4 share, node 6 reads sources and nodes, source 2 is read once.
    "read sink": FunctionGraph(
        3, [[0, 1], [1, 0], [3, 4, 0], [0, 3, 5, 2]], shares=["pair", "pair", None, None], sinks=[6, 3]
    ),
    "two levels": FunctionGraph.tree(4),
    "one node": FunctionGraph(1, [[0]]),
}


@dataclass(frozen=True)
class Case:
    graph: str
    width: int = 16
    hidden: int | None = None
    in_channels: int = 1
    out_channels: int = 1
    batch: int = 5
    precision: str = "ieee"
    activation: str = "gelu"
    with_bias: bool = True
    memory: str = "contiguous"
    fewest_programs: int = 264  # tiles are made smaller, and weights' gradients split, until there are as many
    seed: int = 0

    @property
    def dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision]

    def layout(self) -> DAGLayout:
        return DAGLayout(GRAPHS[self.graph], self.width, self.hidden, self.in_channels, self.out_channels)

    @contextmanager
    def settings(self, kernels=shipped):
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = self.precision == "tf32"
        try:
            with mock.patch.multiple(kernels, ENOUGH_PROGRAMS=self.fewest_programs, LEAST_STEPS=1):
                yield
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before


@dataclass(frozen=True)
class Network:
    """What the ops get."""

    layout: DAGLayout
    activation: str
    x: torch.Tensor
    grad: torch.Tensor
    weights: list[torch.Tensor]
    biases: list[torch.Tensor]

    def to(self, dtype: torch.dtype) -> "Network":
        tensors = (self.x.to(dtype), self.grad.to(dtype))
        lists = ([tensor.to(dtype) for tensor in part] for part in (self.weights, self.biases))
        return Network(self.layout, self.activation, *tensors, *lists)

    def forward(self, op) -> torch.Tensor:
        layout = self.layout
        index = (layout.nodes, layout.edge_ptr, layout.edges, layout.steps, layout.linear)
        sizes = (layout.columns, layout.out_features)
        return op(self.x, self.weights, self.biases, *index, *sizes, self.activation)

    def backward(self, op, needs_x: bool = True, needs_parameters: bool = True) -> list[torch.Tensor]:
        layout = self.layout
        index = (layout.nodes, layout.edge_ptr, layout.edges, layout.child_ptr, layout.children, layout.steps)
        options = (layout.linear, layout.columns, self.activation, needs_x, needs_parameters)
        return op(self.grad, self.x, self.weights, self.biases, *index, *options)


def network(case: Case) -> Network:
    """Weights so that activations keep their size from level to level."""
    layout = case.layout()

    def draw(shape, seed, scale=1.0, memory="contiguous"):
        return random_tensor(*shape, seed=case.seed + seed, memory=memory).mul(scale).to(case.dtype)

    weights = [draw(shape, 10 + i, shape[-1] ** -0.5) for i, shape in enumerate(layout.weight_shapes)]
    biases = [draw(shape, 50 + i) for i, shape in enumerate(layout.bias_shapes)] if case.with_bias else []
    x = draw((case.batch, layout.in_features), 1, memory=case.memory)
    grad = draw((case.batch, layout.out_features), 2, memory=case.memory)
    return Network(layout, case.activation, x, grad, weights, biases)


class _AsTF32(TorchFunctionMode):
    """Dense torch on a CPU has no tf32; with operands that ``cut`` has made so a product computes the same."""

    def __init__(self, cut):
        super().__init__()
        self.cut = cut

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.Tensor.matmul, torch.Tensor.__matmul__):
            args = [self.cut(arg.contiguous()) for arg in args]
        return function(*args, **(kwargs or {}))


def rounded(tensor: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(to_tf32(tensor.numpy()))


def dense(case: Case, compute, cut=rounded):
    """What ``compute()`` returns with products as ``case.precision`` has them; ``cut`` makes a tensor tf32."""
    if case.precision != "tf32":
        return compute()
    with _AsTF32(cut):
        return compute()
