"""``python -m benchmarks.claims``: runs claims, shows each as a table with its verdict, writes JSON and figures."""

import argparse
import importlib
import json
import math
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.claims.common import SEEDS, Claim, SeedResult, results_table, run_claim
from compsparse_kernels.cli.output import console_for
from compsparse_kernels.testing import num_threads

MODULES = {"C3": "c03_imp_locality", "C5": "c05_beta_lasso", "C6": "c06_end_to_end", "C7": "c07_attention_parents"}
RESULTS = Path(__file__).resolve().parent.parent / "results" / "claims"
INTERRUPTED = 130

EXAMPLES = """examples:
  python -m benchmarks.claims                     all claims, as tables
  python -m benchmarks.claims C3 --json --plot    one, with benchmarks/results/claims/c03_imp_locality.json and .png
  python -m benchmarks.claims C6 --json out       JSON into another folder

A claim is judged by the median of its seeds. A FAIL is a result like another, and the exit code is 0."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.claims",
        description="The paper's claims, each an experiment with a criterion that was fixed before.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    known = ", ".join(MODULES)
    parser.add_argument("claims", nargs="*", type=_known, metavar="CLAIM", help=f"one of {known} (default: all)")
    parser.add_argument("--json", nargs="?", type=Path, const=RESULTS, metavar="DIR", help="write the numbers into DIR")
    parser.add_argument("--plot", nargs="?", type=Path, const=RESULTS, metavar="DIR", help="draw the figure into DIR")
    parser.add_argument("--threads", type=_positive, default=None, metavar="N", help="threads (default: torch's own)")
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes, to see that it runs; the numbers mean nothing"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """0: ran, whatever the verdicts; 130: stopped by Ctrl-C."""
    arguments = build_parser().parse_args(argv)
    console = console_for(None)
    try:
        for key in arguments.claims or MODULES:
            with num_threads(arguments.threads or torch.get_num_threads()):
                run_one(load(key), arguments, console)
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def load(key: str) -> Claim:
    return importlib.import_module(f"benchmarks.claims.{MODULES[key]}").CLAIM


def run_one(claim: Claim, arguments: argparse.Namespace, console: Console) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        size = claim.quick if arguments.quick else claim.size
        task = progress.add_task(f"{claim.key} {claim.title}", total=len(SEEDS) * claim.parts(size))
        result, seeds = run_claim(claim, SEEDS, arguments.quick, lambda: progress.advance(task))
    console.print(results_table(result))
    seconds = sum(seed["seconds"] for seed in result["seeds"])
    colour = "green" if result["verdict"] == "PASS" else "red"
    console.print(f"{claim.key} [{colour}]{result['verdict']}[/] in {seconds:.0f} s", highlight=False)
    stem = claim.stem + "_quick" * arguments.quick  # never over a result that means something
    if arguments.json is not None:
        arguments.json.mkdir(parents=True, exist_ok=True)
        path = arguments.json / f"{stem}.json"
        path.write_text(json.dumps(_finite(result), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        console.print(f"wrote {path}", highlight=False)
    if arguments.plot is not None:
        arguments.plot.mkdir(parents=True, exist_ok=True)
        path = arguments.plot / f"{stem}.png"
        save_figure(claim, seeds, result, path)
        console.print(f"wrote {path}", highlight=False)


def _finite(value):
    """JSON knows neither NaN nor infinity: they become null."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def save_figure(claim: Claim, seeds: list[SeedResult], result: dict, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    claim.draw(figure, seeds)
    machine = result["machine"]
    commit = (machine["commit"] or "no commit")[:10] + (" with changes" if machine["dirty"] else "")
    facts = (machine["processor"], f"torch {machine['versions']['torch']}", commit, f"{len(seeds)} seeds")
    figure.suptitle(f"{claim.key}  {claim.title}: {result['verdict']}\n{', '.join(facts)}", fontsize=10)
    figure.savefig(path, dpi=120, metadata={"Software": None})


def _known(key: str) -> str:
    if key not in MODULES:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(MODULES)}, got {key!r}")
    return key


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
