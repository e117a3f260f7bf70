"""A layout as lists of rows, for kernels in which each output gathers what it sums over.

Activations lie in a matrix with a row for each channel and the batch along the row. Row 0 is 0, for arguments that a
node lacks; column c of the layout is row c + 1. Gradients lie likewise.
"""

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from compsparse_kernels.graphs.order import ranges

UNIT = 16  # numbers: what the largest loads are multiples of


class Kind(NamedTuple):
    """The nodes of one kind, sorted by their weights."""

    first: torch.Tensor  # int32 [nodes]: first row of each
    weight: torch.Tensor  # int32 [nodes]
    weight_ptr: torch.Tensor  # int32 [num_weights + 1]: the nodes that share a weight
    inputs: torch.Tensor  # int32 [nodes, fan_in]: the rows that each reads


class Forward(NamedTuple):
    kinds: list[Kind]
    steps: list[tuple[int, torch.Tensor]]  # a kind, and which of its nodes, int32
    outputs: torch.Tensor  # int64 [out_features]: the row of each output


class Backward(NamedTuple):
    """The vertices of one step whose gradients are sums of what their children send back."""

    kind: int | None  # None: sources
    channels: int  # of each vertex
    first: torch.Tensor  # int32 [vertices]: first row of each; those with most terms come first
    ptr: torch.Tensor  # int64 [vertices + 1]: the terms of each, one for each output of each child
    row: torch.Tensor  # int32 [terms]: the gradient of that output
    weight: torch.Tensor  # int64 [terms]: the weight of its first channel there, counted in `unit` numbers from the
    # first of all kinds' weights in a row
    unit: int
    longest: int  # terms
    even: int  # divides the terms of each


def forward_rows(nodes, edge_ptr, edges, steps, shapes) -> Forward:
    """``shapes``: of each kind's weights."""
    device = nodes.device
    kind, weight, column, output = _numpy(nodes).T
    parent, channels, offset = _numpy(edges).T
    _, out, fan_in = np.array(shapes)[kind].T
    order = np.lexsort((weight, kind))
    begin = np.empty_like(kind)  # of each node's inputs, in that order
    begin[order] = np.cumsum(fan_in[order]) - fan_in[order]
    begin_of_edge = np.repeat(begin, np.diff(_numpy(edge_ptr))) + offset
    inputs = np.zeros(int(fan_in.sum()), np.int64)
    inputs[ranges(begin_of_edge, channels)] = ranges(parent + 1, channels)
    number = np.empty_like(kind)  # of each node among those of its kind
    number[order] = ranges(np.zeros(len(shapes), np.int64), np.bincount(kind, minlength=len(shapes)))
    kinds = []
    for of_kind, (num_weights, _, width) in enumerate(shapes):
        mine = order[kind[order] == of_kind]
        rows = inputs[begin[mine[0]] :][: len(mine) * width].reshape(len(mine), width)
        weight_ptr = np.searchsorted(weight[mine], np.arange(num_weights + 1))
        kinds.append(Kind(*(_int32(part, device) for part in (column[mine] + 1, weight[mine], weight_ptr, rows))))
    sinks = np.flatnonzero(output >= 0)
    outputs = np.empty(int(out[sinks].sum()), np.int64)
    outputs[ranges(output[sinks], out[sinks])] = ranges(column[sinks] + 1, out[sinks])
    return Forward(
        kinds,
        [(int(kind[first]), _int32(number[first:last], device)) for first, last in pairwise(steps)],
        torch.from_numpy(outputs).to(device),
    )


def backward_rows(nodes, child_ptr, children, steps, shapes, in_features: int) -> list[Backward]:
    """From the last step to the sources, which come last. Steps of sinks alone have none: nobody reads a sink."""
    device = nodes.device
    kind, weight, column, output = _numpy(nodes).T
    ptr, (child, offset) = _numpy(child_ptr), _numpy(children).T
    sizes = np.array(shapes)
    _, out, fan_in = sizes[kind].T
    sources = len(ptr) - 1 - len(kind)
    in_channels = in_features // max(sources, 1)
    first = np.concatenate((np.arange(sources) * in_channels, column)) + 1
    numbers = sizes.prod(1)
    block = (np.cumsum(numbers) - numbers)[kind] + weight * out * fan_in  # where each node's weights begin
    degrees = np.diff(ptr)
    terms = np.bincount(np.repeat(np.arange(len(degrees)), degrees), out[child], len(degrees)).astype(np.int64)

    def step(of_kind: int | None, vertices: np.ndarray) -> Backward:
        vertices = vertices[np.argsort(-terms[vertices], kind="stable")]
        edges = ranges(ptr[vertices], degrees[vertices])
        readers = child[edges]
        row = ranges(first[sources + readers], out[readers])
        o = ranges(np.zeros(len(edges), np.int64), out[readers])
        at = np.repeat(block[readers] + offset[edges], out[readers]) + o * np.repeat(fan_in[readers], out[readers])
        unit = 1 if (at % UNIT).any() else UNIT
        return Backward(
            of_kind,
            in_channels if of_kind is None else shapes[of_kind][1],
            _int32(first[vertices], device),
            torch.from_numpy(np.concatenate(([0], np.cumsum(terms[vertices])))).to(device),
            _int32(row, device),
            torch.from_numpy(at // unit).to(device),
            unit,
            int(terms[vertices].max(initial=0)),
            int(np.gcd.reduce(terms[vertices])),
        )

    found = []
    for begin, end in reversed(list(pairwise(steps))):
        read = begin + np.flatnonzero(output[begin:end] < 0)
        if len(read):
            found.append(step(int(kind[begin]), sources + read))
    return [*found, step(None, np.arange(sources))] if sources else found


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.cpu().numpy().astype(np.int64)


def _int32(array: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, np.int32)).to(device)
