"""Runs a program over a grid: every block, one after the other, in any order."""

import struct

import numpy as np

from .block import Block
from .memory import Memory
from .profile import Profile
from .program import Program
from .state_spaces import smallest_access

DEFAULT_LIMIT = 10_000_000


def launch(
    program: Program,
    grid: tuple[int, ...],
    args: list,
    *,
    shared_memory: int = 0,
    memory: Memory,
    block: tuple[int, int, int] | None = None,
    order=None,
    check_races: bool = True,
    profile: Profile | None = None,
    limit: int = DEFAULT_LIMIT,
) -> dict[str, int]:
    """Executes ``program`` and returns how often each instruction ran, counted once for a group of threads.

    ``args``: ints, floats and addresses of ``memory`` in the order of the parameters; parameters at the end without an
    argument are 0. ``shared_memory``: bytes of the dynamic part. ``block``: threads along x, y, z, where the program
    does not say. ``order``: the numbers of the blocks in the order in which they run. ``limit``: instructions that one
    block may run. Raises PTXFault.
    """
    shape = block or program.num_threads
    if shape is None:
        raise ValueError(f"kernel {program.name}: wanted a block shape, as the program has no .reqntid")
    grid = (*grid, 1, 1)[:3]
    parameters = pack_arguments(program, args)
    runner = program.blocks.get((shape, shared_memory))
    if runner is None:
        runner = program.blocks[shape, shared_memory] = Block(program, shape, shared_memory)
    runner.counts[:] = [0] * len(runner.counts)
    memory.start(check_races, smallest_access(program, "global"))
    for index in range(int(np.prod(grid))) if order is None else order:
        runner.start(memory, parameters, grid, int(index), check_races, profile)
        runner.run(limit)
        if profile is not None:
            profile.end_block()
    counts: dict[str, int] = {}
    for instruction, count in zip(program.instructions, runner.counts, strict=True):
        if count:
            counts[instruction.name] = counts.get(instruction.name, 0) + count
    if profile is not None:
        profile.end_launch(counts)
    return counts


def pack_arguments(program: Program, args: list) -> dict[str, bytes]:
    """The bytes of each parameter, by its name."""
    if len(args) > len(program.params):
        raise ValueError(f"kernel {program.name}: wanted at most {len(program.params)} arguments, got {len(args)}")
    padded = list(args) + [0] * (len(program.params) - len(args))
    return {name: _pack(value, size) for (name, _, size), value in zip(program.params, padded, strict=True)}


def _pack(value, size: int) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, float):
        return struct.pack("<f" if size == 4 else "<d", value)
    return (int(value) & ((1 << (8 * size)) - 1)).to_bytes(size, "little")
