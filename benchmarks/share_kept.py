"""``python -m benchmarks.share_kept``: the time of threshold attention over the share of keys that it keeps.

Forward, and forward with backward, against SDPA at every share; flex_attention (it has no backward on the CPU) and
entmax-1.5, sparsemax and top-k made of torch ops at one share, since they compute all scores whatever is kept of them.
"""

import argparse
import random
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import torch
from rich.progress import track

from benchmarks import attention_kinds as kinds
from benchmarks.attention_kinds import HEADS, WIDTH
from benchmarks.density import crossing
from benchmarks.inputs import fastest
from benchmarks.system import describe_run
from benchmarks.threshold_attention import BARS, SPARSE_PEERS, runs_of
from benchmarks.timing import LEAST_ROUNDS, seconds_per_call
from compsparse_kernels.cli.output import add_json_option, console_for, write_json
from compsparse_kernels.testing import num_threads

LENGTH = 2048
SHARES = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0)
PEERS_SHARE = 0.05  # where the peers that don't depend on it are measured
SLOW_ROUNDS = 3  # of the peers made of torch ops, which take seconds
DIRECTIONS = tuple(BARS)
OURS, SDPA, FLEX = "this library", "SDPA", "flex_attention"
STYLES = {OURS: ("C0", "o-"), SDPA: ("black", "--"), FLEX: ("C1", "s")}
STYLES |= {name: (f"C{number}", "x") for number, name in enumerate(SPARSE_PEERS, start=2)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.share_kept", description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="number of threads (%(default)s)")
    parser.add_argument("--rounds", type=int, default=LEAST_ROUNDS, help="rounds of all sides in turn (%(default)s)")
    parser.add_argument("--length", type=int, default=LENGTH, help="number of tokens (%(default)s)")
    parser.add_argument("--clustered", action="store_true", help="tokens around a few centres (Gaussian otherwise)")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="draw the figure into FILE")
    add_json_option(parser)
    arguments = parser.parse_args(argv)
    console = console_for(arguments.json)
    torch.manual_seed(random.randrange(2**31))
    with num_threads(arguments.threads):
        points = [
            point
            for share in track(SHARES, "measuring", console=console)
            for point in measure(share, arguments.length, arguments.rounds, arguments.clustered)
        ]
    even = {direction: break_even(points, direction) for direction in DIRECTIONS}
    settings = {"threads": arguments.threads, "length": arguments.length, "clustered": arguments.clustered}
    result = {"machine": describe_run(), **settings, "break_even": even, "points": points}
    write_json(result, arguments.json)
    for direction, share in even.items():
        console.print(f"{direction}: {describe_break_even(share)}")
    if arguments.plot is not None:
        draw(result, arguments.plot)
        console.print(f"wrote {arguments.plot}")
    return 0


def measure(share: float, length: int, rounds: int, clustered: bool) -> list[dict]:
    """Medians of each side, all in turn, once each has been compared with float64; ``to_sdpa`` is the median of its
    paired ratios to SDPA."""
    ours = kinds.ours()
    query, key, value = kinds.tokens(length, clustered)
    query *= kinds.sharpness(query, key, share, kinds.above_threshold)
    _, support = ours.ways[0](query, key, value, return_support=True)
    tensors, attentions = (query, key, value), {OURS: ours, **_peers(length, share)}
    # Which way is faster does not depend on the direction: the backward of all ways is the same.
    with torch.no_grad():
        fastest_ways = {name: _fastest_way(attention, tensors) for name, attention in attentions.items()}
    points = []
    for direction in DIRECTIONS:
        backward = direction == "forward+backward"
        grad = torch.randn_like(query) if backward else None
        chosen = {name: way for name, way in fastest_ways.items() if not (backward and name == FLEX)}
        samples = _samples(_checked_runs(tensors, grad, chosen), rounds)
        for name, seconds in samples.items():
            ratios = [mine / theirs for mine, theirs in zip(seconds, samples[SDPA], strict=False)]
            found = {"name": name, "direction": direction, "aim": share, "share": support.share_kept}
            points.append(found | {"ms": 1e3 * statistics.median(seconds), "to_sdpa": statistics.median(ratios)})
    return points


