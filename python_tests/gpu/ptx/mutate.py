"""Mutation score (level L3b): damages PTX in small ways and counts how many of the damaged programs the tests catch.

A mutant differs from the original in one line. One that no test catches is a gap in the tests, or it is equivalent: it
computes the same, as a barrier that another one makes superfluous.
"""

import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from .faults import PTXFault, UnsupportedPTX
from .program import Instruction, Program
from .types import DTYPES, width

OPPOSITES = {"lt": "le", "ge": "gt", "eq": "ne", "lo": "ls", "hi": "hs"}
NEIGHBOURS = OPPOSITES | {other: one for one, other in OPPOSITES.items()}
WITH_CONSTANTS = ("add", "sub", "mul", "mad", "shl", "shr", "bfe")
ORDERING = ("bar.sync", "barrier.sync", "barrier.cta.sync")
COPIES = ("cp.async.commit_group", "wgmma.commit_group", "tcgen05.commit")
WAITS = ("cp.async.wait_group", "wgmma.wait_group")


@dataclass(frozen=True)
class Mutant:
    """``line`` of the PTX text (from 1) as it was and as it is."""

    kind: str
    line: int
    original: str
    changed: str
    text: str = field(repr=False)

    def __str__(self) -> str:
        return f"{self.kind}, PTX line {self.line}: {self.original!r} -> {self.changed!r}"


@dataclass
class Score:
    """Counts by kind of damage. ``unsupported``: mutants that the emulator could not execute, which count nowhere."""

    caught: Counter = field(default_factory=Counter)
    total: Counter = field(default_factory=Counter)
    reasons: Counter = field(default_factory=Counter)
    survivors: list[Mutant] = field(default_factory=list)
    unsupported: list[Mutant] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """Share that was caught; 1 without mutants."""
        return self.caught.total() / self.total.total() if self.total else 1.0


def mutants(ptx: str, seed: int, per_kind: int, immune: tuple[str, ...] = ()) -> list[Mutant]:
    """At most ``per_kind`` mutants of each kind, chosen by ``seed``, in the order of their kinds and lines; none of the
    instructions ``immune``."""
    lines = ptx.split("\n")
    by_kind: dict[str, list[Mutant]] = {}
    instructions = Program(ptx).instructions
    for instruction, following in zip(instructions, [*instructions[1:], None], strict=True):
        number = instruction.line - 1
        if instruction.name in immune or lines[number].count(";") != 1:
            continue  # one of several statements of a line, or part of one that spans lines
        if _is_wait(instruction) and following is not None and _same(instruction, following):
            continue  # of equal waits in a row the last is damaged, and the others go with it
        for kind, changed in _changes(instruction, lines[number]):
            before = lines[:number]
            if _is_wait(instruction):
                before = _without_equal_waits(before, lines[number])
            text = "\n".join([*before, changed, *lines[number + 1 :]])
            mutant = Mutant(kind, instruction.line, lines[number].strip(), changed.strip(), text)
            by_kind.setdefault(kind, []).append(mutant)
    chosen = []
    for kind in sorted(by_kind):
        found = by_kind[kind]
        picked = random.Random(f"{seed} {kind}").sample(found, min(per_kind, len(found)))
        chosen += sorted(picked, key=lambda mutant: (mutant.line, mutant.changed))
    return chosen


def score(damaged: list[Mutant], run: Callable[[str], str | None]) -> Score:
    """Runs the tests on each mutant: ``run(text)`` returns None if they pass, else why the mutant was caught."""
    result = Score()
    for mutant in damaged:
        try:
            reason = run(mutant.text)
        except UnsupportedPTX:
            result.unsupported.append(mutant)
            continue
        result.total[mutant.kind] += 1
        if reason is None:
            result.survivors.append(mutant)
        else:
            result.caught[mutant.kind] += 1
            result.reasons[reason] += 1
    return result


def reason_caught(test: Callable[[], None]) -> str | None:
    """None if the test passes; else the kind of the fault, an endless loop among them, or ``wrong result``."""
    try:
        test()
    except PTXFault as fault:
        return fault.kind
    except AssertionError:
        return "wrong result"
    return None


def _is_wait(instruction: Instruction) -> bool:
    return instruction.name.startswith(WAITS)


def _same(one: Instruction, other: Instruction) -> bool:
    return (one.opcode, one.operands, one.guard) == (other.opcode, other.operands, other.guard)


