"""``python -m benchmarks.run``: measures a suite, shows it as it comes, and writes JSON and plots."""

import argparse
import random
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.registry import DEVICES, MODULES, SUITES, Case, Entry, Mismatch, select
from benchmarks.report import Report
from benchmarks.system import describe_run
from benchmarks.timing import LEAST_ROUNDS, measure
from compsparse_kernels.cli.output import add_json_option, console_for, write_json
from compsparse_kernels.testing import num_threads

SCHEMA = 1
INTERRUPTED = 130
NO_GPU = "torch can use no GPU here, so there is nothing to measure on cuda: run this on a machine with one."

EXAMPLES = """suites:
  quick        some rows of each op, under half a minute
  foundation   the least speeds the library promises
  bars         every speed the library aims at (about twenty minutes with two thread counts)
  all          everything

examples:
  python -m benchmarks.run                                      the quick suite
  python -m benchmarks.run --suite bars --json bars.json --plot plots --threads 1,2
  python -m benchmarks.run --op masked_linear --suite bars      one op
  python -m benchmarks.run --device cuda --suite all --json gpu.json   on a GPU, against cuBLAS and torch.sparse

A row's ratio is peer / ours: 2 means twice as fast as the peer, below 1 slower. Both run in turn in this process; the
ratio is the median over the rounds, the spread their interquartile range. Both results are compared with float64 first;
a row where they differ is an error, is not timed, and the exit code is 1. A bar that is missed is shown, and is no
error: machines are noisy."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description="Speed of each op against its peers: dense torch, torch.sparse, SDPA and others.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--suite", choices=SUITES, default="quick", help="which rows (%(default)s); see below")
    parser.add_argument(
        "--op", choices=MODULES, action="append", help="rows of this op only (may be given again for more)"
    )
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="where both sides run (%(default)s)")
    parser.add_argument(
        "--threads",
        type=_thread_counts,
        default=None,
        metavar="N,..",
        help="numbers of threads, such as 1,2 (torch's own)",
    )
    parser.add_argument(
        "--rounds", type=_rounds, default=LEAST_ROUNDS, help=f"rounds per row, at least {LEAST_ROUNDS} (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=None, help="seed of the random inputs (a new one each time)")
    parser.add_argument("--plot", metavar="DIR", type=Path, help="draw ratio against density into DIR")
    add_json_option(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the suite. 0: measured; 1: some result was wrong; 2: no such device; 130: stopped by Ctrl-C (what was
    measured is written)."""
    arguments = build_parser().parse_args(argv)
    warnings.filterwarnings(
        "ignore", message="Sparse (BSR|CSR) tensor support is in beta"
    )  # it would tear the live table
    if arguments.device == "cuda" and not torch.cuda.is_available():
        console_for(arguments.json).print(NO_GPU)
        return 2
    entries = select(arguments.suite, arguments.op, arguments.device)
    if not entries:
        console_for(arguments.json).print(
            f"no rows of {', '.join(arguments.op)} in suite {arguments.suite} on {arguments.device}"
        )
        return 2
    threads = (arguments.device == "cpu" and arguments.threads) or [torch.get_num_threads()]
    seed = random.randrange(2**31) if arguments.seed is None else arguments.seed
    torch.manual_seed(seed)
    console = console_for(arguments.json)
    report = Report(console, total=len(entries) * len(threads))
    interrupted = False
    with report:
        try:
            for entry in entries:
                run_entry(entry, arguments.suite, threads, arguments.rounds, report.add, report.begin)
        except KeyboardInterrupt:
            interrupted = True
    report.show_summary(interrupted)
    settings = {
        "suite": arguments.suite,
        "ops": arguments.op,
        "device": arguments.device,
        "threads": threads,
        "rounds": arguments.rounds,
        "seed": seed,
    }
    result = {
        "schema": SCHEMA,
        "machine": describe_run(),
        "settings": settings,
        "complete": not interrupted,
        "rows": report.rows,
    }
    write_json(result, arguments.json)
    if arguments.plot is not None and report.rows:
        from benchmarks.plots import draw

        for path in draw(result, arguments.plot):
            console.print(f"wrote {path}")
    if interrupted:
        return INTERRUPTED
    return 1 if any(row["error"] for row in report.rows) else 0


def run_entry(
    entry: Entry,
    suite: str,
    threads: list[int],
    rounds: int,
    add: Callable[[dict], None],
    begin: Callable[[str], None] = lambda name: None,
) -> None:
    """Builds the case once and hands ``add`` a row for each number of threads."""
    begin(entry.name)
    try:
        case, error = entry.make(), None
    except Exception as reason:  # one row that can't be made must not end the suite
        case, error = None, f"{type(reason).__name__}: {reason}"
    for count in threads:
        row = _row(entry, suite, count)
        if case is None:
            add({**row, "error": error})
            continue
        with num_threads(count):
            add({**row, **_measured(entry, case, row["bar"], rounds)})


def _row(entry: Entry, suite: str, threads: int) -> dict:
    described = ("name", "op", "variant", "shape", "density", "dtype", "direction", "peer")
    numbers = ("ours_ms", "peer_ms", "ratio", "spread", "ok", "error")
    return {
        **{key: getattr(entry, key) for key in described},
        "threads": threads,
        "bar": entry.bar(suite),
        "limit_ms": entry.limit_ms,
        **dict.fromkeys(numbers),
    }


def _measured(entry: Entry, case: Case, bar: float | None, rounds: int) -> dict:
    """The numbers of a row, or its error where a side computes something wrong: that is never timed."""
    for name, side in (("ours", case.ours), ("peer", case.peer)):
        if side is None:
            continue
        try:
            side.check(side.run())
        except Mismatch as mismatch:
            return {"error": f"{name}: {mismatch}"}
        except Exception as reason:  # an op or a peer that can't run here is a row that says so
            return {"error": f"{name}: {type(reason).__name__}: {reason}"}
    timing = measure(case, rounds)
    verdicts = []
    if bar is not None:
        verdicts.append(timing.ratio >= bar)
    if entry.limit_ms is not None:
        verdicts.append(timing.ours_ms <= entry.limit_ms)
    return {
        "density": entry.density if case.density is None else case.density,
        "ours_ms": timing.ours_ms,
        "peer_ms": timing.peer_ms,
        "ratio": timing.ratio,
        "spread": timing.spread,
        "ok": all(verdicts) if verdicts else None,
    }


def _thread_counts(text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise argparse.ArgumentTypeError(f"expected positive numbers such as 1,2, got {text!r}")
    return counts


def _rounds(text: str) -> int:
    if not text.isdigit() or int(text) < LEAST_ROUNDS:
        raise argparse.ArgumentTypeError(f"expected {LEAST_ROUNDS} or more, got {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
