"""Operands of asynchronous products in shared memory: where a matrix descriptor says that each element lies."""

import numpy as np

from ..faults import BOUNDS, PTXFault
from ..types import DTYPES, TF32_MASK, bf16_to_f32

SWIZZLES = {0: (16, 0), 1: (128, 3), 2: (64, 2), 3: (32, 1)}  # mode -> (bytes of a row, address bits that are mixed)


def element_bytes(type_name: str) -> int:
    return 4 if type_name == "tf32" else np.dtype(DTYPES[type_name]).itemsize


def element_addresses(descriptor: int, rows: int, columns: int, size: int, is_transposed: bool) -> np.ndarray:
    """Byte addresses ``[rows, columns]``: rows along M or N, columns along K, elements of ``size`` bytes.

    The canonical layouts of the PTX ISA: cores of 8 rows of 16 bytes, strides between cores in the descriptor, the
    swizzle applied to the bits of the address. ``is_transposed``: M or N is the contiguous direction.
    """
    start = (descriptor & 0x3FFF) << 4
    leading = (descriptor >> 16 & 0x3FFF) << 4
    stride = (descriptor >> 32 & 0x3FFF) << 4
    mode = descriptor >> 62
    row_bytes, mixed_bits = SWIZZLES[mode]
    row, column = np.arange(rows)[:, None], np.arange(columns)[None, :]
    if is_transposed:
        byte = row * size
        along_row, along_column = (leading, stride) if mode else (stride, leading)
        address = start + byte % row_bytes + byte // row_bytes * along_row
        address = address + column % 8 * row_bytes + column // 8 * along_column
    else:
        byte = column * size
        inside = byte if mode else byte % 16 + byte // 16 * leading
        address = start + row % 8 * row_bytes + row // 8 * stride + inside
    return address ^ ((address >> 7 & ((1 << mixed_bits) - 1)) << 4)


def read_matrix(shared, addresses: np.ndarray, type_name: str) -> tuple[np.ndarray, np.ndarray]:
    """(values in the type of the accumulation, granules that were read)."""
    size = element_bytes(type_name)
    if addresses.max() + size > shared.size:
        raise PTXFault(BOUNDS, f"operand of a product at {addresses.max()} of {shared.size} bytes of shared memory")
    granules = shared.read_operand(np.ravel(addresses[..., None] + np.arange(0, size, shared.granule)))
    return values_of(shared.bytes[addresses[..., None] + np.arange(size)], type_name), granules


def values_of(data: np.ndarray, type_name: str) -> np.ndarray:
    """[..., bytes of one element] -> [...] in float64, or int64."""
    if type_name == "tf32":
        return (data.view(np.uint32)[..., 0] & TF32_MASK).view(np.float32).astype(np.float64)
    if type_name == "bf16":
        return bf16_to_f32(data.view(np.uint16)[..., 0]).astype(np.float64)
    values = data.view(DTYPES[type_name])[..., 0]
    return values.astype(np.int64 if type_name in ("s8", "u8") else np.float64)
