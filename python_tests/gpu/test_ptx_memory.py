"""Loads, stores, matrices, asynchronous copies and atomics of the PTX emulator."""

import numpy as np
import pytest

from python_tests.gpu.ptx import Memory, Program, launch
from python_tests.gpu.ptx.snippets import evaluate, kernel, run

LANE = np.arange(32)


def test_vector_loads_and_stores():
    source, target = np.arange(128, dtype=np.uint32), np.zeros(128, np.uint32)
    text = """shl.b64 %l0, %wide, 4; add.s64 %l1, %p0, %l0; add.s64 %l2, %p1, %l0;
    ld.global.v4.b32 {%r0, %r1, %r2, %r3}, [%l1]; st.global.v4.b32 [%l2], {%r3, %r2, %r1, %r0};"""
    run(text, source, target)
    np.testing.assert_array_equal(target.reshape(32, 4), source.reshape(32, 4)[:, ::-1])


@pytest.mark.parametrize("type_name", ["u8", "s8", "u16", "s16"])
def test_short_loads_are_extended(type_name):
    dtype = {"u8": np.uint8, "s8": np.int8, "u16": np.uint16, "s16": np.int16}[type_name]
    source = np.random.default_rng(0).integers(0, 2**16, 32).astype(np.uint16).astype(dtype)
    target = np.zeros(32, np.uint32)
    text = f"""mad.lo.s64 %l0, %wide, {source.itemsize}, %p0; ld.global.{type_name} %r0, [%l0];
    mad.lo.s64 %l1, %wide, 4, %p1; st.global.b32 [%l1], %r0;"""
    run(text, source, target)
    np.testing.assert_array_equal(target, source.astype(np.int64).astype(np.uint32))


def test_short_stores_write_nothing_beside():
    target = np.full(64, 0xFFFF, np.uint16)
    run("mad.lo.s64 %l0, %wide, 4, %p0; mov.b32 %r0, 0x12345678; st.global.b16 [%l0 + 2], %r0;", target)
    np.testing.assert_array_equal(target.reshape(32, 2), [[0xFFFF, 0x5678]] * 32)


def test_guards_and_offsets():
    target = np.zeros(33, np.uint32)
    text = """setp.gt.u32 %q0, %tid, 3; mad.lo.s64 %l0, %wide, 4, %p0; @%q0 st.global.b32 [%l0+4], %tid;
    @!%q0 st.global.b32 [%l0 + -0], 77;"""
    run(text, target)
    np.testing.assert_array_equal(target, [77] * 4 + [0] + list(range(4, 32)))


def test_parameters_of_every_type():
    text = """.version 8.4
    .visible .entry all_types(.param .u64 .ptr .global .align 1 p, .param .u32 i, .param .f32 f, .param .u64 q)
    .reqntid 32 { .reg .b64 %l<4>; .reg .b32 %r<4>;
    ld.param.b64 %l0, [p]; ld.param.b32 %r0, [i]; ld.param.b32 %r1, [f]; ld.param.b64 %l1, [q];
    ld.param.b32 %r2, [q+4];
    st.global.b32 [%l0], %r0; st.global.b32 [%l0+4], %r1; st.global.b64 [%l0+8], %l1; st.global.b32 [%l0+16], %r2;
    ret; }"""
    memory, result = Memory(), np.zeros(6, np.uint32)
    launch(Program(text), (1,), [memory.add(result), -2, 1.5, -3], memory=memory)
    assert result[0].view(np.int32) == -2
    assert result[1].view(np.float32) == 1.5
    assert result[2:4].view(np.int64)[0] == -3
    assert result[4] == 0xFFFFFFFF


def test_arguments_that_are_left_out_are_zero_and_too_many_are_refused():
    memory, result = Memory(), np.full(32, 9, np.uint64)
    program = Program(kernel("mad.lo.s64 %l0, %wide, 8, %p0; st.global.b64 [%l0], %p1;", 2))
    launch(program, (1,), [memory.add(result)], memory=memory)
    assert not result.any()
    with pytest.raises(ValueError, match="at most 2 arguments, got 3"):
        launch(program, (1,), [0, 0, 0], memory=memory)


def test_every_thread_has_its_own_local_memory():
    text = """.local .align 8 .b8 frame[16]; mov.b64 %l0, frame; st.local.b32 [%l0+4], %tid; st.local.b32 [%l0], 5;
    ld.local.b32 %d, [%l0+4];"""
    np.testing.assert_array_equal(evaluate(text, "b32"), LANE)


