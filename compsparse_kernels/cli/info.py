"""``info``: versions, processor, instruction set, and which backend each op has here and why not the others."""

import argparse

from rich.console import Console
from rich.table import Table

from compsparse_kernels.cli.machine import CAP, COMPILED_MODULES, describe_machine, missing_reason
from compsparse_kernels.cli.output import add_json_option, console_for, write_json
from compsparse_kernels.ops import OPS, explain

EXAMPLES = f"""examples:
  python -m compsparse_kernels info                       what is here
  python -m compsparse_kernels info --json -              the same for a program, or for a bug report
  {CAP}=avx2 python -m compsparse_kernels info   what runs when the instruction set is capped

{CAP} (scalar, avx2, avx512 or avx512_bf16) caps the instruction set that the kernels use; it is read once,
at import."""


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "info",
        help="versions, processor, and which backend runs each op here",
        description="Shows the versions, the processor and the instruction set the kernels use, whether the compiled"
        " modules are there, and for each op which backend runs and why the others don't.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_json_option(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    result = collect()
    show(result, console_for(arguments.json))
    write_json(result, arguments.json)
    return 0


def collect() -> dict:
    modules = {name: missing_reason(name) for name in COMPILED_MODULES}
    return {
        "machine": describe_machine(),
        "modules": {name: {"present": reason is None, "reason": reason} for name, reason in modules.items()},
        "ops": {op: explain(op) for op in OPS},
    }


def show(result: dict, console: Console) -> None:
    console.print(_machine_table(result["machine"]))
    console.print(_modules_table(result["modules"]))
    console.print(_ops_table(result["ops"]))


def _machine_table(machine: dict) -> Table:
    table = Table(title="machine", title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column()
    for name, version in machine["versions"].items():
        table.add_row(name, version or "not installed")
    table.add_row("processor", f"{machine['processor']} ({machine['architecture']})")
    table.add_row("cores, threads", f"{machine['cores']} usable, torch uses {machine['threads']}")
    table.add_row("GPU", machine["gpu"] or "none that torch can use")
    table.add_row("instruction set", machine["instruction_set"] or "none: the compiled kernels are not there")
    table.add_row(f"cap ({CAP})", machine["instruction_set_cap"] or "not set")
    table.add_row("system", machine["system"])
    return table


def _modules_table(modules: dict) -> Table:
    table = Table("module", "here", "what it is for", title="compiled modules", title_justify="left")
    for name, module in modules.items():
        here = "[green]yes[/]" if module["present"] else f"[red]no[/]: {module['reason']}"
        table.add_row(name, here, COMPILED_MODULES[name])
    return table


def _ops_table(ops: dict) -> Table:
    backends = list(next(iter(ops.values())))
    table = Table("op", *backends, title="ops and their backends", title_justify="left")
    for op, reasons in ops.items():
        table.add_row(op, *(_coloured(reasons[backend]) for backend in backends))
    return table


def _coloured(state: str) -> str:
    return {"runs": "[green]runs[/]", "available": "available"}.get(state, f"[yellow]{state}[/]")
