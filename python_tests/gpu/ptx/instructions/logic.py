"""Bits: logic, shifts, bit fields, permutation of bytes, comparison and selection."""

import numpy as np

from ..faults import UnsupportedPTX
from ..operands import reader, writer
from ..types import UNSIGNED, is_float, is_signed, width
from .arithmetic import unpack_pair
from .registry import elementwise, opcode

BITWISE = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert}
COMPARISONS = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
UNSIGNED_COMPARISONS = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
COMBINATIONS = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _bits_type(instruction) -> str:
    return "pred" if instruction.type == "pred" else f"u{width(instruction.type)}"


@opcode(*BITWISE)
def decode_bitwise(block, instruction):
    name = instruction.opcode[0]
    return elementwise(block, instruction, BITWISE[name], _bits_type(instruction), 1 if name == "not" else 2)


@opcode("shl", "shr")
def decode_shift(block, instruction):
    """Shifts by the width or more give 0, or the sign."""
    type_name, bits = instruction.type, width(instruction.type)
    value_type = type_name if is_signed(type_name) and instruction.opcode[0] == "shr" else f"u{bits}"
    value, amount = reader(block, instruction.operands[1], value_type), reader(block, instruction.operands[2], "u32")
    write = writer(block, instruction.operands[0], value_type)
    shift = np.left_shift if instruction.opcode[0] == "shl" else np.right_shift
    keeps_sign = is_signed(value_type)

    def execute(mask):
        distance = amount()
        values = value()
        shifted = shift(values, np.minimum(distance, bits - 1).astype(values.dtype))
        if not keeps_sign:
            shifted[distance >= bits] = 0
        write(shifted, mask)

    return execute


@opcode("shf")
def decode_funnel_shift(block, instruction):
    """Shifts the pair (high, low): left keeps the upper word, right the lower one."""
    low, high, amount = (reader(block, text, "u32") for text in instruction.operands[1:4])
    write = writer(block, instruction.operands[0], "u32")
    clamps, is_left = "clamp" in instruction.opcode, "l" in instruction.opcode

    def execute(mask):
        pair = high().astype(np.uint64) << np.uint64(32) | low()
        distance = amount().astype(np.uint64)
        distance = np.minimum(distance, np.uint64(32)) if clamps else distance & np.uint64(31)
        result = (pair << distance) >> np.uint64(32) if is_left else pair >> distance
        write(result.astype(np.uint32), mask)

    return execute


def _low_bits(count: np.ndarray, dtype) -> np.ndarray:
    """``count`` ones at the low end; all of them from the width on."""
    bits = dtype(0).itemsize * 8
    ones = (dtype(1) << np.minimum(count, bits - 1).astype(dtype)) - dtype(1)
    return np.where(count >= bits, ~dtype(0), ones)


def _shift(shift, values: np.ndarray, count: np.ndarray) -> np.ndarray:
    bits = values.dtype.itemsize * 8
    shifted = shift(values, np.minimum(count, bits - 1).astype(values.dtype))
    return np.where(count >= bits, values.dtype.type(0), shifted)


@opcode("bfe")
def decode_extract_field(block, instruction):
    """Bits position .. position + length - 1 at the low end, extended by the field's sign where the type has one."""
    bits, signed = width(instruction.type), is_signed(instruction.type)
    dtype = UNSIGNED[bits]
    value = reader(block, instruction.operands[1], f"u{bits}")
    position, length = (reader(block, text, "u32") for text in instruction.operands[2:4])
    write = writer(block, instruction.operands[0], f"u{bits}")

    def execute(mask):
        values, start, count = value(), position() & np.uint32(255), length() & np.uint32(255)
        ones = _low_bits(count, dtype)
        field = _shift(np.right_shift, values, start) & ones
        if signed:
            sign_at = np.minimum(start + count - np.uint32(1), bits - 1).astype(dtype)
            negative = (count > 0) & ((values >> sign_at) & dtype(1)).astype(bool)
            reaches = np.minimum(np.maximum(bits - start.astype(np.int64), 0), count)
            field = np.where(negative, field | ~_low_bits(reaches, dtype), field)
        write(field, mask)

    return execute


@opcode("bfi")
def decode_insert_field(block, instruction):
    """The low ``length`` bits of the first operand at ``position`` of the second."""
    bits = width(instruction.type)
    dtype = UNSIGNED[bits]
    source, base = (reader(block, text, f"u{bits}") for text in instruction.operands[1:3])
    position, length = (reader(block, text, "u32") for text in instruction.operands[3:5])
    write = writer(block, instruction.operands[0], f"u{bits}")

    def execute(mask):
        start, count = position() & np.uint32(255), length() & np.uint32(255)
        field = _shift(np.left_shift, _low_bits(count, dtype), start)
        write((base() & ~field) | (_shift(np.left_shift, source(), start) & field), mask)

    return execute


@opcode("popc")
def decode_count_ones(block, instruction):
    read = reader(block, instruction.operands[1], f"u{width(instruction.type)}")
    write = writer(block, instruction.operands[0], "u32")
    return lambda mask: write(np.bitwise_count(read()).astype(np.uint32), mask)


