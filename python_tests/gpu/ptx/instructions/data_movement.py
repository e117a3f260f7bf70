"""mov, ld, st and what only hints at caches."""

import numpy as np

from ..faults import BOUNDS, TRAP, PTXFault, UnsupportedPTX
from ..operands import (
    ADDRESS,
    address,
    elements,
    lanes_writer,
    reader,
    shared_address,
    stacked_reader,
    stacked_writer,
    writer,
)
from ..state_spaces import state_space
from ..types import DTYPES, UNSIGNED, width
from .registry import opcode


@opcode("mov")
def decode_move(block, instruction):
    into, source = instruction.operands
    if into.startswith("{"):
        return _unpack(block, instruction, elements(into), source)
    if source.startswith("{"):
        return _pack(block, instruction, into, elements(source))
    type_name = instruction.type if instruction.type == "pred" else f"b{width(instruction.type)}"
    read, write = reader(block, source, type_name), writer(block, into, type_name)
    return lambda mask: write(read(), mask)


def _unpack(block, instruction, names, source):
    part = width(instruction.type) // len(names)
    read = reader(block, source, f"b{width(instruction.type)}")
    writes = [writer(block, name, f"b{part}") for name in names]

    def execute(mask):
        parts = read()[:, None].view(UNSIGNED[part]).copy()
        for column, write in enumerate(writes):
            write(parts[:, column], mask)

    return execute


def _pack(block, instruction, into, names):
    whole = width(instruction.type)
    reads = [reader(block, name, f"b{whole // len(names)}") for name in names]
    write = writer(block, into, f"b{whole}")

    def execute(mask):
        parts = np.stack([read() for read in reads], 1)
        write(parts.view(UNSIGNED[whole])[:, 0], mask)

    return execute


@opcode("cvta")
def decode_convert_address(block, instruction):
    """Generic addresses and those of a state space are the same numbers here."""
    bits = f"b{width(instruction.type)}"
    read, write = reader(block, instruction.operands[1], bits), writer(block, instruction.operands[0], bits)
    return lambda mask: write(read(), mask)


@opcode("ld", "ldu")
def decode_load(block, instruction):
    space, type_name = state_space(instruction.opcode), instruction.type
    names = elements(instruction.operands[0])
    if space == "param":
        return _load_parameter(block, instruction, names)
    if space == "const":
        raise UnsupportedPTX("constant memory")
    size = width(type_name) // 8 * len(names)
    load = {"global": _global_load, "shared": _shared_load, "local": _local_load}[space]
    fetch = load(block, instruction.operands[1], size, DTYPES[_raw(type_name)])
    writes = [lanes_writer(block, name, _raw(type_name)) for name in names]
    is_plain = type_name[0] not in "us" and all(name in block.registers for name in names)
    write_all = stacked_writer(block, names, width(type_name)) if is_plain else None

    def execute(mask):
        rows = fetch(mask)
        if mask is None and write_all is not None:
            write_all(rows.T, mask)
            return
        for column, write in enumerate(writes):
            write(rows[:, column], mask)

    return execute


def _raw(type_name: str) -> str:
    """Floats travel as bits; integers keep their sign, by which they fill a wider register."""
    return type_name if type_name[0] in "us" else f"b{width(type_name)}"


def _global_load(block, text, size, dtype):
    where = address(block, text)
    return lambda mask: block.load_global(block.active(where(), mask), mask, size, dtype)


def _shared_load(block, text, size, dtype):
    where = shared_address(block, text)

    def fetch(mask):
        return block.load_shared(block.active(where(), mask), block.active(block.threads, mask), size, dtype)

    return fetch


def _local_places(block, where, mask, size):
    """(threads, byte positions) of accesses to each thread's own memory."""
    offsets = block.active(where(), mask)
    if offsets.min() < 0 or offsets.max() + size > block.local.shape[1]:
        raise PTXFault(BOUNDS, f"local access of {size} bytes at {offsets.max()} of {block.local.shape[1]} bytes")
    return block.active(block.threads, mask)[:, None], offsets[:, None] + np.arange(size)


def _local_load(block, text, size, dtype):
    where = address(block, text)
    return lambda mask: np.ascontiguousarray(block.local[_local_places(block, where, mask, size)]).view(dtype)


def _load_parameter(block, instruction, names):
    found = ADDRESS.fullmatch(instruction.operands[1])
    type_name, size = _raw(instruction.type), width(instruction.type) // 8
    name, offset = found[1], int(found[2] or "0", 0)
    writes = [writer(block, register, type_name) for register in names]

    def execute(mask):
        data = block.parameters[name]
        for number, write in enumerate(writes):
            start = offset + number * size
            write(np.frombuffer(data[start : start + size], DTYPES[type_name])[0], mask)

    return execute


@opcode("st")
def decode_store(block, instruction):
    space, type_name = state_space(instruction.opcode), _raw(instruction.type)
    if space == "param":
        return lambda mask: None  # the arguments of a call, which is a fault if it is reached
    names = elements(instruction.operands[1])
    keep = {"global": _global_store, "shared": _shared_store, "local": _local_store}[space]
    put = keep(block, instruction.operands[0])
    if len(names) == 1:
        read = reader(block, names[0], type_name)
        return lambda mask: put(np.ascontiguousarray(block.active(read(), mask))[:, None], mask)
    read_all = stacked_reader(block, names, width(type_name))

    def execute(mask):
        values = read_all() if mask is None else read_all()[:, mask]
        put(np.ascontiguousarray(values.T), mask)

    return execute


def _global_store(block, text):
    where = address(block, text)
    return lambda values, mask: block.store_global(block.active(where(), mask), mask, values)


def _shared_store(block, text):
    where = shared_address(block, text)

    def put(values, mask):
        block.store_shared(block.active(where(), mask), block.active(block.threads, mask), values)

    return put


def _local_store(block, text):
    where = address(block, text)

    def put(values, mask):
        data = values.view(np.uint8)
        block.local[_local_places(block, where, mask, data.shape[1])] = data

    return put


@opcode("membar", "fence", "griddepcontrol", "nanosleep", "prefetch", "discard", "applypriority", "pragma")
def decode_hint(block, instruction):
    """Order between threads is that of the lock step; only the fence between proxies leaves a mark."""
    if instruction.opcode[:3] == ("fence", "proxy", "async"):
        return lambda mask: block.shared.fence_proxy()
    return lambda mask: None


@opcode("createpolicy")
def decode_policy(block, instruction):
    write = writer(block, instruction.operands[0], "b64")
    return lambda mask: write(np.uint64(0), mask)


@opcode("call")
def decode_call(block, instruction):
    """Kernels call only what reports a failed assertion."""

    def execute(mask):
        raise PTXFault(TRAP, f"call {', '.join(instruction.operands)}: a device assertion failed")

    return execute
