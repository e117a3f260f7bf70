"""Instructions in which the lanes of a warp meet: shuffles, votes, reductions, elections."""

import numpy as np

from ..faults import PARTIAL_WARP, PTXFault, UnsupportedPTX
from ..operands import reader, writer
from .registry import opcode

LANES = 32
LANE_BITS = np.uint32(1) << np.arange(LANES, dtype=np.uint32)
REDUCTIONS = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


def ballot(block, bits: np.ndarray) -> np.ndarray:
    """[warps]: for each warp the number whose bits are those of its lanes."""
    return (bits.reshape(-1, LANES) * LANE_BITS).sum(axis=1, dtype=np.uint32)


def check_members(block, members: np.ndarray, mask, what: str) -> None:
    """Every lane that the member mask of an active lane names takes part."""
    if mask is None:
        return
    present = ballot(block, mask)[block.warp]
    missing = mask & ((members & ~present) != 0)
    if missing.any():
        thread = int(np.nonzero(missing)[0][0])
        message = f"{what} wants the lanes {int(members[thread]):#x}, of which {int(present[thread]):#x} take part"
        raise PTXFault(PARTIAL_WARP, message)


@opcode("shfl")
def decode_shuffle(block, instruction):
    """A lane of its segment to each lane; where there is none, the lane keeps its value, and the predicate is false."""
    mode = instruction.opcode[2]
    names = [name.strip() for name in instruction.operands[0].split("|")]
    value = reader(block, instruction.operands[1], "b32")
    offset, control, members = (reader(block, text, "u32") for text in instruction.operands[2:5])
    write = writer(block, names[0], "b32")
    write_valid = writer(block, names[1] if len(names) > 1 else "_", "pred")
    sources = {"up": _up, "down": _down, "bfly": _butterfly, "idx": _index}[mode]

    def execute(mask):
        check_members(block, members(), mask, "shfl.sync")
        distance, clamp = offset().astype(np.int64) & 31, control().astype(np.int64)
        segment = (clamp >> 8) & 31
        first = block.lane & segment
        last = first | (clamp & 31 & ~segment)
        lane, valid = sources(block.lane, distance, first, last, segment)
        source = np.where(valid, lane, block.lane) + block.warp * LANES
        write(value()[source], mask)
        write_valid(valid, mask)

    return execute


def _up(lane, distance, first, last, segment):
    return lane - distance, lane - distance >= last


def _down(lane, distance, first, last, segment):
    return lane + distance, lane + distance <= last


def _butterfly(lane, distance, first, last, segment):
    return lane ^ distance, (lane ^ distance) <= last


def _index(lane, distance, first, last, segment):
    source = first | (distance & ~segment)
    return source, source <= last


@opcode("vote")
def decode_vote(block, instruction):
    mode = instruction.opcode[2]
    vote, members = reader(block, instruction.operands[1], "pred"), reader(block, instruction.operands[2], "u32")
    is_ballot = mode == "ballot"
    write = writer(block, instruction.operands[0], "b32" if is_ballot else "pred")
    outcomes = {
        "ballot": lambda votes, all_members: votes,
        "any": lambda votes, all_members: votes != 0,
        "all": lambda votes, all_members: votes == all_members,
        "uni": lambda votes, all_members: (votes == 0) | (votes == all_members),
    }
    outcome = outcomes[mode]

    def execute(mask):
        check_members(block, members(), mask, "vote.sync")
        votes = ballot(block, vote())[block.warp] & members()
        write(outcome(votes, members()), mask)

    return execute


@opcode("redux")
def decode_reduce(block, instruction):
    if instruction.type[0] == "f":
        raise UnsupportedPTX("redux of floats")
    reduce = REDUCTIONS[instruction.opcode[2]]
    read, members = (
        reader(block, instruction.operands[1], instruction.type),
        reader(block, instruction.operands[2], "u32"),
    )
    write = writer(block, instruction.operands[0], instruction.type)

    def execute(mask):
        check_members(block, members(), mask, "redux.sync")
        values, named = read().reshape(-1, LANES), members().reshape(-1, LANES)
        result = values.copy()
        for warp in range(block.num_warps):
            for member_mask in np.unique(named[warp]):
                lanes = (member_mask & LANE_BITS) != 0
                result[warp, lanes] = reduce.reduce(values[warp, lanes], dtype=values.dtype)
        write(result.reshape(-1), mask)

    return execute


@opcode("elect")
def decode_elect(block, instruction):
    """The lowest named lane of each warp gets a true predicate; all learn its number."""
    names = [name.strip() for name in instruction.operands[0].split("|")]
    members = reader(block, instruction.operands[1], "u32")
    write, write_elected = writer(block, names[0], "b32"), writer(block, names[-1], "pred")

    def execute(mask):
        named = members()
        check_members(block, named, mask, "elect.sync")
        lowest = np.bitwise_count((named & (~named + np.uint32(1))) - np.uint32(1)).astype(np.uint32)
        write(lowest, mask)
        write_elected(lowest == block.lane, mask)

    return execute


@opcode("activemask")
def decode_active_mask(block, instruction):
    write = writer(block, instruction.operands[0], "b32")

    def execute(mask):
        active = np.ones(block.num_threads, bool) if mask is None else mask
        write(ballot(block, active)[block.warp], mask)

    return execute