def _without_equal_waits(before: list[str], wait: str) -> list[str]:
    """The lines before a wait, without those right before it that are the same wait."""
    kept = len(before)
    while kept and before[kept - 1].strip() in (wait.strip(), ""):
        kept -= 1
    return [*before[:kept], *[""] * (len(before) - kept)]


def _changes(instruction: Instruction, line: str) -> Iterator[tuple[str, str]]:
    for change in (_ordering, _guards, _compare, _shuffle, _addresses, _constants, _operands, _roundings):
        yield from change(instruction, line)


def _without(line: str) -> str:
    """The line without its statement, but with the labels and braces around it."""
    return re.sub(r"(@!?[%\w$]+\s+)?[a-z][\w.:]*(\s[^;]*)?;", "", line, count=1)


def _ordering(instruction, line):
    name = instruction.name
    if name.startswith(ORDERING):
        yield "barrier dropped", _without(line)
    if name.startswith(COPIES):
        yield "commit dropped", _without(line)
    if name.startswith("fence.proxy"):
        yield "proxy fence dropped", _without(line)
    if name.startswith(WAITS):
        yield "wait dropped", _without(line)
        allowed = int(instruction.operands[0])
        yield "wait weakened", re.sub(r"\d+(\s*;)", rf"{allowed + 1}\1", line)


def _guards(instruction, line):
    if instruction.guard is not None:
        yield "guard dropped", re.sub(r"@!?[%\w$]+\s+", "", line, count=1)
        yield "guard inverted", line.replace("@!", "@", 1) if "@!" in line else line.replace("@", "@!", 1)


def _compare(instruction, line):
    if instruction.opcode[0] != "setp":
        return
    operator = instruction.opcode[1]
    if operator[:2] in NEIGHBOURS:
        changed = NEIGHBOURS[operator[:2]] + operator[2:]
        yield "comparison", line.replace(f"setp.{operator}.", f"setp.{changed}.", 1)


def _shuffle(instruction, line):
    """Half the offset: lanes meet twice. An offset of one more would reach the same lanes, with the later ones."""
    if instruction.opcode[0] == "shfl" and instruction.operands[2].isdigit():
        offset = int(instruction.operands[2])
        parts = line.split(",")
        parts[2] = f" {offset // 2 or 2}"
        yield "shuffle offset", ",".join(parts)


def _addresses(instruction, line):
    """Constant offsets, by the size of what is accessed."""
    if instruction.type not in DTYPES or "param" in instruction.opcode:
        return
    found = re.search(r"\[([^\]+]*)\+\s*(-?\d+)\s*\]", line)
    if found and int(found[2]):
        for step in (1, -1):
            offset = int(found[2]) + step * max(1, width(instruction.type) // 8)
            yield "address offset", f"{line[: found.start()]}[{found[1]}+{offset}]{line[found.end() :]}"


def _constants(instruction, line):
    if instruction.opcode[0] not in WITH_CONSTANTS:
        return
    for found in re.finditer(r"(?<=[,\s])-?\d+(?=\s*[,;])", line):
        yield "constant", f"{line[: found.start()]}{int(found[0]) + 1}{line[found.end() :]}"


def _operands(instruction, line):
    name = instruction.name
    if name in ("and.pred", "or.pred"):
        changed = "or.pred" if name == "and.pred" else "and.pred"
        yield "predicate logic", line.replace(name, changed, 1)
    if instruction.opcode[0] in ("min", "max"):
        changed = "max" if instruction.opcode[0] == "min" else "min"
        yield "extremum", line.replace(f"{instruction.opcode[0]}.", f"{changed}.", 1)
    if instruction.opcode[0] == "selp":
        yield "selection swapped", _swapped(line, instruction.operands[1], instruction.operands[2], ",")
    if instruction.opcode[0] == "mma":
        for operand in instruction.operands[1:3]:
            registers = [part.strip() for part in operand.strip("{}").split(",")]
            if len(set(registers)) > 1:
                changed = "{" + ", ".join([registers[1], registers[0], *registers[2:]]) + "}"
                yield "product operand swapped", line.replace(operand, changed, 1)


def _swapped(line: str, first: str, second: str, separator: str) -> str:
    both = rf"{re.escape(first)}\s*{separator}\s*{re.escape(second)}(?=\s*{separator})"
    return re.sub(both, f"{second}{separator} {first}", line, count=1)


def _roundings(instruction, line):
    if instruction.opcode[:2] == ("cvt", "rn"):
        yield "rounding", line.replace("cvt.rn.", "cvt.rz.", 1)
