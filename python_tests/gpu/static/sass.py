"""NVIDIA machine code: the instructions of a cubin with their scheduling bits, and the resources it declares.

The listing is cuobjdump's, which comes with Triton. Each instruction is 128 bits; ptxas schedules statically, and bits
105..121 hold what it decided (Jia et al., "Dissecting the NVIDIA Volta GPU Architecture via Microbenchmarking", 2018,
section 2.1).
"""

import re
import subprocess
import tempfile
from typing import NamedTuple

from triton import knobs

from python_tests.gpu.static.instruction import Control, Instruction

_INSTRUCTION = re.compile(
    r"/\*(?P<address>[0-9a-f]{4,6})\*/\s+"
    r"(?P<predicate>@!?U?P\w+\s+)?(?P<mnemonic>[A-Z][\w.]*)\s*(?P<operands>[^;]*);\s*"
    r"/\* 0x(?P<low>[0-9a-f]{16}) \*/\s*\n\s*/\* 0x(?P<high>[0-9a-f]{16}) \*/"
)
_ADDRESS = re.compile(r"(?P<condition>.*?)\s*0x(?P<address>[0-9a-f]+)\s*$")
_ENDS = ("EXIT", "RET", "JMP", "BRX")


class Resources(NamedTuple):
    registers: int  # per thread
    stack: int  # bytes per thread


def disassemble(cubin: bytes) -> str:
    return _cuobjdump(cubin, "-sass")


def resources(cubin: bytes) -> Resources:
    return parse_resources(_cuobjdump(cubin, "-res-usage"))


def parse_resources(listing: str) -> Resources:
    registers = re.search(r"REG:(\d+)", listing)
    stack = re.search(r"STACK:(\d+)", listing)
    if not registers or not stack:
        raise ValueError(f"listing: expected REG: and STACK: of cuobjdump -res-usage, got {listing[:200]!r}")
    return Resources(int(registers[1]), int(stack[1]))


def parse(listing: str) -> list[Instruction]:
    """The instructions of a listing of one kernel."""
    instructions = [_instruction(match) for match in _INSTRUCTION.finditer(listing)]
    if not instructions:
        raise ValueError(f"listing: expected the output of cuobjdump -sass, got {listing[:200]!r}")
    return instructions


def _instruction(match: re.Match) -> Instruction:
    mnemonic, operands = match["mnemonic"], match["operands"].strip()
    target, conditional = None, match["predicate"] is not None
    if mnemonic.startswith("BRA") and (found := _ADDRESS.match(operands)):
        target = int(found["address"], 16)
        conditional = conditional or bool(found["condition"])  # `BRA P1, 0x40` and `BRA.U !UP0, 0x40`
    ends = target is not None or mnemonic.split(".")[0] in _ENDS
    return Instruction(
        address=int(match["address"], 16),
        mnemonic=mnemonic,
        operands=operands,
        target=target,
        falls_through=conditional or not ends,
        control=_control(int(match["high"], 16)),
    )


def _control(high: int) -> Control:
    bits = high >> (105 - 64)
    return Control(
        stall=bits & 0xF,
        write_barrier=bits >> 5 & 0x7,
        read_barrier=bits >> 8 & 0x7,
        wait_mask=bits >> 11 & 0x3F,
    )


def _cuobjdump(cubin: bytes, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
