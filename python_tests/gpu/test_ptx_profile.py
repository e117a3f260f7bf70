"""What the PTX emulator counts of a program's accesses."""

import numpy as np
import pytest

from python_tests.gpu.ptx import Profile
from python_tests.gpu.ptx.snippets import run


def profile(body: str, *arrays, **options) -> Profile:
    counted = Profile()
    run(body, *arrays, profile=counted, **options)
    return counted


@pytest.mark.parametrize(("stride", "sectors"), [(4, 4), (8, 8), (32, 32), (128, 32), (0, 1)])
def test_sectors_of_a_strided_load(stride, sectors):
    text = f"mad.lo.s64 %l0, %wide, {stride}, %p0; ld.global.b32 %r0, [%l0];"
    loads = profile(text, np.zeros(1024, np.uint32)).loads
    useful = 128 if stride else 4
    assert (loads.requests, loads.sectors, loads.useful_bytes, loads.requested_bytes) == (1, sectors, useful, 128)
    assert loads.useful_per_sector == useful / (32 * sectors)


def test_a_vector_that_crosses_sectors_counts_both():
    text = "mad.lo.s64 %l0, %wide, 48, %p0; add.s64 %l0, %l0, 24; ld.global.b64 %l1, [%l0]; ld.global.b64 %l1, [%l0+8];"
    loads = profile(text, np.zeros(1024, np.uint32)).loads
    first = {(48 * lane + 24) // 32 for lane in range(32)}
    second = {(48 * lane + 32) // 32 for lane in range(32)}
    assert loads.sectors == len(first) + len(second)


def test_masked_lanes_cost_nothing():
    text = "setp.lt.u32 %q0, %tid, 8; mad.lo.s64 %l0, %wide, 4, %p0; @%q0 st.global.b32 [%l0], %tid;"
    stores = profile(text, np.zeros(32, np.uint32)).stores
    assert (stores.requests, stores.sectors, stores.useful_bytes) == (1, 1, 32)


def test_caches_are_perfect():
    """Two blocks load the same 128 bytes twice: 16 sectors requested, 8 at the second level, 4 from memory."""
    text = "mad.lo.s64 %l0, %wide, 4, %p0; ld.global.b32 %r0, [%l0]; ld.global.b32 %r1, [%l0];"
    counted = profile(text, np.zeros(32, np.uint32), grid=2)
    assert (counted.loads.sectors, counted.l2_sectors, counted.load_dram_sectors) == (16, 8, 4)


def test_asynchronous_copies_are_loads():
    text = """mov.b32 %r20, buffer; mad.lo.s32 %r21, %tid, 16, %r20; mad.lo.s64 %l0, %wide, 16, %p0;
    setp.lt.u32 %q0, %tid, 16; selp.b32 %r0, 16, 0, %q0; cp.async.cg.shared.global [%r21], [%l0], 16, %r0;"""
    loads = profile(text, np.zeros(128, np.uint32), shared=512).loads
    assert (loads.sectors, loads.useful_bytes) == (8, 256)


@pytest.mark.parametrize(
    ("words", "vector", "ratio"),
    [(1, 1, 1), (2, 1, 2), (32, 1, 32), (33, 1, 1), (4, 4, 1), (8, 4, 2), (2, 2, 1), (0, 1, 1)],
)
def test_bank_conflicts(words, vector, ratio):
    """Lanes ``words`` apart, each loading ``vector`` words."""
    registers = "{" + ", ".join(f"%r{number}" for number in range(vector)) + "}"
    kind = f"v{vector}.b32" if vector > 1 else "b32"
    text = f"mov.b32 %r20, buffer; mad.lo.s32 %r21, %tid, {4 * words}, %r20; ld.shared.{kind} {registers}, [%r21];"
    shared = profile(text, shared=8192).shared
    assert shared.least_wavefronts == vector
    assert shared.conflict_ratio == ratio


def test_ldmatrix_reads_rows_eight_at_a_time():
    text = """mov.b32 %r20, buffer; mad.lo.s32 %r21, %tid, {}, %r20;
    ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r0, %r1, %r2, %r3}}, [%r21];"""
    assert profile(text.format(16), shared=8192).shared.wavefronts == 4
    assert profile(text.format(128), shared=8192).shared.wavefronts == 32


def test_counts_are_split_by_source_line_and_instruction():
    text = "\n.loc 1 7 1\nld.global.b32 %r0, [%p0];\n.loc 1 8 1\nld.global.b32 %r0, [%p0]; ld.global.b32 %r0, [%p0];"
    counted = profile(text, np.zeros(1, np.uint32))
    assert {key: access.requests for key, access in counted.global_by_location.items()} == {
        ("loads", "1:7"): 1,
        ("loads", "1:8"): 2,
    }
    assert counted.instructions["ld.global.b32"] == 3
