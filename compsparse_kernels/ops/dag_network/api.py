"""What users call: checks, then the op, inside an autograd Function only where a gradient is wanted."""

from collections.abc import Iterable, Sequence

import torch

from compsparse_kernels.layouts import DAGLayout
from compsparse_kernels.layouts.checks import describe, require
from compsparse_kernels.ops.arguments import (
    autocast_to,
    autocasts,
    check_dtype,
    check_same,
    compute_dtype,
    refuse_forward_mode,
    round_to,
)
from compsparse_kernels.ops.backends import check_backend
from compsparse_kernels.ops.dag_network import contract, reference  # noqa: F401  (contract defines the ops)

_forward = torch.ops.compsparse.dag_network.default
_backward = torch.ops.compsparse.dag_network_backward.default

ACTIVATIONS = (None, "relu", "gelu", "silu")


def dag_network(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    layout: DAGLayout,
    biases: Sequence[torch.Tensor] | None = None,
    activation: str | None = "gelu",
    *,
    backend: str | None = None,
) -> torch.Tensor:
    r"""A whole network on a directed acyclic graph.

    .. math:: h_v = \mathrm{act}(W_v [h_u]_{u \in \mathrm{parents}(v)} + b_v)

    One call runs every node. On the CPU a tile of the batch goes through the whole graph while its activations are in
    cache; the backward computes them again, so what training keeps between the two is ``x`` alone. On a GPU it is one
    launch for each level and kind of node; after a first call nothing waits for the GPU, so that calls can be captured
    in a CUDA graph.

    Args:
        x: ``[..., in_features]``, the channels of the sources, one source after another; float32, float64, float16 or
            bfloat16. On the CPU half precision is widened to float32 where it comes in, and only results are rounded,
            once; on a GPU, and in the reference, the channels of each node are rounded too.
        weights: of each kind of node (``layout.kinds``) the weights ``[num_weights, out, fan_in]``, dtype of ``x``.
        layout: which node reads what with which weight.
        biases: of each kind ``[num_weights, out]``, or None for no biases.
        activation: of all nodes that are not linear: None, ``"relu"``, ``"gelu"`` (exact, by erf) or ``"silu"``.
        backend: None lets torch's dispatcher choose; ``"cpu"``, ``"triton"`` or ``"reference"`` runs that one or says
            why not.

    Returns:
        ``[..., out_features]``, the channels of the sinks. Gradients reach ``x``, ``weights`` and ``biases``; higher
        derivatives too, through the reference, which keeps every activation.

    Under autocast it takes x, weights and biases in autocast's dtype, as ``nn.Linear`` does.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.

    Source: Poggio, "It is Compositional Sparsity: a framework for ML", section 4 (the graph is known).

    Example:
        >>> import torch
        >>> from compsparse_kernels import DAGLayout, FunctionGraph, dag_network
        >>> layout = DAGLayout(FunctionGraph.tree(8), width=16)
        >>> weights = [torch.randn(shape) / shape[-1] ** 0.5 for shape in layout.weight_shapes]
        >>> dag_network(torch.randn(5, 8), weights, layout).shape
        torch.Size([5, 1])
    """
    if autocasts(x):
        return _under_autocast(x, weights, layout, biases, activation, backend)
    weights, biases = _check(x, weights, layout, biases, activation)
    name = "none" if activation is None else activation
    if backend is not None:
        check_backend(backend, "dag_network", x)
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if backend == "reference":
        y = reference.dag_network(flat, *_arguments(weights, biases, layout, name))
    else:
        y = _run(flat, weights, biases, layout, name)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], layout.out_features)


def _arguments(weights, biases, layout, activation):
    """What the op takes behind x."""
    index = (layout.nodes, layout.edge_ptr, layout.edges, layout.steps, layout.linear)
    return weights, biases, *index, layout.columns, layout.out_features, activation


def _run(x, weights, biases, layout, activation):
    parameters = (*weights, *biases)
    names = ["weights"] * len(weights) + ["biases"] * len(biases)
    refuse_forward_mode(("x", x), *zip(names, parameters, strict=True))
    wanted = x.requires_grad or any(parameter.requires_grad for parameter in parameters)
    if wanted and torch.is_grad_enabled():
        return _DAGNetwork.apply(x, layout, activation, len(weights), *parameters)
    return _forward(x, *_arguments(weights, biases, layout, activation))


