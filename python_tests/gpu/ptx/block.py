"""One block of threads: registers, special registers, and the loop that executes its instructions in lock step.

Each register is one numpy array over all threads. Instructions are decoded once, when they are first reached, into a
function of the mask of active threads; None stands for all threads. Where threads diverge, they form groups; the group
at the lowest instruction runs first, and groups merge where they meet.
"""

import numpy as np

from . import instructions
from .async_copies import AsyncCopies
from .control_flow import CONTROL, ENDED, release_barrier
from .faults import LIMIT, PARTIAL_WARP, PTXFault, UnsupportedPTX
from .shared_memory import SharedMemory
from .state_spaces import smallest_access
from .types import UNSIGNED, width

LANES = 32
POISON = 0xFF  # of a register that nobody wrote: NaN as a float, -1 as an index
NO_STOP = 1 << 60


class Block:
    """A program decoded for blocks of one shape. ``start`` makes it the block at a place of a grid."""

    def __init__(self, program, shape: tuple[int, int, int], dynamic_shared: int):
        self.program, self.shape = program, shape
        self.num_threads = int(np.prod(shape))
        if self.num_threads % LANES:
            raise UnsupportedPTX(f"block of {shape} threads: wanted a multiple of {LANES} threads")
        self.num_warps = self.num_threads // LANES
        self.threads = np.arange(self.num_threads)
        self.lane, self.warp = self.threads % LANES, self.threads // LANES
        self.pools: dict[int, np.ndarray] = {}  # bits -> [registers, threads]: neighbours can be used as one matrix
        self.rows: dict[str, int] = {}  # of a register in its pool
        self.registers = self._registers()
        self.special = self._special_registers()
        has_proxies = any(instruction.opcode[0] in ("wgmma", "tcgen05") for instruction in program.instructions)
        shared_size = program.static_shared + dynamic_shared
        self.shared = SharedMemory(shared_size, smallest_access(program, "shared"), has_proxies)
        self.copies = AsyncCopies(self.shared, self.num_threads)
        self.local = np.empty((self.num_threads, program.local_bytes), np.uint8)
        self.state: dict = {}  # of units that only some architectures have, by name
        self.steps = [None] * len(program.instructions)
        self.counts = [0] * len(program.instructions)
        self.parameters: dict[str, bytes] = {}
        self.memory = self.profile = None
        self.pc = 0

    def _registers(self) -> dict[str, np.ndarray]:
        by_bits: dict[int, list[str]] = {}
        for name, type_name in self.program.registers.items():
            by_bits.setdefault(width(type_name) if type_name != "pred" else 1, []).append(name)
        registers = {}
        for bits, names in by_bits.items():
            self.pools[bits] = np.zeros((len(names), self.num_threads), UNSIGNED.get(bits, np.bool_))
            self.rows.update((name, row) for row, name in enumerate(names))
            registers.update(zip(names, self.pools[bits], strict=True))
        return registers

    def _special_registers(self) -> dict[str, np.ndarray]:
        x, y, _ = self.shape
        coordinates = {"x": self.threads % x, "y": self.threads // x % y, "z": self.threads // (x * y)}
        special = {f"%tid.{axis}": values.astype(np.uint32) for axis, values in coordinates.items()}
        for axis, size in zip("xyz", self.shape, strict=True):
            special[f"%ntid.{axis}"] = np.full(self.num_threads, size, np.uint32)
            special[f"%ctaid.{axis}"] = np.zeros(self.num_threads, np.uint32)
            special[f"%nctaid.{axis}"] = np.zeros(self.num_threads, np.uint32)
        special["%laneid"] = self.lane.astype(np.uint32)
        special["%warpid"] = self.warp.astype(np.uint32)
        special["%cluster_ctarank"] = np.zeros(self.num_threads, np.uint32)
        special["%clock64"] = np.zeros(self.num_threads, np.uint64)
        special["WARP_SZ"] = np.full(self.num_threads, LANES, np.uint32)
        return special

    def start(self, memory, parameters: dict[str, bytes], grid, index: int, check_races: bool, profile) -> None:
        """Becomes block number ``index`` (x fastest) of the grid, with nothing in its registers and shared memory."""
        self.memory, self.parameters, self.profile, self.index = memory, parameters, profile, index
        position = (index % grid[0], index // grid[0] % grid[1], index // (grid[0] * grid[1]))
        for axis, number, size in zip("xyz", position, grid, strict=True):
            self.special[f"%ctaid.{axis}"].fill(number)
            self.special[f"%nctaid.{axis}"].fill(size)
        for bits, pool in self.pools.items():
            pool.view(np.uint8).fill(0 if bits == 1 else POISON)
        self.local.fill(POISON)
        self.shared.reset(check_races)
        self.copies.reset()
        self.state.clear()

    def run(self, limit: int) -> None:
        """Executes until every thread has exited; at most ``limit`` instructions."""
        self.remaining = limit
        self.exited = np.zeros(self.num_threads, bool)
        self.groups = [(0, np.ones(self.num_threads, bool))]
        self.waiting: list[tuple[int, np.ndarray, int]] = []  # at a barrier: next instruction, threads, barrier
        try:
            with np.errstate(all="ignore"):
                while self.groups or self.waiting:
                    self._run_lowest_group()
        except PTXFault as fault:
            fault.locate(self.program.instructions[self.pc], self.index)
            raise

    def _run_lowest_group(self) -> None:
        if not self.groups:
            release_barrier(self)
            return
        self.groups.sort(key=lambda group: group[0])
        pc, mask = self.groups.pop(0)
        while self.groups and self.groups[0][0] == pc:
            mask = mask | self.groups.pop(0)[1]
        stop = self.groups[0][0] if self.groups else NO_STOP
        pc = self._advance(pc, None if mask.all() else mask, stop)
        if pc != ENDED:
            self.groups.append((pc, mask))

    def _advance(self, pc: int, mask, stop: int) -> int:
        """Runs one group until its control flow splits or ends (ENDED), or it meets the group at ``stop``."""
        steps, counts, end = self.steps, self.counts, len(self.steps)
        while pc < stop:
            if pc >= end:
                self.exited |= True if mask is None else mask
                return ENDED
            self.pc = pc
            step = steps[pc]
            if step is None:
                step = steps[pc] = self._decode(self.program.instructions[pc])
            counts[pc] += 1
            self.remaining -= 1
            if self.remaining < 0:
                raise PTXFault(LIMIT, "the limit of instructions is reached: an endless loop?")
            target = step(mask)
            if target is None:
                pc += 1
            elif target == ENDED:
                return ENDED
            else:
                pc = target
        return pc

    def _decode(self, instruction):
        name = instruction.opcode[0]
        if name in CONTROL:
            return CONTROL[name](self, instruction)
        decode = instructions.DECODERS.get(name)
        if decode is None:
            raise UnsupportedPTX(f"instruction {instruction} at PTX line {instruction.line}")
        try:
            step = decode(self, instruction)
        except (UnsupportedPTX, KeyError, ValueError, IndexError, StopIteration) as error:
            what = f"{type(error).__name__}: {error}"
            raise UnsupportedPTX(f"{instruction} at PTX line {instruction.line}: {what}") from error
        return step if instruction.guard is None else self._guarded(step, *instruction.guard)

    def _guarded(self, step, register: str, negated: bool):
        predicate, num_threads = self.registers[register], self.num_threads

        def execute(mask):
            active = ~predicate if negated else predicate.copy()
            if mask is not None:
                active &= mask
            count = np.count_nonzero(active)
            if count == num_threads:
                step(None)
            elif count:
                step(active)

        return execute

    def full_warps(self, mask, what: str) -> np.ndarray:
        """Numbers of the warps that take part; a fault where only part of a warp does."""
        if mask is None:
            return np.arange(self.num_warps)
        lanes = mask.reshape(-1, LANES).sum(axis=1)
        if ((lanes > 0) & (lanes < LANES)).any():
            raise PTXFault(PARTIAL_WARP, f"{what} executed by {lanes.tolist()} lanes of the warps, wanted all or none")
        return np.nonzero(lanes)[0]

    def active(self, values: np.ndarray, mask) -> np.ndarray:
        """The values of the active threads."""
        return values if mask is None else values[mask]

    def load_global(self, addresses: np.ndarray, mask, width: int, dtype) -> np.ndarray:
        """Loads of the active threads, whose addresses these are."""
        self.note_global("loads", addresses, mask, width)
        return self.memory.load(addresses, width, dtype, self.index)

    def store_global(self, addresses: np.ndarray, mask, values: np.ndarray) -> None:
        self.note_global("stores", addresses, mask, values.shape[1] * values.dtype.itemsize)
        self.memory.store(addresses, values, self.index)

    def note_global(self, kind: str, addresses: np.ndarray, mask, width: int) -> None:
        if self.profile is not None:
            location = self.program.instructions[self.pc].location
            self.profile.note_global(kind, addresses, self.active(self.warp, mask), width, location)

    def load_shared(self, offsets, threads, width: int, dtype, owners=None) -> np.ndarray:
        """Loads of these threads, one for each offset; ``owners``: who reads, where it is not the thread alone."""
        self.note_shared(offsets, threads, width)
        return self.shared.load(offsets, threads if owners is None else owners, width, dtype)

    def store_shared(self, offsets, threads, values: np.ndarray, owners=None) -> None:
        self.note_shared(offsets, threads, values.shape[1] * values.dtype.itemsize)
        self.shared.store(offsets, threads if owners is None else owners, values)

    def note_shared(self, offsets: np.ndarray, threads: np.ndarray, width: int) -> None:
        if self.profile is not None:
            location = self.program.instructions[self.pc].location
            self.profile.note_shared(offsets, threads, width, location)
