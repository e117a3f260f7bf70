"""How far each kernel has climbed. Tests write it down as they pass; the run prints it last."""

import json
from collections import defaultdict
from pathlib import Path

LEVELS = {
    "L1": "ran in the strict interpreter, within the error budget",
    "L2": "machine code passed the gates",
    "L3": "compiled code executed on the CPU, within the error budget",
}
FILE = "COMPSPARSE_GPU_LEDGER"  # environment variable: where a child process leaves its part

_kernels: defaultdict[str, set[str]] = defaultdict(set)
_mutants: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0])  # kernel -> caught, of


def reached(level: str, kernel: str) -> None:
    """A kernel (its name says dtype, blocks and target) passed a test of a level."""
    assert level in LEVELS, f"level: expected one of {', '.join(LEVELS)}, got {level!r}"
    _kernels[level].add(kernel)


def mutants(kernel: str, caught: int, total: int) -> None:
    """So many of a kernel's damaged versions were caught by its tests (level L3b)."""
    _mutants[kernel][0] += caught
    _mutants[kernel][1] += total


def contents() -> dict:
    """What :func:`add` takes in another process."""
    kernels = {level: sorted(names) for level, names in _kernels.items()}
    return {"kernels": kernels, "mutants": {kernel: list(counts) for kernel, counts in _mutants.items()}}


def add(contents: dict) -> None:
    for level, names in contents["kernels"].items():
        _kernels[level].update(names)
    for kernel, counts in contents["mutants"].items():
        mutants(kernel, *counts)


def save(path: Path) -> None:
    path.write_text(json.dumps(contents()))


def merge(path: Path) -> None:
    """Adds what a child process saved."""
    add(json.loads(path.read_text()))


def lines() -> list[str]:
    """One line a level, and the mutation score last; empty where nothing was proven."""
    told = [f"{level}  {len(_kernels[level]):4} kernels  {LEVELS[level]}" for level in LEVELS if _kernels[level]]
    if _mutants:
        caught, total = (sum(counts[i] for counts in _mutants.values()) for i in (0, 1))
        told.append(f"L3b mutation score {caught / total:.0%}: {caught} of {total} damaged versions caught")
    return told
