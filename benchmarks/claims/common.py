"""What the claims share: a claim, its criteria, and how several seeds become a verdict."""

import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from benchmarks.system import describe_run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCHEMA = 1
SEEDS = (0, 1, 2)

Tick = Callable[[], object]  # called after each part of a run


@dataclass(frozen=True)
class Criterion:
    """``measure`` (its median over the seeds) must be at least, or at most, ``bound``."""

    measure: str
    relation: str  # ">=" or "<="
    bound: float

    def holds(self, value: float) -> bool:
        """False for NaN."""
        return value >= self.bound if self.relation == ">=" else value <= self.bound


@dataclass(frozen=True)
class SeedResult:
    """``measures`` are numbers by name, the same names for every seed; ``details`` go into the JSON beside them, and
    ``pictures`` are for the figure alone."""

    measures: dict[str, float]
    details: dict[str, Any] = field(default_factory=dict)
    pictures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Claim:
    """An experiment with its criteria, fixed before it runs.

    Args:
        key: as in ``C3``.
        stem: of the files of its results.
        title, source, text: the claim, who made it, and what is done here.
        criteria: what PASS means: all of them.
        size, quick: a frozen dataclass of sizes, and a tiny one whose numbers mean nothing.
        parts: how often a run of that size calls ``tick``.
        run: ``(seed, size, tick) -> SeedResult``.
        draw: ``(figure, results)`` draws the results of all seeds.
    """

    key: str
    stem: str
    title: str
    source: str
    text: str
    criteria: Sequence[Criterion]
    size: Any
    quick: Any
    parts: Callable[[Any], int]
    run: Callable[[int, Any, Tick], SeedResult]
    draw: Callable[["Figure", Sequence[SeedResult]], None]


def run_claim(
    claim: Claim, seeds: Sequence[int] = SEEDS, quick: bool = False, tick: Tick = lambda: None
) -> tuple[dict, list[SeedResult]]:
    """Runs all seeds; returns what goes into the JSON, and what the figure needs."""
    size = claim.quick if quick else claim.size
    machine = describe_run()  # before the run: the commit that is measured
    load = os.getloadavg() if hasattr(os, "getloadavg") else None  # who else was there
    results, seconds = [], []
    for seed in seeds:
        started = time.perf_counter()
        results.append(claim.run(seed, size, tick))
        seconds.append(time.perf_counter() - started)
    medians = {name: _median([result.measures[name] for result in results]) for name in results[0].measures}
    criteria = [
        {**asdict(criterion), "median": medians[criterion.measure], "ok": criterion.holds(medians[criterion.measure])}
        for criterion in claim.criteria
    ]
    return {
        "schema": SCHEMA,
        "claim": claim.key,
        "title": claim.title,
        "source": claim.source,
        "text": claim.text,
        "verdict": "PASS" if all(criterion["ok"] for criterion in criteria) else "FAIL",
        "quick": quick,
        "criteria": criteria,
        "medians": medians,
        "seeds": [
            {"seed": seed, "seconds": took, "measures": result.measures, "details": result.details}
            for seed, took, result in zip(seeds, seconds, results, strict=True)
        ],
        "size": asdict(size),
        "machine": machine,
        "load_average": load,
    }, results


def _median(values: list[float]) -> float:
    """NaN if one is NaN: among them there is no order."""
    return math.nan if any(map(math.isnan, values)) else statistics.median(values)


def results_table(result: dict) -> Table:
    """Every measure, seed by seed, and beside the median of each what it is judged by."""
    title = f"{result['claim']}  {result['title']}" + " (quick: the numbers mean nothing)" * result["quick"]
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("measure")
    for seed in result["seeds"]:
        table.add_column(f"seed {seed['seed']}", justify="right")
    for heading in ("median", "criterion"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for name, median in result["medians"].items():
        criteria = [criterion for criterion in result["criteria"] if criterion["measure"] == name]
        asked = ", ".join(f"{criterion['relation']} {criterion['bound']:g}" for criterion in criteria)
        ok = all(criterion["ok"] for criterion in criteria)
        verdict = "" if not criteria else "[green]PASS[/]" if ok else "[red]FAIL[/]"
        numbers = (f"{seed['measures'][name]:.4g}" for seed in result["seeds"])
        table.add_row(name, *numbers, f"{median:.4g}", asked, verdict)
    return table
