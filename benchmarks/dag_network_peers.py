"""What torch's own ops can make of a network on a graph: the peers of dag_network's rows.

Each takes a layout and an activation, and returns ``forward(x, *weights, *biases)``.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F


def by_levels(layout, activation):
    """Vertices first, ``[vertices, batch, channels]``: parents are gathered, a run of nodes is one batched product."""
    inputs, sources, width = layout.in_features, layout.graph.num_sources, layout.width
    apart = layout.in_channels != width  # then sources lie in a tensor of their own
    plan = []
    for kind, first, last, edges in _runs(layout):
        column, channels, offset = edges.unbind(2)
        own_weights = layout.nodes[first:last, 1].long()
        parents = torch.where(
            column < inputs, column // layout.in_channels, (column - inputs) // width + (0 if apart else sources)
        )
        plan.append((kind, bool(apart and column[0, 0] < inputs), parents, channels[0], offset[0], own_weights))

    def forward(x, *parameters):
        weights, biases = parameters[: len(layout.kinds)], parameters[len(layout.kinds) :]
        x = x.view(len(x), sources, layout.in_channels).transpose(0, 1)
        values, outputs = [] if apart else [x], []
        for kind, reads_sources, parents, channels, offset, number in plan:
            if not reads_sources and len(values) > 1:
                values = [torch.cat(values)]
            read = (x if reads_sources else values[0])[parents]  # [nodes, in-degree, batch, channels]
            columns = (offset[:, None] + torch.arange(int(channels[0]))).flatten()
            weight = weights[kind][number][:, :, columns].mT
            z = torch.baddbmm(biases[kind][number].unsqueeze(1), read.transpose(1, 2).flatten(2), weight)
            (outputs if layout.kinds[kind].linear else values).append(_activated(layout, kind, activation, z))
        return torch.cat(outputs).transpose(0, 1).flatten(1)

    return forward


def by_nodes(layout, activation):
    """A call for each node, as a user would write it."""
    nodes, ptr, edges = layout.nodes.tolist(), layout.edge_ptr.tolist(), layout.edges.tolist()

    def forward(x, *parameters):
        weights, biases = parameters[: len(layout.kinds)], parameters[len(layout.kinds) :]
        h = {source * layout.in_channels: part for source, part in enumerate(x.split(layout.in_channels, 1))}
        outputs = []
        for i, (kind, number, column, output) in enumerate(nodes):
            mine = edges[ptr[i] : ptr[i + 1]]
            weight = weights[kind][number]
            if sum(channels for _, channels, _ in mine) < weight.shape[1]:
                weight = torch.cat([weight[:, offset : offset + channels] for _, channels, offset in mine], 1)
            z = F.linear(torch.cat([h[parent] for parent, _, _ in mine], 1), weight, biases[kind][number])
            h[column] = _activated(layout, kind, activation, z)
            if output >= 0:
                outputs.append(h[column])
        return torch.cat(outputs, 1)

    return forward


def by_masks(layout, activation):
    """Per level a dense weight over everything from its first parent on, times its mask."""
    plan = [_masked_step(layout, begin, end) for begin, end in pairwise(layout.steps)]

    def forward(x, *parameters):
        weights, biases = parameters[: len(layout.kinds)], parameters[len(layout.kinds) :]
        h, outputs = x, []
        for kind, low, high, element, mask, number in plan:
            weight = weights[kind].flatten()[element] * mask.to(x.dtype)
            z = F.linear(h[:, low:high], weight, biases[kind][number].flatten())
            z = _activated(layout, kind, activation, z)
            h = torch.cat((h, z), 1)
            outputs += [z] if layout.kinds[kind].linear else []
        return torch.cat(outputs, 1)

    return forward


def _masked_step(layout, begin, end):
    """(kind, first and last column, element of the weights at each place ``[out, in]``, mask, weight of each node)."""
    kind = int(layout.nodes[begin, 0])
    high, (_, out, fan_in) = int(layout.nodes[begin, 2]), layout.weight_shapes[kind]
    rows, columns, elements = [], [], []
    for i in range(begin, end):
        for column, channels, offset in layout.edges[layout.edge_ptr[i] : layout.edge_ptr[i + 1]].tolist():
            o, k = torch.meshgrid(torch.arange(out), torch.arange(channels), indexing="ij")
            rows.append(((i - begin) * out + o).flatten())
            columns.append((column + k).flatten())
            elements.append(((int(layout.nodes[i, 1]) * out + o) * fan_in + offset + k).flatten())
    low = int(torch.cat(columns).min())
    shape, place = ((end - begin) * out, high - low), (torch.cat(rows), torch.cat(columns) - low)
    element = torch.zeros(shape, dtype=torch.long).index_put(place, torch.cat(elements))
    mask = torch.zeros(shape).index_put(place, torch.ones(()))
    return kind, low, high, element, mask, layout.nodes[begin:end, 1].long()


def _runs(layout):
    """(kind, first node, last node, edges ``[nodes, in-degree, 3]``) of runs of nodes that lack the same arguments."""
    ptr = layout.edge_ptr.tolist()
    arguments = [tuple(layout.edges[first:last, 2].tolist()) for first, last in pairwise(ptr)]
    for begin, end in pairwise(layout.steps):
        while begin < end:
            last = begin + 1
            while last < end and arguments[last] == arguments[begin]:
                last += 1
            edges = layout.edges[ptr[begin] : ptr[last]].view(last - begin, -1, 3).long()
            yield int(layout.nodes[begin, 0]), begin, last, edges
            begin = last


def _activated(layout, kind, activation, z):
    return z if layout.kinds[kind].linear else getattr(F, activation)(z)
