"""cp.async: copies from global to shared memory that complete when they are waited for."""

import numpy as np

from ..faults import UnsupportedPTX
from ..operands import address, reader, shared_address
from .registry import opcode


@opcode("cp")
def decode_copy(block, instruction):
    what = instruction.opcode[2] if instruction.opcode[1] == "async" else ""
    if what == "commit_group":
        return lambda mask: block.copies.commit(mask)
    if what == "wait_group":
        allowed = int(instruction.operands[0], 0)
        return lambda mask: block.copies.wait(mask, allowed)
    if what == "wait_all":
        return lambda mask: block.copies.wait(mask, -1)
    if what not in ("ca", "cg"):
        raise UnsupportedPTX("bulk copies")
    return _copy(block, instruction)


def _copy(block, instruction):
    """``cp.async [shared], [global], size{, source size}``: what the source does not give is filled with zeros."""
    into, source = shared_address(block, instruction.operands[0]), address(block, instruction.operands[1])
    size = int(instruction.operands[2], 0)
    source_size = None
    if len(instruction.operands) > 3:
        if block.program.registers.get(instruction.operands[3]) == "pred":
            raise UnsupportedPTX("ignore-src")
        source_size = reader(block, instruction.operands[3], "u32")

    def execute(mask):
        threads = block.active(block.threads, mask)
        offsets = block.active(into(), mask).copy()
        addresses = block.active(source(), mask)
        block.shared.check(offsets, size, "cp.async")
        if source_size is None:
            data = block.load_global(addresses, mask, size, np.uint8)
        else:
            data = _load_part(block, addresses, threads, size, block.active(source_size(), mask))
        block.note_shared(offsets, threads, size)
        block.copies.issue(threads, offsets, data)

    return execute


def _load_part(block, addresses, threads, size, sizes):
    """[lanes, size] bytes, of which each lane reads as many as its source size says, and none at 0."""
    data = np.zeros((len(threads), size), np.uint8)
    for count in np.unique(sizes):
        if count == 0:
            continue
        if count not in (size, 1, 2, 4, 8):
            raise UnsupportedPTX(f"source size {count} of a copy of {size} bytes")
        lanes = sizes == count
        mask = np.zeros(block.num_threads, bool)
        mask[threads[lanes]] = True
        data[lanes, :count] = block.load_global(addresses[lanes], mask, int(count), np.uint8)
    return data
