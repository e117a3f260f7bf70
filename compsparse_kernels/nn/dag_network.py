"""A network on a known graph, as a module."""

from collections.abc import Hashable
from numbers import Integral
from typing import NamedTuple

import torch
from torch import nn

from compsparse_kernels.graphs import FunctionGraph
from compsparse_kernels.layouts import DAGLayout
from compsparse_kernels.layouts.checks import describe, require
from compsparse_kernels.nn.circuits import check_circuit, write_gates
from compsparse_kernels.ops import dag_network
from compsparse_kernels.ops.dag_network.api import ACTIVATIONS


class Affine(NamedTuple):
    """Parameters of one layer of one node."""

    weight: torch.Tensor  # [out, fan_in]
    bias: torch.Tensor | None  # [out]


class Constituent(NamedTuple):
    """The layers of one node."""

    first: Affine  # reads the parents; the fan-in holds their channels, argument by argument
    second: Affine | None  # behind the hidden units, where there are any
    readout: Affine | None  # of a sink that other nodes read too: from its channels to the output's


class DAGNetwork(nn.Module):
    r"""Network whose neurons sit on a graph: each node is a small network of its parents, and of nothing else.

    .. math:: h_v = \mathrm{act}(W_v [h_u]_{u \in \mathrm{parents}(v)} + b_v)

    with ``width`` channels, or, with ``hidden`` units, the constituent functions of Theorem 1,
    :math:`h_v = A_v\,\mathrm{act}(W_v [h_u]_{u \in \mathrm{parents}(v)} + b_v) + c_v`. Sinks have ``out_channels`` and
    no activation. (A sink that another node reads, or that shares weights with one that is read, has ``width`` channels
    like any node, and a linear readout.) Nodes of one name in ``graph.shares`` have the same weights: so a convolution
    is such a network. The whole graph runs in one call, forward and backward (:func:`dag_network`).

    Args:
        graph: what depends on what.
        width: channels of each node that others read.
        hidden: units of the hidden layer of each node, or None for none.
        activation: None, ``"relu"``, ``"gelu"`` or ``"silu"``.
        in_channels: channels of each source.
        out_channels: channels of each sink.
        bias: with biases, or without.
        device, dtype: of the parameters.

    Shapes: ``[..., sources]`` or, with more than one channel, ``[..., sources, in_channels]``, to ``[..., sinks]`` or
    ``[..., sinks, out_channels]``, in the order of the graph.

    Parameters are the lists ``weights`` and ``biases``, one tensor for each kind of node (``layout.kinds``): ``[number
    of weights, out, fan_in]`` and ``[number of weights, out]``. :meth:`constituent` gives those of one node. They are
    drawn from U(-1/sqrt(n), 1/sqrt(n)) as in ``nn.Linear``, where n is the number of channels that the node really
    reads; where nodes share weights, their bounds are averaged.

    Its state dict holds the parameters. The graph is an argument of the constructor: ``graph.to_dict()`` saves it.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.

    Source: Poggio, "It is Compositional Sparsity: a framework for ML", section 4 (the graph is known); Theorem 1 for
    ``hidden``.

    Example:
        >>> import torch
        >>> from compsparse_kernels import DAGNetwork, FunctionGraph
        >>> net = DAGNetwork(FunctionGraph.tree(8), width=16)
        >>> net
        DAGNetwork(8 sources, 7 nodes in 3 levels, 1 sink, 14 edges, in-degree 2, 7 weights; width=16, activation=gelu)
        >>> net(torch.randn(5, 8)).shape
        torch.Size([5, 1])
        >>> net.constituent(12).first.weight.shape  # [width, channels of both parents]
        torch.Size([16, 32])
    """

    def __init__(
        self,
        graph: FunctionGraph,
        width: int = 16,
        hidden: int | None = None,
        activation: str | None = "gelu",
        in_channels: int = 1,
        out_channels: int = 1,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        require(activation in ACTIVATIONS, "activation", "None, 'relu', 'gelu' or 'silu'", repr(activation))
        self.layout = DAGLayout(graph, width, hidden, in_channels, out_channels)
        self.activation = activation
        self.weights = _parameters(self.layout.weight_shapes, device, dtype)
        self.biases = _parameters(self.layout.bias_shapes, device, dtype) if bias else None
        self.register_load_state_dict_post_hook(_follow_parameters)
        self._move_layout()
        self.reset_parameters()

    @classmethod
    def from_circuit(
        cls, graph: FunctionGraph, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "DAGNetwork":
        """The network that computes a logic circuit exactly on inputs 0 and 1; it can be trained on from there.

        Each gate has the hidden units relu(a), relu(b) and relu(a + b - 1), which on 0 and 1 are a, b and a b; every
        gate of two operands is a sum of these and a constant.

        Args:
            graph: a graph whose labels are gates, as :meth:`FunctionGraph.from_circuit` makes it.
            device, dtype: of the parameters.

        Raises:
            TypeError, ValueError: naming the node, what was wanted and what came.

        Source: Poggio, "It is Compositional Sparsity: a framework for ML", Thesis 1 (what can be computed efficiently
        is compositionally sparse).

        Example:
            >>> import torch
            >>> from compsparse_kernels import DAGNetwork, FunctionGraph
            >>> adder = FunctionGraph.from_circuit({"sum": ("XOR", "a", "b"), "carry": ("AND", "a", "b")})
            >>> DAGNetwork.from_circuit(adder)(torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]])).tolist()
            [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]
        """
        check_circuit(graph)
        network = cls(graph, width=1, hidden=3, activation="relu", device=device, dtype=dtype)
        write_gates(network)
        return network

    @property
    def graph(self) -> FunctionGraph:
        return self.layout.graph

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """U(-1/sqrt(n), 1/sqrt(n)), as in ``nn.Linear``, where n is the number of channels that a node really reads."""
        if self.weights[0].is_meta:
            return
        for kind, bound in enumerate(_bounds(self.layout)):
            self.weights[kind].uniform_(-1, 1).mul_(bound[:, None, None])
            if self.biases is not None:
                self.biases[kind].uniform_(-1, 1).mul_(bound[:, None])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., sources(, in_channels)]`` -> ``[..., sinks(, out_channels)]``."""
        layout = self.layout
        if layout.in_channels > 1:
            wanted = (layout.graph.num_sources, layout.in_channels)
            ok = isinstance(x, torch.Tensor) and x.shape[-2:] == wanted
            require(ok, "x", f"tensor [..., {wanted[0]}, {wanted[1]}]", describe(x))
            x = x.flatten(-2)
        y = dag_network(x, self.weights, layout, self.biases, self.activation)
        return y if layout.out_channels == 1 else y.unflatten(-1, (layout.graph.num_sinks, layout.out_channels))

    def constituent(self, node: int | Hashable) -> Constituent:
        """The parameters of one node, as differentiable views: writing into them (``torch.nn.init``, or under
        ``torch.no_grad()``) changes the network.

        Args:
            node: its id in the graph, or its name. (An int is an id; ``graph.index`` finds a name that is an int.)

        Returns:
            :class:`Constituent`. Nodes that share weights share them here too.

        Example:
            >>> import torch
            >>> from compsparse_kernels import DAGNetwork, FunctionGraph
            >>> net = DAGNetwork(FunctionGraph.from_edges([("a", "mean"), ("b", "mean")]), width=4)
            >>> weight, bias = net.constituent("mean").first
            >>> _ = torch.nn.init.constant_(weight, 0.5), torch.nn.init.zeros_(bias)
            >>> net(torch.tensor([1.0, 3.0])).tolist()
            [2.0]
        """
        graph, layout = self.layout.graph, self.layout
        try:
            vertex = int(node) if isinstance(node, Integral) else graph.index(node)
        except (TypeError, ValueError):  # which speak of a name
            vertex = -1
        wanted = f"a node, {graph.num_sources}..{graph.num_vertices - 1}, or its name"
        require(graph.num_sources <= vertex < graph.num_vertices, "node", wanted, repr(node))
        return Constituent(*(self._affine(part) for part in layout.parts[vertex - graph.num_sources].tolist()))

    def _affine(self, part: int) -> Affine | None:
        if part < 0:
            return None
        kind, number = self.layout.nodes[part, :2].tolist()
        return Affine(self.weights[kind][number], None if self.biases is None else self.biases[kind][number])

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._move_layout()
        return self

    def _move_layout(self):
        # A meta tensor has lost its contents and a graph cannot be initialised again, so it stays where it is.
        if not self.weights[0].is_meta:
            self.layout = self.layout.to(self.weights[0].device)

    def extra_repr(self) -> str:
        layout = self.layout
        hidden = "" if layout.hidden is None else f", hidden={layout.hidden}"
        channels = [
            f", {name}={getattr(layout, name)}" for name in ("in_channels", "out_channels") if getattr(layout, name) > 1
        ]
        bias = "" if self.biases is not None else ", bias=False"
        graph = repr(layout.graph).removeprefix("FunctionGraph(").removesuffix(")")
        return f"{graph}; width={layout.width}{hidden}, activation={self.activation}{''.join(channels)}{bias}"

    def __repr__(self) -> str:
        """One line; nn.Module's would list the parameters, kind by kind."""
        return f"{type(self).__name__}({self.extra_repr()})"


def _parameters(shapes, device, dtype) -> nn.ParameterList:
    return nn.ParameterList(torch.empty(shape, device=device, dtype=dtype) for shape in shapes)


def _follow_parameters(network, incompatible_keys) -> None:
    """After ``load_state_dict(assign=True)`` the parameters may lie on another device."""
    network._move_layout()


def _bounds(layout: DAGLayout) -> tuple[torch.Tensor, ...]:
    """Of each kind float32 ``[num_weights]``: 1/sqrt(n), n the channels that a node reads; the mean over nodes that
    share weights."""
    kind, weight = layout.nodes[:, :2].long().unbind(1)
    counts = torch.tensor([kind.num_weights for kind in layout.kinds], device=layout.device)
    number = (counts.cumsum(0) - counts)[kind] + weight  # among the weights of all kinds
    node = torch.arange(len(kind), device=layout.device).repeat_interleave(layout.edge_ptr.diff())
    reads = torch.zeros(len(kind), device=layout.device).index_add_(0, node, layout.edges[:, 1].float())
    total = torch.zeros(int(counts.sum()), device=layout.device).index_add_(0, number, reads.rsqrt())
    return (total / number.bincount()).split(counts.tolist())
