"""AMD machine code, from the assembly text that LLVM writes: instructions, and the resources in its metadata."""

import re
from typing import NamedTuple

from python_tests.gpu.static.instruction import Instruction

_LABEL = re.compile(r"(\.?[A-Za-z_]\w*):")
_INSTRUCTION = re.compile(r"([a-z]\w+)\s*([^;]*)")
_BRANCHES = ("s_branch", "s_cbranch")
_ENDS = ("s_branch", "s_endpgm", "s_setpc")


class Resources(NamedTuple):
    """Per lane; registers of a lane are the vector registers and, behind them, the accumulation registers."""

    registers: int
    stack: int  # bytes of scratch memory
    spills: int  # vector and scalar registers that were spilled
    scalar_spills: int  # of these the scalar ones


def parse_resources(assembly: str) -> Resources:
    return Resources(
        registers=_metadata(assembly, "vgpr_count"),  # of the unified file: the accumulation registers are in it
        stack=_metadata(assembly, "private_segment_fixed_size"),
        spills=_metadata(assembly, "vgpr_spill_count") + _metadata(assembly, "sgpr_spill_count"),
        scalar_spills=_metadata(assembly, "sgpr_spill_count"),
    )


def parse(assembly: str) -> list[Instruction]:
    """The instructions of a kernel. Addresses are ordinals: the text has no others."""
    code = assembly.split(".Lfunc_end0")[0]
    labels: dict[str, int] = {}
    parsed: list[tuple[str, str]] = []
    for line in map(str.strip, code.splitlines()):
        if label := _LABEL.match(line):
            labels[label[1]] = len(parsed)
        elif found := _INSTRUCTION.match(line):
            parsed.append((found[1], found[2].strip()))
    if not parsed:
        raise ValueError(f"assembly: expected AMD assembly text, got {assembly[:200]!r}")
    return [_instruction(ordinal, *one, labels) for ordinal, one in enumerate(parsed)]


def _instruction(ordinal: int, mnemonic: str, operands: str, labels: dict[str, int]) -> Instruction:
    target = labels.get(operands) if mnemonic.startswith(_BRANCHES) else None
    return Instruction(ordinal, mnemonic, operands, target, falls_through=not mnemonic.startswith(_ENDS))


def _metadata(assembly: str, name: str) -> int:
    found = re.search(rf"\.{name}:\s*(\d+)", assembly)
    if not found:
        raise ValueError(f"assembly: expected .{name} in its metadata, found none")
    return int(found[1])
