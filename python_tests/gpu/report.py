"""``python -m python_tests.gpu.report``: what the kernels compiled to, as a table for people and one for tests.

Level L2 comes from the machine code of every target. Level L4 runs the PTX of sm_80 and sm_90 in the emulator, on a
small batch, and counts its traffic.
"""

import argparse
import io
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from python_tests.gpu.aot import compile_launch
from python_tests.gpu.attention_cases import AttentionCase
from python_tests.gpu.cases import FEATURES, LARGE_BATCH, SMALL_BATCH, Case
from python_tests.gpu.dag_cases import DagCase
from python_tests.gpu.nm_cases import NMCase
from python_tests.gpu.proximal_cases import ProximalCase
from python_tests.gpu.ptx import Profile
from python_tests.gpu.ptx.torch_launch import run_compiled
from python_tests.gpu.shipped import shipped
from python_tests.gpu.static.analyse import Analysis, analyse
from python_tests.gpu.static.cycles import CycleBound, cycle_bound
from python_tests.gpu.static.gates import violations
from python_tests.gpu.static.golden import golden_row, path_of, write
from python_tests.gpu.static.roofline import DEVICES, Ceiling, Traffic, ceiling, traffic

EMULATED = ("sm_80", "sm_90")
GATES = (
    "tensor_cores",
    "async_copies",
    "index_loads",
    "tile_loads",
    "least_occupancy",
    "inner_loop",
    "spilled_scalars",
)
AnyCase = Case | DagCase | NMCase | ProximalCase | AttentionCase
WIDTH = 190

L2_NOTE = """\
L2: machine code, read and not run. Occupancy: warps a multiprocessor holds, of those it can. Inner loop: static
instructions (all, tensor-core products, asynchronous copies, global and shared loads, barriers). Ceiling: share of the
tensor cores' rate that the inner loop cannot exceed, and what sets it (cycles.py); "-" where the code does not tell.
"""
SHEETS = ", ".join(DEVICES[target].name for target in EMULATED)
L4_NOTE = f"""\
L4: the PTX executed by the emulator at batch {SMALL_BATCH}, on {FEATURES} features (dag: a step of a small tree).
Useful: bytes wanted of sectors moved. Requested and memory: sectors asked for, and sectors touched, to the least
possible. Ceiling: TFLOP/s that data sheets
({SHEETS}) allow at batch {LARGE_BATCH}, if the second-level cache serves every reuse, and if it
serves none. Nothing was timed.
"""


@dataclass(frozen=True)
class Static:
    case: AnyCase
    analysis: Analysis
    bound: CycleBound | None
    violations: list[str]


@dataclass(frozen=True)
class Emulated:
    case: AnyCase
    traffic: Traffic
    ceiling: Ceiling


def examine(case: AnyCase) -> Static:
    """Compiles a case and reads it."""
    analysis = analyse(case.compiled(), case.target)
    gates = {name: getattr(case, name) for name in GATES if hasattr(case, name)}
    return Static(case, analysis, cycle_bound(analysis), violations(analysis, **gates))


def is_emulated(case: AnyCase) -> bool:
    """Whether a case takes part in L4."""
    return case.target in EMULATED and getattr(case, "emulated", True)


def emulate(static: Static) -> Emulated:
    """Runs a case's PTX on a small batch and counts its traffic."""
    case, profile = static.case, Profile()
    small = case.small_launch()
    run_compiled(compile_launch(small, case.config, case.target), profile=profile)
    counted = traffic(profile, case.least_work(small))
    reachable = static.bound.tensor_ceiling if static.bound and case.tensor_cores else 1.0
    return Emulated(case, counted, ceiling(counted, case.least_work(case.launch()), case.target, case.dtype, reachable))


def static_table(rows: list[Static]) -> Table:
    columns = ("registers", "shared KiB", "occupancy", "limited by", "inner", "tensor", "copies", "global", "shared")
    table = _table("kernel", *columns, "barriers", "ceiling", "set by", "gates")
    for row in rows:
        found, inner = row.analysis, row.analysis.inner
        bound = row.bound if row.case.tensor_cores else None
        table.add_row(
            row.case.name,
            str(found.registers),
            f"{found.shared / 1024:.1f}",
            f"{found.occupancy.share:.3f}",
            found.occupancy.limited_by,
            str(found.inner_instructions),
            *(str(inner[kind]) for kind in ("tensor core", "async copy", "global load", "shared load", "barrier")),
            f"{bound.tensor_ceiling:.2f}" if bound else "-",
            bound.bound_by if bound else "-",
            "; ".join(row.violations) or "passed",
        )
    return table


def traffic_table(rows: list[Emulated]) -> Table:
    table = _table("kernel", "useful", "bank conflicts", "requested", "memory", "ceiling, cached", "uncached")
    for row in rows:
        counted, limit = row.traffic, row.ceiling
        ratios = (counted.useful_per_sector, counted.bank_conflicts, counted.requested, counted.memory)
        rates = (limit.cached, limit.uncached)
        table.add_row(row.case.name, *(f"{value:.3f}" for value in ratios), *(f"{value:.0f}" for value in rates))
    return table


def render(static: list[Static], emulated: list[Emulated]) -> str:
    """The report as text."""
    console = Console(file=io.StringIO(), width=WIDTH, color_system=None)
    console.print(L2_NOTE, static_table(static), sep="\n", highlight=False)
    if emulated:
        console.print("", L4_NOTE, traffic_table(emulated), sep="\n", highlight=False)
    good = sum(not row.violations for row in static)
    console.print(f"\n{good} of {len(static)} kernels pass the gates; {len(emulated)} emulated.", highlight=False)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()) + "\n"


def write_golden(rows: list[Static]) -> None:
    """The tables hold the first choices only: what the tests compile each time."""
    rows = [row for row in rows if row.case in shipped()]
    for op in sorted({row.case.op for row in rows}):
        write(path_of(op), {row.case.name: golden_row(row.analysis) for row in rows if row.case.op == op})


def main() -> int:
    """0 if every kernel passes its gates."""
    parser = argparse.ArgumentParser(prog="python -m python_tests.gpu.report", description=__doc__.splitlines()[0])
    parser.add_argument("--long", action="store_true", help="every configuration, not the first choices only")
    parser.add_argument("--text", type=Path, help="write the report to this file")
    parser.add_argument("--write-golden", action="store_true", help="replace the golden tables by what was measured")
    options = parser.parse_args()
    console = Console(stderr=True)
    cases = shipped(options.long)
    static = [examine(case) for case in track(cases, "compiling", console=console)]
    to_run = [row for row in static if is_emulated(row.case) and row.case in shipped()]
    emulated = [emulate(row) for row in track(to_run, "emulating", console=console)]
    text = render(static, emulated)
    print(text, end="")
    if options.text:
        options.text.write_text(text)
    if options.write_golden:
        write_golden(static)
    return int(any(row.violations for row in static))


def _table(first: str, *columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(first, no_wrap=True)
    for column in columns:
        left = column in ("limited by", "set by", "gates")
        table.add_column(column, justify="left" if left else "right", overflow="fold")
    return table


if __name__ == "__main__":
    raise SystemExit(main())
