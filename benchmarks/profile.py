"""``python -m benchmarks.profile``: where the time of rows that are hard to bring to their bars goes, on one core.

For each row: the least processor time of both sides; a roofline, which is the time that the arithmetic takes at the
core's measured peak, or its bytes at the speed measured for a buffer of that size, whichever is more; the ratio peer /
ours that such a time would have; and the stages of ours, found by leaving things out:

call      the same op on a tiny input
writing   an empty pattern less the call: y, zeros of gradients, packing of x where it is packed
tiles     the non-zeros, at the speed per non-zero that a full pattern of the same blocks has
scatter   what is left: blocks apart, first reads of x that a full pattern spreads over more work
act       networks on a graph: gelu less relu; the backward's steps of it too
again     networks on a graph: the forward that the backward repeats, in place of storing it
levels    networks on a graph: all the rest
"""

import argparse
import re
import sys
from dataclasses import dataclass
from functools import partial

import torch
from rich.progress import track
from rich.table import Table

from benchmarks import block_sparse_linear as blocks
from benchmarks import dag_network as graphs
from benchmarks.inputs import differentiated, leaves
from benchmarks.limits import best_seconds, bytes_per_second, peak_flops
from benchmarks.registry import Entry
from benchmarks.system import describe_run
from compsparse_kernels import BlockLayout, block_sparse_linear
from compsparse_kernels.cli.output import add_json_option, console_for, write_json
from compsparse_kernels.testing import num_threads

FORWARD, BOTH = "forward", "forward+backward"
# Vector operations of an activation per value, each as long as a multiply-add (csrc/cpu/vector_math.h); with slope too.
STEPS = {"relu": (1, 2), "gelu": (29, 33)}


@dataclass(frozen=True)
class Work:
    """What a row can't do without: floating-point operations, and bytes of the tensors that go in or come out."""

    flops: float
    moved: int


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.profile", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="TEXT", default="", help="rows whose name contains TEXT (all)")
    add_json_option(parser)
    arguments = parser.parse_args(argv)
    console = console_for(arguments.json)
    chosen = [entry for entry in representative_entries() if arguments.only in entry.name]
    if not chosen:
        parser.error(f"--only: expected a part of a row's name, got {arguments.only}")
    with num_threads(1):
        dtypes = sorted({entry.dtype for entry in chosen} | {"float32"})
        peaks = {dtype: peak_flops(getattr(torch, dtype)) for dtype in dtypes}
        rows = [profile(entry, peaks[entry.dtype]) for entry in track(chosen, "measuring", console=console)]
    console.print(_table(rows))
    peak_text = ", ".join(f"{dtype} {peak / 1e9:.0f} GFLOP/s" for dtype, peak in peaks.items())
    console.print(f"one core's peak: {peak_text}; ms, least processor time")
    write_json({"machine": describe_run(), "threads": 1, "peaks": peaks, "rows": rows}, arguments.json)
    return 0


def representative_entries() -> list[Entry]:
    """One row, or few, of each class of bars that is missed somewhere."""
    square, chosen = "(1024, 1024->1024)", []
    for entry in [*blocks.entries(), *graphs.entries()]:
        dense = entry.op == blocks.OP and entry.peer == "dense"
        plain = dense and entry.shape == square and entry.density in (0.1, 0.05) and entry.variant != "block 4"
        half = dense and entry.shape.startswith(square) and entry.dtype == "bfloat16" and entry.density in (0.5, 0.05)
        single = dense and entry.shape == "(1, 1024->1024)" and entry.density == 0.05
        tree = entry.op == graphs.OP and entry.shape.startswith("tree") and entry.variant.startswith("width 32")
        if plain or half or single or (tree and entry.peer in (graphs.GEMM, graphs.LOOP)):
            chosen.append(entry)
    return chosen


def profile(entry: Entry, peak: float) -> dict:
    """Times and roofline of one row."""
    case = entry.make()
    ours = best_seconds(case.ours.run)
    peer = min(case.peer.seconds() for _ in range(7)) if case.peer.seconds else best_seconds(case.peer.run)
    work, stages = (_block_stages if entry.op == blocks.OP else _graph_stages)(entry, ours)
    bandwidth = bytes_per_second(work.moved)
    bound = max(work.flops / peak, work.moved / bandwidth)
    return {
        "name": entry.name + (f" / {entry.dtype}" if entry.dtype != "float32" else ""),
        "ours_ms": 1e3 * ours,
        "peer_ms": 1e3 * peer,
        "ratio": peer / ours,
        "bar": entry.bar("bars"),
        "limit": peer / bound,
        "bound_by": "products" if work.flops / peak >= work.moved / bandwidth else "bytes",
        "of_bound": bound / ours,
        "gflops": work.flops / ours / 1e9,
        "bytes": work.moved,
        "bytes_per_second": bandwidth,
        "stages_ms": {name: 1e3 * seconds for name, seconds in stages.items()},
    }