def test_special_registers_of_a_grid():
    result = np.zeros((6, 3, 8, 4), np.uint32)  # blocks, fields
    text = """.version 8.4
    .visible .entry where(.param .u64 p) .reqntid 4, 4, 2 { .reg .b64 %l<4>; .reg .b32 %r<9>;
    ld.param.b64 %l0, [p]; mov.u32 %r0, %tid.x; mov.u32 %r1, %tid.y; mov.u32 %r2, %tid.z; mov.u32 %r3, %ctaid.x;
    mov.u32 %r4, %ctaid.y; mov.u32 %r5, %nctaid.x; mov.u32 %r6, %ntid.y;
    mad.lo.s32 %r7, %r4, %r5, %r3; mul.lo.s32 %r7, %r7, 32; mad.lo.s32 %r7, %r2, 16, %r7;
    mad.lo.s32 %r7, %r1, %r6, %r7; add.s32 %r7, %r7, %r0; mul.wide.u32 %l1, %r7, 4; add.s64 %l0, %l0, %l1;
    add.s32 %r8, %r7, 1; st.global.b32 [%l0], %r8; ret; }"""
    result = np.zeros(192, np.uint32)
    memory = Memory()
    launch(Program(text), (3, 2), [memory.add(result)], memory=memory)
    np.testing.assert_array_equal(result, np.arange(1, 193))


TO_SHARED = """mov.b32 %r20, buffer; mad.lo.s32 %r21, %tid, 16, %r20; mad.lo.s64 %l0, %wide, 16, %p0;
ld.global.v4.b32 {%r0, %r1, %r2, %r3}, [%l0]; st.shared.v4.b32 [%r21], {%r0, %r1, %r2, %r3}; bar.sync 0;"""
MATRICES = np.random.default_rng(3).integers(0, 2**16, (4, 8, 8), dtype=np.uint16)


