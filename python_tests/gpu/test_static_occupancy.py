"""Occupancy against values worked out from NVIDIA's and AMD's tables."""

import pytest

from python_tests.gpu.static.occupancy import LIMITS, occupancy, occupancy_cdna3


@pytest.mark.parametrize(
    ("capability", "registers", "warps", "shared", "blocks", "limited_by"),
    [
        # 65536 registers / (32 lanes x 32 registers) = 64 warps: all of them
        (80, 32, 8, 0, 8, "registers"),
        (80, 64, 8, 0, 4, "registers"),
        # 255 registers are handed out as 256: 8 warps
        (80, 255, 4, 0, 2, "registers"),
        # 100 registers x 32 = 3200, in units of 256 that is 3328; a quarter of the registers holds 4 such warps
        (80, 100, 4, 0, 4, "registers"),
        # 168 x 32 = 5376 is a whole number of units; 3 warps in a quarter
        (90, 168, 4, 0, 3, "registers"),
        # 48 warps: a block of 1024 threads leaves a third empty
        (86, 32, 32, 0, 1, "warps"),
        (89, 16, 1, 0, 24, "blocks"),
        (90, 16, 1, 0, 32, "blocks"),
        # 163 KiB and 1 KiB for the system are all that there is
        (80, 32, 4, 163 * 1024, 1, "shared memory"),
        (80, 32, 4, 48 * 1024, 3, "shared memory"),
        (90, 32, 4, 48 * 1024, 4, "shared memory"),
        (80, 32, 4, 163 * 1024 + 1, 0, "shared memory of a block"),
    ],
)
def test_nvidia(capability, registers, warps, shared, blocks, limited_by):
    found = occupancy(capability, registers, warps, shared)
    assert (found.blocks, found.limited_by) == (blocks, limited_by)
    assert found.share == blocks * warps / LIMITS[capability].warps


def test_a_capability_without_a_table_is_an_error():
    with pytest.raises(ValueError, match=r"compute_capability: expected one of .*, got 75"):
        occupancy(75, 32, 4, 0)


@pytest.mark.parametrize(
    ("registers", "warps", "shared", "blocks", "limited_by"),
    [
        # LLVM's AMDGPU tables for 512 registers: 64 or fewer give 8 waves a SIMD, 128 give 4, 512 give 1
        (64, 4, 0, 8, "registers"),
        (65, 4, 0, 7, "registers"),
        (120, 4, 0, 4, "registers"),
        (128, 4, 0, 4, "registers"),
        (129, 4, 0, 3, "registers"),
        (512, 4, 0, 1, "registers"),
        (64, 4, 40 * 1024, 1, "shared memory"),
        (64, 4, 16 * 1024, 4, "shared memory"),
    ],
)
def test_cdna3(registers, warps, shared, blocks, limited_by):
    found = occupancy_cdna3(registers, warps, shared)
    assert (found.blocks, found.limited_by) == (blocks, limited_by)
    assert found.share == blocks * warps / 32
