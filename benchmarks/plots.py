"""Ratio against density: one figure per op and number of threads, a panel per direction and shape."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

PANELS_ACROSS = 4


def draw(result: dict, folder: Path) -> list[Path]:
    """Writes the figures of a result and returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for row in result["rows"] if row["ratio"] is not None and row["density"] is not None]
    paths = []
    for op, threads in dict.fromkeys((row["op"], row["threads"]) for row in rows):
        chosen = [row for row in rows if (row["op"], row["threads"]) == (op, threads)]
        path = folder / f"{op}_{threads}_threads.png"
        figure = _figure(chosen)
        figure.suptitle(_title(op, threads, result["machine"]))
        figure.savefig(path, dpi=130)
        plt.close(figure)
        paths.append(path)
    return paths


def _title(op: str, threads: int, machine: dict) -> str:
    commit = (machine["commit"] or "no commit")[:10] + (" with changes" if machine["dirty"] else "")
    return (
        f"{op}: time of the peer / our time, {threads} thread{'s' * (threads > 1)}\n"
        f"{machine['processor']} ({machine['instruction_set']}), torch {machine['versions']['torch']}, {commit}"
    )


def _figure(rows: list[dict]):
    panels = list(dict.fromkeys((row["direction"], row["shape"]) for row in rows))
    across = min(PANELS_ACROSS, len(panels))
    down = -(-len(panels) // across)
    figure, axes = plt.subplots(
        down, across, figsize=(4.6 * across, 4.2 * down + 0.9), squeeze=False, layout="constrained"
    )
    for axis, panel in zip(axes.flat, panels, strict=False):
        _panel(axis, [row for row in rows if (row["direction"], row["shape"]) == panel])
        axis.set_title(f"{panel[0]}, {panel[1]}", fontsize=10)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    return figure


def _panel(axis, rows: list[dict]) -> None:
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.axhline(1, color="black", linewidth=1, label="the peer")
    for (variant, peer), line in _lines(rows).items():
        line.sort(key=lambda row: row["density"])
        densities = [row["density"] for row in line]
        (drawn,) = axis.plot(
            densities, [row["ratio"] for row in line], marker="o", markersize=4, label=f"{variant} vs {peer}"
        )
        barred = [(row["density"], row["bar"]) for row in line if row["bar"] is not None]
        axis.scatter(*zip(*barred, strict=True) if barred else ([], []), marker="_", s=160, color=drawn.get_color())
    axis.scatter([], [], marker="_", s=160, color="gray", label="bar")
    densities = sorted({round(row["density"], 3) for row in rows})
    apart = [density for index, density in enumerate(densities) if index == 0 or density > 1.2 * densities[index - 1]]
    axis.xaxis.set_major_locator(FixedLocator(apart))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.grid(alpha=0.25)
    axis.set_xlabel("density")
    axis.legend(fontsize=7)


def _lines(rows: list[dict]) -> dict[tuple, list[dict]]:
    """Rows by what varies beside density; a variant that names the share kept is no line of its own."""
    lines: dict[tuple, list[dict]] = {}
    for row in rows:
        variant = row["variant"]
        if variant.startswith("kept"):
            variant = ", ".join(["ours", *variant.split(", ")[1:]])
        lines.setdefault((variant, row["peer"]), []).append(row)
    return lines
