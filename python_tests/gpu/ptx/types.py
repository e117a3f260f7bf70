"""The fundamental types of PTX as numpy sees them, and the roundings between floating-point formats.

bfloat16 has no numpy type: its 16 bits travel as uint16, its values as float32, which holds each of them exactly.
"""

import re

import numpy as np

DTYPES = {
    "b8": np.uint8,
    "u8": np.uint8,
    "s8": np.int8,
    "b16": np.uint16,
    "u16": np.uint16,
    "s16": np.int16,
    "f16": np.float16,
    "bf16": np.uint16,
    "b32": np.uint32,
    "u32": np.uint32,
    "s32": np.int32,
    "f32": np.float32,
    "tf32": np.uint32,
    "f16x2": np.uint32,
    "bf16x2": np.uint32,
    "b64": np.uint64,
    "u64": np.uint64,
    "s64": np.int64,
    "f64": np.float64,
    "f32x2": np.uint64,
    "pred": np.bool_,
}
UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOATS = ("f16", "bf16", "f32", "f64")
TF32_MASK = np.uint32(0xFFFFE000)
NAN_BF16 = np.uint16(0x7FFF)
NAN_TF32 = np.uint32(0x7FFFFFFF)


def width(type_name: str) -> int:
    """Bits of a value of this type."""
    return np.dtype(DTYPES[type_name]).itemsize * 8


def is_float(type_name: str) -> bool:
    return type_name in FLOATS


def is_signed(type_name: str) -> bool:
    return type_name[0] == "s"


def immediate(text: str, type_name: str):
    """The numpy scalar that a constant operand stands for: 5, -1, 0x10U, 0f3F800000 (f32 bits), 0d... (f64 bits)."""
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
        return _reinterpret(int(text[2:], 16), 32, type_name)
    if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", text):
        return _reinterpret(int(text[2:], 16), 64, type_name)
    bits = width(type_name)
    return _reinterpret(int(text.rstrip("U"), 0) & ((1 << bits) - 1), bits, type_name)


def _reinterpret(value: int, bits: int, type_name: str):
    scalar = UNSIGNED[bits](value)
    return scalar.view(DTYPES[type_name]) if bits == width(type_name) else scalar


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(values: np.ndarray, toward_zero: bool = False) -> np.ndarray:
    """Bits of the bfloat16 next to float32 values: ties to even, or cut; any NaN becomes the canonical one."""
    values = np.ascontiguousarray(values, np.float32)
    bits = values.view(np.uint32)
    if not toward_zero:
        bits = bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    return np.where(np.isnan(values), NAN_BF16, (bits >> np.uint32(16)).astype(np.uint16))


def f64_to_bf16(values: np.ndarray) -> np.ndarray:
    """The same from float64, rounded once."""
    narrow = values.astype(np.float32)
    return f32_to_bf16(round_to_odd(narrow, values - narrow))


def f32_to_tf32(bits: np.ndarray, rounding: str) -> np.ndarray:
    """Bits of float32 values cut to tf32: ``rna`` (half away from zero), ``rn`` (half to even) or ``rz``."""
    if rounding == "rna":
        rounded = bits + np.uint32(0x1000)
    elif rounding == "rn":
        rounded = bits + (np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1)))
    else:
        rounded = bits
    return np.where(np.isnan(bits.view(np.float32)), NAN_TF32, rounded & TF32_MASK)


def round_to_odd(rounded: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Replaces a sum rounded to nearest by its neighbour with an odd last bit, where ``error`` says it was inexact.

    A second rounding, to a format shorter by two bits or more, is then as if there had been only one.
    """
    integer = {4: np.uint32, 8: np.uint64}[rounded.dtype.itemsize]
    is_even = (rounded.view(integer) & integer(1)) == 0
    moves = is_even & (error != 0) & np.isfinite(rounded) & np.isfinite(error)
    towards = np.where(error > 0, np.inf, -np.inf).astype(rounded.dtype)
    return np.where(moves, np.nextafter(rounded, towards), rounded)


def narrow_float(values: np.ndarray, dtype, rounding: str) -> np.ndarray:
    """float64 or float32 values in a shorter format, rounded as ``rn``, ``rz``, ``rm`` (down) or ``rp`` (up) says."""
    nearest = values.astype(dtype)
    if rounding == "rn":
        return nearest
    exact = values.astype(np.float64)
    back = nearest.astype(np.float64)
    zero, infinity = dtype(0), dtype(np.inf)
    if rounding == "rz":
        return np.where(np.abs(back) > np.abs(exact), np.nextafter(nearest, zero), nearest)
    if rounding == "rm":
        return np.where(back > exact, np.nextafter(nearest, -infinity), nearest)
    return np.where(back < exact, np.nextafter(nearest, infinity), nearest)
