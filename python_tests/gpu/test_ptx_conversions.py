"""cvt and mov of the PTX emulator against the definitions of the formats."""

from fractions import Fraction

import numpy as np
import pytest

from python_tests.gpu.ptx.snippets import evaluate
from python_tests.gpu.ptx.types import DTYPES, bf16_to_f32

VALUES = np.float32([0.0, 1.0, -1.0, 0.1, -0.1, 3.1415927, 1e-3, -123.456, 1000.123, 1.0009765, 1.00390625, 1.01171875])
EVERY_F16 = np.arange(0x7C00, dtype=np.uint16).view(np.float16)  # finite, not negative, ascending
EVERY_BF16 = (np.arange(0x7F80, dtype=np.uint32) << np.uint32(16)).view(np.float32)


def neighbours(value: float, every: np.ndarray) -> tuple[float, float]:
    """The largest value of a format that is not above |value|, and the smallest that is not below."""
    magnitude = abs(value)
    values = every.astype(np.float64)
    below = int(np.searchsorted(values, magnitude, side="right")) - 1
    return values[below], values[below if values[below] == magnitude else below + 1]


def expected(value: float, every: np.ndarray, rounding: str) -> float:
    below, above = neighbours(value, every)
    if rounding == "rz":
        return float(np.copysign(below, value))
    down, up = Fraction(abs(value)) - Fraction(below), Fraction(above) - Fraction(abs(value))
    index = int(np.searchsorted(every.astype(np.float64), below))
    is_upper = up < down or (up == down and index % 2 == 1)
    return float(np.copysign(above if is_upper else below, value))


@pytest.mark.parametrize("rounding", ["rn", "rz"])
def test_f32_to_shorter_floats(rounding):
    spread = np.random.default_rng(0).standard_normal(84).astype(np.float32)
    halfway = (EVERY_F16[5000:5016].astype(np.float32) + EVERY_F16[5001:5017].astype(np.float32)) / 2
    values = np.concatenate([VALUES, spread, halfway, EVERY_BF16[16256:16272] * np.float32(1 + 2**-8)])
    half = evaluate(f"cvt.{rounding}.f16.f32 %d, %a;", "f16", ("f32", values))
    assert half.astype(float).tolist() == [expected(float(value), EVERY_F16, rounding) for value in values]
    brain = evaluate(f"cvt.{rounding}.bf16.f32 %d, %a;", "b16", ("f32", values))
    assert bf16_to_f32(brain).astype(float).tolist() == [expected(float(v), EVERY_BF16, rounding) for v in values]


def test_special_floats_survive_narrowing():
    values = np.float32([np.inf, -np.inf, np.nan, 1e30, -0.0])
    half = evaluate("cvt.rn.f16.f32 %d, %a;", "f16", ("f32", values))
    np.testing.assert_array_equal(half, np.float16([np.inf, -np.inf, np.nan, np.inf, 0]))
    assert np.signbit(half[4])
    assert evaluate("cvt.rz.f16.f32 %d, %a;", "f16", ("f32", [1e30])).tolist() == [65504.0]
    brain = evaluate("cvt.rn.bf16.f32 %d, %a;", "b16", ("f32", values))
    assert brain[:3].tolist() == [0x7F80, 0xFF80, 0x7FFF]


@pytest.mark.parametrize("into", ["f16x2", "bf16x2"])
def test_packed_conversion_puts_the_first_operand_above(into):
    high, low = VALUES, VALUES[::-1].copy()
    packed = evaluate(f"cvt.rn.{into}.f32 %d, %a, %b;", "b32", ("f32", high), ("f32", low))
    scalar = into[:-2]
    for bits, values in ((packed >> 16, high), (packed & 0xFFFF, low)):
        single = evaluate(f"cvt.rn.{scalar}.f32 %d, %a;", "b16", ("f32", values))
        assert bits.tolist() == single.tolist()


