"""Reads the text of a PTX kernel into instructions with operands, resolved labels and source lines.

Names are resolved by scope: inline assembly opens ``{ .reg .pred p; loop: ... }`` more than once in a kernel, with the
same names for other registers and other labels.
"""

import re
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property

from .types import width

TOKEN = re.compile(
    r"\s*(?:(?P<loc>\.loc\s[^\n]*)|(?P<open>\{)|(?P<close>\})|(?P<label>[$\w]+):(?!:)|(?P<statement>[^;]*);)"
)
GUARD = re.compile(r"@(!?)\s*([%$\w]+)\s+")
OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|\([^)]*\)|[^,\s][^,]*")
NAME = re.compile(r"[%$\w]+")
PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+\d+\s+)?\.([busf]\d+)(?:\s+\.ptr[^,)]*?)?\s+([\w$]+)(?:\[(\d+)\])?\s*[,)]"
)
SHARED = re.compile(r"(\.extern\s+)?\.shared\s+(?:\.align\s+(\d+)\s+)?\.([bufs]\d+)\s+([\w$]+)(?:\[(\d*)\])?\s*;")
LOCAL = re.compile(r"\.local\s+(?:\.align\s+\d+\s+)?\.b8\s+([\w$]+)\[(\d+)\]")
REGISTER_RANGE = re.compile(r"(%?[\w$]+)<(\d+)>")


@dataclass(frozen=True, eq=False)
class Instruction:
    """One instruction. ``opcode`` is split at its dots."""

    opcode: tuple[str, ...]
    operands: tuple[str, ...]
    guard: tuple[str, bool] | None  # register and whether it is negated
    location: str  # file:line of the kernel's source
    line: int  # of the PTX text, from 1
    index: int
    scopes: tuple[int, ...]  # outermost first

    @property
    def type(self) -> str:
        return self.opcode[-1]

    @cached_property
    def name(self) -> str:
        return ".".join(self.opcode)

    def __str__(self) -> str:
        guard = f"@{'!' if self.guard[1] else ''}{self.guard[0]} " if self.guard else ""
        return f"{guard}{self.name} {', '.join(self.operands)}"


class Program:
    """The first kernel of a PTX text.

    ``params`` are (name, type, bytes), ``num_threads`` what ``.reqntid`` or ``.maxntid`` says (None without one),
    ``shared_symbols`` offsets in shared memory, where the dynamic part begins at ``static_shared``.
    """

    def __init__(self, ptx_text: str):
        self.text = ptx_text
        text = re.sub(r"//[^\n]*", "", ptx_text)
        entry = re.search(r"\.entry\s+([\w$]+)", text)
        if entry is None:
            raise ValueError("PTX text: wanted a kernel (.entry), found none")
        self.name = entry[1]
        start = text.index("{", entry.end())
        head = text[entry.start() : start]
        self.params = [_parameter(*found) for found in PARAMETER.findall(head)]
        threads = re.search(r"\.(?:req|max)ntid\s+([\d, ]+)", head)
        self.num_threads = _three(threads[1]) if threads else None
        self.shared_symbols, self.static_shared = _shared_layout(text)
        self.local_symbols, self.local_bytes = {}, 0
        self.registers: dict[str, str] = {}
        self.instructions: list[Instruction] = []
        self.targets: dict[int, int] = {}  # index of a branch -> index of the instruction it goes to
        self.blocks: dict = {}  # decoded forms, kept by ``launch``
        _Body(self, text, start, _source_files(ptx_text)).read()


def _parameter(type_name: str, name: str, count: str) -> tuple[str, str, int]:
    return name, type_name, width(type_name) // 8 * int(count or 1)


def _three(text: str) -> tuple[int, int, int]:
    sizes = [int(size) for size in text.split(",")]
    return (*sizes, 1, 1)[:3]


def _source_files(text: str) -> dict[str, str]:
    return dict(re.findall(r'\.file\s+(\d+)\s+"([^"]+)"', text))


