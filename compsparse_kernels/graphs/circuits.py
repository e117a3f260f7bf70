"""Graphs of logic circuits. ``from_circuit`` is a classmethod of FunctionGraph."""

from collections.abc import Hashable, Iterable, Mapping
from typing import TYPE_CHECKING

from compsparse_kernels.graphs.checks import describe, listing, require

if TYPE_CHECKING:
    from compsparse_kernels.graphs.function_graph import FunctionGraph

FAN_IN = {"AND": 2, "OR": 2, "XOR": 2, "NAND": 2, "NOR": 2, "XNOR": 2, "NOT": 1, "BUF": 1}


def from_circuit(
    cls,
    gates: Mapping[Hashable, tuple],
    inputs: Iterable[Hashable] | None = None,
    outputs: Iterable[Hashable] | None = None,
) -> "FunctionGraph":
    """Graph of a logic circuit of gates with at most two inputs; each node has its gate as its label.

    Args:
        gates: ``{name: (gate, operand)}`` or ``{name: (gate, operand, operand)}``, in any order. Gates are AND, OR,
            XOR, NAND, NOR, XNOR, and NOT and BUF of one operand. An operand that is no gate is an input of the circuit.
        inputs: names of the inputs, in the order of the sources; by default as they appear.
        outputs: names of the gates that are outputs, in order; by default the gates that nothing reads.

    Raises:
        TypeError, ValueError: naming the gate, what was wanted and what came.

    Source: Poggio, "It is Compositional Sparsity: a framework for ML", Thesis 1 (what can be computed efficiently is
    compositionally sparse).

    Example:
        >>> from compsparse_kernels import FunctionGraph
        >>> adder = {"sum": ("XOR", "a", "b"), "carry": ("AND", "a", "b")}
        >>> graph = FunctionGraph.from_circuit(adder)
        >>> graph
        FunctionGraph(2 sources, 2 nodes in 1 level, 2 sinks, 4 edges, in-degree 2, 2 weights)
        >>> graph.names, graph.labels
        (('a', 'b', 'sum', 'carry'), ('XOR', 'AND'))
    """
    require(
        isinstance(gates, Mapping), "gates", "a mapping from names to (gate, operands...)", describe(gates), TypeError
    )
    require(len(gates) > 0, "gates", "at least one gate", "none")
    for name, gate in gates.items():
        _check_gate(name, gate)
    if inputs is None:
        inputs = dict.fromkeys(operand for gate in gates.values() for operand in gate[1:] if operand not in gates)
    inputs = list(inputs)
    known = {*inputs, *gates}
    unknown = [repr(operand) for gate in gates.values() for operand in gate[1:] if operand not in known]
    require(not unknown, "gates", "operands among inputs and gates", f"the unknown {listing(dict.fromkeys(unknown))}")
    edges = [(operand, name) for name, gate in gates.items() for operand in gate[1:]]
    labels = {name: gate[0] for name, gate in gates.items()}
    return cls.from_edges(edges, sources=inputs, nodes=gates, sinks=outputs, labels=labels)


def _check_gate(name: Hashable, gate: object) -> None:
    argument = f"gates[{name!r}]"
    ok = isinstance(gate, (tuple, list)) and len(gate) > 1
    require(ok, argument, "(gate, operand) or (gate, operand, operand)", repr(gate), TypeError)
    require(gate[0] in FAN_IN, argument, f"a gate of {', '.join(FAN_IN)}", repr(gate[0]))
    fan_in = FAN_IN[gate[0]]
    require(len(gate) == fan_in + 1, argument, f"{fan_in} operand{'s' * (fan_in > 1)} of {gate[0]}", len(gate) - 1)