@pytest.mark.parametrize(
    ("mode", "function"),
    [("rni", round), ("rzi", int), ("rmi", lambda x: x // 1), ("rpi", lambda x: -(-x // 1))],
)
def test_floats_to_integers(mode, function):
    values = [0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 2.4999, -7.75, 1000000.5]
    got = evaluate(f"cvt.{mode}.s32.f32 %d, %a;", "s32", ("f32", values))
    assert got.tolist() == [int(function(float(np.float32(value)))) for value in values]
    whole = evaluate(f"cvt.{mode}.f32.f32 %d, %a;", "f32", ("f32", values))
    assert whole.tolist() == got.astype(float).tolist()


@pytest.mark.parametrize("into", ["s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64"])
def test_floats_past_the_range_are_clamped(into):
    limits = np.iinfo(DTYPES[into])
    values = [1e30, -1e30, np.inf, -np.inf, np.nan]
    wide = into if limits.bits >= 32 else f"{into[0]}32"
    got = evaluate(f"cvt.rzi.{into}.f32 %d, %a;", wide, ("f32", values))
    nan = (limits.min if into == "s64" else 2**63) if limits.bits == 64 else 0
    assert got.tolist() == [limits.max, limits.min, limits.max, limits.min, nan]


@pytest.mark.parametrize("source", ["u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"])
def test_integers_to_floats_are_rounded_once(source):
    limits = np.iinfo(DTYPES[source])
    values = [limits.min, limits.max, 0, 1, limits.max - 1, limits.max // 3, limits.max // 7 * 5]
    held = source if limits.bits >= 16 else f"{source[0]}16"
    got = evaluate(f"cvt.rn.f64.{source} %d, %a;", "f64", (held, values))
    assert got.tolist() == [float(value) for value in values]
    short = evaluate(f"cvt.rn.f32.{source} %d, %a;", "f32", (held, values))
    for value, result in zip(values, short.tolist(), strict=True):
        step = Fraction(float(np.spacing(np.float32(abs(result)))))
        assert abs(Fraction(result) - value) <= step / 2, value


@pytest.mark.parametrize(
    ("conversion", "source", "into", "value", "result"),
    [
        ("s64.s32", "s32", "s64", -5, -5),
        ("u64.u32", "b32", "u64", 0xFFFFFFFB, 0xFFFFFFFB),
        ("u32.u64", "b64", "u32", 0x123456789A, 0x3456789A),
        ("s32.s8", "b32", "s32", 0x1FE, -2),
        ("u32.u8", "b32", "u32", 0x1FE, 0xFE),
        ("sat.s8.s32", "s32", "s32", 300, 127),
        ("sat.u8.s32", "s32", "u32", -300, 0),
        ("sat.s32.u32", "b32", "s32", 0xFFFFFFFF, 0x7FFFFFFF),
    ],
)
def test_integers_to_integers(conversion, source, into, value, result):
    assert evaluate(f"cvt.{conversion} %d, %a;", into, (source, [value])).tolist() == [result]


@pytest.mark.parametrize("rounding", ["rna", "rn", "rz"])
def test_tf32_has_ten_bits_of_mantissa(rounding):
    unit = 2.0**-10
    values = [1 + unit * (k + part) for k in (0, 1) for part in (0.0, 0.25, 0.5, 0.75)]
    got = evaluate(f"cvt.{rounding}.tf32.f32 %d, %a;", "f32", ("f32", values + [-value for value in values]))
    steps = {"rna": [0, 0, 1, 1, 1, 1, 2, 2], "rn": [0, 0, 0, 1, 1, 1, 2, 2], "rz": [0, 0, 0, 0, 1, 1, 1, 1]}
    exact = [1 + unit * step for step in steps[rounding]]
    assert got.tolist() == exact + [-value for value in exact]


def test_saturation_of_floats():
    values = [-1.0, 0.5, 2.0, np.nan]
    assert evaluate("cvt.sat.f32.f32 %d, %a;", "f32", ("f32", values)).tolist() == [0, 0.5, 1, 0]


def test_mov_packs_and_unpacks_low_parts_first():
    words, other = [0x11112222, 0x33334444], [0xAAAABBBB, 0xCCCCDDDD]
    text = "mov.b32 {%h0, %h1}, %a; mov.b32 {%h2, _}, %b; mov.b32 %d, {%h1, %h2};"
    assert evaluate(text, "b32", ("b32", words), ("b32", other)).tolist() == [0xBBBB1111, 0xDDDD3333]
    wide = evaluate("mov.b64 %d, {%a, %b};", "b64", ("b32", words), ("b32", other))
    assert wide.tolist() == [0xAAAABBBB11112222, 0xCCCCDDDD33334444]
