"""One program for each kind of fault that the PTX emulator finds, and its nearest neighbour that commits none."""

import numpy as np
import pytest

from python_tests.gpu.ptx import Memory, Program, PTXFault, launch
from python_tests.gpu.ptx.snippets import kernel, run

SHARED_ADDRESS = "mov.b32 %r20, buffer; mad.lo.s32 %r21, %tid, 4, %r20; xor.b32 %r22, %tid, 32;"
SHARED_ADDRESS += "mad.lo.s32 %r22, %r22, 4, %r20; mad.lo.s64 %l0, %wide, 4, %p0;"


def fault(body: str, *arrays, **options) -> PTXFault:
    with pytest.raises(PTXFault) as caught:
        run(body, *arrays, **options)
    return caught.value


def words(count: int = 32) -> np.ndarray:
    return np.zeros(count, np.uint32)


@pytest.mark.parametrize("offset", [-4, 4])
@pytest.mark.parametrize("access", ["ld.global.b32 %r0, [%l0+{}];", "st.global.b32 [%l0+{}], %tid;"])
def test_global_bounds(access, offset):
    text = "mad.lo.s64 %l0, %wide, 4, %p0;" + access
    found = fault(text.format(offset), words(), words())
    assert found.kind == "bounds"
    assert "'array 0' of 128 bytes" in str(found)
    run(text.format(0), words(), words())


def test_global_bounds_of_atomics_and_copies():
    assert fault("red.global.add.u32 [%p0+128], 1;", words()).kind == "bounds"
    text = "mov.b32 %r0, buffer; cp.async.ca.shared.global [%r0], [%p0+128], 4;"
    assert fault(text, words(), shared=16).kind == "bounds"


def test_shared_and_local_bounds():
    assert fault("mov.b32 %r0, buffer; ld.shared.b32 %r1, [%r0+16];", shared=16).kind == "bounds"
    assert fault("mov.b32 %r0, buffer; st.shared.b32 [%r0+-4], %r1;", shared=16).kind == "bounds"
    assert fault("mov.b64 %l0, f; .local .align 4 .b8 f[16]; ld.local.b32 %r1, [%l0+16];").kind == "bounds"
    run("mov.b32 %r0, buffer; ld.shared.b32 %r1, [%r0+12];", shared=16)


def test_an_array_of_no_elements_has_no_place_to_read():
    assert fault("ld.global.b32 %r0, [%p0];", words(0)).kind == "bounds"


def test_bytes_before_an_unaligned_array_are_out_of_bounds():
    memory, data = Memory(), np.zeros(40, np.uint8)
    program = Program(kernel("ld.global.b32 %r0, [%p0]; ld.global.b32 %r0, [%p0+-4];", 1))
    with pytest.raises(PTXFault, match="byte -4 of 'data' of 32 bytes"):
        launch(program, (1,), [memory.add(data, "data", lead=8)], memory=memory)


@pytest.mark.parametrize("access", ["ld.global.b64 %l1, [%p0+4];", "st.global.v2.b32 [%p0+4], {%r0, %r1};"])
def test_misaligned_global_access(access):
    assert fault(access, words()).kind == "misaligned"
    run(access.replace("+4", "+8"), words())


def test_misaligned_shared_access():
    text = "mov.b32 %r0, buffer; ld.shared.b32 %r1, [%r0+{}];"
    assert fault(text.format(2), shared=16).kind == "misaligned"
    text = "mov.b32 %r0, buffer; cp.async.cg.shared.global [%r0+{}], [%p0], 16;"
    assert fault(text.format(8), words(), shared=64).kind == "misaligned"


def test_wild_address():
    found = fault("mov.b64 %l0, 4096; ld.global.b32 %r0, [%l0];", words())
    assert found.kind == "wild address"
    assert "0x1000" in str(found)


@pytest.mark.parametrize("access", ["st.global.b32 [%p0], 1;", "red.global.add.u32 [%p0], 1;"])
def test_store_to_read_only_array(access):
    assert fault(access, words(), readonly=(0,)).kind == "read-only"
    run(access, words())


RACES = {
    "read after write": "st.shared.b32 [%r21], %tid; {} ld.shared.b32 %r0, [%r22];",
    "write after read": "ld.shared.b32 %r0, [%r21]; {} st.shared.b32 [%r22], %tid;",
    "write after write": "st.shared.b32 [%r21], %tid; {} st.shared.b32 [%r22], %tid;",
    "copy over what is read": "ld.shared.b32 %r0, [%r21]; {} cp.async.ca.shared.global [%r22], [%l0], 4;",
    "read of a copy that another thread waited for": """cp.async.ca.shared.global [%r21], [%l0], 4;
        cp.async.wait_all; {} ld.shared.b32 %r0, [%r22];""",
}


@pytest.mark.parametrize("name", list(RACES))
@pytest.mark.parametrize("distance", [32, 1], ids=["between warps", "inside a warp"])
def test_shared_memory_race(name, distance):
    text = (SHARED_ADDRESS + RACES[name]).replace("%tid, 32", f"%tid, {distance}")
    options = {"threads": 64, "shared": 256}
    assert fault(text.format(""), words(64), **options).kind == "race"
    run(text.format("bar.sync 0;"), words(64), **options)
    run(text.format(""), words(64), check_races=False, **options)


def test_stores_of_one_instruction_may_agree_but_not_differ():
    text = "mov.b32 %r20, buffer; st.shared.b32 [%r20], {};"
    run(text.format(7), threads=64, shared=16)
    assert fault(text.format("%tid"), threads=64, shared=16).kind == "race"


