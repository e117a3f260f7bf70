"""Branches, exits and barriers: the instructions that decide which threads run where.

A step of these returns where its group goes on, or ENDED once it has put what is left of it elsewhere.
"""

import numpy as np

from .faults import BARRIER, PARTIAL_WARP, TRAP, PTXFault, UnsupportedPTX
from .instructions.warp import check_members
from .operands import reader

ENDED = -1
LANES = 32


def _split(block, instruction):
    """A function: mask -> (active threads, the others of the group), each as a mask of bools."""
    everyone = np.ones(block.num_threads, bool)
    if instruction.guard is None:
        nobody = np.zeros(block.num_threads, bool)
        return lambda mask: (everyone if mask is None else mask, nobody)
    register, negated = instruction.guard
    predicate = block.registers[register]

    def split(mask):
        group = everyone if mask is None else mask
        active = group & (predicate != negated)
        return active, group & ~active

    return split


def decode_branch(block, instruction):
    target, following = block.program.targets[instruction.index], instruction.index + 1
    if instruction.guard is None:
        return lambda mask: target
    split = _split(block, instruction)

    def execute(mask):
        taken, rest = split(mask)
        if not taken.any():
            return following
        if not rest.any():
            return target
        block.groups += [(target, taken), (following, rest)]
        return ENDED

    return execute


def decode_exit(block, instruction):
    split, following, is_trap = _split(block, instruction), instruction.index + 1, instruction.opcode[0] == "trap"

    def execute(mask):
        leaving, rest = split(mask)
        if is_trap and leaving.any():
            raise PTXFault(TRAP, "the program traps")
        block.exited |= leaving
        if not rest.any():
            return ENDED
        block.groups.append((following, rest))
        return ENDED

    return execute


def decode_barrier(block, instruction):
    if "warp" in instruction.opcode:
        return _decode_warp_barrier(block, instruction)
    if "sync" not in instruction.opcode or instruction.guard is not None:
        raise UnsupportedPTX(f"{instruction}: wanted an unguarded barrier of the whole block")
    if len(instruction.operands) > 1 and instruction.operands[1] != str(block.num_threads):
        raise UnsupportedPTX(f"{instruction}: wanted a barrier of all {block.num_threads} threads")
    is_aligned = instruction.opcode[0] == "bar" or "aligned" in instruction.opcode
    barrier, following = int(instruction.operands[0], 0), instruction.index + 1

    def execute(mask):
        group = ~block.exited if mask is None else mask
        if is_aligned:
            _check_alive_warps(block, group)
        block.waiting.append((following, group, barrier))
        return ENDED

    return execute


def _decode_warp_barrier(block, instruction):
    """Lock step has brought the threads together before; what it orders in shared memory is noted."""
    split, members = _split(block, instruction), reader(block, instruction.operands[0], "u32")

    def execute(mask):
        active, _ = split(mask)
        check_members(block, members(), active, "bar.warp.sync")
        block.shared.warp_barrier(np.nonzero(active.reshape(-1, LANES).any(axis=1))[0])

    return execute


def _check_alive_warps(block, group) -> None:
    arrived = group.reshape(-1, LANES)
    alive = ~block.exited.reshape(-1, LANES)
    partial = arrived.any(axis=1) & (alive & ~arrived).any(axis=1)
    if partial.any():
        warp = int(np.nonzero(partial)[0][0])
        raise PTXFault(PARTIAL_WARP, f"barrier reached by {arrived[warp].sum()} of {alive[warp].sum()} lanes of a warp")


def release_barrier(block) -> None:
    """Every thread waits or has exited: lets those that wait at one barrier go on."""
    barriers = sorted({barrier for _, _, barrier in block.waiting})
    if len(barriers) > 1:
        raise PTXFault(BARRIER, f"deadlock: threads of a block wait at the different barriers {barriers}")
    block.groups = [(following, group) for following, group, _ in block.waiting]
    block.waiting = []
    block.shared.barrier()


CONTROL = {
    "bra": decode_branch,
    "ret": decode_exit,
    "exit": decode_exit,
    "trap": decode_exit,
    "bar": decode_barrier,
    "barrier": decode_barrier,
}
