"""mma.sync of the PTX emulator, against the fragment layouts of the PTX ISA written out lane by lane."""

import numpy as np
import pytest

from python_tests.gpu.ptx.snippets import run
from python_tests.gpu.ptx.types import bf16_to_f32, f32_to_bf16

TF32_MASK = np.uint32(0xFFFFE000)


def a_place_16bit(lane: int, i: int) -> tuple[int, int]:
    """(row, column) of a_i, m16n8k16 with 16-bit elements."""
    row = lane // 4 if i % 4 < 2 else lane // 4 + 8
    return row, lane % 4 * 2 + i % 2 + (8 if i >= 4 else 0)


def b_place_16bit(lane: int, i: int) -> tuple[int, int]:
    return lane % 4 * 2 + i % 2 + (8 if i >= 2 else 0), lane // 4


def c_place(lane: int, i: int) -> tuple[int, int]:
    return (lane // 4 if i < 2 else lane // 4 + 8), lane % 4 * 2 + i % 2


def a_place_tf32(lane: int, i: int) -> tuple[int, int]:
    """m16n8k8 with tf32 elements."""
    return lane // 4 + 8 * (i % 2), lane % 4 + 4 * (i // 2)


def b_place_tf32(lane: int, i: int) -> tuple[int, int]:
    return lane % 4 + 4 * i, lane // 4


def a_place_bytes(lane: int, i: int) -> tuple[int, int]:
    """m16n8k32 with 8-bit elements."""
    row = lane // 4 if i // 4 % 2 == 0 else lane // 4 + 8
    return row, lane % 4 * 4 + i % 4 + (16 if i >= 8 else 0)


def b_place_bytes(lane: int, i: int) -> tuple[int, int]:
    return lane % 4 * 4 + i % 4 + (16 if i >= 4 else 0), lane // 4


def fragments(matrix: np.ndarray, place, count: int) -> np.ndarray:
    """[32, count]: what each lane holds of a matrix."""
    return np.array([[matrix[place(lane, i)] for i in range(count)] for lane in range(32)], matrix.dtype)


def multiply(shape_and_types: str, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Runs one mma on fragments given as registers [32, n] of 32 bits; returns those of D, which has the form of C."""
    d = np.zeros_like(c)
    names, loads, number = [], "", 0
    for operand, registers in enumerate((a, b, c)):
        mine = [f"%r{number + i}" for i in range(registers.shape[1])]
        number += len(mine)
        names.append("{" + ", ".join(mine) + "}")
        loads += f"mad.lo.s64 %l0, %wide, {4 * len(mine)}, %p{operand};"
        loads += "".join(f"ld.global.b32 {name}, [%l0+{4 * i}];" for i, name in enumerate(mine))
    mine = [f"%r{number + i}" for i in range(d.shape[1])]
    names.insert(0, "{" + ", ".join(mine) + "}")
    stores = f"mad.lo.s64 %l0, %wide, {4 * len(mine)}, %p3;"
    stores += "".join(f"st.global.b32 [%l0+{4 * i}], {name};" for i, name in enumerate(mine))
    run(f"{loads} mma.sync.aligned.{shape_and_types} {', '.join(names)}; {stores}", a, b, c, d)
    return d


def matrices(m: int, n: int, k: int):
    rng = np.random.default_rng(5)
    return [rng.standard_normal(shape).astype(np.float32) for shape in ((m, k), (k, n), (m, n))]


@pytest.mark.parametrize("type_name", ["f16", "bf16"])
def test_m16n8k16_accumulates_in_float32(type_name):
    a, b, c = matrices(16, 8, 16)
    if type_name == "bf16":
        held = [f32_to_bf16(a), f32_to_bf16(b)]
        exact = [bf16_to_f32(bits).astype(np.float64) for bits in held]
    else:
        held = [a.astype(np.float16), b.astype(np.float16)]
        exact = [values.astype(np.float64) for values in held]
    registers = [
        fragments(held[0], a_place_16bit, 8).view(np.uint32),
        fragments(held[1], b_place_16bit, 4).view(np.uint32),
        fragments(c, c_place, 4),
    ]
    d = multiply(f"m16n8k16.row.col.f32.{type_name}.{type_name}.f32", *registers)
    np.testing.assert_array_equal(d, fragments((exact[0] @ exact[1] + c).astype(np.float32), c_place, 4))


def test_m16n8k16_accumulates_in_float16():
    a, b, c = (matrix.astype(np.float16) for matrix in matrices(16, 8, 16))
    registers = [
        fragments(a, a_place_16bit, 8).view(np.uint32),
        fragments(b, b_place_16bit, 4).view(np.uint32),
        fragments(c, c_place, 4).view(np.uint32),
    ]
    d = multiply("m16n8k16.row.col.f16.f16.f16.f16", *registers)
    exact = a.astype(np.float64) @ b.astype(np.float64) + c
    np.testing.assert_array_equal(d.view(np.float16), fragments(exact.astype(np.float16), c_place, 4))


def test_m16n8k8_tf32_ignores_the_low_bits():
    a, b, c = matrices(16, 8, 8)
    registers = [fragments(a, a_place_tf32, 4), fragments(b, b_place_tf32, 2), fragments(c, c_place, 4)]
    d = multiply("m16n8k8.row.col.f32.tf32.tf32.f32", *registers)
    cut = [(matrix.view(np.uint32) & TF32_MASK).view(np.float32).astype(np.float64) for matrix in (a, b)]
    np.testing.assert_array_equal(d, fragments((cut[0] @ cut[1] + c).astype(np.float32), c_place, 4))
    full = fragments((a.astype(np.float64) @ b.astype(np.float64) + c).astype(np.float32), c_place, 4)
    assert (d != full).any()


def test_m16n8k32_of_bytes():
    rng = np.random.default_rng(6)
    a, b = rng.integers(-128, 128, (16, 32)).astype(np.int8), rng.integers(-128, 128, (32, 8)).astype(np.int8)
    c = rng.integers(-1000, 1000, (16, 8)).astype(np.int32)
    registers = [
        fragments(a, a_place_bytes, 16).view(np.uint32),
        fragments(b, b_place_bytes, 8).view(np.uint32),
        fragments(c, c_place, 4),
    ]
    d = multiply("m16n8k32.row.col.s32.s8.s8.s32", *registers)
    np.testing.assert_array_equal(d, fragments(a.astype(np.int32) @ b.astype(np.int32) + c, c_place, 4))