def test_a_short_store_beside_another_threads_is_no_race():
    run("mov.b32 %r20, buffer; mad.lo.s32 %r21, %tid, 2, %r20; st.shared.b16 [%r21], %tid;", threads=64, shared=128)


BLOCK_RACES = {
    "two blocks write": "st.global.b32 [%p0], 1;",
    "one reads, one writes": "setp.eq.u32 %q0, %r0, 0; @%q0 st.global.b32 [%p0], 1; @!%q0 ld.global.b32 %r1, [%p0];",
    "one adds, one writes": "setp.eq.u32 %q0, %r0, 0; @%q0 st.global.b32 [%p0], 1; @!%q0 red.global.add.u32 [%p0], 1;",
}


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
@pytest.mark.parametrize("name", list(BLOCK_RACES))
def test_global_memory_race_between_blocks(name, order):
    text = "mov.u32 %r0, %ctaid.x;" + BLOCK_RACES[name]
    assert fault(text, words(), grid=2, order=order).kind == "race"
    run(text, words(), grid=1)


def test_blocks_may_write_neighbouring_halves_of_a_word():
    text = "mov.u32 %r0, %ctaid.x; mul.wide.u32 %l0, %r0, {}; add.s64 %l0, %l0, %p0; st.global.b16 [%l0], %r0;"
    run(text.format(2), words(), grid=2)
    assert fault(text.format(0), words(), grid=2).kind == "race"


def test_a_race_ends_with_the_launch():
    program, memory, data = Program(kernel("st.global.b32 [%p0], 1;", 1)), Memory(), words()
    address = memory.add(data)
    for block in (0, 1):
        launch(program, (2,), [address], memory=memory, order=[block])


def test_deadlock_at_different_barriers():
    text = "setp.lt.u32 %q0, %tid, 32; @%q0 bra FIRST; bar.sync 1; bra END; FIRST: bar.sync 2; END:"
    found = fault(text, threads=64)
    assert found.kind == "barrier"
    assert "[1, 2]" in str(found)


IN_FLIGHT = "cp.async.ca.shared.global [%r21], [%l0], 4; cp.async.commit_group; {} {}"


@pytest.mark.parametrize(
    ("access", "kind"),
    [
        ("ld.shared.b32 %r0, [%r21];", "in-flight read"),
        ("st.shared.b32 [%r21], 1;", "in-flight write"),
        ("cp.async.ca.shared.global [%r21], [%l0], 4;", "in-flight write"),
    ],
)
def test_use_of_a_copy_in_flight(access, kind):
    text = SHARED_ADDRESS + IN_FLIGHT
    assert fault(text.format("", access), words(), shared=256).kind == kind
    assert fault(text.format("cp.async.wait_group 1;", access), words(), shared=256).kind == kind
    run(text.format("cp.async.wait_group 0;", access), words(), shared=256)


def test_waiting_does_not_cover_what_was_not_committed():
    text = SHARED_ADDRESS + "cp.async.ca.shared.global [%r21], [%l0], 4; {} ld.shared.b32 %r0, [%r21];"
    assert fault(text.format("cp.async.wait_group 0;"), words(), shared=256).kind == "in-flight read"
    run(text.format("cp.async.wait_all;"), words(), shared=256)


COLLECTIVES = [
    "bar.sync 0;",
    "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r1}, [%r20];",
    "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%r1, %r2, %r3, %r4}, {%r5, %r6}, {%r9}, {%r1, %r2, %r3, %r4};",
]


@pytest.mark.parametrize("collective", COLLECTIVES)
def test_part_of_a_warp(collective):
    text = f"mov.b32 %r20, buffer; setp.lt.u32 %q0, %tid, LANES; @!%q0 bra END; {collective} END:"
    assert fault(text.replace("LANES", "16"), shared=128).kind == "partial warp"
    run(text.replace("LANES", "32"), shared=128)


def test_trap_and_failed_assertion():
    text = "setp.eq.u32 %q0, %tid, {}; @%q0 trap;"
    assert fault(text.format(5)).kind == "trap"
    run(text.format(50))
    assert fault("call.uni __assertfail, (param0, param1);").kind == "trap"


def test_endless_loop():
    assert fault("LOOP: bra LOOP;", limit=1000).kind == "limit"


def test_mbarrier():
    text = "mov.b32 %r0, buffer; mbarrier.arrive.shared.b64 _, [%r0];"
    assert fault(text, shared=16).kind == "mbarrier"
    initialise = "mov.b32 %r0, buffer; setp.eq.u32 %q0, %tid, 0; @%q0 mbarrier.init.shared.b64 [%r0], {};"
    text = initialise + "mbarrier.arrive.shared.b64 _, [%r0];"
    assert fault(text.format(8), shared=16).kind == "mbarrier"
    run(text.format(32), shared=16)


def test_a_fault_names_its_line_and_its_block():
    text = kernel("\n.loc 1 42 7\nmov.u32 %r0, %ctaid.x; setp.eq.u32 %q0, %r0, 1;\n@%q0 trap;")
    text = text.replace(".visible", '.file 1 "kernels.py"\n.visible')
    with pytest.raises(PTXFault) as caught:
        launch(Program(text), (2,), [], memory=Memory())
    assert caught.value.location == "kernels.py:42"
    assert text.split("\n")[caught.value.line - 1] == "@%q0 trap;"
    assert "(block 1)" in str(caught.value)


def test_arrays_must_be_contiguous():
    with pytest.raises(ValueError, match="contiguous array, got strides"):
        Memory().add(np.zeros((4, 4), np.float32)[:, ::2])