@opcode("clz")
def decode_count_leading_zeros(block, instruction):
    bits = width(instruction.type)
    read = reader(block, instruction.operands[1], f"u{bits}")
    write = writer(block, instruction.operands[0], "u32")

    def execute(mask):
        write(np.array([bits - int(value).bit_length() for value in read()], np.uint32), mask)

    return execute


@opcode("brev")
def decode_reverse(block, instruction):
    bits = width(instruction.type)
    read = reader(block, instruction.operands[1], f"u{bits}")
    write = writer(block, instruction.operands[0], f"u{bits}")

    def execute(mask):
        write(np.array([int(f"{int(value):0{bits}b}"[::-1], 2) for value in read()], UNSIGNED[bits]), mask)

    return execute


@opcode("prmt")
def decode_permute_bytes(block, instruction):
    """Each nibble of the selector picks one of the 8 bytes of (second, first), or repeats its sign."""
    if instruction.type != "b32" or len(instruction.opcode) > 2:
        raise ValueError("wanted prmt.b32 in its default mode")
    low, high, selector = (reader(block, text, "u32") for text in instruction.operands[1:4])
    write = writer(block, instruction.operands[0], "u32")

    def execute(mask):
        source = np.stack([low(), high()], 1).view(np.uint8).reshape(-1, 8)
        picks = (selector()[:, None] >> np.arange(0, 16, 4, dtype=np.uint32)) & np.uint32(15)
        chosen = np.take_along_axis(source, (picks & 7).astype(np.int64), 1)
        signs = np.where(chosen & 0x80, np.uint8(0xFF), np.uint8(0))
        write(np.where(picks & 8, signs, chosen).view(np.uint32)[:, 0], mask)

    return execute


@opcode("lop3")
def decode_logic_of_three(block, instruction):
    """Bit i of the table is the result where the bits of the three operands read as i."""
    reads = [reader(block, text, "u32") for text in instruction.operands[1:4]]
    write = writer(block, instruction.operands[0], "u32")
    table = int(instruction.operands[4], 0)

    def execute(mask):
        first, second, third = (read() for read in reads)
        result = np.zeros_like(first)
        for case in range(8):
            if table >> case & 1:
                term = first if case & 4 else ~first
                term = term & (second if case & 2 else ~second)
                result |= term & (third if case & 1 else ~third)
        write(result, mask)

    return execute


@opcode("setp")
def decode_compare(block, instruction):
    operator, type_name = instruction.opcode[1], instruction.type
    first, second = (reader(block, text, type_name) for text in instruction.operands[1:3])
    names = instruction.operands[0].split("|")
    writes = [writer(block, name.strip(), "pred") for name in names]
    if type_name in ("f16x2", "bf16x2"):
        return _compare_pairs(block, instruction, _ordered(operator), writes)
    compare = _ordered(operator) if is_float(type_name) else COMPARISONS[UNSIGNED_COMPARISONS.get(operator, operator)]
    if len(instruction.operands) == 3:
        if len(writes) == 1:
            (write,) = writes
            return lambda mask: write(compare(first(), second()), mask)
        return _both_outcomes(lambda: compare(first(), second()), lambda outcome: outcome, writes)
    combine = COMBINATIONS[instruction.opcode[2]]
    third = reader(block, instruction.operands[3], "pred")
    return _both_outcomes(lambda: compare(first(), second()), lambda outcome: combine(outcome, third()), writes)


def _compare_pairs(block, instruction, compare, writes):
    """Low halves into the first predicate, high halves into the second."""
    if len(instruction.operands) != 3 or len(writes) != 2:
        raise UnsupportedPTX(f"setp.{instruction.type} with a third operand or one result")
    first, second = (reader(block, text, "b32") for text in instruction.operands[1:3])

    def execute(mask):
        pairs = (unpack_pair(read(), instruction.type) for read in (first, second))
        for write, outcome in zip(writes, compare(*pairs).T, strict=True):
            write(outcome, mask)

    return execute


def _both_outcomes(compare, combine, writes):
    """The comparison into the first predicate, its opposite into the second, each combined with the third operand."""

    def execute(mask):
        outcome = compare()
        results = [combine(outcome), combine(~outcome)]
        for write, result in zip(writes, results, strict=False):
            write(result, mask)

    return execute


def _ordered(operator: str):
    """A comparison of floats: false where one is NaN, true there for the forms that end in u."""
    if operator in ("num", "nan"):
        return lambda x, y: (np.isnan(x) | np.isnan(y)) == (operator == "nan")
    compare = COMPARISONS[operator[:2]]
    is_unordered = operator.endswith("u")

    def compared(x, y):
        nan = np.isnan(x) | np.isnan(y)
        return compare(x, y) | nan if is_unordered else compare(x, y) & ~nan

    return compared


@opcode("selp")
def decode_select(block, instruction):
    bits = f"b{width(instruction.type)}"
    chosen, other = (reader(block, text, bits) for text in instruction.operands[1:3])
    condition = reader(block, instruction.operands[3], "pred")
    write = writer(block, instruction.operands[0], bits)
    return lambda mask: write(np.where(condition(), chosen(), other()), mask)
