"""Arithmetic instructions of the PTX emulator against exact arithmetic in Python's integers and fractions."""

from fractions import Fraction

import numpy as np
import pytest

from python_tests.gpu.ptx.snippets import evaluate
from python_tests.gpu.ptx.types import DTYPES, bf16_to_f32, f32_to_bf16, width

EDGES = [0, 1, 2, 3, 5, 7, 0x7F, 0x80, 0x7FFF, 0x8000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF, 0x12345678]
INTEGERS = ("u16", "s16", "u32", "s32", "u64", "s64")


def wrapped(value: int, type_name: str) -> int:
    """An exact integer as the type holds it."""
    value &= (1 << width(type_name)) - 1
    return value - (1 << width(type_name)) if type_name[0] == "s" and value >> (width(type_name) - 1) else value


def integers(type_name: str, seed: int) -> list[int]:
    rng = np.random.default_rng(seed)
    spread = [int(value) * 0x100000001 for value in rng.integers(0, 2**32, 49)]
    return [wrapped(value, type_name) for value in [*EDGES, *spread]]


def pairs(type_name: str):
    first, second = integers(type_name, 1), integers(type_name, 2)[::-1]
    return first, second


@pytest.mark.parametrize("type_name", INTEGERS)
@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("add", lambda x, y: x + y),
        ("sub", lambda x, y: x - y),
        ("mul.lo", lambda x, y: x * y),
        ("min", min),
        ("max", max),
    ],
)
def test_integer_results_wrap(name, function, type_name):
    first, second = pairs(type_name)
    got = evaluate(f"{name}.{type_name} %d, %a, %b;", type_name, (type_name, first), (type_name, second))
    assert got.tolist() == [wrapped(function(x, y), type_name) for x, y in zip(first, second, strict=True)]


@pytest.mark.parametrize("type_name", INTEGERS)
def test_mul_hi_is_the_upper_half(type_name):
    first, second = pairs(type_name)
    got = evaluate(f"mul.hi.{type_name} %d, %a, %b;", type_name, (type_name, first), (type_name, second))
    bits = width(type_name)
    assert got.tolist() == [wrapped(x * y >> bits, type_name) for x, y in zip(first, second, strict=True)]


@pytest.mark.parametrize("type_name", ["u16", "s16", "u32", "s32"])
def test_wide_products_keep_all_bits(type_name):
    wide = f"{type_name[0]}{2 * width(type_name)}"
    first, second = pairs(type_name)
    third = integers(wide, 3)
    operands = (type_name, first), (type_name, second), (wide, third)
    product = evaluate(f"mul.wide.{type_name} %d, %a, %b;", wide, *operands[:2])
    total = evaluate(f"mad.wide.{type_name} %d, %a, %b, %c;", wide, *operands)
    assert product.tolist() == [x * y for x, y in zip(first, second, strict=True)]
    assert total.tolist() == [wrapped(x * y + z, wide) for x, y, z in zip(first, second, third, strict=True)]


@pytest.mark.parametrize("half", ["lo", "hi"])
def test_mad_takes_a_half(half):
    first, second = pairs("s32")
    third = integers("s32", 3)
    got = evaluate(f"mad.{half}.s32 %d, %a, %b, %c;", "s32", ("s32", first), ("s32", second), ("s32", third))
    shift = 32 if half == "hi" else 0
    expected = [wrapped((x * y >> shift) + z, "s32") for x, y, z in zip(first, second, third, strict=True)]
    assert got.tolist() == expected


@pytest.mark.parametrize("type_name", ["u32", "s32", "u64", "s64"])
def test_division_truncates(type_name):
    first, second = pairs(type_name)
    second = [value or 3 for value in second]
    operands = (type_name, first), (type_name, second)
    quotients = evaluate(f"div.{type_name} %d, %a, %b;", type_name, *operands)
    remainders = evaluate(f"rem.{type_name} %d, %a, %b;", type_name, *operands)
    exact = [abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1) for x, y in zip(first, second, strict=True)]
    assert quotients.tolist() == [wrapped(value, type_name) for value in exact]
    assert remainders.tolist() == [x - q * y for x, y, q in zip(first, second, exact, strict=True)]


@pytest.mark.parametrize("name", ["neg", "abs"])
def test_unary(name):
    values = integers("s32", 1)
    got = evaluate(f"{name}.s32 %d, %a;", "s32", ("s32", values))
    exact = [-value if name == "neg" else abs(value) for value in values]
    assert got.tolist() == [wrapped(value, "s32") for value in exact]


