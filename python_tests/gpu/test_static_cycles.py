"""Cycle bounds and the roofline, on loops and counts whose answer is worked out by hand."""

from collections import Counter
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")

from python_tests.gpu.static.analyse import Analysis
from python_tests.gpu.static.classify import count_kinds
from python_tests.gpu.static.cycles import cycle_bound, multiply_adds, shared_bytes
from python_tests.gpu.static.instruction import Control, Instruction
from python_tests.gpu.static.loops import Loop
from python_tests.gpu.static.occupancy import Occupancy
from python_tests.gpu.static.roofline import DEVICES, ceiling, traffic

PRODUCT = "HMMA.16816.F32.BF16"


def analysis(*mnemonics, target="sm_80", num_warps=4, blocks=1, stall=1, every_time=None):
    code = tuple(Instruction(i, name, control=Control(stall, 7, 7, 0)) for i, name in enumerate(mnemonics))
    loop = Loop(code, code if every_time is None else code[:every_time])
    return Analysis(
        kernel="kernel",
        target=target,
        num_warps=num_warps,
        registers=128,
        stack=0,
        spills=0,
        shared=0,
        occupancy=Occupancy(blocks * num_warps / 64, "registers", blocks),
        instructions=len(code),
        total=Counter(),
        inner_loop=loop,
        inner=count_kinds(code, "cuda"),
    )


def test_products_alone_reach_the_whole_rate():
    """16 x 8 x 16 multiply-adds at 1024 / 4 a cycle are 8 cycles."""
    bound = cycle_bound(analysis(*[PRODUCT] * 10))
    assert (bound.tensor, bound.issue, bound.stalls, bound.shared) == (80, 10, 10, 0)
    assert (bound.tensor_ceiling, bound.bound_by) == (1.0, "tensor")


def test_tf32_has_half_the_rate():
    assert cycle_bound(analysis("HMMA.1688.F32.TF32")).tensor == 8


def test_warps_of_a_scheduler_take_turns_but_wait_together():
    one = cycle_bound(analysis(*[PRODUCT] * 10, stall=9))
    two = cycle_bound(analysis(*[PRODUCT] * 10, stall=9, blocks=2))
    assert (one.stalls, one.tensor, one.bound_by) == (90, 80, "stalls")
    assert (two.stalls, two.tensor, two.tensor_ceiling) == (90, 160, 1.0)


def test_idle_schedulers_lower_the_ceiling():
    """6 warps on 4 schedulers: two of them have two, which takes as long as 8 warps would."""
    assert cycle_bound(analysis(PRODUCT, num_warps=2, blocks=3)).tensor_ceiling == 0.75
    assert cycle_bound(analysis(PRODUCT, num_warps=2, blocks=1)).tensor_ceiling == 0.5


def test_issue_slots():
    bound = cycle_bound(analysis(PRODUCT, *["IMAD"] * 31, blocks=2))
    assert (bound.issue, bound.tensor, bound.tensor_ceiling, bound.bound_by) == (64, 16, 0.25, "issue")


def test_the_port_of_shared_memory():
    """Of 4 warps: 4 matrices of 128 bytes each, 2 KiB, and 16 bytes of 32 lanes each, 2 KiB; 128 bytes a cycle."""
    bound = cycle_bound(analysis(PRODUCT, "LDSM.16.M88.4", "LDGSTS.E.BYPASS.LTC128B.128"))
    assert (bound.shared, bound.bound_by) == (32, "shared")


def test_what_may_be_skipped_is_not_counted():
    assert cycle_bound(analysis(PRODUCT, *["IMAD"] * 100, every_time=1)).issue == 1


def test_a_warpgroups_product_is_shared_by_its_warps():
    """64 x 128 x 16 multiply-adds at 2048 a cycle are 64 cycles, of all four schedulers at once."""
    assert cycle_bound(analysis("HGMMA.64x128x16.F32.BF16", target="sm_90")).tensor == 64


@pytest.mark.parametrize("target", ["sm_100", "gfx942"])
def test_where_nothing_is_known_no_bound_is_told(target):
    assert cycle_bound(analysis(PRODUCT, target=target)) is None


@pytest.mark.parametrize(
    ("mnemonic", "wanted"),
    [("LDSM.16.M88.4", 512), ("LDSM.16.MT88.2", 256), ("LDS.128", 512), ("STS", 128), ("LDGSTS.E", 0), ("IMAD", 0)],
)
def test_shared_bytes(mnemonic, wanted):
    assert shared_bytes(Instruction(0, mnemonic)) == wanted


def test_other_instructions_multiply_nothing():
    assert multiply_adds(Instruction(0, "IMAD")) == 0


def profile(load_sectors=30, store_sectors=10, useful=1280, conflicts=1.0, touched=20):
    return SimpleNamespace(
        loads=SimpleNamespace(sectors=load_sectors, useful_bytes=useful - 320),
        stores=SimpleNamespace(sectors=store_sectors, useful_bytes=320),
        shared=SimpleNamespace(conflict_ratio=conflicts),
        load_dram_sectors=touched - 10,
        store_dram_sectors=10,
    )


WORK = SimpleNamespace(flops=64000, bytes=640, tile_bytes=1280)


def test_ideal_traffic():
    found = traffic(profile(), WORK)
    assert found.useful_per_sector == found.bank_conflicts == found.requested == found.memory == 1.0


def test_wasted_traffic():
    found = traffic(profile(load_sectors=70, conflicts=2.0, touched=40), WORK)
    assert (found.useful_per_sector, found.requested, found.memory) == (0.5, 2.0, 2.0)
    assert found.bank_conflicts == 2.0


def test_ceiling_of_memory_and_of_tensor_cores():
    counted = traffic(profile(), WORK)
    device = DEVICES["sm_80"]
    limit = ceiling(counted, WORK, "sm_80", "bf16", 0.5)
    assert limit.cached == 0.5 * device.tera_flops["bf16"]  # 100 flops a byte would allow 203.9
    assert limit.uncached == pytest.approx(50 * device.bandwidth)
    wasteful = traffic(profile(load_sectors=70), WORK)
    assert ceiling(wasteful, WORK, "sm_80", "bf16", 0.5).uncached == pytest.approx(25 * device.bandwidth)