def _peers(length: int, share: float) -> dict[str, kinds.Attention]:
    names = (SDPA, FLEX, *SPARSE_PEERS) if share == PEERS_SHARE else (SDPA,)
    every = kinds.peers(length)
    return {name: every[name] for name in names}


def _fastest_way(attention: kinds.Attention, tensors: tuple) -> kinds.Attention:
    if len(attention.ways) == 1:
        return attention
    runs = dict(zip(runs_of(attention, tensors, None), attention.ways, strict=True))
    return replace(attention, ways=(runs[fastest(runs)],))


def _checked_runs(tensors: tuple, grad: torch.Tensor | None, attentions: dict) -> dict:
    """A call of each side, once its result is right."""
    head = kinds.OneHead(tensors, grad, attentions.values())
    runs = {}
    for name, attention in attentions.items():
        (runs[name],) = runs_of(attention, tensors, grad)
        head.check(attention, runs[name]())
    return runs


def _samples(runs: dict, rounds: int) -> dict[str, list[float]]:
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        for name, run in runs.items():
            if number < SLOW_ROUNDS or name not in SPARSE_PEERS:
                samples[name].append(seconds_per_call(run, 1))
    return samples


def break_even(points: list[dict], direction: str) -> float | None:
    """The share from which on ours takes longer than SDPA; None if at none."""
    mine = [point for point in points if (point["name"], point["direction"]) == (OURS, direction)]
    return crossing((point["share"], point["to_sdpa"]) for point in mine)


def describe_break_even(share: float | None) -> str:
    if share is None:
        return "as fast as SDPA, or faster, at every share of keys kept"
    return f"breaks even with SDPA at {share:.0%} of the keys kept" if share else "slower than SDPA at every share"


def draw(result: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 5.6), layout="constrained", sharey=True)
    for axis, direction in zip(axes, DIRECTIONS, strict=True):
        points = [point for point in result["points"] if point["direction"] == direction]
        _panel(axis, points, result["break_even"][direction])
        axis.set_title(direction, fontsize=10)
    axes[0].set_ylabel("ms")
    axes[0].set_ylim(bottom=0.6 * min(point["ms"] for point in result["points"]))  # room for words
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=9)
    machine, threads = result["machine"], result["threads"]
    commit = (machine["commit"] or "no commit")[:10] + (" with changes" if machine["dirty"] else "")
    data = "clustered" if result["clustered"] else "Gaussian"
    figure.suptitle(
        f"Attention over the share of keys kept, B1 H{HEADS} T{result['length']} D{WIDTH}, {data} tokens, float32\n"
        f"{machine['processor']} ({machine['instruction_set']}), {threads} thread{'s' * (threads > 1)},"
        f" torch {machine['versions']['torch']}, {commit}",
        fontsize=9,
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _panel(axis, points: list[dict], even: float | None) -> None:
    from matplotlib.ticker import LogLocator

    lowest, highest = min(point["share"] for point in points), max(point["share"] for point in points)
    for name, (color, style) in STYLES.items():
        line = sorted((point["share"], point["ms"]) for point in points if point["name"] == name)
        if len(line) > 1:
            axis.plot(*zip(*line, strict=True), style, color=color, markersize=4, label=name)
        elif line:  # one point is measured; the thin line says that others would lie at its height
            axis.plot(*line[0], style, color=color, markersize=6, label=f"{name} (at {PEERS_SHARE:.0%})")
            axis.plot([lowest, highest], [line[0][1]] * 2, ":", linewidth=1, color=color)
    if even:
        axis.axvline(even, color="gray", linewidth=1)
        to_the_right = even < 0.35
        axis.text(
            even * (1.05 if to_the_right else 0.95), 0.02, f"breaks even\nat {100 * even:.0f} %", fontsize=9,
            ha="left" if to_the_right else "right", transform=axis.get_xaxis_transform(),
        )  # fmt: skip
    axis.set(xscale="log", yscale="log", xlabel="share of keys kept")
    ticks = [share for share in SHARES if share not in (0.3, 0.7, 0.9)]
    axis.set_xticks(ticks, [f"{100 * share:g} %" for share in ticks])
    axis.minorticks_off()
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.grid(alpha=0.25)


if __name__ == "__main__":
    sys.exit(main())
