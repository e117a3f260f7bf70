"""Which tokens fed which, layer by layer: the graph that thresholded attention found for an input."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from compsparse_kernels.graphs.checks import import_extra
from compsparse_kernels.layouts.checks import describe, require
from compsparse_kernels.nn.attention_runs import run, watched

if TYPE_CHECKING:
    import networkx
    from matplotlib.axes import Axes

INK, EDGE, SOURCE, RESIDUAL = "#44546a", "#2f6f9f", "#ffffff", "#c2621b"
MOST_LABELS = 40  # tokens a layer


def support_graph(
    model: nn.Module,
    inputs: torch.Tensor | tuple,
    *,
    example: int = 0,
    head: int | None = None,
    residual: bool = False,
) -> "networkx.DiGraph":
    """The graph of one example: an edge from each token to those whose queries kept its key, in each layer.

    Vertices are ``(layer, token)``: layer 0 is what the first attention reads, layer l what the l-th one returns. Keys
    that are not the queries' own tokens (cross attention) are vertices ``("keys l", token)``. Edges lead from one layer
    to the next, so the graph has no cycles, causal or not.

    Args:
        model: attention, or a model with :class:`ThresholdAttention` in it; the layers are in the order they run. It
            runs once, in eval mode and without gradients, and is left as it was.
        inputs: ``model(inputs)``, or a tuple of arguments. Attention itself takes a tensor as query, key and value.
        example: which element of the batch.
        head: the edges of that head; None those of any head.
        residual: also edges from each token to itself in the next layer, as the residual stream of a transformer has.

    Returns:
        A ``networkx.DiGraph``. Edges have ``weight``, the attention weight (the mean over heads if ``head`` is None;
        0 for a residual that attention does not take too), ``heads``, how many heads kept it, ``residual``, a bool, and
        ``position``, the key's, which orders parents in :meth:`FunctionGraph.from_networkx`. Vertices have ``layer``
        (the column of a picture) and ``token``. ``FunctionGraph.from_networkx(graph)`` makes it a
        :class:`FunctionGraph`, with what has no parents as its sources: a query without keys, too.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.
        ImportError: where networkx is missing.

    Source: Poggio, "It is Compositional Sparsity: a framework for ML", section 5.2: attention finds the sparse parents.

    Example:
        >>> import torch
        >>> from compsparse_kernels import FunctionGraph, ThresholdAttention
        >>> from compsparse_kernels.nn import support_graph
        >>> attn = ThresholdAttention(8, num_heads=2, threshold=2, rule="topk", batch_first=True)
        >>> graph = support_graph(attn, torch.randn(1, 5, 8), head=0)
        >>> graph.number_of_nodes(), graph.number_of_edges()
        (10, 10)
        >>> FunctionGraph.from_networkx(graph).num_sources
        5
    """
    networkx = import_extra("networkx")
    calls = []
    with watched(model, lambda module, call: calls.append(call)):
        run(model, inputs)
    require(len(calls) > 0, "model", "attention that runs on the inputs", "none that did")
    for name, value in (("example", example), ("head", 0 if head is None else head)):
        is_int = isinstance(value, int) and not isinstance(value, bool)
        require(is_int, name, "an int", describe(value), TypeError)
    graph = networkx.DiGraph()
    _add_tokens(graph, 0, calls[0].query.shape[2])
    for layer, call in enumerate(calls, 1):
        batch, heads = call.query.shape[:2]
        packed = call.options.get("cu_seqlens_q") is not None
        require(not packed, "inputs", "tensors that are not nested", "nested ones")
        require(0 <= example < batch, "example", f"one of {batch}, from 0 on", example)
        require(head is None or 0 <= head < heads, "head", f"None, or one of {heads}, from 0 on", head)
        _add_layer(graph, layer, call.example(example), head, residual)
    return graph


def _add_tokens(graph, layer, count):
    column = layer if isinstance(layer, int) else int(layer.split()[1]) - 1
    graph.add_nodes_from(((layer, token), {"layer": column, "token": token}) for token in range(count))


def _add_layer(graph, layer, call, head, residual):
    queries, keys = call.query.shape[2], call.key.shape[2]
    require(
        (layer - 1, queries - 1) in graph and (layer - 1, queries) not in graph,
        "model",
        "as many queries in each layer",
        f"{queries} in layer {layer}",
    )
    _add_tokens(graph, layer, queries)
    before = layer - 1 if call.is_self and keys == queries else f"keys {layer}"
    if before != layer - 1:
        _add_tokens(graph, before, keys)
    support = call.support()
    weights, kept = support.to_dense()[0], support.to_mask()[0]  # [H, Tq, Tk]
    if head is not None:
        weights, kept = weights[head : head + 1], kept[head : head + 1]
    mean, count = weights.mean(0).tolist(), kept.sum(0)
    for query, key in count.nonzero().tolist():
        facts = {"weight": mean[query][key], "heads": int(count[query, key]), "residual": False, "position": key}
        graph.add_edge((before, key), (layer, query), **facts)
    if residual:
        for token in range(queries):
            edge = ((layer - 1, token), (layer, token))
            if graph.has_edge(*edge):
                graph.edges[edge]["residual"] = True
            else:
                graph.add_edge(*edge, weight=0.0, heads=0, residual=True, position=token)


def draw_support_graph(graph: "networkx.DiGraph", ax: "Axes | None" = None, labels: list[str] | None = None) -> "Axes":
    """Draws a graph of :func:`support_graph`: a column for each layer, tokens downward, edges the stronger the larger
    their weight; residual edges are orange.

    Args:
        graph: of one example.
        ax: matplotlib axes to draw on; by default those of a new figure.
        labels: what the tokens are, written beside the first column; their numbers by default.

    Returns:
        The axes.

    Raises:
        ImportError: where matplotlib is missing.

    Example:
        >>> import matplotlib, torch
        >>> matplotlib.use("Agg")
        >>> from compsparse_kernels import ThresholdAttention
        >>> from compsparse_kernels.nn import draw_support_graph, support_graph
        >>> attn = ThresholdAttention(8, num_heads=2, threshold=2, rule="topk", batch_first=True)
        >>> graph = support_graph(attn, torch.randn(1, 5, 8), head=0)
        >>> draw_support_graph(graph, labels=list("abcde")).get_title(loc="left")
        '5 tokens, 1 layer, 10 edges, 2 a query'
    """
    import_extra("matplotlib")
    from matplotlib.collections import LineCollection

    places = {vertex: _place(vertex, data) for vertex, data in graph.nodes(data=True)}
    layers = max(data["layer"] for _, data in graph.nodes(data=True))
    tokens = sum(1 for vertex in graph if vertex[0] == 0)
    require(
        labels is None or len(labels) == tokens,
        "labels",
        f"{tokens}, one a token",
        None if labels is None else len(labels),
    )
    if ax is None:
        from matplotlib import pyplot

        size = (min(max(2.2 * layers + 1.6, 4), 16), min(max(0.26 * tokens + 1, 3), 12))
        ax = pyplot.subplots(figsize=size, layout="constrained")[1]
    edges = [(places[tail], places[head], data) for tail, head, data in graph.edges(data=True)]
    _draw_lines(ax, [edge for edge in edges if edge[2]["heads"]], EDGE, LineCollection, solid=False)
    _draw_lines(ax, [edge for edge in edges if edge[2]["residual"]], RESIDUAL, LineCollection, solid=True)
    points = np.array(list(places.values()))
    first = [data["layer"] == 0 or isinstance(vertex[0], str) for vertex, data in graph.nodes(data=True)]
    colours = [SOURCE if each else INK for each in first]
    size = min(42, 2600 / max(1, tokens))
    ax.scatter(*points.T, s=size, c=colours, edgecolors=INK, linewidths=0.9, zorder=3)
    _write(ax, graph, places, layers, tokens, labels)
    return ax


def _place(vertex, data):
    """Keys of cross attention stand a little to the right of the layer whose queries they meet."""
    return data["layer"] + (0.35 if isinstance(vertex[0], str) else 0), -data["token"]


def _draw_lines(ax, edges, colour, collection, solid):
    from matplotlib.colors import to_rgb

    if not edges:
        return
    most = max(data["weight"] for *_, data in edges) or 1.0
    alphas = [0.5 if solid else 0.12 + 0.88 * data["weight"] / most for *_, data in edges]
    widths = [0.8 if solid else 0.4 + 1.6 * data["weight"] / most for *_, data in edges]
    rows = [(*to_rgb(colour), alpha) for alpha in alphas]
    ends = [(start, end) for start, end, _ in edges]
    ax.add_collection(collection(ends, colors=rows, linewidths=widths, zorder=1 if not solid else 2))


def _write(ax, graph, places, layers, tokens, labels):
    kept = sum(1 for *_, heads in graph.edges(data="heads") if heads)
    queries = tokens * layers
    parts = [_count(tokens, "token"), _count(layers, "layer"), _count(kept, "edge"), f"{kept / queries:.3g} a query"]
    ax.set_title(", ".join(parts), loc="left", fontsize=9, color=INK)
    ax.set_xticks(range(layers + 1), ["input", *(f"layer {layer}" for layer in range(1, layers + 1))], fontsize=8)
    if labels is not None or tokens <= MOST_LABELS:
        texts = labels if labels is not None else range(tokens)
        ax.set_yticks([-token for token in range(tokens)], texts, fontsize=min(8, 320 / tokens))
    else:
        ax.set_yticks([])
    ax.tick_params(length=0, colors=INK)
    ax.spines[:].set_visible(False)
    ax.margins(x=0.06, y=0.04)


def _count(number, noun):
    return f"{number} {noun}" + "s" * (number != 1)
