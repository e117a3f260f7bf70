"""Bit instructions, comparisons and selections of the PTX emulator against the pseudo code of the PTX ISA."""

import itertools
import math

import numpy as np
import pytest

from python_tests.gpu.ptx.snippets import evaluate
from python_tests.gpu.ptx.types import f32_to_bf16, width

WORDS = np.random.default_rng(0).integers(0, 2**32, 64, dtype=np.uint32)
LONG_WORDS = np.random.default_rng(1).integers(0, 2**63, 64, dtype=np.uint64) * np.uint64(2) + np.uint64(1)


def signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> (bits - 1) else value


@pytest.mark.parametrize(
    ("name", "function"),
    [("and", lambda x, y: x & y), ("or", lambda x, y: x | y), ("xor", lambda x, y: x ^ y)],
)
def test_logic(name, function):
    other = WORDS[::-1].copy()
    got = evaluate(f"{name}.b32 %d, %a, %b;", "b32", ("b32", WORDS), ("b32", other))
    assert got.tolist() == [function(int(x), int(y)) for x, y in zip(WORDS, other, strict=True)]
    assert evaluate("not.b32 %d, %a;", "b32", ("b32", WORDS)).tolist() == [int(x) ^ 0xFFFFFFFF for x in WORDS]


@pytest.mark.parametrize("type_name", ["b16", "b32", "b64", "s16", "s32", "s64", "u32"])
def test_shifts_past_the_width(type_name):
    """Left and unsigned: 0 comes out; signed to the right: the sign."""
    bits = width(type_name)
    distances = [0, 1, 7, bits - 1, bits, bits + 1, 200, 0xFFFFFFFF]
    value = (1 << (bits - 1)) | 0x1234 & ((1 << (bits - 1)) - 1)
    operands = (f"b{bits}", [value] * 8), ("u32", distances)
    right = evaluate(f"shr.{type_name} %d, %a, %b;", f"b{bits}", *operands)
    source = signed(value, bits) if type_name[0] == "s" else value
    assert right.tolist() == [(source >> min(distance, 500)) & ((1 << bits) - 1) for distance in distances]
    if type_name[0] == "b":
        left = evaluate(f"shl.{type_name} %d, %a, %b;", type_name, *operands)
        assert left.tolist() == [(value << min(distance, 500)) & ((1 << bits) - 1) for distance in distances]


@pytest.mark.parametrize("mode", ["clamp", "wrap"])
@pytest.mark.parametrize("direction", ["l", "r"])
def test_funnel_shift(direction, mode):
    low, high, distances = WORDS[:12], WORDS[12:24], [0, 1, 5, 16, 31, 32, 33, 63, 64, 100, 255, 2**32 - 1]
    operands = ("b32", low), ("b32", high), ("u32", distances)
    got = evaluate(f"shf.{direction}.{mode}.b32 %d, %a, %b, %c;", "b32", *operands)
    for result, first, second, distance in zip(got, low, high, distances, strict=True):
        pair = int(second) << 32 | int(first)
        count = min(distance, 32) if mode == "clamp" else distance & 31
        expected = (pair << count >> 32 if direction == "l" else pair >> count) & 0xFFFFFFFF
        assert int(result) == expected, distance


def extracted(value: int, position: int, length: int, bits: int, is_signed: bool) -> int:
    """The pseudo code of bfe."""
    position, length = position & 0xFF, length & 0xFF
    sign = 0 if not is_signed or length == 0 else value >> min(position + length - 1, bits - 1) & 1
    result = sum(1 << bit for bit in range(bits) if sign)
    for bit in range(length):
        if bit < bits and position + bit < bits:
            result = result & ~(1 << bit) | (value >> (position + bit) & 1) << bit
    for bit in range(length, bits):
        result = result & ~(1 << bit) | sign << bit
    return result


def inserted(source: int, base: int, position: int, length: int, bits: int) -> int:
    """The pseudo code of bfi."""
    result = base
    for bit in range(length & 0xFF):
        place = (position & 0xFF) + bit
        if place < bits:
            result = result & ~(1 << place) | (source >> bit & 1) << place
    return result


FIELDS = list(itertools.product([0, 1, 8, 20, 31, 32, 40, 63, 64, 255], [0, 1, 5, 16, 32, 33, 64, 255]))