def _shared_layout(text: str) -> tuple[dict[str, int], int]:
    """Static arrays one after the other; what is declared ``.extern`` lies behind them."""
    offsets, end = {}, 0
    declarations = SHARED.findall(text)
    for extern, align, type_name, name, count in sorted(declarations, key=lambda found: bool(found[0])):
        alignment = 16 if extern else int(align or width(type_name) // 8)
        end = -(-end // alignment) * alignment
        offsets[name] = end
        if not extern:
            end += int(count or 1) * width(type_name) // 8
    return offsets, end


class _Body:
    """Reads what stands between the braces of a kernel into its ``Program``."""

    def __init__(self, program: Program, text: str, start: int, files: dict[str, str]):
        self.program, self.text, self.position, self.files = program, text, start, files
        self.line_starts = [0] + [found.end() for found in re.finditer("\n", text)]
        self.location = "?"
        self.scopes: list[int] = []
        self.names: list[dict[str, str]] = []  # of registers, for each open scope
        self.labels: dict[tuple[int, str], int] = {}
        self.opened = 0

    def read(self) -> None:
        while True:
            token = TOKEN.match(self.text, self.position)
            if token is None:
                raise ValueError(f"PTX line {self._line(self.position)}: wanted a statement or a closing brace")
            self.position = token.end()
            if token["loc"]:
                self._locate(token["loc"])
            elif token["open"]:
                self._open()
            elif token["close"]:
                self.scopes.pop()
                self.names.pop()
                if not self.scopes:
                    break
            elif token["label"]:
                self.labels[self.scopes[-1], token["label"]] = len(self.program.instructions)
            elif token["statement"].strip():
                self._statement(token["statement"].strip(), self._line(token.start("statement")))
        self._resolve_branches()

    def _line(self, position: int) -> int:
        return bisect_right(self.line_starts, position)

    def _open(self) -> None:
        self.scopes.append(self.opened)
        self.names.append({})
        self.opened += 1

    def _locate(self, directive: str) -> None:
        number, line = directive.split()[1:3]
        self.location = f"{self.files.get(number, number)}:{line}"

    def _statement(self, text: str, line: int) -> None:
        if text.startswith(".reg"):
            self._declare(text)
        elif local := LOCAL.match(text):
            self.program.local_symbols[local[1]] = self.program.local_bytes
            self.program.local_bytes += -(-int(local[2]) // 16) * 16
        elif not text.startswith("."):
            self._instruction(text, line)

    def _declare(self, text: str) -> None:
        _, type_name, names = text.split(None, 2)
        for name in names.split(","):
            name = name.strip()
            if several := REGISTER_RANGE.fullmatch(name):
                for number in range(int(several[2])):
                    self._declare_one(f"{several[1]}{number}", type_name[1:])
            else:
                self._declare_one(name, type_name[1:])

    def _declare_one(self, name: str, type_name: str) -> None:
        unique = name if len(self.scopes) == 1 else f"{name}${self.scopes[-1]}"
        self.names[-1][name] = unique
        self.program.registers[unique] = type_name

    def _instruction(self, text: str, line: int) -> None:
        if len(self.scopes) > 1:
            text = NAME.sub(lambda found: self._unique(found[0]), text)
        guard = GUARD.match(text)
        if guard:
            text = text[guard.end() :]
        opcode, *rest = text.split(None, 1)
        instructions = self.program.instructions
        instructions.append(
            Instruction(
                tuple(opcode.split(".")),
                tuple(operand.strip() for operand in OPERAND.findall("".join(rest))),
                (guard[2], guard[1] == "!") if guard else None,
                self.location,
                line,
                len(instructions),
                tuple(self.scopes),
            )
        )

    def _unique(self, name: str) -> str:
        for names in reversed(self.names):
            if name in names:
                return names[name]
        return name

    def _resolve_branches(self) -> None:
        for instruction in self.program.instructions:
            if instruction.opcode[0] != "bra":
                continue
            label = instruction.operands[0]
            found = [self.labels.get((scope, label)) for scope in reversed(instruction.scopes)]
            targets = [target for target in found if target is not None]
            if not targets:
                raise ValueError(f"PTX line {instruction.line}: branch to '{label}', wanted a label of its scopes")
            self.program.targets[instruction.index] = targets[0]
