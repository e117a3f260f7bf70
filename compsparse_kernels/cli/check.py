"""``check``: every op against its float64 reference on this machine; dense torch's own error sets the budget."""

import argparse
import time
from collections.abc import Iterable, Iterator

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from compsparse_kernels.cli.cases import Case, all_cases
from compsparse_kernels.cli.machine import describe_machine
from compsparse_kernels.cli.output import add_json_option, console_for, write_json
from compsparse_kernels.ops import OPS, explain
from compsparse_kernels.testing import DTYPES, THREADS, budget_used, num_threads

EXAMPLES = """examples:
  python -m compsparse_kernels check                       all ops
  python -m compsparse_kernels check --op masked_linear    one of them
  python -m compsparse_kernels check --json check.json     the result for a bug report
  COMPSPARSE_CPU=scalar python -m compsparse_kernels check the kernels of another instruction set

The error of an op may be twice that of dense torch in the same dtype on the same input, plus one rounding; `budget`
shows the largest share of it that was used, so 100 % and less is right. Results with 1, 2 and 3 threads must be equal
bit by bit."""


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "check",
        help="does every op compute right on this machine? (under a minute)",
        description="Compares the output and every gradient of each op with its float64 reference, in float32 and"
        " float64, on regular and ragged shapes, and with 1, 2 and 3 threads. Exit code 1 if anything is wrong.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--op", choices=OPS, action="append", help="check this op only (may be given again for more)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the ops run (%(default)s)")
    add_json_option(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    console = console_for(arguments.json)
    if arguments.device == "cuda":
        console.print("There is no GPU backend yet, so there is nothing to check on cuda.")
        return 2
    started = time.perf_counter()
    cases = [case for case in all_cases() if not arguments.op or case.op in arguments.op]
    rows = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("checking", total=len(cases) * len(DTYPES))
        for case in cases:
            progress.update(task, description=case.op)
            for dtype in DTYPES:
                rows += check_case(case, dtype)
                progress.advance(task)
    failed = [row for row in rows if not row["ok"]]
    backends = {op: next(name for name, state in explain(op).items() if state == "runs") for op in OPS}
    result = {"ok": not failed, "machine": describe_machine(), "backends": backends, "rows": rows}
    console.print(_summary(rows))
    console.print("run by: " + ", ".join(f"{op} {backend}" for op, backend in backends.items()), style="dim")
    for row in failed:
        console.print(f"[red]wrong[/] {row['op']}, {row['dtype']}, {row['quantity']}, {row['case']}: {row['reason']}")
    verdict = f"[red]{len(failed)} wrong[/]" if failed else "[green]all right[/]"
    console.print(f"{len(rows)} comparisons in {time.perf_counter() - started:.1f} s: {verdict}")
    write_json(result, arguments.json)
    return 1 if failed else 0


def check_case(case: Case, dtype: torch.dtype) -> list[dict]:
    """One row for the output and one for each gradient; an op that raises is a wrong row too."""
    common = {"op": case.op, "case": case.name, "dtype": str(dtype).removeprefix("torch.")}
    try:
        return [{**common, **row} for row in _compare(case, dtype)]
    except Exception as error:  # a check reports what is wrong, whatever it is, and goes on to the next op
        reason = f"{type(error).__name__}: {error}"
        return [{**common, "quantity": "all", "error": None, "budget_used": None, "ok": False, "reason": reason}]


def _compare(case: Case, dtype: torch.dtype) -> Iterator[dict]:
    exact = _output_and_gradients(case.dense, case.inputs, torch.float64)
    dense = _output_and_gradients(case.dense, case.inputs, torch.float32)
    absolute = {name: tensor.abs() for name, tensor in case.inputs.items()}
    magnitude = _output_and_gradients(case.dense, absolute, torch.float64, absolute=True) if case.multilinear else {}
    by_threads = []
    for threads in THREADS:
        with num_threads(threads):
            by_threads.append(_output_and_gradients(case.ours, case.inputs, dtype))
    for quantity, ours in by_threads[0].items():
        used = budget_used(ours, dense[quantity], exact[quantity], magnitude.get(quantity))
        same = all(torch.equal(ours, other[quantity]) for other in by_threads)
        error = float((ours.double() - exact[quantity]).abs().max())
        reason = "" if used <= 1 else f"error {error:.3g} is {used:.3g} times the budget"
        if not same:
            reason = "; ".join(filter(None, [reason, "results with 1, 2 and 3 threads differ"]))
        yield {"quantity": quantity, "error": error, "budget_used": used, "ok": not reason, "reason": reason}


def _output_and_gradients(function, inputs: dict, dtype: torch.dtype, absolute: bool = False) -> dict:
    """{"output": ..., "grad of x": ...} for a random gradient of the output, the same in every dtype."""
    leaves = {name: tensor.to(dtype).requires_grad_() for name, tensor in inputs.items()}
    output = function(*leaves.values())
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
    grads = torch.autograd.grad(output, list(leaves.values()), (grad.abs() if absolute else grad).to(dtype))
    gradients = {f"grad of {name}": gradient for name, gradient in zip(leaves, grads, strict=True)}
    return {"output": output.detach(), **gradients}


def _summary(rows: list[dict]) -> Table:
    table = Table("op", "dtype", title="largest error over all shapes", title_justify="left")
    for heading in ("output", "budget", "gradients", "budget", "compared"):
        table.add_column(heading, justify="right")
    table.add_column("")
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["op"], row["dtype"]), []).append(row)
    for (op, dtype), group in groups.items():
        output = _largest(row for row in group if row["quantity"] == "output")
        gradients = _largest(row for row in group if row["quantity"].startswith("grad"))
        verdict = "[green]ok[/]" if all(row["ok"] for row in group) else "[red]wrong[/]"
        table.add_row(op, dtype, *output, *gradients, str(len(group)), verdict)
    return table


def _largest(rows: Iterable[dict]) -> tuple[str, str]:
    rows = list(rows)
    if not rows:
        return "-", "-"
    return f"{max(row['error'] for row in rows):.1e}", f"{max(row['budget_used'] for row in rows):.0%}"
