"""Integer and floating-point arithmetic, in scalars and in packed pairs."""

from fractions import Fraction

import numpy as np

from ..faults import UnsupportedPTX
from ..operands import reader, writer
from ..types import SIGNED, UNSIGNED, bf16_to_f32, f32_to_bf16, f64_to_bf16, is_float, is_signed, round_to_odd, width
from .registry import elementwise, opcode

SMALLEST_NORMAL = np.float32(1.17549435e-38)
DIRECTED = {"rz", "rm", "rp"}
PACKED = ("f16x2", "bf16x2", "f32x2")
BINARY = {"add": np.add, "sub": np.subtract}
UNARY = {"neg": np.negative, "abs": np.abs}
FUNCTIONS = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": np.reciprocal,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: np.reciprocal(np.sqrt(x)),
    "tanh": np.tanh,
    "sin": np.sin,
    "cos": np.cos,
}


def arithmetic(block, instruction, function, count):
    """``function`` of ``count`` operands in the type of the instruction, with its modifiers."""
    type_name, modifiers = instruction.type, set(instruction.opcode[1:-1])
    unknown = modifiers & {"cc", "xorsign"} | (modifiers & DIRECTED if is_float(type_name) else set())
    if unknown:
        raise UnsupportedPTX(f"modifiers {sorted(unknown)}")
    if type_name in PACKED:
        return _packed(block, instruction, function, count)
    if is_mixed(instruction):
        return _mixed(block, instruction, function, count)
    if modifiers & {"ftz", "sat"} and type_name == "f32":
        function = _modified(function, modifiers)
    elif "sat" in modifiers or "relu" in modifiers:
        raise UnsupportedPTX(f"modifiers {sorted(modifiers)} of .{type_name}")
    return elementwise(block, instruction, function, type_name, count)


def is_mixed(instruction) -> bool:
    """Blackwell's float32 sums, of which all operands but the last may be of half precision."""
    return instruction.type in ("f16", "bf16") and "f32" in instruction.opcode


def _mixed(block, instruction, function, count):
    if "sat" in instruction.opcode:
        raise UnsupportedPTX(f"modifier sat of .f32.{instruction.type}")
    *halves, last = instruction.operands[1 : 1 + count]
    reads = [reader(block, text, instruction.type) for text in halves]
    addend = reader(block, last, "f32")
    write = writer(block, instruction.operands[0], "f32")
    return lambda mask: write(function(*(read().astype(np.float32) for read in reads), addend()), mask)


def flush(values):
    """Subnormal float32 values become zeros of their sign."""
    return np.where(np.abs(values) < SMALLEST_NORMAL, np.copysign(np.float32(0), values), values)


def saturate(values):
    """To 0 .. 1; NaN becomes 0."""
    return np.where(np.isnan(values), values.dtype.type(0), np.clip(values, 0, 1))


def _modified(function, modifiers):
    def modified(*values):
        if "ftz" in modifiers:
            values = [flush(value) for value in values]
        result = function(*values)
        if "ftz" in modifiers:
            result = flush(result)
        return saturate(result) if "sat" in modifiers else result

    return modified


def _packed(block, instruction, function, count):
    """Both halves of 32-bit (f32x2: 64-bit) operands, the low one first."""
    type_name = instruction.type
    bits = "b64" if type_name == "f32x2" else "b32"
    reads = [reader(block, text, bits) for text in instruction.operands[1 : 1 + count]]
    write = writer(block, instruction.operands[0], bits)

    def execute(mask):
        halves = [unpack_pair(read(), type_name) for read in reads]
        write(pack_pair(function(*halves), type_name), mask)

    return execute


def unpack_pair(packed: np.ndarray, type_name: str) -> np.ndarray:
    """[threads] -> [threads, 2] floats (bf16 as float32)."""
    if type_name == "f32x2":
        return packed[:, None].view(np.float32)
    halves = packed[:, None].view(np.uint16)
    return bf16_to_f32(halves) if type_name == "bf16x2" else halves.view(np.float16)


def pack_pair(values: np.ndarray, type_name: str) -> np.ndarray:
    if type_name == "f32x2":
        return np.ascontiguousarray(values, np.float32).view(np.uint64)[:, 0]
    halves = f32_to_bf16(values) if type_name == "bf16x2" else np.ascontiguousarray(values, np.float16)
    return halves.view(np.uint32)[:, 0]


@opcode(*BINARY)
def decode_binary(block, instruction):
    return arithmetic(block, instruction, BINARY[instruction.opcode[0]], 2)


@opcode(*UNARY)
def decode_unary(block, instruction):
    return arithmetic(block, instruction, UNARY[instruction.opcode[0]], 1)


