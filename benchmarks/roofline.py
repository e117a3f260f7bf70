"""``python -m benchmarks.roofline``: GFLOP/s of the non-zeros over arithmetic intensity, beside dense torch and BSR.

Intensity is the multiply-adds of the non-zeros, twice, per byte that any way of computing must move once: x, y and the
stored values. The sloping roof is memory read as fast as torch sums it up; the flat one is the best dense product here.
"""

import argparse
import random
import sys
import warnings
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import track

from benchmarks.inputs import mask_of_density
from benchmarks.system import describe_run
from benchmarks.timing import seconds_per_call
from compsparse_kernels import BlockLayout, block_sparse_linear
from compsparse_kernels.cli.output import add_json_option, console_for, write_json
from compsparse_kernels.testing import num_threads

FEATURES = 1024
BATCHES = (1, 8, 32, 128, 512, 2048)
BLOCKS = (4, 8, 16, 32, 64)
DENSITIES = (0.5, 0.1, 0.05)
SAMPLE = 0.02  # seconds of one of the samples of which the best counts
SAMPLES = 5


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="number of threads (%(default)s)")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="draw the figure into FILE")
    add_json_option(parser)
    arguments = parser.parse_args(argv)
    warnings.filterwarnings("ignore", message="Sparse BSR tensor support is in beta")
    console = console_for(arguments.json)
    torch.manual_seed(random.randrange(2**31))
    cases = list(product(BATCHES, DENSITIES, BLOCKS))
    with num_threads(arguments.threads), torch.no_grad():
        points = [point for case in track(cases, "measuring", console=console) for point in _points(*case)]
        points += [_dense_point(batch) for batch in BATCHES]
        bandwidth = _bandwidth()
    result = {"machine": describe_run(), "threads": arguments.threads, "bytes_per_second": bandwidth, "points": points}
    write_json(result, arguments.json)
    if arguments.plot is not None:
        draw(result, arguments.plot)
        console.print(f"wrote {arguments.plot}")
    return 0


def _points(batch: int, density: float, block: int) -> list[dict]:
    side = FEATURES // block
    layout = BlockLayout.from_mask(mask_of_density(side, side, density), (block, block))
    x, values = torch.randn(batch, FEATURES), torch.randn(layout.values_shape)
    columns, bsr = x.T.contiguous(), layout.to_bsr(values)
    nonzeros = values.numel()
    ours = _point("this library", batch, nonzeros, lambda: block_sparse_linear(x, values, layout))
    theirs = _point("torch.sparse BSR", batch, nonzeros, lambda: bsr @ columns)
    return [{**point, "density": density, "block": block} for point in (ours, theirs)]


def _dense_point(batch: int) -> dict:
    x, weight = torch.randn(batch, FEATURES), torch.randn(FEATURES, FEATURES)
    point = _point("F.linear", batch, FEATURES**2, lambda: F.linear(x, weight))
    return {**point, "density": 1.0, "block": None}


def _point(name: str, batch: int, nonzeros: int, run) -> dict:
    flops, moved = 2 * batch * nonzeros, 4 * (nonzeros + 2 * batch * FEATURES)
    seconds = _best_seconds(run)
    return {"name": name, "batch": batch, "intensity": flops / moved, "gflops": flops / seconds / 1e9}


def _best_seconds(run) -> float:
    """Best, not typical: a roofline asks what the machine can do."""
    repeats = max(1, round(SAMPLE / seconds_per_call(run, 3)))
    return min(seconds_per_call(run, repeats) for _ in range(SAMPLES))


def _bandwidth() -> float:
    numbers = torch.ones(2**27)  # 512 MiB, far beyond any cache
    return 4 * numbers.numel() / _best_seconds(numbers.sum)


def draw(result: dict, path: Path) -> None:
    """A panel per density: a line per block size over the batch, which sets the intensity."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(DENSITIES), figsize=(5.2 * len(DENSITIES), 5), sharey=True, layout="constrained")
    dense = [point for point in result["points"] if point["name"] == "F.linear"]
    for axis, density in zip(axes, DENSITIES, strict=True):
        chosen = [point for point in result["points"] if point["density"] == density]
        for color, block in enumerate(BLOCKS):
            for name, style in (("this library", "o-"), ("torch.sparse BSR", "x:")):
                line = [point for point in chosen if (point["name"], point["block"]) == (name, block)]
                label = f"block {block}" if name == "this library" else None
                _line(axis, line, style, color=f"C{color}", label=label)
        _line(axis, dense, "s--", color="black", label="F.linear, dense")
        axis.plot([], [], "x:", color="gray", label="torch.sparse BSR")
        _roofs(axis, result, max(point["gflops"] for point in dense))
        axis.set_title(f"density {density:g}")
        axis.set_xlabel("FLOP of the non-zeros per byte of x, y and values")
    axes[0].set_ylabel("GFLOP/s of the non-zeros")
    axes[0].legend(fontsize=8, loc="lower right")
    machine, threads = result["machine"], result["threads"]
    commit = (machine["commit"] or "no commit")[:10] + (" with changes" if machine["dirty"] else "")
    batches = ", ".join(map(str, BATCHES))
    figure.suptitle(
        f"Block-sparse forward, {FEATURES} to {FEATURES} features, batches {batches} from left to right, float32\n"
        f"{machine['processor']} ({machine['instruction_set']}), {threads} thread{'s' * (threads > 1)},"
        f" torch {machine['versions']['torch']}, {commit}"
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _line(axis, points: list[dict], style: str, **options) -> None:
    points = sorted(points, key=lambda point: point["intensity"])
    axis.plot(
        [point["intensity"] for point in points], [point["gflops"] for point in points], style, markersize=4, **options
    )


def _roofs(axis, result: dict, best: float) -> None:
    low, high = 0.3, 400
    bandwidth = result["bytes_per_second"] / 1e9
    axis.plot([low, best / bandwidth], [low * bandwidth, best], color="gray", linewidth=1)
    axis.axhline(best, color="gray", linewidth=1)
    axis.text(low, low * bandwidth * 1.1, f"memory, {bandwidth:.0f} GB/s", fontsize=7, color="gray", rotation=38)
    axis.text(low, best * 1.05, f"best dense product, {best:.0f} GFLOP/s", fontsize=7, color="gray")
    axis.set(xscale="log", yscale="log", xlim=(low, high))
    axis.grid(alpha=0.25)


if __name__ == "__main__":
    sys.exit(main())