def _block_stages(entry: Entry, ours: float) -> tuple[Work, dict]:
    batch, inputs, outputs = map(int, re.findall(r"\d+", entry.shape)[:3])
    block, dtype = int(entry.variant.removeprefix("block ")), getattr(torch, entry.dtype)
    cells = (outputs // block, inputs // block)
    run = partial(_block_run, entry.direction == BOTH, dtype)
    call = best_seconds(run(1, torch.eye(2, dtype=torch.bool), 8))
    empty = best_seconds(run(batch, torch.zeros(cells, dtype=torch.bool), block))
    full = best_seconds(run(batch, torch.ones(cells, dtype=torch.bool), block))
    nonzeros = round(entry.density * cells[0] * cells[1]) * block**2
    tiles = max(full - empty, 0.0) * nonzeros / (inputs * outputs)
    stages = {"call": call, "writing": max(empty - call, 0.0), "tiles": tiles}
    stages["scatter"] = ours - sum(stages.values())
    passes = 3 if entry.direction == BOTH else 1
    size = nonzeros + batch * (inputs + outputs)
    moved = (passes if passes == 1 else 2) * size * dtype.itemsize  # each tensor and its gradient
    return Work(2 * passes * batch * nonzeros, moved), stages


def _block_run(backward: bool, dtype: torch.dtype, batch: int, mask: torch.Tensor, block: int):
    layout = BlockLayout.from_mask(mask, (block, block))
    outputs, inputs = (cells * block for cells in mask.shape)
    tensors = [torch.randn(batch, inputs), torch.randn(layout.values_shape), torch.randn(outputs)]
    tensors = [tensor.to(dtype) for tensor in tensors]
    forward = lambda x, values, bias: block_sparse_linear(x, values, layout, bias)  # noqa: E731
    if backward:
        return differentiated(forward, leaves(*tensors), torch.randn(batch, outputs).to(dtype))
    return partial(forward, *tensors)


def _graph_stages(entry: Entry, ours: float) -> tuple[Work, dict]:
    graph = entry.shape.removesuffix(f", batch {graphs.BATCH}")
    width, activation = re.fullmatch(r"width (\d+), (\w+)", entry.variant).groups()
    layout = graphs.GRAPHS[graph](int(width))
    time_of = lambda activation, direction: best_seconds(  # noqa: E731
        graphs._case(graph, int(width), activation, direction, graphs.GEMM).ours.run, samples=3
    )
    relu = ours if activation == "relu" else time_of("relu", entry.direction)
    stages = {"act": max(ours - relu, 0.0)}
    if entry.direction == BOTH:
        stages["again"] = time_of("relu", FORWARD)
    stages["levels"] = ours - sum(stages.values())
    both = entry.direction == BOTH
    hidden = sum(layout.kinds[kind].out for kind in layout.nodes[:, 0].tolist() if not layout.kinds[kind].linear)
    flops = 2 * graphs.BATCH * ((3 if both else 1) * layout.multiply_adds + hidden * STEPS[activation][both])
    parameters = sum(torch.Size(shape).numel() for shape in [*layout.weight_shapes, *layout.bias_shapes])
    moved = 4 * (2 if both else 1) * (parameters + graphs.BATCH * (layout.in_features + layout.out_features))
    return Work(flops, moved), stages


def _table(rows: list[dict]) -> Table:
    table = Table("row", "ours", "ratio", "bar", "limit", "bound by", "of bound", "stages", title="Where the time goes")
    for row in rows:
        stages = ", ".join(f"{name} {ms / row['ours_ms']:.0%}" for name, ms in row["stages_ms"].items())
        numbers = (f"{row['ours_ms']:.3g}", *(f"{row[key]:.3g}" for key in ("ratio", "bar", "limit")))
        table.add_row(row["name"], *numbers, row["bound_by"], f"{row['of_bound']:.0%}", stages)
    return table


if __name__ == "__main__":
    sys.exit(main())
