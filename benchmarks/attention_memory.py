"""``python -m benchmarks.attention_memory``: the memory that attention takes, forward and backward, beside SDPA's.

Each number is from a fresh process: the most that was resident while output and gradients were computed, less what was
resident before, less output and gradients themselves. The allocator of torch would not see what kernels take beside it.
"""

import argparse
import ctypes
import json
import random
import sys
from pathlib import Path

import torch
from rich.progress import track
from rich.table import Table

from benchmarks import attention_kinds as kinds
from benchmarks.attention_kinds import HEADS, WIDTH
from benchmarks.inputs import leaves
from benchmarks.system import describe_run
from benchmarks.threshold_attention import KEPT, LENGTHS
from compsparse_kernels.cli.output import add_json_option, console_for, write_json
from compsparse_kernels.testing import run_in_subprocess

SIDES = ("this library", "SDPA")
WARM_UP_LENGTH = 256
PEAK = Path("/proc/self/clear_refs")  # "5" written to it makes the peak what is resident now
NO_PROC = "memory is measured by /proc/self/clear_refs and /proc/self/status: this needs Linux."
CHILD = """
from benchmarks.attention_memory import extra_bytes
print(extra_bytes({side!r}, {length}, {factor}, {seed}, {threads}))
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention_memory", description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="number of threads (%(default)s)")
    add_json_option(parser)
    arguments = parser.parse_args(argv)
    console = console_for(arguments.json)
    if not PEAK.exists():
        console.print(NO_PROC)
        return 2
    cases = [(length, share) for length in LENGTHS for share in KEPT.values()]
    rows = [describe(*case, arguments.threads) for case in track(cases, "measuring", console=console)]
    fitted = fit(rows)
    write_json({"machine": describe_run(), "threads": arguments.threads, "fit": fitted, "rows": rows}, arguments.json)
    console.print(_table(rows))
    console.print(
        f"ours is within {fitted['largest_error']:.0%} of {fitted['per_survivor']:.1f} bytes a survivor"
        f" + {fitted['per_token']:.0f} a token of a head"
    )
    return 0


def describe(length: int, share: float, threads: int) -> dict:
    """Survivors, and the extra bytes of both sides on the same numbers."""
    seed = random.randrange(2**31)
    query, key, value, _ = _inputs(length, 1.0, seed)
    factor = kinds.sharpness(query, key, share, kinds.above_threshold)
    _, support = kinds.ours().ways[0](query * factor, key, value, return_support=True)
    options = {"length": length, "factor": factor, "seed": seed, "threads": threads}
    ours, sdpa = (json.loads(run_in_subprocess(CHILD.format(side=side, **options))) for side in SIDES)
    return {
        "shape": f"B1 H{HEADS} T{length} D{WIDTH}",
        "tokens": HEADS * length,
        "share": support.share_kept,
        "survivors": support.nnz,
        "ours_bytes": ours,
        "sdpa_bytes": sdpa,
        "bytes_per_survivor_over_sdpa": (ours - sdpa) / support.nnz,
        "dense_scores_bytes": 4 * HEADS * length**2,
    }


def extra_bytes(side: str, length: int, factor: float, seed: int, threads: int) -> int:
    """What forward and backward need at their peak beside inputs, output and gradients, of this very process."""
    torch.set_num_threads(threads)
    attention = kinds.ours() if side == SIDES[0] else kinds.peers(length)[side]
    query, key, value, grad = _inputs(length, factor, seed)
    tensors = leaves(query, key, value)
    _forward_and_backward(attention, *(tensor[:, :, :WARM_UP_LENGTH] for tensor in (*tensors, grad)))
    _give_back_free_memory()
    PEAK.write_text("5")
    before = _resident("VmRSS")
    results = _forward_and_backward(attention, *tensors, grad)
    kept = sum(tensor.numel() * tensor.element_size() for tensor in results)
    return _resident("VmHWM") - before - kept


def _inputs(length: int, factor: float, seed: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(seed)
    query, key, value = kinds.tokens(length, clustered=False)
    return query * factor, key, value, torch.randn_like(query)


def _forward_and_backward(attention: kinds.Attention, query, key, value, grad) -> tuple[torch.Tensor, ...]:
    output = attention.ways[0](query, key, value)
    return output.detach(), *torch.autograd.grad(output, (query, key, value), grad)


def _give_back_free_memory() -> None:
    """What is free but resident would be used again and not be seen. (Of the C library of GNU; others keep little.)"""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _resident(field: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (the peak)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{field}:")).split()[1])


def fit(rows: list[dict]) -> dict:
    """Bytes of ours as ``per_survivor * survivors + per_token * tokens``, by least squares of relative errors; and the
    largest of these. Where memory grew with all pairs of tokens, no such line would fit."""
    counts = torch.tensor([[row["survivors"], row["tokens"]] for row in rows], dtype=torch.float64)
    measured = torch.tensor([row["ours_bytes"] for row in rows], dtype=torch.float64).unsqueeze(-1)
    found = torch.linalg.lstsq(counts / measured, torch.ones_like(measured)).solution
    errors = (counts @ found / measured - 1).abs()
    return {
        "per_survivor": float(found[0]),
        "per_token": float(found[1]),
        "largest_error": float(errors.max()),
    }


def _table(rows: list[dict]) -> Table:
    table = Table(title="Memory beside inputs, output and gradients, MB", title_justify="left")
    for heading in ("shape", "kept", "survivors", "ours", "SDPA", "all scores", "bytes a survivor over SDPA"):
        table.add_column(heading, justify="left" if heading == "shape" else "right")
    for row in rows:
        sizes = (f"{row[key] / 1e6:.1f}" for key in ("ours_bytes", "sdpa_bytes", "dense_scores_bytes"))
        described = (row["shape"], f"{row['share']:.1%}", f"{row['survivors']:,}")
        table.add_row(*described, *sizes, f"{row['bytes_per_survivor_over_sdpa']:.1f}")
    return table


if __name__ == "__main__":
    sys.exit(main())
