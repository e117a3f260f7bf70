"""Operands, decoded once: what reads one, what writes one, and what computes an address.

A reader takes nothing and returns one value for each thread of the block, in the numpy type of the PTX type. Readers
return views of registers, so a handler that keeps a value across a write copies it.
"""

import re

import numpy as np

from .faults import UnsupportedPTX
from .types import DTYPES, SIGNED, UNSIGNED, bf16_to_f32, f32_to_bf16, immediate, is_signed, width

ADDRESS = re.compile(r"\[\s*([%$\w.]+)\s*(?:\+\s*(-?\w+))?\s*\]")


def elements(text: str) -> list[str]:
    """The operands inside ``{a, b}``, or the one operand there is."""
    return [part.strip() for part in text.strip("{}").split(",")]


def reader(block, text: str, type_name: str):
    """A function that returns the operand's value, for each thread, as ``type_name`` (bf16: as float32)."""
    if type_name == "pred":
        return _predicate_reader(block, text)
    if text in block.registers:
        return _register_reader(block.registers[text], text, type_name)
    if text in block.special:
        return _register_reader(block.special[text], text, type_name)
    value = np.full(block.num_threads, _constant(block, text, type_name))
    value = bf16_to_f32(value) if type_name == "bf16" else value
    return lambda: value


def _predicate_reader(block, text: str):
    if re.fullmatch(r"-?\d+", text):
        value = np.full(block.num_threads, int(text) != 0)
        return lambda: value
    register = block.registers[text.lstrip("!")]
    if text.startswith("!"):
        return lambda: ~register
    return lambda: register


def _register_reader(register: np.ndarray, text: str, type_name: str):
    bits = width(type_name)
    held = register.dtype.itemsize * 8
    if register.dtype == np.bool_ or held < bits:
        raise UnsupportedPTX(f"operand {text}: wanted {bits} bits for .{type_name}, got a register of {register.dtype}")
    dtype = DTYPES[type_name]
    if held > bits:
        return lambda: register.astype(UNSIGNED[bits]).view(dtype)
    view = register.view(dtype)
    if type_name == "bf16":
        return lambda: bf16_to_f32(view)
    return lambda: view


def _constant(block, text: str, type_name: str):
    program = block.program
    if text in program.shared_symbols:
        return DTYPES[type_name](program.shared_symbols[text])
    if text in program.local_symbols:
        return DTYPES[type_name](program.local_symbols[text])
    if re.match(r"-?\d", text):
        return immediate(text, type_name)
    if re.fullmatch(r"\$?[A-Za-z_][\w$]*", text):
        return DTYPES[type_name](0)  # a string of an assertion's message: its address is never followed
    raise UnsupportedPTX(f"operand {text}: wanted a register, a constant or a symbol")


def writer(block, text: str, type_name: str):
    """A function ``write(values, mask)``: values of all threads into the register, where the mask (None: all) says."""
    if text == "_":
        return lambda values, mask: None
    target = _target(block, text, type_name)
    convert = f32_to_bf16 if type_name == "bf16" else None

    def write(values, mask):
        values = values if convert is None else convert(values)
        if mask is None:
            np.copyto(target, values)
        else:
            np.copyto(target, values, where=mask)

    return write


def lanes_writer(block, text: str, type_name: str):
    """The same for values of the threads in the mask only, as loads return them."""
    if text == "_":
        return lambda values, mask: None
    target = _target(block, text, type_name)

    def write(values, mask):
        if mask is None:
            np.copyto(target, values)
        else:
            target[mask] = values

    return write


def _pool_rows(block, texts: list[str], bits: int):
    """Where these registers lie in the pool of their width, as a slice or an array; None if it does not hold all."""
    if any(text not in block.registers or block.registers[text].dtype != UNSIGNED[bits] for text in texts):
        return None
    rows = [block.rows[text] for text in texts]
    is_run = rows == list(range(rows[0], rows[0] + len(rows)))
    return slice(rows[0], rows[0] + len(rows)) if is_run else np.array(rows)


def stacked_reader(block, texts: list[str], bits: int):
    """A function that returns several operands as raw bits, ``[operands, threads]``."""
    rows = _pool_rows(block, texts, bits)
    if rows is not None:
        pool = block.pools[bits]
        return lambda: pool[rows]
    reads = [reader(block, text, f"b{bits}") for text in texts]
    return lambda: np.stack([read() for read in reads])


def stacked_writer(block, texts: list[str], bits: int):
    """A function ``write(values, mask)`` for raw bits ``[operands, threads]``."""
    rows = _pool_rows(block, texts, bits)
    writes = [writer(block, text, f"b{bits}") for text in texts]

    def write(values, mask):
        if mask is None and rows is not None:
            block.pools[bits][rows] = values
            return
        for one, row in zip(writes, values, strict=True):
            one(row, mask)

    return write


def destination(block, text: str, type_name: str) -> np.ndarray | None:
    """The register itself, where a result of this type needs no conversion on the way in."""
    if text not in block.registers or type_name == "bf16":
        return None
    register = block.registers[text]
    if type_name != "pred" and register.dtype.itemsize * 8 != width(type_name):
        return None
    return _target(block, text, type_name)


def _target(block, text: str, type_name: str) -> np.ndarray:
    """A view of the register in which a narrower value is extended, by its sign where it has one."""
    if text not in block.registers:
        raise UnsupportedPTX(f"destination {text}: wanted a declared register")
    register = block.registers[text]
    if type_name == "pred" or register.dtype == np.bool_:
        return register
    held = register.dtype.itemsize * 8
    if held < width(type_name):
        raise UnsupportedPTX(f"destination {text}: wanted {width(type_name)} bits for .{type_name}, got {held}")
    if held == width(type_name):
        return register.view(DTYPES[type_name])
    return register.view((SIGNED if is_signed(type_name) else UNSIGNED)[held])


def address(block, text: str):
    """A function that returns the byte address of ``[base + offset]`` for each thread, as int64."""
    found = ADDRESS.fullmatch(text)
    if found is None:
        raise UnsupportedPTX(f"address {text}: wanted [base] or [base + offset]")
    base, offset = found[1], int(found[2] or "0", 0)
    held = block.registers.get(base)
    is_short = held is not None and held.dtype.itemsize == 4
    read = reader(block, base, "u32" if is_short else "s64")
    if is_short:
        return lambda: read().astype(np.int64) + offset
    if offset == 0:
        return read
    return lambda: read() + offset


def shared_address(block, text: str):
    """The same for shared memory, whose addresses have 32 bits."""
    read = address(block, text)
    return lambda: read() & 0xFFFFFFFF
