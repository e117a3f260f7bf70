"""``python -m benchmarks.density``: a training step of a pruned layer over its density, and where sparse breaks even.

Forward and backward of x, weight and bias, float32, against a dense layer, ``F.linear(x, W * M)`` and torch's own CSR.
"""

import argparse
import random
import statistics
import sys
import warnings
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import track

from benchmarks.inputs import differentiated, fastest, leaves, mask_of_density
from benchmarks.system import describe_run
from benchmarks.timing import LEAST_ROUNDS, seconds_per_call
from compsparse_kernels import MaskLayout, masked_linear
from compsparse_kernels.cli.output import add_json_option, console_for, write_json
from compsparse_kernels.testing import num_threads

BATCH, IN_FEATURES, OUT_FEATURES = 256, 1024, 1024
DENSITIES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.85, 1.0)
SPARSE_PEER_LIMIT = 0.5  # above it torch's CSR takes a hundred times as long as dense: nobody would
DENSE, MASKED, CSR_AUTOGRAD = "F.linear, dense", "F.linear(x, W*M)", "torch.sparse CSR autograd"
OURS = {"csr": "this library, kind csr", "auto": "this library, kind auto"}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.density", description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="number of threads (%(default)s)")
    parser.add_argument("--rounds", type=int, default=LEAST_ROUNDS, help="rounds of all sides in turn (%(default)s)")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="draw the figure into FILE")
    add_json_option(parser)
    arguments = parser.parse_args(argv)
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
    console = console_for(arguments.json)
    torch.manual_seed(random.randrange(2**31))
    with num_threads(arguments.threads):
        points = [
            point
            for density in track(DENSITIES, "measuring", console=console)
            for point in measure(density, arguments.rounds)
        ]
    even = {name: break_even(points, name) for name in OURS.values()}
    result = {"machine": describe_run(), "threads": arguments.threads, "break_even": even, "points": points}
    write_json(result, arguments.json)
    for name, density in even.items():
        console.print(f"{name}: {describe_break_even(density)}")
    if arguments.plot is not None:
        draw(result, arguments.plot)
        console.print(f"wrote {arguments.plot}")
    return 0


def measure(density: float, rounds: int, shape: tuple = (BATCH, IN_FEATURES, OUT_FEATURES)) -> list[dict]:
    """Medians of each side, in turn; ``to_dense`` is the median of its paired ratios to the dense layer."""
    steps = _steps(density, *shape)
    for step in steps.values():
        step()
    samples = [{name: seconds_per_call(step, 3) for name, step in steps.items()} for _ in range(rounds)]
    return [
        {
            "name": name,
            "density": density,
            "ms": 1e3 * statistics.median(sample[name] for sample in samples),
            "to_dense": statistics.median(sample[name] / sample[DENSE] for sample in samples),
        }
        for name in steps
    ]


def _steps(density: float, batch: int, in_features: int, out_features: int) -> dict:
    mask = mask_of_density(out_features, in_features, density)
    x, weight, bias = torch.randn(batch, in_features), torch.randn(out_features, in_features), torch.randn(out_features)
    grad = torch.randn(batch, out_features)
    steps = {
        DENSE: differentiated(F.linear, leaves(x, weight, bias), grad),
        MASKED: differentiated(lambda x, w, b: F.linear(x, w * mask, b), leaves(x, weight, bias), grad),
    }
    for kind, name in OURS.items():
        layout = MaskLayout.from_mask(mask, kind)
        product = lambda x, values, bias, layout=layout: masked_linear(x, values, layout, bias)  # noqa: E731
        steps[name] = differentiated(product, leaves(x, layout.pack(weight), bias), grad)
    if density <= SPARSE_PEER_LIMIT:
        inputs = leaves(x, (weight * mask).to_sparse_csr(), bias)
        ways = (lambda x, w, b: torch.sparse.mm(w, x.T).T + b, lambda x, w, b: (w @ x.T).T + b)
        steps[CSR_AUTOGRAD] = fastest(differentiated(way, inputs, grad) for way in ways)
    return steps


def break_even(points: list[dict], name: str) -> float | None:
    """The density where a side becomes slower than dense, as ``crossing`` finds it."""
    return crossing((point["density"], point["to_dense"]) for point in points if point["name"] == name)


def crossing(line: Iterable[tuple[float, float]]) -> float | None:
    """Where a ratio over a share becomes more than 1, on a straight line between two points; None if never."""
    line = sorted(line)
    if line[0][1] > 1:
        return 0.0
    for (share, ratio), (next_share, next_ratio) in pairwise(line):
        if ratio <= 1 < next_ratio:
            return share + (next_share - share) * (1 - ratio) / (next_ratio - ratio)
    return None


def describe_break_even(density: float | None) -> str:
    if density is None:
        return "as fast as dense, or faster, at every density"
    return f"breaks even with dense at density {density:.2f}" if density else "slower than dense at every density"


def draw(result: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7.6, 5.4), layout="constrained")
    styles = {DENSE: "k--", MASKED: "s:", CSR_AUTOGRAD: "x:", **dict.fromkeys(OURS.values(), "o-")}
    for name, style in styles.items():
        line = [point for point in result["points"] if point["name"] == name]
        axis.plot([p["density"] for p in line], [p["ms"] for p in line], style, markersize=4, label=name)
    even = result["break_even"][OURS["csr"]]
    if even:
        dense = statistics.median(point["ms"] for point in result["points"] if point["name"] == DENSE)
        axis.axvline(even, color="gray", linewidth=1)
        axis.annotate(
            f"csr breaks even\nat {even:.2f}", (even, dense), (1.2 * even, 0.3 * dense), fontsize=9, ha="left",
            arrowprops={"arrowstyle": "->", "color": "gray"},
        )  # fmt: skip
    axis.set(xscale="log", yscale="log", xlabel="density", ylabel="forward and backward, ms")
    ticks = [density for density in DENSITIES if density not in (0.4, 0.6, 0.85)]
    axis.set_xticks(ticks, [f"{density:g}" for density in ticks])
    axis.minorticks_off()
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.grid(alpha=0.25)
    axis.legend(fontsize=9, loc="best")
    machine, threads = result["machine"], result["threads"]
    commit = (machine["commit"] or "no commit")[:10] + (" with changes" if machine["dirty"] else "")
    axis.set_title(
        f"A training step of a pruned layer, ({BATCH}, {IN_FEATURES}->{OUT_FEATURES}), random mask, float32\n"
        f"{machine['processor']} ({machine['instruction_set']}), {threads} thread{'s' * (threads > 1)},"
        f" torch {machine['versions']['torch']}, {commit}",
        fontsize=9,
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
