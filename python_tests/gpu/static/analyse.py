"""All that is read out of one compiled kernel."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from python_tests.gpu.aot import TARGETS, Compiled
from python_tests.gpu.static import amdgcn, sass
from python_tests.gpu.static.classify import access_bytes, count_kinds, kind
from python_tests.gpu.static.instruction import Instruction
from python_tests.gpu.static.loops import Loop, innermost_loops, outer_loops
from python_tests.gpu.static.occupancy import Occupancy, occupancy, occupancy_cdna3

TILE_BYTES = 16  # of a lane's access to an operand tile that the compiler could align
INDEX_BYTES = (4, 8)  # of a lane's access to int32 and int64 indices


@dataclass(frozen=True)
class Analysis:
    """Registers and stack are per thread, stack and shared memory in bytes; counts are of static instructions."""

    kernel: str
    target: str
    num_warps: int
    registers: int
    stack: int
    spills: int
    shared: int
    occupancy: Occupancy
    instructions: int
    total: Mapping[str, int]  # by kind, see classify
    inner_loop: Loop | None = field(repr=False)
    inner: Mapping[str, int]  # by kind, of the inner loop
    scalar_spills: int = 0  # of the spills those of scalar registers, to lanes of vector registers

    @property
    def backend(self) -> str:
        return TARGETS[self.target].backend

    @property
    def inner_instructions(self) -> int:
        return len(self.inner_loop.instructions) if self.inner_loop else 0

    @property
    def inner_stalls(self) -> int:
        """Cycles that one warp needs at least for an iteration; 0 where the vendor does not write them down."""
        return sum(one.stall for one in self.inner_loop.every_time) if self.inner_loop else 0

    def inner_accesses(self, kind_name: str, widths: tuple[int, ...]) -> int:
        """Instructions of a kind in the inner loop whose lanes move one of these numbers of bytes."""
        if self.inner_loop is None:
            return 0
        accesses = [one for one in self.inner_loop.instructions if kind(one, self.backend) == kind_name]
        return sum(access_bytes(one) in widths for one in accesses)

    @property
    def tile_copies(self) -> int:
        return self.inner_accesses("async copy", (TILE_BYTES,))


def analyse(compiled: Compiled, target: str) -> Analysis:
    """Reads the machine code of a kernel that was compiled for one of ``TARGETS``."""
    if target not in TARGETS:
        raise ValueError(f"target: expected one of {', '.join(TARGETS)}, got {target!r}")
    if TARGETS[target].backend == "cuda":
        return _analyse_nvidia(compiled, target)
    return _analyse_amd(compiled, target)


def _analyse_nvidia(compiled: Compiled, target: str) -> Analysis:
    cubin = compiled.kernel.asm["cubin"]
    metadata = compiled.kernel.metadata
    instructions = sass.parse(sass.disassemble(cubin))
    used = sass.resources(cubin)
    return Analysis(
        **_common(compiled, target, instructions),
        registers=used.registers,
        stack=used.stack,
        spills=count_kinds(instructions, "cuda")["spill"],
        occupancy=occupancy(TARGETS[target].arch, used.registers, metadata.num_warps, metadata.shared),
    )


def _analyse_amd(compiled: Compiled, target: str) -> Analysis:
    assembly = compiled.kernel.asm["amdgcn"]
    metadata = compiled.kernel.metadata
    instructions = amdgcn.parse(assembly)
    used = amdgcn.parse_resources(assembly)
    return Analysis(
        **_common(compiled, target, instructions),
        registers=used.registers,
        stack=used.stack,
        spills=used.spills,
        scalar_spills=used.scalar_spills,
        occupancy=occupancy_cdna3(used.registers, metadata.num_warps, metadata.shared),
    )


def _common(compiled: Compiled, target: str, instructions: list[Instruction]) -> dict:
    backend = TARGETS[target].backend
    inner_loop = _main_loop(innermost_loops(instructions), outer_loops(instructions), backend)
    return {
        "kernel": compiled.kernel.metadata.name,
        "target": target,
        "num_warps": compiled.kernel.metadata.num_warps,
        "shared": compiled.kernel.metadata.shared,
        "instructions": len(instructions),
        "total": count_kinds(instructions, backend),
        "inner_loop": inner_loop,
        "inner": count_kinds(inner_loop.instructions if inner_loop else (), backend),
    }


def _main_loop(innermost: list[Loop], outer: list[Loop], backend: str) -> Loop | None:
    """The one with most tensor-core instructions; the longest of those that tie. A loop around rare loops is the main
    one where no innermost one has such instructions."""

    def weight(loop: Loop) -> tuple[int, int]:
        return count_kinds(loop.instructions, backend)["tensor core"], len(loop.instructions)

    found = max(innermost, key=weight, default=None)
    around = max(outer, key=weight, default=None)
    if around is not None and weight(around)[0] > 0 and weight(found)[0] == 0:
        return around
    return found
