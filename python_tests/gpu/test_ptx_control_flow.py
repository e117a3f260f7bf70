"""Divergence, loops, barriers and scopes in the PTX emulator."""

import numpy as np
import pytest

from python_tests.gpu.ptx import Memory, Program, PTXFault, UnsupportedPTX, launch
from python_tests.gpu.ptx.snippets import evaluate, kernel, run

LANE = np.arange(32)


def test_both_sides_of_a_branch_run_and_meet_again():
    text = """setp.lt.u32 %q0, %tid, 10; @%q0 bra LOW; add.s32 %d, %tid, 1000; bra JOIN; LOW: mul.lo.s32 %d, %tid, 3;
    JOIN: add.s32 %d, %d, 1; redux.sync.or.b32 %r0, %tid, -1;"""
    np.testing.assert_array_equal(evaluate(text, "b32"), np.where(LANE < 10, 3 * LANE, LANE + 1000) + 1)


def test_each_thread_leaves_a_loop_when_it_is_done():
    text = """mov.b32 %d, 0; mov.b32 %r0, %tid;
    LOOP: setp.eq.u32 %q0, %r0, 0; @%q0 bra DONE; add.s32 %d, %d, %r0; sub.s32 %r0, %r0, 1; bra LOOP; DONE:"""
    np.testing.assert_array_equal(evaluate(text, "b32"), LANE * (LANE + 1) // 2)


def test_divergence_inside_divergence():
    text = """mov.b32 %d, 0; and.b32 %r0, %tid, 1; setp.eq.u32 %q0, %r0, 0; @%q0 bra EVEN;
    setp.gt.u32 %q1, %tid, 15; @%q1 bra BIG; mov.b32 %d, 1; bra JOIN; BIG: mov.b32 %d, 2; bra JOIN;
    EVEN: mov.b32 %d, 3; JOIN: activemask.b32 %r1; setp.eq.b32 %q2, %r1, -1; @%q2 add.s32 %d, %d, 10;"""
    expected = np.where(LANE % 2 == 0, 3, np.where(LANE > 15, 2, 1)) + 10
    np.testing.assert_array_equal(evaluate(text, "b32"), expected)


def test_threads_that_exit_do_nothing_more():
    result = np.zeros(64, np.uint32)
    text = """setp.ge.u32 %q0, %tid, 40; @%q0 exit; bar.sync 0; mad.lo.s64 %l0, %wide, 4, %p0;
    st.global.b32 [%l0], 1; bar.sync 0;"""
    run(text, result, threads=64)
    np.testing.assert_array_equal(result, np.arange(64) < 40)


def test_a_barrier_orders_warps():
    """Each warp reads what the other wrote; without the barrier that is a race (test_ptx_faults)."""
    result = np.zeros(64, np.uint32)
    text = """mov.b32 %r20, buffer; mad.lo.s32 %r21, %tid, 4, %r20; st.shared.b32 [%r21], %tid; bar.sync 0;
    xor.b32 %r22, %tid, 32; mad.lo.s32 %r22, %r22, 4, %r20; ld.shared.b32 %r0, [%r22];
    mad.lo.s64 %l0, %wide, 4, %p0; st.global.b32 [%l0], %r0;"""
    run(text, result, threads=64, shared=256)
    np.testing.assert_array_equal(result, np.arange(64) ^ 32)


def test_a_barrier_of_a_warp_orders_its_lanes_only():
    text = """mov.b32 %r20, buffer; mad.lo.s32 %r21, %tid, 4, %r20; st.shared.b32 [%r21], %tid; bar.warp.sync -1;
    xor.b32 %r22, %tid, {other}; mad.lo.s32 %r22, %r22, 4, %r20; ld.shared.b32 %r0, [%r22];"""
    run(text.format(other=1), threads=64, shared=256)
    with pytest.raises(PTXFault, match="another thread wrote") as caught:
        run(text.format(other=32), threads=64, shared=256)
    assert caught.value.kind == "race"


def test_warps_may_wait_at_different_instructions_of_one_barrier():
    text = """setp.lt.u32 %q0, %tid, 32; @%q0 bra FIRST; bar.sync 0; mov.b32 %d, 1; bra END;
    FIRST: bar.sync 0; mov.b32 %d, 2; END:"""
    got = evaluate(text, "b32", ("b32", np.zeros(64)))
    np.testing.assert_array_equal(got, [2] * 32 + [1] * 32)


def test_scopes_have_their_own_labels_and_registers():
    """Inline assembly repeats its names: each loop goes back to its own label, each register has its own type."""
    text = """mov.b32 %d, 0;
    { .reg .pred done; .reg .b32 x; mov.b32 x, 0; again: add.s32 x, x, 1; add.s32 %d, %d, 1; setp.ge.u32 done, x, 3;
      @!done bra.uni again; }
    { .reg .b32 done; .reg .pred x; mov.b32 done, 0; again: add.s32 done, done, 1; add.s32 %d, %d, 100;
      setp.ge.u32 x, done, 2; @!x bra.uni again; }"""
    assert evaluate(text, "b32").tolist() == [203] * 32


@pytest.mark.parametrize("order", [None, [3, 2, 1, 0], [2, 0, 3, 1]])
def test_blocks_run_in_any_order_and_start_afresh(order):
    result = np.zeros(4, np.uint32)
    text = """mov.u32 %r0, %ctaid.x; mul.wide.u32 %l0, %r0, 4; add.s64 %l0, %l0, %p0; add.s32 %r2, %r0, 5;
    setp.eq.u32 %q0, %tid, 0; @%q0 st.global.b32 [%l0], %r2;"""
    counts = run(text, result, grid=4, order=order)
    assert result.tolist() == [5, 6, 7, 8]
    assert counts["st.global.b32"] == 4


def test_a_program_can_be_launched_again():
    program = Program(kernel("mad.lo.s64 %l0, %wide, 4, %p0; st.global.b32 [%l0], %tid;", 1))
    for _ in range(2):
        memory, result = Memory(), np.zeros(32, np.uint32)
        counts = launch(program, (1,), [memory.add(result)], memory=memory)
        assert counts["st.global.b32"] == 1
        np.testing.assert_array_equal(result, LANE)


def test_registers_and_shared_memory_begin_as_nan():
    assert np.isnan(evaluate("mov.b32 %d, %r9;", "f32")).all()
    text = "mov.b32 %r0, buffer; ld.shared.b32 %d, [%r0];"
    assert np.isnan(evaluate(text, "f32", shared=16)).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("frobnicate.b32 %r0, %r1;", "frobnicate"),
        ("add.rz.f32 %r0, %r1, %r2;", "rz"),
        ("bar.sync 1, 16;", "all 32 threads"),
        ("ld.const.b32 %r0, [%l0];", "constant memory"),
        ("add.s32 %r0, %r1, %l0, 1; mov.b64 %l0, %r0;", "64 bits"),
    ],
)
def test_what_is_not_implemented_says_so(text, message):
    with pytest.raises(UnsupportedPTX, match=message):
        run(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "found none"), (kernel("bra NOWHERE;"), "NOWHERE"), (".entry f() { mov.b32 %r0, 0;", "closing brace")],
)
def test_text_that_is_no_program(text, message):
    with pytest.raises(ValueError, match=message):
        Program(text)


def test_what_a_program_tells_about_itself():
    text = """.version 8.4
    .file 1 "dir/source.py"
    .extern .shared .align 16 .b8 dynamic[];
    .shared .align 4 .b8 first[6];
    .shared .b64 second[2];
    .visible .entry name$1(.param .u64 .ptr .global .align 1 a, .param .u32 b, .param .align 8 .b8 c[24])
    .reqntid 64, 2, 1
    { .reg .b32 %r<2>; .loc 1 42 7
    mov.b32 %r0, 1; // a comment; with a semicolon
    @!%p1 bra END; END: ret; }"""
    program = Program(text)
    assert program.name == "name$1"
    assert program.params == [("a", "u64", 8), ("b", "u32", 4), ("c", "b8", 24)]
    assert program.num_threads == (64, 2, 1)
    assert program.shared_symbols == {"first": 0, "second": 8, "dynamic": 32}
    assert program.static_shared == 32
    move, branch, leave = program.instructions
    assert (move.location, move.line, str(move)) == ("dir/source.py:42", 9, "mov.b32 %r0, 1")
    assert (branch.guard, program.targets[branch.index], leave.name) == (("%p1", True), leave.index, "ret")
