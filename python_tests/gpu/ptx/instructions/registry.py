"""The table of instructions, and the forms that many of them share."""

import numpy as np

from ..operands import destination, reader, writer

DECODERS = {}


def opcode(*names: str):
    """Registers a decoder for these opcodes."""

    def register(decode):
        for name in names:
            DECODERS[name] = decode
        return decode

    return register


def elementwise(block, instruction, function, type_name: str, count: int, result_type: str | None = None):
    """The step ``first operand = function(the next count operands)``, each read as ``type_name``."""
    result_type = result_type or type_name
    reads = [reader(block, text, type_name) for text in instruction.operands[1 : 1 + count]]
    target = destination(block, instruction.operands[0], result_type)
    if isinstance(function, np.ufunc) and target is not None:
        return _in_place(function, reads, target)
    write = writer(block, instruction.operands[0], result_type)
    if count == 2:
        first, second = reads
        return lambda mask: write(function(first(), second()), mask)
    return lambda mask: write(function(*(read() for read in reads)), mask)


def _in_place(function, reads, target):
    """Most instructions are of this form; the one allocation that it saves is a third of their time."""
    if len(reads) == 1:
        (only,) = reads
        return lambda mask: _nothing(function(only(), out=target, where=True if mask is None else mask))
    first, second = reads
    return lambda mask: _nothing(function(first(), second(), out=target, where=True if mask is None else mask))


def _nothing(result) -> None:
    """A step returns where to go on; None is the next instruction."""