class _DAGNetwork(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, layout, activation, kinds, *parameters):
        ctx.save_for_backward(x, *parameters)
        ctx.layout, ctx.activation, ctx.kinds = layout, activation, kinds
        return _forward(x, *_arguments(list(parameters[:kinds]), list(parameters[kinds:]), layout, activation))

    @staticmethod
    def backward(ctx, grad):
        x, *parameters = ctx.saved_tensors
        layout, kinds = ctx.layout, ctx.kinds
        needs_x, needs_parameters = ctx.needs_input_grad[0], any(ctx.needs_input_grad[4:])
        if torch.is_grad_enabled():  # for a second derivative: as torch would differentiate the reference
            grads = _differentiable(grad, x, parameters, kinds, layout, ctx.activation, ctx.needs_input_grad)
            return grads[0], None, None, None, *grads[1:]
        index = (layout.nodes, layout.edge_ptr, layout.edges, layout.child_ptr, layout.children, layout.steps)
        options = (layout.linear, layout.columns, ctx.activation, needs_x, needs_parameters)
        grads = _backward(grad, x, parameters[:kinds], parameters[kinds:], *index, *options)
        rest = grads[1:] if needs_parameters else [None] * len(parameters)
        return grads[0] if needs_x else None, None, None, None, *rest


def _differentiable(grad, x, parameters, kinds, layout, activation, needs):
    inputs = [tensor for tensor, need in zip((x, *parameters), (needs[0], *needs[4:]), strict=True) if need]
    with torch.autocast(x.device.type, enabled=False):  # the forward has left it, whatever surrounds the backward
        y = reference.dag_network(x, *_arguments(parameters[:kinds], parameters[kinds:], layout, activation))
        grads = iter(torch.autograd.grad(y, inputs, grad, create_graph=True, materialize_grads=True))
    return [next(grads) if need else None for need in (needs[0], *needs[4:])]


def _under_autocast(x, weights, layout, biases, activation, backend):
    device = x.device.type
    dtype, compute = torch.get_autocast_dtype(device), compute_dtype("dag_network", device)
    with torch.autocast(device, enabled=False):
        x, weights, biases = autocast_to(compute, x), _all_to(compute, weights), _all_to(compute, biases)
        return round_to(dtype, dag_network(x, weights, layout, biases, activation, backend=backend))


def _all_to(dtype, tensors):
    """What is no row of tensors stays as it is, for the checks to name."""
    return [autocast_to(dtype, tensor) for tensor in tensors] if isinstance(tensors, Iterable) else tensors


def _check(x, weights, layout, biases, activation):
    require(isinstance(layout, DAGLayout), "layout", "DAGLayout", type(layout).__name__, TypeError)
    ok = isinstance(x, torch.Tensor) and x.dim() >= 1 and x.shape[-1] == layout.in_features
    if not ok:
        require(False, "x", f"tensor [..., {layout.in_features}]", describe(x))
    check_dtype("x", x, "dag_network")
    weights = _checked_parameters("weights", weights, layout.weight_shapes, x)
    biases = [] if biases is None else _checked_parameters("biases", biases, layout.bias_shapes, x)
    if x.device != layout.device:
        require(False, "layout", f"on {x.device}, like x (layout.to(device))", f"one on {layout.device}")
    if activation not in ACTIVATIONS:
        require(False, "activation", "None, 'relu', 'gelu' or 'silu'", repr(activation))
    return weights, biases


def _checked_parameters(name, tensors, shapes, x):
    try:
        tensors = list(tensors)
    except TypeError:
        require(False, name, f"{len(shapes)} tensors, one for each kind", describe(tensors), TypeError)
    require(len(tensors) == len(shapes), name, f"{len(shapes)} tensors, one for each kind", len(tensors))
    for number, (tensor, shape) in enumerate(zip(tensors, shapes, strict=True)):
        if not (isinstance(tensor, torch.Tensor) and tensor.shape == shape):
            require(False, f"{name}[{number}]", f"tensor {list(shape)}", describe(tensor))
        check_same(f"{name}[{number}]", tensor, "x", x)
    return tensors
