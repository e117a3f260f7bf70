"""ldmatrix, stmatrix and mma.sync: matrices spread over the lanes of a warp.

Sums are taken in float64 (integers: int64) and rounded once: PTX leaves the order and the precision of a tensor core's
sum open. Lanes are called by group (lane / 4) and place in it (lane mod 4), as in the figures of the PTX ISA.
"""

import re

import numpy as np

from ..faults import UnsupportedPTX
from ..operands import elements, shared_address, stacked_reader, stacked_writer
from ..shared_memory import whole_warp
from ..types import DTYPES, TF32_MASK, UNSIGNED, bf16_to_f32, width
from .registry import opcode

LANES = 32
GROUP, PLACE = np.arange(LANES) // 4, np.arange(LANES) % 4
OPERAND_TYPES = ("f16", "bf16", "tf32", "f64", "s8", "u8")


def _check_matrix(instruction):
    if "m8n8" not in instruction.opcode or instruction.type != "b16":
        raise UnsupportedPTX("wanted .m8n8 of .b16")


def _row_threads(warps: np.ndarray, count: int) -> np.ndarray:
    """The threads whose addresses count: the first 8 lanes of each warp for each of ``count`` matrices."""
    return (warps[:, None] * LANES + np.arange(8 * count)).reshape(-1)


@opcode("ldmatrix")
def decode_load_matrix(block, instruction):
    """Lane i gives the address of row i mod 8 of matrix i / 8; each register gets two elements of one matrix."""
    _check_matrix(instruction)
    names = elements(instruction.operands[0])
    where = shared_address(block, instruction.operands[1])
    write = stacked_writer(block, names, 32)
    transposes, count = "trans" in instruction.opcode, len(names)
    result = np.zeros((count, block.num_warps, LANES), np.uint32)

    def execute(mask):
        warps = block.full_warps(mask, "ldmatrix")
        threads = _row_threads(warps, count)
        rows = block.load_shared(where()[threads], threads, 16, np.uint16, whole_warp(threads))
        rows = rows.reshape(len(warps), count, 8, 8)
        if transposes:
            rows = rows.transpose(0, 1, 3, 2)
        pairs = np.ascontiguousarray(rows).reshape(len(warps), count, 64).view(np.uint32)
        result[:, warps] = pairs.transpose(1, 0, 2)
        write(result.reshape(count, -1), mask)

    return execute


@opcode("stmatrix")
def decode_store_matrix(block, instruction):
    """The opposite of ldmatrix."""
    _check_matrix(instruction)
    names = elements(instruction.operands[1])
    where = shared_address(block, instruction.operands[0])
    read = stacked_reader(block, names, 32)
    transposes, count = "trans" in instruction.opcode, len(names)

    def execute(mask):
        warps = block.full_warps(mask, "stmatrix")
        threads = _row_threads(warps, count)
        pairs = read().reshape(count, -1, LANES)[:, warps].transpose(1, 0, 2)
        rows = np.ascontiguousarray(pairs).view(np.uint16).reshape(len(warps), count, 8, 8)
        if transposes:
            rows = rows.transpose(0, 1, 3, 2)
        block.store_shared(where()[threads], threads, np.ascontiguousarray(rows).reshape(-1, 8), whole_warp(threads))

    return execute


def shape_of(instruction) -> tuple[int, int, int]:
    """M, N and K of .mMnNkK."""
    found = next(match for part in instruction.opcode if (match := re.fullmatch(r"m(\d+)n(\d+)k(\d+)", part)))
    return tuple(int(size) for size in found.groups())


def operand_values(bits: np.ndarray, type_name: str) -> np.ndarray:
    """[..., registers] of raw bits -> [..., registers, elements of one register] of values."""
    bits = bits[..., None]
    if type_name == "tf32":
        return (bits & TF32_MASK).view(np.float32)
    if type_name == "bf16":
        return bf16_to_f32(bits.view(np.uint16))
    return bits.view(DTYPES[type_name])


@opcode("mma")
def decode_mma(block, instruction):
    """D = A B + C for each warp; A by rows, B by columns."""
    m, n, k = shape_of(instruction)
    type_d, type_a, type_b, type_c = instruction.opcode[-4:]
    if type_a not in OPERAND_TYPES or type_b not in OPERAND_TYPES or type_c != type_d or "sp" in instruction.opcode:
        raise UnsupportedPTX("types of the operands, or a sparse product")
    texts_d, texts_a, texts_b, texts_c = (elements(text) for text in instruction.operands[:4])
    read_a = _fragment_reader(block, texts_a, type_a, m, k)
    read_b = _fragment_reader(block, texts_b, type_b, n, k)
    read_c, write_d = _accumulator(block, texts_c, texts_d, type_d, (m, n))
    saturates = "satfinite" in instruction.opcode

    def execute(mask):
        block.full_warps(mask, "mma.sync")
        product = read_a() @ read_b().transpose(0, 2, 1)
        write_d(product, read_c(), mask, saturates)

    return execute


def _fragment_reader(block, texts, type_name, rows, columns):
    """A function that returns an operand as [warps, M or N, K].

    Registers go first through the halves of 8 rows, then along K, where a lane's place and the elements of one register
    follow: so the matrix is the registers with their axes in another order.
    """
    bits = 64 if type_name == "f64" else 32
    read = stacked_reader(block, texts, bits)
    halves, per_register = rows // 8, bits // width(type_name)
    steps = len(texts) // halves  # along K
    if steps * halves != len(texts) or steps * 4 * per_register != columns:
        raise UnsupportedPTX(f"{len(texts)} registers of .{type_name} for a matrix of {rows} x {columns}")
    shape = (steps, halves, -1, 8, 4, per_register)
    dtype = np.int64 if type_name in ("s8", "u8") else np.float64

    def fragment():
        values = operand_values(read(), type_name).reshape(shape)
        return values.transpose(2, 1, 3, 0, 4, 5).astype(dtype).reshape(-1, rows, columns)

    return fragment


def _accumulator(block, texts_c, texts_d, type_name, shape):
    """(function that returns C as [warps, M, N], function that writes D): two neighbours of a row in each lane."""
    bits = 64 if type_name == "f64" else 32
    read, write = stacked_reader(block, texts_c, bits), stacked_writer(block, texts_d, bits)
    dtype, raw = DTYPES[type_name], UNSIGNED[bits]
    per_register = bits // width(type_name)
    halves, pair = shape[0] // 8, 2 // per_register  # registers of one half

    def matrix():
        values = read()[..., None].view(dtype).reshape(halves, pair, -1, 8, 4, per_register)
        return values.transpose(2, 0, 3, 4, 1, 5).reshape(-1, *shape)

    def put(product, addend, mask, saturates):
        total = product + addend
        if saturates:
            total = np.clip(total, np.iinfo(dtype).min, np.iinfo(dtype).max)
        values = total.astype(dtype).reshape(-1, halves, 8, 4, pair, per_register)
        packed = np.ascontiguousarray(values.transpose(1, 4, 0, 2, 3, 5)).view(raw)
        write(packed.reshape(halves * pair, -1), mask)

    return matrix, put