def test_constants_are_read_in_every_notation():
    got = evaluate("add.s32 %d, %a, 0x10; add.s32 %d, %d, -3; add.s32 %d, %d, 5U;", "s32", ("s32", [100]))
    assert got.tolist() == [118]
    assert evaluate("add.f32 %d, %a, 0f3F800000;", "f32", ("f32", [2.0])).tolist() == [3.0]
    assert evaluate("add.f64 %d, %a, 0d3FF0000000000000;", "f64", ("f64", [2.0])).tolist() == [3.0]


def rounded_once(exact: Fraction, type_name: str) -> float:
    """The value of the format next to an exact one, ties to even. For normal numbers."""
    precision = {"f16": 11, "bf16": 8, "f32": 24, "f64": 53}[type_name]
    if exact == 0:
        return 0.0
    exponent = 0
    while abs(exact) >= Fraction(2) ** (exponent + precision):
        exponent += 1
    while abs(exact) < Fraction(2) ** (exponent + precision - 1):
        exponent -= 1
    return float(round(exact / Fraction(2) ** exponent) * Fraction(2) ** exponent)


def floats(type_name: str, seed: int) -> np.ndarray:
    """Random values of a format as float64, and their halfway cases."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(96).astype(np.float32) * np.float32(4)
    if type_name == "bf16":
        return bf16_to_f32(f32_to_bf16(values)).astype(np.float64)
    return values.astype(DTYPES[type_name]).astype(np.float64)


def as_operand(values: np.ndarray, type_name: str):
    return type_name, f32_to_bf16(values.astype(np.float32)) if type_name == "bf16" else values


def as_values(result: np.ndarray, type_name: str) -> list[float]:
    return (bf16_to_f32(result) if type_name == "bf16" else result).astype(np.float64).tolist()


@pytest.mark.parametrize("type_name", ["f16", "bf16", "f32", "f64"])
def test_fma_rounds_once(type_name):
    x, y = floats(type_name, 1), floats(type_name, 2)
    z = floats(type_name, 3) / 2**9
    if type_name == "bf16":
        z = bf16_to_f32(f32_to_bf16(z.astype(np.float32))).astype(np.float64)
    else:
        z = z.astype(DTYPES[type_name]).astype(np.float64)
    z[:48] = -(x * y).astype(np.float32)[:48] if type_name == "f32" else z[:48]
    operands = [as_operand(values, type_name) for values in (x, y, z)]
    got = evaluate(f"fma.rn.{type_name} %d, %a, %b, %c;", type_name, *operands)
    exact = [
        Fraction(p) * Fraction(q) + Fraction(r) for p, q, r in zip(x.tolist(), y.tolist(), z.tolist(), strict=True)
    ]
    assert as_values(got, type_name) == [rounded_once(value, type_name) for value in exact]


@pytest.mark.parametrize("type_name", ["f16", "bf16"])
def test_float32_sums_take_operands_of_half_precision(type_name):
    rng = np.random.default_rng(5)
    x, y, z = (rng.normal(size=32).astype(np.float32) for _ in range(3))
    bits = [f32_to_bf16(part) if type_name == "bf16" else part.astype(np.float16) for part in (x, y)]
    x, y = (bf16_to_f32(part) if type_name == "bf16" else part.astype(np.float32) for part in bits)
    half = (type_name, bits[0])
    assert np.array_equal(evaluate(f"add.rn.f32.{type_name} %d, %a, %b;", "f32", half, ("f32", z)), x + z)
    assert np.array_equal(evaluate(f"sub.rn.f32.{type_name} %d, %a, %b;", "f32", half, ("f32", z)), x - z)
    got = evaluate(f"fma.rn.f32.{type_name} %d, %a, %b, %c;", "f32", half, (type_name, bits[1]), ("f32", z))
    assert np.array_equal(got, (x.astype(np.float64) * y + z).astype(np.float32))


def test_fma_rounds_once_where_float64_would_round_twice():
    """1 + 2^-24 + 2^-60: float64 drops the last term, and the tie then goes down to 1."""
    x, y, z = 1 + 2.0**-12, 1 + 2.0**-12, 2.0**-60
    exact = Fraction(x) * Fraction(y) + Fraction(z)
    got = evaluate("fma.rn.f32 %d, %a, %b, %c;", "f32", ("f32", [x]), ("f32", [y]), ("f32", [z]))
    twice = np.float32(np.float64(x) * y + z)
    assert float(got[0]) == rounded_once(exact, "f32")
    assert float(twice) != float(got[0])


@pytest.mark.parametrize("type_name", ["f16", "bf16", "f32", "f64"])
@pytest.mark.parametrize(
    ("name", "function"),
    [("add", lambda x, y: x + y), ("sub", lambda x, y: x - y), ("mul", lambda x, y: x * y)],
)
def test_float_results_are_rounded_once(name, function, type_name):
    x, y = floats(type_name, 1), floats(type_name, 2)
    got = evaluate(f"{name}.{type_name} %d, %a, %b;", type_name, as_operand(x, type_name), as_operand(y, type_name))
    exact = [function(Fraction(p), Fraction(q)) for p, q in zip(x.tolist(), y.tolist(), strict=True)]
    assert as_values(got, type_name) == [rounded_once(value, type_name) for value in exact]


def test_division_of_floats_is_rounded_once():
    x, y = floats("f32", 1), floats("f32", 2)
    got = evaluate("div.rn.f32 %d, %a, %b;", "f32", ("f32", x), ("f32", y))
    exact = [Fraction(p) / Fraction(q) for p, q in zip(x.tolist(), y.tolist(), strict=True)]
    assert as_values(got, "f32") == [rounded_once(value, "f32") for value in exact]


@pytest.mark.parametrize("name", ["min", "max"])
def test_extrema_skip_nan_unless_told_otherwise(name):
    x, y = [1.0, np.nan, 3.0, np.nan], [2.0, 2.0, np.nan, np.nan]
    got = evaluate(f"{name}.f32 %d, %a, %b;", "f32", ("f32", x), ("f32", y))
    strict = evaluate(f"{name}.NaN.f32 %d, %a, %b;", "f32", ("f32", x), ("f32", y))
    np.testing.assert_array_equal(got, np.float32([1 if name == "min" else 2, 2, 3, np.nan]))
    np.testing.assert_array_equal(strict, np.float32([1 if name == "min" else 2, np.nan, np.nan, np.nan]))


def test_saturation_and_flushing():
    x = [0.25, 2.0, -3.0, np.nan]
    assert evaluate("add.sat.f32 %d, %a, %b;", "f32", ("f32", x), ("f32", [0.25] * 4)).tolist() == [0.5, 1, 0, 0]
    tiny = np.float32(1e-40)
    assert evaluate("mul.f32 %d, %a, %b;", "f32", ("f32", [tiny]), ("f32", [1])).tolist() == [float(tiny)]
    flushed = evaluate("mul.ftz.f32 %d, %a, %b;", "f32", ("f32", [-tiny]), ("f32", [1]))
    assert flushed.tolist() == [0] and np.signbit(flushed[0])


@pytest.mark.parametrize("type_name", ["f16x2", "bf16x2"])
def test_pairs_are_two_results(type_name):
    scalar = type_name[:-2]
    low, high = (np.where(np.abs(half) < 0.1, 1.5, half) for half in (floats(scalar, 1), floats(scalar, 2)))
    bits = [
        np.asarray(as_operand(half, scalar)[1], DTYPES[scalar]).view(np.uint16).astype(np.uint32)
        for half in (low, high)
    ]
    packed = bits[0] | bits[1] << np.uint32(16)
    got = evaluate(f"mul.{type_name} %d, %a, %b;", "b32", ("b32", packed), ("b32", packed))
    halves = np.stack([got & 0xFFFF, got >> 16]).astype(np.uint16).view(DTYPES[scalar])
    for half, values in zip(halves, (low, high), strict=True):
        assert as_values(half, scalar) == [rounded_once(Fraction(v) ** 2, scalar) for v in values.tolist()]


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("ex2.approx", np.exp2),
        ("lg2.approx", np.log2),
        ("rcp.approx", lambda x: 1 / x),
        ("sqrt.rn", np.sqrt),
        ("rsqrt.approx", lambda x: 1 / np.sqrt(x)),
        ("tanh.approx", np.tanh),
        ("sin.approx", np.sin),
        ("cos.approx", np.cos),
    ],
)
def test_functions_are_as_near_as_float32_gets(name, function):
    x = (np.abs(floats("f32", 1)) + 0.5).astype(np.float32).astype(np.float64)
    got = evaluate(f"{name}.f32 %d, %a;", "f32", ("f32", x)).astype(np.float64)
    spacing = np.spacing(np.abs(function(x)).astype(np.float32))
    assert (np.abs(got - function(x)) <= 2 * spacing).all()
