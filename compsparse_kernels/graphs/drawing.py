"""Pictures of graphs: levels as columns, sources left, sinks right. ``draw`` is a method of FunctionGraph."""

from typing import TYPE_CHECKING

import numpy as np

from compsparse_kernels.graphs.checks import import_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from compsparse_kernels.graphs.function_graph import FunctionGraph

SOURCE_COLOUR = "#ffffff"
OWN_COLOUR = "#44546a"
EDGE_COLOUR = "#44546a"
SKIP_COLOUR = "#c2621b"
MOST_LABELS = 40
MOST_LEGEND_ENTRIES = 8
CURVE_POINTS = 24
RING = 1.5  # diameter of a sink's ring over that of a node


def draw(self, ax: "Axes | None" = None) -> "Axes":
    """Draws the graph: a column for each level, sources left.

    Nodes that share weights have one colour, sinks a ring, sources are white; edges that skip levels are orange. Names
    and labels are written where there are few vertices. Made for up to a few hundred nodes.

    Args:
        ax: matplotlib axes to draw on; by default those of a new figure.

    Returns:
        The axes.

    Raises:
        ImportError: where matplotlib is missing.

    Example:
        >>> import matplotlib
        >>> matplotlib.use("Agg")
        >>> from compsparse_kernels import FunctionGraph
        >>> FunctionGraph.tree(16, share="level").draw().get_title(loc="left")
        '16 sources, 15 nodes in 4 levels, 1 sink, 30 edges, in-degree 2, 4 weights'
    """
    import_extra("matplotlib")
    heights = vertical_places(self)
    most = max(len(level) for level in self.levels)
    if ax is None:
        from matplotlib import pyplot

        size = (min(max(1.5 * self.num_levels + 2, 5), 16), min(max(0.32 * most + 1.2, 3.2), 11))
        ax = pyplot.subplots(figsize=size, layout="constrained")[1]
    _draw_edges(self, ax, heights)
    _draw_vertices(self, ax, heights)
    ax.set_title(self._sizes(), loc="left", fontsize=9, color=OWN_COLOUR)
    ticks = range(self.num_levels + 1)
    step = max(1, -(-len(ticks) // 16))
    shown = ticks[::step]
    ax.set_xticks(shown, ["sources" if level == 0 else f"level {level}" for level in shown], fontsize=8)
    ax.tick_params(axis="x", length=0, colors=OWN_COLOUR)
    ax.set_yticks([])
    ax.spines[:].set_visible(False)
    points_high = ax.get_window_extent().height * 72 / ax.figure.dpi
    ax.margins(x=0.6 / max(self.num_levels, 3), y=max(0.06, 24 / points_high))
    return ax


def vertical_places(graph: "FunctionGraph") -> np.ndarray:
    """y of each vertex: near the middle of its parents, at least 1 from its neighbours in the column; downward from 0.

    A column is in the order of ids, or of the parents' middles where that makes the edges shorter.
    """
    places = np.zeros(graph.num_vertices)
    places[graph.levels[0]] = -np.arange(graph.num_sources)
    for level in range(1, graph.num_levels + 1):
        vertices = graph.levels[level]
        parents = [places[graph.parents_of(vertex)] for vertex in vertices]
        middles = np.array([each.mean() for each in parents])
        candidates = []
        for order in (np.arange(len(vertices)), np.argsort(-middles, kind="stable")):
            column = np.empty(len(vertices))
            column[order] = -_spaced(-middles[order])
            length = sum(np.abs(each - y).sum() for each, y in zip(parents, column, strict=True))
            candidates.append((round(length, 6), len(candidates), column))
        places[vertices] = min(candidates)[2]
    return places


def _spaced(wanted: np.ndarray) -> np.ndarray:
    """Nearest to ``wanted`` in the sum of squares, ascending in steps of at least 1 (pool adjacent violators)."""
    blocks = []  # [sum, count] of runs that move together
    for place, value in enumerate(wanted):
        blocks.append([value - place, 1])
        while len(blocks) > 1 and blocks[-2][0] * blocks[-1][1] >= blocks[-1][0] * blocks[-2][1]:
            total, count = blocks.pop()
            blocks[-1][0] += total
            blocks[-1][1] += count
    means = np.repeat([total / count for total, count in blocks], [count for _, count in blocks])
    return means + np.arange(len(wanted))


def _draw_edges(graph: "FunctionGraph", ax: "Axes", heights: np.ndarray) -> None:
    from matplotlib.collections import LineCollection

    tails = graph.parents.idx
    heads = graph.parents.node_of_edge() + graph.num_sources
    skips = graph.level[heads] - graph.level[tails] > 1
    starts, ends = (np.stack((graph.level[each], heights[each]), axis=1) for each in (tails, heads))
    curves = _curves(starts, ends)
    crowd = min(1.0, (60 / len(tails)) ** 0.5)
    for chosen, colour, alpha, order in ((~skips, EDGE_COLOUR, 0.7, 1), (skips, SKIP_COLOUR, 0.6, 1.5)):
        lines = LineCollection(
            curves[chosen], colors=colour, alpha=max(0.12, alpha * crowd), linewidths=0.5 + 0.6 * crowd
        )
        lines.set_zorder(order)
        ax.add_collection(lines)


def _curves(starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """``[edges, points, 2]``: cubic Bezier curves that leave and arrive horizontally."""
    t = np.linspace(0, 1, CURVE_POINTS)[:, None]
    middle = (starts[:, :1] + ends[:, :1]) / 2
    control_start = np.concatenate((middle, starts[:, 1:]), axis=1)[:, None]
    control_end = np.concatenate((middle, ends[:, 1:]), axis=1)[:, None]
    outer = starts[:, None] * (1 - t) ** 3 + ends[:, None] * t**3
    return outer + 3 * control_start * (1 - t) ** 2 * t + 3 * control_end * (1 - t) * t**2


def _draw_vertices(graph: "FunctionGraph", ax: "Axes", heights: np.ndarray) -> None:
    size = _diameter(graph, ax, heights) ** 2
    sources = np.arange(graph.num_sources)
    edge = {"edgecolors": OWN_COLOUR, "linewidths": 0.9, "zorder": 3}
    ax.scatter(graph.level[sources], heights[sources], s=size, c=SOURCE_COLOUR, **edge)
    ring = max(1.2, 0.12 * size**0.5)
    sinks = graph.sinks
    ax.scatter(
        graph.level[sinks],
        heights[sinks],
        s=size * RING**2,
        facecolors="#ffffff",
        edgecolors=OWN_COLOUR,
        linewidths=ring,
        zorder=3,
    )
    colours = _colours(graph)
    nodes = np.arange(graph.num_sources, graph.num_vertices)
    rows = [colours[number] for number in graph.share]
    ax.scatter(graph.level[nodes], heights[nodes], s=size, c=rows, edgecolors="#ffffff", linewidths=0.6, zorder=4)
    _legend(graph, ax, colours)
    if graph.num_vertices <= MOST_LABELS:
        _write_labels(graph, ax, heights, size**0.5)


def _diameter(graph: "FunctionGraph", ax: "Axes", heights: np.ndarray) -> float:
    """Of a vertex in points: as large as the axes have room for."""
    box = ax.get_window_extent()
    points = 72 / ax.figure.dpi
    tall = box.height * points / (np.ptp(heights) + 1)
    wide = box.width * points / (graph.num_levels + 1)
    return float(np.clip(min(0.55 * tall, 0.3 * wide), 2, 13))


def _colours(graph: "FunctionGraph") -> list[tuple | str]:
    """One for each of the weights; those of a single node are all alike."""
    from matplotlib import colormaps

    shared = np.flatnonzero(np.bincount(graph.share) > 1)
    if len(shared) <= 10:
        palette = colormaps["tab10"].colors
    else:
        palette = colormaps["turbo"](np.linspace(0.05, 0.95, len(shared)))
    colours = [OWN_COLOUR] * graph.num_weights
    for number, weights in enumerate(shared):
        colours[weights] = tuple(palette[number])
    return colours


def _legend(graph: "FunctionGraph", ax: "Axes", colours: list[tuple | str]) -> None:
    from matplotlib.lines import Line2D

    several = [number for number in range(graph.num_weights) if colours[number] != OWN_COLOUR]
    marker = {"linestyle": "", "marker": "o", "markersize": 6}
    entries = [Line2D([], [], color=colours[number], label=graph.share_names[number], **marker) for number in several]
    entries = entries if len(entries) <= MOST_LEGEND_ENTRIES else []
    heads = graph.parents.node_of_edge() + graph.num_sources
    if (graph.level[heads] - graph.level[graph.parents.idx] > 1).any():
        entries.append(Line2D([], [], color=SKIP_COLOUR, linewidth=1, label="skips levels"))
    if entries:
        where = {"loc": "upper left", "bbox_to_anchor": (1, 1), "borderaxespad": 0}
        ax.legend(handles=entries, fontsize=8, frameon=False, labelcolor=OWN_COLOUR, **where)


def _write_labels(graph: "FunctionGraph", ax: "Axes", heights: np.ndarray, diameter: float) -> None:
    from matplotlib.patheffects import withStroke

    halo = [withStroke(linewidth=2.2, foreground="#ffffff")]
    for vertex in range(graph.num_vertices):
        source = vertex < graph.num_sources
        style = {"ha": "right", "va": "center"} if source else {"ha": "center", "va": "bottom"}
        radius = 0.5 * diameter * (RING if vertex in graph.sinks else 1)
        offset = (-radius - 4, 0) if source else (0, radius + 2.5)
        ax.annotate(
            _text(graph, vertex),
            (graph.level[vertex], heights[vertex]),
            xytext=offset,
            textcoords="offset points",
            fontsize=7.5,
            color=OWN_COLOUR,
            path_effects=halo,
            zorder=5,
            **style,
        )


def _text(graph: "FunctionGraph", vertex: int) -> str:
    """Name and label, or the id of a vertex that has neither."""
    node = vertex - graph.num_sources
    name = None if graph.names is None else graph.names[vertex]
    label = graph.labels[node] if graph.labels is not None and node >= 0 else None
    parts = [str(part) for part in (name, label) if part is not None]
    return " ".join(parts) or str(vertex)