@opcode(*FUNCTIONS)
def decode_function(block, instruction):
    """Approximations of hardware are computed to float32's own precision; the type of the result stays."""
    return arithmetic(block, instruction, FUNCTIONS[instruction.opcode[0]], 1)


@opcode("min", "max")
def decode_extremum(block, instruction):
    is_min, keeps_nan = instruction.opcode[0] == "min", "NaN" in instruction.opcode
    if keeps_nan or instruction.type[0] in "us":
        function = np.minimum if is_min else np.maximum
    else:
        function = np.fmin if is_min else np.fmax
    return arithmetic(block, instruction, function, 2)


@opcode("mul")
def decode_multiply(block, instruction):
    if "wide" in instruction.opcode:
        return _wide(block, instruction, None)
    if "hi" in instruction.opcode:
        return elementwise(block, instruction, high_half, instruction.type, 2)
    return arithmetic(block, instruction, np.multiply, 2)


@opcode("mad")
def decode_multiply_add(block, instruction):
    if is_float(instruction.type):
        return decode_fused(block, instruction)
    if "wide" in instruction.opcode:
        return _wide(block, instruction, instruction.operands[3])
    multiply = high_half if "hi" in instruction.opcode else np.multiply
    return arithmetic(block, instruction, lambda x, y, z: multiply(x, y) + z, 3)


def _wide(block, instruction, addend):
    """The whole product of two integers, in twice their bits, plus an addend of that width."""
    type_name = instruction.type
    wide_type = f"{type_name[0]}{2 * width(type_name)}"
    wide = (SIGNED if is_signed(type_name) else UNSIGNED)[2 * width(type_name)]
    first, second = (reader(block, text, type_name) for text in instruction.operands[1:3])
    write = writer(block, instruction.operands[0], wide_type)
    if addend is None:
        return lambda mask: write(np.multiply(first(), second(), dtype=wide), mask)
    third = reader(block, addend, wide_type)
    return lambda mask: write(np.multiply(first(), second(), dtype=wide) + third(), mask)


def high_half(x, y):
    """The upper half of the bits of each product."""
    bits = x.dtype.itemsize * 8
    if bits == 64:
        products = [int(left) * int(right) >> 64 for left, right in zip(x, y, strict=True)]
        return np.array(products, dtype=object).astype(x.dtype)
    wide = (SIGNED if x.dtype.kind == "i" else UNSIGNED)[64]
    return ((x.astype(wide) * y.astype(wide)) >> wide(bits)).astype(x.dtype)


@opcode("fma")
def decode_fused(block, instruction):
    type_name = instruction.type
    scalar = {"f16x2": "f16", "bf16x2": "bf16", "f32x2": "f32"}.get(type_name, type_name)
    scalar = "f32" if is_mixed(instruction) else scalar
    fused = {"f16": fused_f16, "bf16": fused_bf16, "f32": fused_f32, "f64": fused_f64}[scalar]
    if "relu" in instruction.opcode:
        raise UnsupportedPTX("modifier relu")
    return arithmetic(block, instruction, fused, 3)


def _product_sum(x, y, z):
    """x y + z of formats of at most 24 bits, in float64 rounded to odd: fit to be rounded once more."""
    product = x.astype(np.float64) * y  # exact: 48 bits
    total = product + z
    back = total - product
    error = (product - (total - back)) + (z - back)
    return round_to_odd(total, error)


def fused_f32(x, y, z):
    return _product_sum(x, y, z).astype(np.float32)


def fused_f16(x, y, z):
    return _product_sum(x, y, z).astype(np.float16)


def fused_bf16(x, y, z):
    return bf16_to_f32(f64_to_bf16(_product_sum(x, y, z)))


def fused_f64(x, y, z):
    rough = x * y + z
    exact = np.isfinite(rough) & (rough != 0)
    for index in np.nonzero(exact)[0]:
        rough[index] = float(Fraction(float(x[index])) * Fraction(float(y[index])) + Fraction(float(z[index])))
    return rough


@opcode("div")
def decode_divide(block, instruction):
    function = np.divide if is_float(instruction.type) else divide_integers
    return arithmetic(block, instruction, function, 2)


def divide_integers(x, y):
    """Truncated quotients; by zero all bits are set, which PTX leaves open."""
    quotient = x // y
    if x.dtype.kind == "i":
        is_rounded_down = (quotient * y != x) & ((x < 0) != (y < 0))
        quotient = quotient + is_rounded_down.astype(x.dtype)
    return np.where(y == 0, ~x.dtype.type(0), quotient)


@opcode("rem")
def decode_remainder(block, instruction):
    return arithmetic(block, instruction, lambda x, y: np.where(y == 0, x, np.fmod(x, y)), 2)


@opcode("copysign")
def decode_copysign(block, instruction):
    """The second operand with the sign of the first."""
    return arithmetic(block, instruction, lambda sign, value: np.copysign(value, sign), 2)