@pytest.mark.parametrize("type_name", ["u32", "s32", "u64", "s64"])
def test_bit_fields(type_name):
    bits = width(type_name)
    position, length = ([field[i] for field in FIELDS] for i in (0, 1))
    values = np.resize(WORDS if bits == 32 else LONG_WORDS, len(FIELDS))
    base = values[::-1].copy()
    operands = (f"b{bits}", values), ("u32", position), ("u32", length)
    got = evaluate(f"bfe.{type_name} %d, %a, %b, %c;", f"b{bits}", *operands)
    for result, value, field in zip(got, values, FIELDS, strict=True):
        assert int(result) == extracted(int(value), *field, bits, type_name[0] == "s"), field
    into = evaluate(f"bfi.b{bits} %d, %a, %e, %b, %c;", f"b{bits}", *operands, (f"b{bits}", base))
    for result, value, old, field in zip(into, values, base, FIELDS, strict=True):
        assert int(result) == inserted(int(value), int(old), *field, bits), field


def test_prmt_picks_bytes_and_repeats_signs():
    selectors = np.random.default_rng(2).integers(0, 2**16, 64, dtype=np.uint32)
    other = WORDS[::-1].copy()
    got = evaluate("prmt.b32 %d, %a, %b, %c;", "b32", ("b32", WORDS), ("b32", other), ("b32", selectors))
    for result, low, high, selector in zip(got, WORDS, other, selectors, strict=True):
        source = int(low).to_bytes(4, "little") + int(high).to_bytes(4, "little")
        expected = []
        for place in range(4):
            pick = int(selector) >> 4 * place & 15
            byte = source[pick & 7]
            expected.append((255 if byte & 128 else 0) if pick & 8 else byte)
        assert int(result) == int.from_bytes(bytes(expected), "little")


@pytest.mark.parametrize("table", [0x00, 0x80, 0xFE, 0x96, 0xCA, 0x2D])
def test_lop3_is_its_truth_table(table):
    second, third = np.roll(WORDS, 7), np.roll(WORDS, 19)
    operands = [("b32", words) for words in (WORDS, second, third)]
    got = evaluate(f"lop3.b32 %d, %a, %b, %c, {table};", "b32", *operands)
    for result, *words in zip(got, WORDS, second, third, strict=True):
        for bit in range(32):
            x, y, z = (int(word) >> bit & 1 for word in words)
            assert int(result) >> bit & 1 == table >> (4 * x + 2 * y + z) & 1


def test_counting_and_reversing_bits():
    values = np.concatenate([WORDS[:29], np.uint32([0, 1, 2**32 - 1])])
    texts = [f"{int(value):032b}" for value in values]
    assert evaluate("popc.b32 %d, %a;", "b32", ("b32", values)).tolist() == [text.count("1") for text in texts]
    assert evaluate("brev.b32 %d, %a;", "b32", ("b32", values)).tolist() == [int(text[::-1], 2) for text in texts]
    leading = [len(text) - len(text.lstrip("0")) for text in texts]
    assert evaluate("clz.b32 %d, %a;", "b32", ("b32", values)).tolist() == leading


COMPARE = {
    "eq": lambda x, y: x == y,
    "ne": lambda x, y: x != y,
    "lt": lambda x, y: x < y,
    "le": lambda x, y: x <= y,
    "gt": lambda x, y: x > y,
    "ge": lambda x, y: x >= y,
}
TO_NUMBER = "selp.b32 %d, 1, 0, %q0;"


@pytest.mark.parametrize("suffix", ["", "u"])
@pytest.mark.parametrize("operator", list(COMPARE))
@pytest.mark.parametrize("type_name", ["f16", "f32", "f64"])
def test_comparisons_of_floats_know_nan(type_name, operator, suffix):
    numbers = [0.0, -0.0, 1.0, -2.0, np.inf, np.nan]
    x, y = (list(values) for values in zip(*itertools.product(numbers, numbers), strict=True))
    text = f"setp.{operator}{suffix}.{type_name} %q0, %a, %b; {TO_NUMBER}"
    got = evaluate(text, "b32", (type_name, x), (type_name, y))
    expected = []
    for left, right in zip(x, y, strict=True):
        is_unordered = math.isnan(left) or math.isnan(right)
        expected.append(int(suffix == "u") if is_unordered else int(COMPARE[operator](left, right)))
    assert got.tolist() == expected


