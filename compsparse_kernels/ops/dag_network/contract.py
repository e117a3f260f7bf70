"""Schemas, fakes and the fallback of the op for whole graphs. Constitution: all backends and tests change with it.

``compsparse::dag_network``            x [batch, in] -> y [batch, out], through every node of a :class:`DAGLayout`
``compsparse::dag_network_backward``   [grad_x, *grad_weights, *grad_biases]; activations are computed again

Index tensors are those of the layout. ``biases`` is empty or has one tensor per kind, as ``weights`` has. Of the
backward's results only what is asked for is computed: else grad_x is empty, or the others are absent.
"""

import torch

from compsparse_kernels.ops.backends import register_triton
from compsparse_kernels.ops.dag_network import reference

lib = torch.library.Library("compsparse", "FRAGMENT")
TAGS = (torch.Tag.pt2_compliant_tag,)

lib.define(
    "dag_network(Tensor x, Tensor[] weights, Tensor[] biases, Tensor nodes, Tensor edge_ptr, Tensor edges, int[] steps,"
    " int[] linear, int columns, int out_features, str activation) -> Tensor",
    tags=TAGS,
)
lib.define(
    "dag_network_backward(Tensor grad, Tensor x, Tensor[] weights, Tensor[] biases, Tensor nodes, Tensor edge_ptr,"
    " Tensor edges, Tensor child_ptr, Tensor children, int[] steps, int[] linear, int columns, str activation,"
    " bool needs_x, bool needs_parameters) -> Tensor[]",
    tags=TAGS,
)
for _op in ("dag_network", "dag_network_backward"):
    lib.impl(_op, getattr(reference, _op), "CompositeExplicitAutograd")
    register_triton(lib, _op, "compsparse_kernels.ops.dag_network.triton", getattr(reference, _op))


@torch.library.register_fake("compsparse::dag_network", lib=lib)
def _(x, weights, biases, nodes, edge_ptr, edges, steps, linear, columns, out_features, activation):
    return x.new_empty(x.shape[0], out_features)


@torch.library.register_fake("compsparse::dag_network_backward", lib=lib)
def _(
    grad,
    x,
    weights,
    biases,
    nodes,
    edge_ptr,
    edges,
    child_ptr,
    children,
    steps,
    linear,
    columns,
    activation,
    needs_x,
    needs_parameters,
):
    grad_x = x.new_empty(x.shape if needs_x else 0)
    parameters = (*weights, *biases) if needs_parameters else ()
    return [grad_x, *(parameter.new_empty(parameter.shape) for parameter in parameters)]
