"""The roofline of a kernel (level L4): counted traffic against the least possible, and the rate no run can exceed.

Williams, Waterman, Patterson, "Roofline: An Insightful Visual Performance Model for Multicore Architectures", 2009. A
ceiling from data sheets and counts, never a speed: nothing here was timed.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

SECTOR = 32  # bytes; the unit in which global memory is moved


class Device(NamedTuple):
    """Peak rates of a data sheet, without sparsity."""

    name: str
    tera_flops: dict[str, float]  # by dtype
    bandwidth: float  # of device memory, TB/s


DEVICES = {
    "sm_80": Device("A100 SXM 80 GB", {"fp16": 312.0, "bf16": 312.0, "tf32": 156.0, "fp32": 19.5}, 2.039),
    "sm_90": Device("H100 SXM", {"fp16": 989.4, "bf16": 989.4, "tf32": 494.7, "fp32": 66.9}, 3.35),
    "sm_100": Device("B200", {"fp16": 2250.0, "bf16": 2250.0, "tf32": 1125.0, "fp32": 75.0}, 8.0),
    "gfx942": Device("MI300X", {"fp16": 1307.4, "bf16": 1307.4, "tf32": 653.7, "fp32": 163.4}, 5.3),
}


class Access(Protocol):
    sectors: int
    useful_bytes: int


class SharedAccess(Protocol):
    conflict_ratio: float


class Profile(Protocol):
    """What is read of the emulator's profile of one launch."""

    loads: Access
    stores: Access
    shared: SharedAccess
    load_dram_sectors: int
    store_dram_sectors: int


class Work(Protocol):
    """What a launch must do at least."""

    flops: int
    bytes: int  # each operand, index and result once
    tile_bytes: int  # once for each program that needs it


@dataclass(frozen=True)
class Traffic:
    """Counted for one launch. The ratios are to the least possible: 1 is ideal."""

    useful_per_sector: float  # share of the bytes in the requested sectors that a warp wanted
    bank_conflicts: float  # cycles of shared memory
    requested: float  # sectors that warps asked for, to the least of programs that share nothing
    memory: float  # sectors touched by the launch, to each byte once


@dataclass(frozen=True)
class Ceiling:
    """TFLOP/s that cannot be exceeded: if the second-level cache serves every reuse, and if it serves none."""

    cached: float
    uncached: float


def traffic(profile: Profile, work: Work) -> Traffic:
    sectors = profile.loads.sectors + profile.stores.sectors
    useful = profile.loads.useful_bytes + profile.stores.useful_bytes
    touched = profile.load_dram_sectors + profile.store_dram_sectors
    return Traffic(
        useful_per_sector=useful / (sectors * SECTOR),
        bank_conflicts=profile.shared.conflict_ratio,
        requested=sectors * SECTOR / work.tile_bytes,
        memory=touched * SECTOR / work.bytes,
    )


def ceiling(counted: Traffic, work: Work, target: str, dtype: str, tensor_ceiling: float) -> Ceiling:
    """Of a launch with this ``work``, if its traffic exceeds the least in the counted ratios.

    Args:
        counted: of a launch of the same kernel, perhaps on a smaller batch.
        work: of the launch that is asked about.
        target: whose device's data sheet to use.
        dtype: of the operands.
        tensor_ceiling: share of the peak that the inner loop can reach, see cycles.
    """
    device = DEVICES[target]
    peak = device.tera_flops[dtype] * tensor_ceiling
    return Ceiling(
        cached=min(peak, device.bandwidth * work.flops / (work.bytes * counted.memory)),
        uncached=min(peak, device.bandwidth * work.flops / (work.tile_bytes * counted.requested)),
    )
