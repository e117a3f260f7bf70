"""Asynchronous products of the PTX emulator (wgmma, tcgen05), with operands laid out by the rules of the PTX ISA."""

import numpy as np
import pytest

from python_tests.gpu.ptx import PTXFault
from python_tests.gpu.ptx.snippets import run

THREADS = 128
BUFFER = 32768
B_START = 16384
LAYOUTS = {"plain": (0, 128, 256), "swizzled": (1, 0, 1024)}  # mode of wgmma, leading and stride bytes


def place(row: int, byte: int, is_swizzled: bool) -> int:
    """Where a byte of a row of a K-major operand lies: cores of 8 rows x 16 bytes, or 128-byte rows, mixed."""
    if is_swizzled:
        return row * 128 + (byte // 16 ^ row % 8) * 16 + byte % 16
    return row // 8 * 256 + byte // 16 * 128 + row % 8 * 16 + byte % 16


def shared_image(a: np.ndarray, b: np.ndarray, is_swizzled: bool) -> np.ndarray:
    """The bytes of shared memory with A at 0 and B at B_START, both [rows, K] of float16."""
    image = np.zeros(BUFFER, np.uint8)
    for start, matrix in ((0, a), (B_START, b)):
        data = matrix.view(np.uint8)
        for row in range(matrix.shape[0]):
            for byte in range(data.shape[1]):
                image[start + place(row, byte, is_swizzled)] = data[row, byte]
    return image


def descriptor(start: int, leading: int, stride: int) -> int:
    return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32


LOAD = f"""mov.b32 %r20, buffer; mad.lo.s32 %r21, %tid, 16, %r20; mad.lo.s64 %l0, %wide, 16, %p0; mov.b32 %r22, 0;
COPY: ld.global.v4.b32 {{%r0, %r1, %r2, %r3}}, [%l0]; st.shared.v4.b32 [%r21], {{%r0, %r1, %r2, %r3}};
add.s64 %l0, %l0, {16 * THREADS}; add.s32 %r21, %r21, {16 * THREADS}; add.s32 %r22, %r22, 1;
setp.lt.s32 %q0, %r22, {BUFFER // (16 * THREADS)}; @%q0 bra COPY;"""
FENCE = "fence.proxy.async.shared::cta;"
ORDERED = LOAD + FENCE + "bar.sync 0;"


def random_operands(m: int, n: int):
    rng = np.random.default_rng(7)
    return [rng.standard_normal((rows, 16)).astype(np.float16) for rows in (m, n)]


def wgmma(layout: str, accumulates: bool = False) -> str:
    mode, leading, stride = LAYOUTS[layout]
    first, second = (descriptor(start, leading, stride) | mode << 62 for start in (0, B_START))
    return f"""mov.b64 %l4, {first}; mov.b64 %l5, {second}; wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {{%r4, %r5, %r6, %r7}}, %l4, %l5, {int(accumulates)}, 1, 1, 0, 0;
    wgmma.commit_group.sync.aligned;"""


WAIT = "wgmma.wait_group.sync.aligned {};"
STORE = "mad.lo.s64 %l1, %wide, 16, %p1; st.global.v4.b32 [%l1], {%r4, %r5, %r6, %r7};"


def warpgroup_fragments(d: np.ndarray) -> np.ndarray:
    """[128, 4]: what each thread holds of D [64, 8]."""
    result = np.zeros((THREADS, 4), np.float32)
    for thread in range(THREADS):
        for i in range(4):
            row = 16 * (thread // 32) + thread % 32 // 4 + (8 if i >= 2 else 0)
            result[thread, i] = d[row, thread % 4 * 2 + i % 2]
    return result


def run_wgmma(text: str, layout: str = "plain") -> tuple[np.ndarray, np.ndarray]:
    """(what the threads hold, what they should hold of one product)."""
    a, b = random_operands(64, 8)
    image, result = shared_image(a, b, layout == "swizzled"), np.zeros((THREADS, 4), np.float32)
    run(text, image, result, threads=THREADS, shared=BUFFER)
    return result, a.astype(np.float64) @ b.astype(np.float64).T


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_wgmma(layout):
    result, exact = run_wgmma(ORDERED + wgmma(layout) + WAIT.format(0) + STORE, layout)
    np.testing.assert_array_equal(result, warpgroup_fragments(exact.astype(np.float32)))


def test_wgmma_accumulates():
    text = ORDERED + wgmma("plain") + wgmma("plain", accumulates=True) + WAIT.format(0) + STORE
    result, exact = run_wgmma(text)
    np.testing.assert_array_equal(result, warpgroup_fragments((exact + exact.astype(np.float32)).astype(np.float32)))


def test_an_accumulator_is_unknown_until_its_group_is_waited_for():
    for wait in ("", WAIT.format(1)):
        result, _ = run_wgmma(ORDERED + wgmma("plain") + wait + STORE)
        assert np.isnan(result).all()


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (LOAD + "bar.sync 0;" + wgmma("plain"), "proxy"),
        (LOAD + FENCE + wgmma("plain"), "race"),
        (ORDERED + wgmma("plain") + WAIT.format(1) + "st.shared.b32 [%r20], 0;", "in-flight write"),
        (ORDERED + "setp.lt.u32 %q1, %tid, 64; @!%q1 bra END;" + wgmma("plain") + "END:", "partial warp"),
        (ORDERED + wgmma("plain").replace(f"%l5, {descriptor(B_START, 128, 256)}", "%l5, %wide"), "partial warp"),
        (
            ORDERED
            + wgmma("plain").replace(f"{descriptor(0, 128, 256)};", f"{descriptor(B_START * 2 - 64, 128, 256)};"),
            "bounds",
        ),
    ],
)
def test_misuse_of_wgmma(text, kind):
    with pytest.raises(PTXFault) as caught:
        run_wgmma(text)
    assert caught.value.kind == kind


