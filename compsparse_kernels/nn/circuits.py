"""Exact weights of gates: a logic circuit as a network of one hidden layer per gate."""

import numpy as np
import torch

from compsparse_kernels.graphs import FunctionGraph
from compsparse_kernels.graphs.circuits import FAN_IN
from compsparse_kernels.layouts.checks import require

# Hidden units relu(a), relu(b), relu(a + b - 1): on {0, 1} they are a, b and a * b, and with 1 these span all gates.
# A gate of one operand has the first column, and no use for the other units.
UNITS = np.array([[1, 0], [0, 1], [1, 1]])
SHIFTS = np.array([0, 0, -1])

# Of each gate its value at (a, b) = 00, 10, 01, 11; b means nothing to NOT and BUF.
TRUTH = {
    "AND": (0, 0, 0, 1),
    "OR": (0, 1, 1, 1),
    "XOR": (0, 1, 1, 0),
    "NAND": (1, 1, 1, 0),
    "NOR": (1, 0, 0, 0),
    "XNOR": (1, 0, 0, 1),
    "NOT": (1, 0, 1, 0),
    "BUF": (0, 1, 0, 1),
}


def check_circuit(graph: object) -> None:
    """A graph whose labels are gates, each with as many parents as it has operands."""
    require(isinstance(graph, FunctionGraph), "graph", "FunctionGraph", type(graph).__name__, TypeError)
    require(graph.labels is not None, "graph", "labels of gates (FunctionGraph.from_circuit)", "a graph without labels")
    gate_of_share = {}
    degrees = zip(graph.in_degrees.tolist(), graph.parents.arity.tolist(), strict=True)
    for node, (label, share, degree) in enumerate(zip(graph.labels, graph.share.tolist(), degrees, strict=True)):
        right = label in FAN_IN and degree == (FAN_IN[label],) * 2 and gate_of_share.setdefault(share, label) == label
        if right:
            continue
        name = graph.name_of(graph.num_sources + node)
        require(label in FAN_IN, "graph", f"labels among {', '.join(FAN_IN)}", f"{label!r} for {name}")
        operands = f"{FAN_IN[label]} parent{'s' * (FAN_IN[label] > 1)} of each {label}"
        require(degree == (FAN_IN[label],) * 2, "graph", operands, f"{degree[0]} of {degree[1]} arguments for {name}")
        require(
            False, "graph", "one gate where nodes share weights", f"{gate_of_share[share]} and, for {name}, {label}"
        )


@torch.no_grad()
def write_gates(network) -> None:
    """The weights of the gates that a graph has as labels, for a ``DAGNetwork`` of width 1 with 3 hidden relu units."""
    layout = network.layout
    nodes = layout.nodes.cpu().numpy()
    for part, (weights, biases) in zip(layout.parts.T, _layers(layout.graph), strict=True):
        gates = np.flatnonzero(part >= 0)
        kinds, numbers = nodes[part[gates], :2].T
        for kind in np.unique(kinds):
            chosen, number = gates[kinds == kind], numbers[kinds == kind]
            weight, bias = network.weights[kind], network.biases[kind]
            weight[number] = torch.from_numpy(weights[chosen, :, : weight.shape[2]]).to(weight)
            bias[number] = torch.from_numpy(biases[chosen]).to(bias)


def _layers(graph: FunctionGraph) -> list[tuple[np.ndarray, np.ndarray]]:
    """Weights ``[gates, out, in]`` and biases ``[gates, out]`` of the layers of each gate (``DAGLayout.parts``)."""
    at_00, at_10, at_01, at_11 = np.array([TRUTH[label] for label in graph.labels]).T
    count = len(at_00)
    polynomial = np.stack((at_10 - at_00, at_01 - at_00, at_11 - at_10 - at_01 + at_00), axis=1)  # of a, b, a * b
    return [
        (np.broadcast_to(UNITS, (count, 3, 2)), np.broadcast_to(SHIFTS, (count, 3))),
        (polynomial[:, None], at_00[:, None]),
        (np.ones((count, 1, 1)), np.zeros((count, 1))),
    ]
