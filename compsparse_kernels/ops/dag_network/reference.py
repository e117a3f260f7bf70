"""The meaning of the op, level by level in dense torch: any device, any dtype, differentiable. Correct first.

Column 0 of ``h`` is 0, for arguments that a node lacks; column c of the layout is column c + 1 of ``h``.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F

ACTIVATIONS = {"none": lambda z: z, "relu": F.relu, "gelu": F.gelu, "silu": F.silu}
BACKWARD = {
    "none": lambda grad, z: grad,
    "relu": lambda grad, z: torch.ops.aten.threshold_backward(grad, z, 0),
    "gelu": torch.ops.aten.gelu_backward,
    "silu": torch.ops.aten.silu_backward,
}


def dag_network(
    x, weights, biases, nodes, edge_ptr, edges, steps, linear, columns, out_features, activation
):  # [batch, in] -> [batch, out]
    h, _ = _forward(x, weights, biases, nodes, edge_ptr, edges, steps, linear, activation)
    return h[:, _output_columns(nodes, weights, out_features)]


def dag_network_backward(
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
    """``[grad_x (empty unless needed), then, if needed, *grad_weights, *grad_biases]``, by the chain rule from the last
    step to the first."""
    h, saved = _forward(x, weights, biases, nodes, edge_ptr, edges, steps, linear, activation)
    grad_h = torch.zeros_like(h).index_add_(1, _output_columns(nodes, weights, grad.shape[1]), grad)
    grad_weights = [torch.zeros_like(weight) for weight in weights]
    grad_biases = [torch.zeros_like(bias) for bias in biases]
    end = h.shape[1]
    for kind, share, gather, inputs, z in reversed(saved):
        count, batch, out = z.shape
        own = grad_h[:, end - count * out : end].view(batch, count, out).transpose(0, 1)
        end -= count * out
        grad_z = BACKWARD[_activation(linear, kind, activation)](own.contiguous(), z)  # [nodes, batch, out]
        grad_weights[kind].index_add_(0, share, grad_z.mT @ inputs)
        if biases:
            grad_biases[kind].index_add_(0, share, grad_z.sum(1))
        grad_inputs = grad_z @ weights[kind][share]  # [nodes, batch, fan_in]
        grad_h.index_add_(1, gather.flatten(), grad_inputs.transpose(0, 1).flatten(1))
    grad_x = grad_h[:, 1 : 1 + x.shape[1]].contiguous() if needs_x else x.new_empty(0)
    return [grad_x, *grad_weights, *grad_biases] if needs_parameters else [grad_x]


def _forward(x, weights, biases, nodes, edge_ptr, edges, steps, linear, activation):
    """All columns, and of each step what the backward needs."""
    h = F.pad(x, (1, 0))
    saved = []
    for begin, end in pairwise(steps):
        kind, share = int(nodes[begin, 0]), nodes[begin:end, 1].long()
        gather = _gather(begin, end, weights[kind].shape[2], edge_ptr, edges)
        inputs = h[:, gather].transpose(0, 1)  # [nodes, batch, fan_in]
        z = inputs @ weights[kind][share].mT
        if biases:
            z = z + biases[kind][share].unsqueeze(1)
        value = ACTIVATIONS[_activation(linear, kind, activation)](z)
        h = torch.cat((h, value.transpose(0, 1).flatten(1)), 1)
        saved.append((kind, share, gather, inputs, z))
    return h, saved


def _activation(linear, kind, activation):
    return "none" if linear[kind] else activation


def _gather(begin, end, fan_in, edge_ptr, edges):
    """int64 ``[nodes, fan_in]``: which column of ``h`` each input of each node is."""
    first, last = int(edge_ptr[begin]), int(edge_ptr[end])
    column, channels, offset = edges[first:last].long().unbind(1)
    node = torch.arange(end - begin, device=edges.device).repeat_interleave(edge_ptr[begin : end + 1].diff())
    within = _count_up(channels)
    gather = torch.zeros(end - begin, fan_in, dtype=torch.long, device=edges.device)
    place = (node.repeat_interleave(channels), offset.repeat_interleave(channels) + within)
    return gather.index_put(place, 1 + column.repeat_interleave(channels) + within)


def _output_columns(nodes, weights, out_features):
    sinks = nodes[nodes[:, 3] >= 0].long()
    out = torch.tensor([weight.shape[1] for weight in weights], device=nodes.device)[sinks[:, 0]]
    within = _count_up(out)
    columns = torch.empty(out_features, dtype=torch.long, device=nodes.device)
    return columns.index_put(
        (sinks[:, 3].repeat_interleave(out) + within,), 1 + sinks[:, 2].repeat_interleave(out) + within
    )


def _count_up(counts):
    """0 .. counts[0], then 0 .. counts[1], and so on."""
    ends = counts.cumsum(0)
    return torch.arange(int(counts.sum()), device=counts.device) - (ends - counts).repeat_interleave(counts)
