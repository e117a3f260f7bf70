"""cvt: between integers, floating-point formats and packed pairs, with the rounding and saturation of PTX."""

import numpy as np

from ..faults import UnsupportedPTX
from ..operands import reader, writer
from ..types import (
    DTYPES,
    bf16_to_f32,
    f32_to_bf16,
    f32_to_tf32,
    f64_to_bf16,
    is_float,
    narrow_float,
    width,
)
from .arithmetic import flush, saturate
from .registry import opcode

TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
ROUNDINGS = ("rn", "rz", "rm", "rp", "rna")


@opcode("cvt")
def decode_convert(block, instruction):
    types = [part for part in instruction.opcode[1:] if part in DTYPES]
    modifiers = [part for part in instruction.opcode[1:] if part not in DTYPES]
    if len(types) != 2:
        raise UnsupportedPTX(f"conversion between {types}: wanted two known types")
    into, source = types
    if into in ("f16x2", "bf16x2"):
        return _convert_pair(block, instruction, into, modifiers)
    read = reader(block, instruction.operands[1], source)
    write = writer(block, instruction.operands[0], "b32" if into == "tf32" else into)
    convert = _conversion(into, source, modifiers)
    return lambda mask: write(convert(read()), mask)


def _conversion(into: str, source: str, modifiers: list[str]):
    rounding = next((part for part in modifiers if part in ROUNDINGS), "rn")
    integral = next((part for part in modifiers if part in TO_INTEGER), None)
    if into == "tf32":
        return lambda values: f32_to_tf32(values.view(np.uint32), rounding)
    if is_float(into):
        convert = _to_float(into, source, rounding, integral)
        return _finished(convert, modifiers)
    if is_float(source):
        return lambda values: float_to_integer(values, into, source, integral or "rzi")
    if "sat" in modifiers:
        limits = np.iinfo(DTYPES[into])
        return lambda values: clip_integer(values, limits).astype(DTYPES[into])
    return lambda values: values.astype(DTYPES[into])


def _finished(convert, modifiers: list[str]):
    """With the clamps that follow the rounding."""
    if "ftz" in modifiers:
        inner = convert

        def convert(values):
            values = flush(values) if values.dtype == np.float32 else values
            result = inner(values)
            return flush(result) if result.dtype == np.float32 else result

    if "sat" in modifiers:
        return lambda values: saturate(convert(values))
    if "relu" in modifiers:
        return lambda values: np.maximum(convert(values), 0)
    return convert


def _to_float(into: str, source: str, rounding: str, integral: str | None):
    if integral is not None and is_float(source):
        whole = TO_INTEGER[integral]
        return lambda values: whole(values).astype(_values_dtype(into))
    if into == "bf16":
        return lambda values: bf16_to_f32(_bf16_bits(values, rounding))
    dtype = DTYPES[into]
    if not is_float(source):
        if rounding != "rn":
            return lambda values: narrow_float(values.astype(np.float64), dtype, rounding)
        if into == "f16":
            return lambda values: values.astype(np.float64).astype(np.float16)
        return lambda values: values.astype(dtype)
    return lambda values: narrow_float(values, dtype, rounding)


def _values_dtype(type_name: str):
    return np.float32 if type_name == "bf16" else DTYPES[type_name]


def _bf16_bits(values: np.ndarray, rounding: str) -> np.ndarray:
    if rounding not in ("rn", "rz"):
        raise UnsupportedPTX(f"rounding {rounding} to bf16")
    if values.dtype in (np.float32, np.float16):
        return f32_to_bf16(values.astype(np.float32), rounding == "rz")
    if rounding == "rz":
        raise UnsupportedPTX(f"rounding rz from {values.dtype} to bf16")
    return f64_to_bf16(values.astype(np.float64))


def float_to_integer(values: np.ndarray, into: str, source: str, integral: str) -> np.ndarray:
    """Rounded to an integer and clamped to the range; NaN becomes 0, or only the top bit for 64-bit types."""
    dtype = DTYPES[into]
    limits = np.iinfo(dtype)
    whole = TO_INTEGER[integral](values.astype(np.float64))
    inside = (whole > float(limits.min)) & (whole < float(limits.max))
    result = np.where(inside, whole, 0).astype(dtype)
    result = np.where(whole >= float(limits.max), dtype(limits.max), result)
    result = np.where(whole <= float(limits.min), dtype(limits.min), result)
    is_wide = source == "f64" or width(into) == 64
    top_bit = np.array(1 << (width(into) - 1), f"u{width(into) // 8}").view(dtype)
    return np.where(np.isnan(values), top_bit if is_wide else dtype(0), result)


def clip_integer(values: np.ndarray, limits: np.iinfo) -> np.ndarray:
    """To a range that may not fit the type of the values."""
    own = np.iinfo(values.dtype)
    return np.clip(values, max(limits.min, own.min), min(limits.max, own.max))


def _convert_pair(block, instruction, into: str, modifiers: list[str]):
    """Two float32 values: the first operand into the upper half, the second into the lower one."""
    if len(instruction.operands) != 3:
        raise UnsupportedPTX("wanted two operands of .f32")
    rounding = next((part for part in modifiers if part in ROUNDINGS), "rn")
    high, low = (reader(block, text, "f32") for text in instruction.operands[1:3])
    write = writer(block, instruction.operands[0], "b32")

    def bits(values):
        values = np.maximum(values, np.float32(0)) if "relu" in modifiers else values
        if into == "bf16x2":
            return _bf16_bits(values, rounding).astype(np.uint32)
        return narrow_float(values, np.float16, rounding).view(np.uint16).astype(np.uint32)

    return lambda mask: write(bits(high()) << np.uint32(16) | bits(low()), mask)