N_COLUMNS = 16
SHAPE = 1 << 4 | N_COLUMNS // 8 << 17 | 128 // 16 << 24  # float32 accumulator, float16 operands
REGISTERS = ", ".join(f"%t{number}" for number in range(N_COLUMNS))
ALLOCATE = """mov.b32 %r20, buffer; mov.b32 %r24, slot; mov.b32 %r25, barrier; setp.lt.u32 %q1, %tid, 32;
@%q1 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r24], 32; setp.eq.u32 %q2, %tid, 0;
@%q2 mbarrier.init.shared::cta.b64 [%r25], 1;"""
PRODUCT = f"""ld.shared.b32 %r26, [%r24]; mov.b64 %l4, {descriptor(0, 128, 256) | 1 << 46};
mov.b64 %l5, {descriptor(B_START, 128, 256) | 1 << 46}; mov.b32 %r27, {SHAPE};
@%q2 tcgen05.mma.cta_group::1.kind::f16 [%r26], %l4, %l5, %r27, ACCUMULATES;"""
COMMIT = "@%q2 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r25];"
AWAIT = "AGAIN: mbarrier.try_wait.parity.shared::cta.b64 %q3, [%r25], 0; @!%q3 bra AGAIN;"
READ = f"""shr.u32 %r28, %tid, 5; shl.b32 %r28, %r28, 21; add.s32 %r28, %r28, %r26;
tcgen05.ld.sync.aligned.32x32b.x{N_COLUMNS}.b32 {{{REGISTERS}}}, [%r28]; tcgen05.wait::ld.sync.aligned;
mad.lo.s64 %l1, %wide, {4 * N_COLUMNS}, %p1;"""
READ += "".join(f"st.global.b32 [%l1+{4 * number}], %t{number};" for number in range(N_COLUMNS))


def run_tcgen05(text: str) -> tuple[np.ndarray, np.ndarray]:
    """(D as the threads read it, A B^T)."""
    a, b = random_operands(128, N_COLUMNS)
    image, result = shared_image(a, b, False), np.zeros((128, N_COLUMNS), np.float32)
    registers = f".reg .b32 %t<{N_COLUMNS}>; .shared .align 8 .b8 slot[8]; .shared .align 8 .b8 barrier[8];"
    text = ALLOCATE + ORDERED + text.replace("ACCUMULATES", "0", 1).replace("ACCUMULATES", "1")
    run(text, image, result, threads=THREADS, shared=BUFFER, registers=registers, limit=2000)
    return result, a.astype(np.float64) @ b.astype(np.float64).T


def test_tcgen05():
    result, exact = run_tcgen05(PRODUCT + COMMIT + AWAIT + READ)
    np.testing.assert_array_equal(result, exact.astype(np.float32))


def test_tcgen05_accumulates():
    result, exact = run_tcgen05(PRODUCT + PRODUCT + COMMIT + AWAIT + READ)
    np.testing.assert_array_equal(result, (exact + exact.astype(np.float32)).astype(np.float32))


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (PRODUCT + COMMIT + READ, "in-flight read"),
        (PRODUCT + COMMIT + "st.shared.b32 [%r20], 0;", "in-flight write"),
        (PRODUCT + AWAIT, "limit"),
        (PRODUCT + COMMIT + AWAIT + READ.replace("%r28, 21", "%r28, 22"), "bounds"),
        (PRODUCT.replace("@%q2 tcgen05", "tcgen05"), "partial warp"),
        (PRODUCT + COMMIT.replace("%r25", "%r20"), "mbarrier"),
    ],
)
def test_misuse_of_tcgen05(text, kind):
    with pytest.raises(PTXFault) as caught:
        run_tcgen05(text)
    assert caught.value.kind == kind
