"""How many warps of a kernel a multiprocessor holds at once, and what stops it from holding more.

NVIDIA: the limits are those of the CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; the
granularity of registers and shared memory is that of the CUDA toolkit's ``cuda_occupancy.h``.
AMD: a compute unit of CDNA 3 has 4 SIMDs of 8 waves, 512 vector registers a lane (in eights) and 64 KiB of LDS ("AMD
Instinct MI300" instruction set architecture guide; ``llvm/docs/AMDGPUUsage.rst``).
"""

import math
from typing import NamedTuple

WARP = 32
SCHEDULERS = 4  # of a multiprocessor, and SIMDs of a compute unit; each has a quarter of the registers
REGISTER_UNIT = 256  # registers of a warp are handed out in units of this many
SHARED_UNIT = 128
SHARED_RESERVED = 1024  # bytes that the system keeps for itself in each block
LDS = 64 * 1024
WAVES_PER_SIMD = 8
VECTOR_REGISTERS = 512
VECTOR_REGISTER_UNIT = 8


class Limits(NamedTuple):
    """Of one multiprocessor; shared memory in KiB."""

    registers: int
    warps: int
    blocks: int
    shared: int
    shared_per_block: int


LIMITS = {
    80: Limits(65536, 64, 32, 164, 163),
    86: Limits(65536, 48, 16, 100, 99),
    89: Limits(65536, 48, 24, 100, 99),
    90: Limits(65536, 64, 32, 228, 227),
    100: Limits(65536, 64, 32, 228, 227),
    120: Limits(65536, 48, 24, 100, 99),
}


class Occupancy(NamedTuple):
    share: float  # warps that fit, of the warps the hardware can hold
    limited_by: str
    blocks: int  # per multiprocessor or compute unit


def occupancy(compute_capability: int, registers: int, warps: int, shared: int) -> Occupancy:
    """For blocks of ``warps`` warps with ``registers`` per thread and ``shared`` bytes on an NVIDIA multiprocessor."""
    if compute_capability not in LIMITS:
        raise ValueError(f"compute_capability: expected one of {sorted(LIMITS)}, got {compute_capability}")
    limits = LIMITS[compute_capability]
    if shared > limits.shared_per_block * 1024:
        return Occupancy(0.0, "shared memory of a block", 0)
    per_warp = _round_up(max(registers, 1) * WARP, REGISTER_UNIT)
    per_block = _round_up(shared + SHARED_RESERVED, SHARED_UNIT)
    return _least(
        {
            "registers": limits.registers // SCHEDULERS // per_warp * SCHEDULERS // warps,
            "warps": limits.warps // warps,
            "blocks": limits.blocks,
            "shared memory": limits.shared * 1024 // per_block,
        },
        warps,
        limits.warps,
    )


def occupancy_cdna3(registers: int, warps: int, shared: int) -> Occupancy:
    """The same for workgroups of ``warps`` waves on a compute unit of gfx942; ``registers`` counts both kinds."""
    waves = VECTOR_REGISTERS // _round_up(max(registers, 1), VECTOR_REGISTER_UNIT)
    most = WAVES_PER_SIMD * SCHEDULERS
    return _least(
        {
            "registers": waves * SCHEDULERS // warps,
            "warps": most // warps,
            "shared memory": LDS // shared if shared else most,
        },
        warps,
        most,
    )


def _least(blocks: dict[str, int], warps: int, most_warps: int) -> Occupancy:
    limited_by = min(blocks, key=blocks.get)
    return Occupancy(blocks[limited_by] * warps / most_warps, limited_by, blocks[limited_by])


def _round_up(value: int, unit: int) -> int:
    return math.ceil(value / unit) * unit