@pytest.mark.parametrize("operator", list(COMPARE))
@pytest.mark.parametrize("type_name", ["f16x2", "bf16x2"])
def test_pairs_are_compared_into_two_predicates(type_name, operator):
    numbers = [-2.0, 0.0, 1.0, np.nan]
    low, high = (list(values) for values in zip(*itertools.product(numbers, numbers), strict=True))
    pairs = np.array([low, high], np.float32).T
    halves = f32_to_bf16(pairs) if type_name == "bf16x2" else pairs.astype(np.float16).view(np.uint16)
    text = f"""setp.{operator}.{type_name} %q0|%q1, %a, 0;
    selp.b32 %r0, 1, 0, %q0; selp.b32 %r1, 2, 0, %q1; add.s32 %d, %r0, %r1;"""
    got = evaluate(text, "b32", ("b32", np.ascontiguousarray(halves).view(np.uint32)[:, 0]))
    assert got.tolist() == [
        int(COMPARE[operator](x, 0.0)) * (x == x) + 2 * int(COMPARE[operator](y, 0.0)) * (y == y)
        for x, y in zip(low, high, strict=True)
    ]


@pytest.mark.parametrize("operator", ["num", "nan"])
def test_test_for_nan(operator):
    got = evaluate(f"setp.{operator}.f32 %q0, %a, %b; {TO_NUMBER}", "b32", ("f32", [1, np.nan]), ("f32", [1, 1]))
    assert got.tolist() == ([1, 0] if operator == "num" else [0, 1])


@pytest.mark.parametrize(
    ("operator", "type_name"),
    [*itertools.product(COMPARE, ["s32", "u32"]), *itertools.product(["lo", "ls", "hi", "hs"], ["u32"])],
)
def test_comparisons_of_integers_know_signs(operator, type_name):
    values = [0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]
    x, y = (list(numbers) for numbers in zip(*itertools.product(values, values), strict=True))
    got = evaluate(f"setp.{operator}.{type_name} %q0, %a, %b; {TO_NUMBER}", "b32", ("b32", x), ("b32", y))
    compare = COMPARE[{"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(operator, operator)]
    read = (lambda value: signed(value, 32)) if type_name == "s32" else (lambda value: value)
    assert got.tolist() == [int(compare(read(left), read(right))) for left, right in zip(x, y, strict=True)]


@pytest.mark.parametrize("combination", ["and", "or", "xor"])
def test_setp_combines_both_outcomes_with_a_third_predicate(combination):
    x, y, third = [1, 1, 2, 2], [1, 2, 1, 2], [0, 1, 0, 1]
    text = f"""setp.ne.b32 %q2, %c, 0; setp.eq.{combination}.s32 %q0|%q1, %a, %b, %q2;
    selp.b32 %r0, 1, 0, %q0; selp.b32 %r1, 2, 0, %q1; add.s32 %d, %r0, %r1;"""
    got = evaluate(text, "b32", ("s32", x), ("s32", y), ("b32", third))
    combine = {"and": lambda p, q: p & q, "or": lambda p, q: p | q, "xor": lambda p, q: p ^ q}[combination]
    outcomes = [int(left == right) for left, right in zip(x, y, strict=True)]
    expected = [combine(p, q) + 2 * combine(1 - p, q) for p, q in zip(outcomes, third, strict=True)]
    assert got.tolist() == expected


def test_predicate_logic_and_negated_operands():
    text = """setp.ne.b32 %q0, %a, 0; setp.ne.b32 %q1, %b, 0; and.pred %q2, %q0, %q1; not.pred %q3, %q2;
    xor.pred %q4, %q0, %q1; or.pred %q5, %q4, %q2; selp.b32 %d, 1, 0, !%q5; @%q3 add.s32 %d, %d, 2;
    @!%q3 add.s32 %d, %d, 4;"""
    got = evaluate(text, "b32", ("b32", [0, 0, 1, 1]), ("b32", [0, 1, 0, 1]))
    assert got.tolist() == [3, 2, 2, 4]
