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
from compsparse_kernels.ops.backends import dtypes_on
from compsparse_kernels.testing import THREADS, budget_used, num_threads

EXAMPLES = """examples:
  python -m compsparse_kernels check                       all ops
  python -m compsparse_kernels check --op masked_linear    one of them
  python -m compsparse_kernels check --json check.json     the result for a bug report
  COMPSPARSE_CPU=scalar python -m compsparse_kernels check the kernels of another instruction set
  python -m compsparse_kernels check --device cuda --json check.json   the same on a GPU

The error of an op may be twice that of dense torch in the same dtype on the same input, plus one rounding; `budget`
shows the largest share of it that was used, so 100 % and less is right. Results with 1, 2 and 3 threads must be equal
bit by bit; on a GPU, those of three runs."""
NO_GPU = "torch can use no GPU here, so there is nothing to check on cuda: run this on a machine with one."


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "check",
        help="does every op compute right on this machine? (under a minute)",
        description="Compares the output and every gradient of each op with its float64 reference, in each dtype"
        " it takes, on regular and ragged shapes, and with 1, 2 and 3 threads. Exit code 1 if anything is wrong.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--op", choices=OPS, action="append", help="check this op only (may be given again for more)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the ops run (%(default)s)")
    add_json_option(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    console = console_for(arguments.json)
    device = arguments.device
    if device == "cuda" and not torch.cuda.is_available():
        console.print(NO_GPU)
        return 2
    started = time.perf_counter()
    cases = [case for case in all_cases() if not arguments.op or case.op in arguments.op]
    rows = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("checking", total=sum(len(dtypes_on(device, case.op)) for case in cases))
        for case in cases:
            progress.update(task, description=case.op)
            for dtype in dtypes_on(device, case.op):
                rows += check_case(case, dtype, device)
                progress.advance(task)
    failed = [row for row in rows if not row["ok"]]
    example = torch.zeros(1, device=device)
    backends = {op: next(name for name, state in explain(op, example).items() if state == "runs") for op in OPS}
    result = {"ok": not failed, "machine": describe_machine(), "backends": backends, "rows": rows}
    console.print(_summary(rows))
    console.print("run by: " + ", ".join(f"{op} {backend}" for op, backend in backends.items()), style="dim")
    for row in failed:
        console.print(f"[red]wrong[/] {row['op']}, {row['dtype']}, {row['quantity']}, {row['case']}: {row['reason']}")
    verdict = f"[red]{len(failed)} wrong[/]" if failed else "[green]all right[/]"
    console.print(f"{len(rows)} comparisons in {time.perf_counter() - started:.1f} s: {verdict}")
    write_json(result, arguments.json)
    return 1 if failed else 0


def check_case(case: Case, dtype: torch.dtype, device: str = "cpu") -> list[dict]:
    """One row for the output and one for each gradient; an op that raises is a wrong row too."""
    common = {"op": case.op, "case": case.name, "dtype": str(dtype).removeprefix("torch.")}
    try:
        return [{**common, **row} for row in _compare(case, dtype, device)]
    except Exception as error:  # a check reports what is wrong, whatever it is, and goes on to the next op
        reason = f"{type(error).__name__}: {error}"
        return [{**common, "quantity": "all", "error": None, "budget_used": None, "ok": False, "reason": reason}]


def _compare(case: Case, dtype: torch.dtype, device: str) -> Iterator[dict]:
    dense_dtype = torch.float32 if dtype == torch.float64 else dtype
    inputs = {name: tensor.to(dtype).to(device, torch.float64) for name, tensor in case.inputs.items()}
    wanted = case.differentiable
    exact = _output_and_gradients(case.dense, inputs, torch.float64, wanted)
    dense = _output_and_gradients(case.dense, inputs, dense_dtype, wanted)
    absolute = {name: tensor.abs() for name, tensor in inputs.items()}
    terms = case.terms or (case.dense if case.multilinear else None)
    magnitude = _output_and_gradients(terms, absolute, torch.float64, wanted, absolute=True) if terms else {}
    runs = []
    for threads in THREADS:
        with num_threads(threads):
            runs.append(_output_and_gradients(case.ours, inputs, dtype, wanted))
    for quantity, ours in runs[0].items():
        used = budget_used(ours, dense[quantity], exact[quantity], magnitude.get(quantity))
        same = all(torch.equal(ours, other[quantity]) for other in runs)
        error = float((ours.double() - exact[quantity]).abs().max())
        reason = "" if used <= 1 else f"error {error:.3g} is {used:.3g} times the budget"
        if not same:
            differ = "results with 1, 2 and 3 threads differ" if device == "cpu" else "results of three runs differ"
            reason = "; ".join(filter(None, [reason, differ]))
        yield {"quantity": quantity, "error": error, "budget_used": used, "ok": not reason, "reason": reason}


def _output_and_gradients(function, inputs: dict, dtype: torch.dtype, gradients: bool, absolute: bool = False) -> dict:
    """{"output": ..., "grad of x": ...} for a random gradient of the output, the same in every dtype."""
    leaves = {name: tensor.to(dtype, copy=True).requires_grad_() for name, tensor in inputs.items()}
    output = function(*leaves.values())
    if not gradients:
        return {"output": output}
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).bfloat16()  # every dtype holds it
    grad = (grad.abs() if absolute else grad).to(output.device, dtype)
    grads = torch.autograd.grad(output, list(leaves.values()), grad)
    named = {f"grad of {name}": gradient for name, gradient in zip(leaves, grads, strict=True)}
    return {"output": output.detach(), **named}


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