@pytest.mark.parametrize("is_transposed", [False, True], ids=["", "trans"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(count, is_transposed):
    """Thread t of the warp holds elements 2 (t mod 4) and the next of row t / 4 of each matrix."""
    names = [f"%r{4 + number}" for number in range(count)]
    result = np.zeros((32, 4), np.uint32)
    text = f"""{TO_SHARED} ldmatrix.sync.aligned.m8n8.x{count}{".trans" if is_transposed else ""}.shared.b16
    {{{", ".join(names)}}}, [%r21]; mad.lo.s64 %l1, %wide, 16, %p1;
    {"".join(f"st.global.b32 [%l1+{4 * number}], {name};" for number, name in enumerate(names))}"""
    run(text, MATRICES, result, shared=512)
    for thread in range(32):
        for number in range(count):
            matrix = MATRICES[number].T if is_transposed else MATRICES[number]
            pair = matrix[thread // 4, 2 * (thread % 4) : 2 * (thread % 4) + 2]
            assert result[thread, number] == int(pair[0]) | int(pair[1]) << 16


@pytest.mark.parametrize("is_transposed", [False, True], ids=["", "trans"])
def test_stmatrix_is_the_opposite(is_transposed):
    result = np.zeros((4, 8, 8), np.uint16)
    fragments = np.zeros((32, 4), np.uint32)
    for thread in range(32):
        for number in range(4):
            pair = MATRICES[number, thread // 4, 2 * (thread % 4) :][:2]
            fragments[thread, number] = int(pair[0]) | int(pair[1]) << 16
    text = f"""mov.b32 %r20, buffer; mad.lo.s32 %r21, %tid, 16, %r20; mad.lo.s64 %l0, %wide, 16, %p0;
    ld.global.v4.b32 {{%r0, %r1, %r2, %r3}}, [%l0];
    stmatrix.sync.aligned.m8n8.x4{".trans" if is_transposed else ""}.shared.b16 [%r21], {{%r0, %r1, %r2, %r3}};
    bar.sync 0; ld.shared.v4.b32 {{%r4, %r5, %r6, %r7}}, [%r21]; mad.lo.s64 %l1, %wide, 16, %p1;
    st.global.v4.b32 [%l1], {{%r4, %r5, %r6, %r7}};"""
    run(text, fragments, result, shared=512)
    np.testing.assert_array_equal(result, MATRICES.transpose(0, 2, 1) if is_transposed else MATRICES)


COPY = """mov.b32 %r20, buffer; mad.lo.s32 %r21, %tid, 16, %r20; mad.lo.s64 %l0, %wide, 16, %p0;
mad.lo.s64 %l1, %wide, 16, %p1; mov.b32 %r9, {size};
cp.async.cg.shared.global [%r21], [%l0], 16, %r9; cp.async.commit_group; cp.async.wait_group 0; bar.sync 0;
xor.b32 %r22, %r21, 16; ld.shared.v4.b32 {{%r0, %r1, %r2, %r3}}, [%r22];
st.global.v4.b32 [%l1], {{%r0, %r1, %r2, %r3}};"""


@pytest.mark.parametrize("size", [0, 4, 8, 16])
def test_an_asynchronous_copy_fills_the_rest_with_zeros(size):
    source, result = np.arange(1, 129, dtype=np.uint32), np.full(128, 7, np.uint32)
    run(COPY.format(size=size), source, result, shared=512)
    expected = source.reshape(16, 2, 4)[:, ::-1].reshape(32, 4).copy()
    expected[:, size // 4 :] = 0
    np.testing.assert_array_equal(result.reshape(32, 4), expected)


def test_an_asynchronous_copy_of_nothing_reads_nothing():
    source, result = np.zeros(4, np.uint32), np.full(128, 7, np.uint32)  # all lanes but one are out of bounds
    run(COPY.format(size=0), source, result, shared=512)
    assert not result.any()


def test_wait_group_leaves_the_latest_groups_in_flight():
    """Two groups: with one allowed in flight, the first has landed and the second may not be read."""
    text = """mov.b32 %r20, buffer; mad.lo.s32 %r21, %tid, 4, %r20; mad.lo.s64 %l0, %wide, 4, %p0;
    mad.lo.s64 %l1, %wide, 4, %p1;
    cp.async.ca.shared.global [%r21], [%l0], 4; cp.async.commit_group;
    cp.async.ca.shared.global [%r21+128], [%l0], 4; cp.async.commit_group;
    cp.async.wait_group 1; ld.shared.b32 %r0, [%r21]; cp.async.wait_all; ld.shared.b32 %r1, [%r21+128];
    add.s32 %r2, %r0, %r1; st.global.b32 [%l1], %r2;"""
    source, result = np.arange(32, dtype=np.uint32), np.zeros(32, np.uint32)
    run(text, source, result, shared=256)
    np.testing.assert_array_equal(result, 2 * source)


OPERATIONS = {
    "add.u32": lambda old, values: (old + sum(values)) & 0xFFFFFFFF,
    "min.s32": lambda old, values: min(old, *values),
    "max.u32": lambda old, values: max(old, *values),
    "and.b32": lambda old, values: int(np.bitwise_and.reduce([old, *values])),
    "or.b32": lambda old, values: int(np.bitwise_or.reduce([old, *values])),
    "xor.b32": lambda old, values: int(np.bitwise_xor.reduce([old, *values])),
    "exch.b32": lambda old, values: values[-1],
}


@pytest.mark.parametrize("operation", list(OPERATIONS))
@pytest.mark.parametrize("space", ["global", "shared"])
def test_atomics_take_every_lane(space, operation):
    values = np.random.default_rng(4).integers(1, 2**31, 32, dtype=np.uint32)
    result = np.array([1000], np.uint32)
    place = "%p1" if space == "global" else "%r20"
    text = f"""mad.lo.s64 %l0, %wide, 4, %p0; ld.global.b32 %r0, [%l0]; mov.b32 %r20, buffer;
    setp.eq.u32 %q0, %tid, 0; @%q0 st.shared.b32 [%r20], 1000; bar.sync 0;
    atom.{space}.{operation} %r1, [{place}], %r0; bar.sync 0;"""
    if space == "shared":
        text += "ld.shared.b32 %r2, [%r20]; @%q0 st.global.b32 [%p1], %r2;"
    run(text, values, result, shared=16)
    assert result[0] == OPERATIONS[operation](1000, values.tolist())


def test_compare_and_swap_and_counters():
    cell = np.array([0, 5, 0], np.uint32)
    old = np.zeros((3, 32), np.uint32)
    text = """mad.lo.s64 %l0, %wide, 4, %p1; add.s32 %r1, %tid, 1; mov.b32 %r5, 3;
    atom.global.cas.b32 %r2, [%p0], %tid, %r1; st.global.b32 [%l0], %r2;
    atom.global.inc.u32 %r3, [%p0+4], 6; st.global.b32 [%l0+128], %r3;
    atom.global.dec.u32 %r4, [%p0+8], %r5; st.global.b32 [%l0+256], %r4;"""
    run(text, cell, old)
    assert old[0].tolist() == LANE.tolist()  # each lane finds what the one before it left
    up, down = [5], [0]
    for _ in range(32):
        up.append(0 if up[-1] >= 6 else up[-1] + 1)
        down.append(3 if down[-1] == 0 or down[-1] > 3 else down[-1] - 1)
    assert [old[1].tolist(), old[2].tolist()] == [up[:-1], down[:-1]]
    assert cell.tolist() == [32, up[-1], down[-1]]


def test_atomics_on_floats():
    total = np.zeros(1, np.float32)
    half = np.array([0x3C00_4000], np.uint32)  # (2, 1)
    text = """mov.b32 %r0, 0f3F000000; red.relaxed.gpu.global.add.f32 [%p0], %r0;
    mov.b32 %r1, 0x3C003C00; atom.global.add.noftz.f16x2 %r2, [%p1], %r1;"""
    run(text, total, half)
    assert total[0] == 16
    assert half.view(np.float16).tolist() == [34, 33]


def test_atomics_of_two_blocks_are_no_race_and_their_order_is_free():
    count = np.zeros(1, np.uint32)
    run("red.global.add.u32 [%p0], 1;", count, grid=3, order=[2, 0, 1])
    assert count[0] == 96
