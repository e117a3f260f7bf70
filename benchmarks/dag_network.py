"""Networks on a graph, against dense products of the same cost and against what torch's own ops can make of a graph."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F

from benchmarks.dag_network_peers import by_levels, by_masks, by_nodes
from benchmarks.inputs import differentiated, fastest, leaves, side
from benchmarks.registry import Case, Entry, Side
from benchmarks.timing import LEAST_SAMPLE, seconds_per_call
from compsparse_kernels import DAGLayout, FunctionGraph, dag_network

OP = "dag_network"
BATCH = 1024
# All sources and nodes have one width in the random graph, so that any node may read any.
GRAPHS = {
    "tree of 64": lambda width: DAGLayout(FunctionGraph.tree(64), width),
    "tree of 1024": lambda width: DAGLayout(FunctionGraph.tree(1024), width),
    "conv 64 x 4": lambda width: DAGLayout(FunctionGraph.conv1d(64, kernel=3, padding=1, depth=4), width),
    "random 256": lambda width: DAGLayout(FunctionGraph.random(64, 256, in_degree=3, n_outputs=8), width, None, width),
}
WIDTHS = (16, 32)
CHECKED = 64  # rows of the batch that are compared with float64
# Least ratio dense / ours for the same arithmetic: the bars are 1.3 and 1.5 times dense, 2 for width 16.
SAME_COST_BARS = {"forward": 1 / 1.3, "forward+backward": 1 / 1.5}
NARROW_BAR = 1 / 2
GEMM = "dense product of the same cost"
TORCH_OPS = "gather + bmm per level"
LOOP = "loop over nodes"
MASKED = "masked dense per level"


def entries() -> Iterator[Entry]:
    for graph in GRAPHS:
        for direction, bar in SAME_COST_BARS.items():
            for width, activation in product(WIDTHS, ("relu", "gelu")):
                least = bar if width >= 32 else NARROW_BAR
                yield _entry(graph, width, activation, direction, GEMM, {"bars": least})
            suites = {"bars": 3.0, "quick": 3.0} if graph == "tree of 64" and direction == "forward" else {"bars": 3.0}
            yield _entry(graph, 32, "gelu", direction, TORCH_OPS, suites)
            yield _entry(graph, 32, "gelu", direction, LOOP, {"bars": 20.0})
            if graph != "tree of 1024":  # its masks alone would take a gigabyte
                yield _entry(graph, 32, "gelu", direction, MASKED, {"bars": 20.0})


def _entry(graph: str, width: int, activation: str, direction: str, peer: str, suites: dict) -> Entry:
    make = partial(_case, graph, width, activation, direction, peer)
    return Entry(OP, f"width {width}, {activation}", f"{graph}, batch {BATCH}", None, direction, peer, make, suites)


def _case(graph: str, width: int, activation: str, direction: str, peer: str) -> Case:
    layout = GRAPHS[graph](width)
    parameters = [torch.randn(shape) / shape[-1] ** 0.5 for shape in layout.weight_shapes]
    parameters += [torch.randn(shape) for shape in layout.bias_shapes]
    tensors = (torch.randn(BATCH, layout.in_features), *parameters)
    # Only these rows have a gradient, so that they alone tell every result: float64 takes its time.
    grad = torch.zeros(BATCH, layout.out_features)
    grad[:CHECKED] = torch.randn(CHECKED, layout.out_features)

    def checked(outputs):  # relu's gradient jumps where float64 has another sign: there only y is compared
        rows = [output[:CHECKED] for output in outputs[:2]]
        if activation == "relu" or len(outputs) == 1:
            return rows[:1]
        weights, biases = outputs[2 : 2 + len(layout.kinds)], outputs[2 + len(layout.kinds) :]
        # All together: one number alone may be right by luck in dense torch, which measures the budget.
        return [*rows, *(torch.cat([part.flatten() for part in parts]) for parts in (weights, biases))]

    reference = partial(_by_reference, layout, activation)
    few = [tensor[:CHECKED] if number == 0 else tensor for number, tensor in enumerate(tensors)]
    exact = checked(_directed(direction, reference, [tensor.double() for tensor in few], grad[:CHECKED].double())())
    dense = checked(_directed(direction, reference, few, grad[:CHECKED])())
    run = _directed(direction, lambda x, *p: dag_network(x, *_split(p, layout), activation), tensors, grad)
    ours = side(run, exact, dense, checked)
    if peer == GEMM:
        return Case(ours, _product_of_cost(layout.multiply_adds, direction))
    make = {TORCH_OPS: by_levels, LOOP: by_nodes, MASKED: by_masks}[peer]
    theirs = [_directed(direction, make(layout, activation), tensors, grad)]
    if peer == TORCH_OPS:
        theirs.append(_directed(direction, reference, tensors, grad))
    return Case(ours, side(fastest(theirs) if len(theirs) > 1 else theirs[0], exact, dense, checked))


def _split(parameters, layout):
    return parameters[: len(layout.kinds)], layout, parameters[len(layout.kinds) :]


def _by_reference(layout, activation, x, *parameters):
    weights, layout, biases = _split(parameters, layout)
    return dag_network(x, weights, layout, biases, activation, backend="reference")


def _directed(direction: str, forward: Callable, tensors, grad) -> Callable[[], list[torch.Tensor]]:
    """A call that returns ``[y]``, or ``[y, *gradients]`` of x and all parameters."""
    if direction == "forward+backward":
        return differentiated(forward, leaves(*tensors), grad)

    def run():
        with torch.no_grad():
            return [forward(*tensors)]

    return run


def _product_of_cost(multiply_adds: int, direction: str) -> Side:
    """Time of ``F.linear`` (1024, 1024->1024), scaled to as many multiply-adds; the backward costs two more of each."""
    size = 1024
    x, weight = torch.randn(BATCH, size), torch.randn(size, size)
    if direction == "forward":
        run = partial(F.linear, x, weight)
    else:
        run = differentiated(F.linear, leaves(x, weight), torch.randn(BATCH, size))
    scale = multiply_adds / size**2
    repeats = max(1, int(LEAST_SAMPLE / min(seconds_per_call(run, 1) for _ in range(3))))
    return Side(run, lambda result: None, lambda: scale * seconds_per_call(run, repeats))
