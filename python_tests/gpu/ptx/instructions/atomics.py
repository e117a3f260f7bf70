"""atom and red, on global and shared memory: one lane after the other, which is one of the legal orders."""

import numpy as np

from ..faults import UnsupportedPTX
from ..operands import address, elements, lanes_writer, reader, shared_address
from ..state_spaces import state_space
from ..types import DTYPES, bf16_to_f32, f32_to_bf16, width
from .arithmetic import pack_pair, unpack_pair
from .registry import opcode

OPERATIONS = {
    "add": lambda old, value, other: old + value,
    "min": lambda old, value, other: min(old, value),
    "max": lambda old, value, other: max(old, value),
    "and": lambda old, value, other: old & value,
    "or": lambda old, value, other: old | value,
    "xor": lambda old, value, other: old ^ value,
    "exch": lambda old, value, other: value,
    "cas": lambda old, value, other: other if old == value else old,
    "inc": lambda old, value, other: type(old)(0) if old >= value else old + type(old)(1),
    "dec": lambda old, value, other: value if old == 0 or old > value else old - type(old)(1),
}


@opcode("atom")
def decode_atomic(block, instruction):
    names = elements(instruction.operands[0])
    return _atomic(block, instruction, names, *instruction.operands[1:])


@opcode("red")
def decode_reduction(block, instruction):
    return _atomic(block, instruction, [], *instruction.operands)


def _atomic(block, instruction, names, where_text, value_text, other_text=None):
    type_name = instruction.type
    operation = OPERATIONS[next(part for part in instruction.opcode[1:] if part in OPERATIONS)]
    if type_name in ("f16x2", "bf16x2", "bf16") and "add" not in instruction.opcode:
        raise UnsupportedPTX(f"atomic of .{type_name} other than add")
    is_shared = state_space(instruction.opcode) == "shared"
    where = (shared_address if is_shared else address)(block, where_text)
    raw = DTYPES[f"b{width(type_name)}"]
    reads = [_raw_reader(block, text, type_name) for text in elements(value_text)]
    other = _raw_reader(block, other_text, type_name) if other_text and operation is OPERATIONS["cas"] else None
    writes = [lanes_writer(block, name, f"b{width(type_name)}") for name in names]
    size = width(type_name) // 8 * len(reads)

    def execute(mask):
        threads, places = block.active(block.threads, mask), block.active(where(), mask)
        old = np.empty((len(threads), len(reads)), raw)
        values = np.stack([read()[threads] for read in reads], 1)
        others = values if other is None else other()[threads][:, None]
        if not is_shared:
            block.note_global("atomics", places, mask, size)
        for lane, place in enumerate(places):
            cell = _cell(block, is_shared, int(place), threads[lane : lane + 1], size).view(raw)
            old[lane] = cell
            for column in range(len(reads)):
                cell[column] = _apply(
                    operation, cell[column], values[lane, column], others[lane, min(column, others.shape[1] - 1)],
                    type_name,
                )  # fmt: skip
        for column, write in enumerate(writes):
            write(old[:, column], mask)

    return execute


def _raw_reader(block, text, type_name):
    return reader(block, text, f"b{width(type_name)}")


def _cell(block, is_shared, place, thread, size):
    """The bytes in memory, to be read and written."""
    if not is_shared:
        return block.memory.atomic(place, size, block.index)
    block.shared.check(np.array([place]), size, "atomic")
    return block.shared.bytes[place : place + size]


def _apply(operation, old, value, other, type_name):
    """On raw bits; bfloat16 and pairs are computed in float32 and rounded once."""
    if type_name == "bf16":
        return f32_to_bf16(bf16_to_f32(np.array([old])) + bf16_to_f32(np.array([value])))[0]
    if type_name in ("f16x2", "bf16x2"):
        pairs = [unpack_pair(np.array([bits]), type_name).astype(np.float32) for bits in (old, value)]
        return pack_pair(pairs[0] + pairs[1], type_name)[0]
    dtype = DTYPES[type_name]
    return operation(old.view(dtype), value.view(dtype), other.view(dtype)).view(old.dtype)
