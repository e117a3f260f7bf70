"""The committed table of what kernels compiled to, so that a change of the code is a change that somebody reads."""

import json
from importlib.metadata import version
from pathlib import Path

from python_tests.gpu.static.analyse import Analysis

FOLDER = Path(__file__).parent.parent / "golden"
Table = dict[str, dict[str, int | float | str]]  # "case target" -> what golden_row tells


def golden_row(analysis: Analysis) -> dict[str, int | float | str]:
    return {
        "registers": analysis.registers,
        "stack": analysis.stack,
        "spills": analysis.spills,
        "shared": analysis.shared,
        "occupancy": round(analysis.occupancy.share, 4),
        "instructions": analysis.instructions,
        "inner_instructions": analysis.inner_instructions,
        "inner_tensor_core": analysis.inner.get("tensor core", 0),
        "inner_async_copies": analysis.inner.get("async copy", 0),
        "inner_global_loads": analysis.inner.get("global load", 0),
        "inner_barriers": analysis.inner.get("barrier", 0),
    }


def path_of(op: str) -> Path:
    return FOLDER / f"{op}.json"


def read(path: Path) -> Table:
    """The table of a file that ``write`` wrote. Fails where another compiler than the one installed made it."""
    content = json.loads(path.read_text())
    if content["triton"] != version("triton"):
        raise ValueError(f"{path.name}: expected a table of triton {version('triton')}, got {content['triton']}")
    return content["kernels"]


def write(path: Path, table: Table) -> None:
    """One line for each kernel, sorted, so that a diff shows which changed."""
    rows = [f"{json.dumps(name)}: {json.dumps(table[name])}" for name in sorted(table)]
    kernels = ",\n".join(rows)
    path.parent.mkdir(exist_ok=True)
    path.write_text(f'{{"triton": {json.dumps(version("triton"))}, "kernels": {{\n{kernels}\n}}}}\n')


def compare(golden: Table, measured: Table) -> list[str]:
    """One sentence for each difference. Kernels that were not measured are not compared."""
    found = []
    for name, row in measured.items():
        if name not in golden:
            found.append(f"{name}: not in the golden table")
            continue
        for field in sorted(row.keys() | golden[name].keys()):
            wanted, got = golden[name].get(field), row.get(field)
            if wanted != got:
                found.append(f"{name}: {field} was {wanted}, now {got}")
    return found
