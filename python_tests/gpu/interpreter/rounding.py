"""bfloat16 and tf32 as the hardware rounds them, in numpy, which has neither.

bfloat16 numbers are held as uint16, as in Triton's interpreter: the upper half of a float32.
"""

import numpy as np

BF16_NAN = np.uint16(0x7FC0)


def to_bf16(numbers: np.ndarray) -> np.ndarray:
    """float32 -> the nearest bfloat16, ties to even."""
    upper = (_rounded_bits(numbers, 16) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(numbers), BF16_NAN, upper)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """bfloat16 -> float32, exact."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_tf32(numbers: np.ndarray) -> np.ndarray:
    """float32 -> the nearest tf32 (10 bits of mantissa), ties to even, held as float32."""
    rounded = (_rounded_bits(numbers, 13) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(numbers), rounded, np.asarray(numbers, np.float32))


def _rounded_bits(numbers: np.ndarray, dropped: int) -> np.ndarray:
    """Bits of float32 that are right once the last ``dropped`` are cut; infinities stay, NaN does not."""
    bits = np.array(numbers, np.float32).view(np.uint32)
    odd = (bits >> np.uint32(dropped)) & np.uint32(1)
    return bits + np.uint32((1 << (dropped - 1)) - 1) + odd
