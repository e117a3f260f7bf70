"""Mutation of PTX: what is damaged, that it still is a program, and that the score counts right."""

import numpy as np
import pytest

from python_tests.gpu.ptx import Memory, Program, UnsupportedPTX, launch
from python_tests.gpu.ptx.mutate import mutants, reason_caught, score
from python_tests.gpu.ptx.snippets import kernel

REVERSE = kernel(
    """mov.b32 %r20, buffer;
mad.lo.s32 %r21, %tid, 4, %r20;
mad.lo.s64 %l0, %wide, 4, %p0;
cp.async.ca.shared.global [%r21], [%l0], 4;
cp.async.commit_group;
cp.async.wait_group 0;
bar.sync 0;
sub.s32 %r1, 63, %tid;
mad.lo.s32 %r2, %r1, 4, %r20;
ld.shared.b32 %r3, [%r2];
mov.b32 %r5, 0;
LOOP:
add.s32 %r5, %r5, 1;
setp.lt.s32 %q0, %r5, 3;
@%q0 bra LOOP;
setp.ge.s32 %q1, %tid, 8;
setp.lt.s32 %q2, %tid, 60;
and.pred %q3, %q1, %q2;
mad.lo.s64 %l1, %wide, 4, %p1;
@%q3 st.global.b32 [%l1+8], %r3;
shfl.sync.bfly.b32 %r6, %r3, 1, 31, -1;
min.s32 %r7, %r6, %r3;
selp.b32 %r8, %r6, %r7, %q3;
cvt.rn.f16.f32 %h0, %r8;
mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%r1, %r2, %r3, %r4}, {%r5, %r6}, {%r7}, {%r1, %r2, %r3, %r4};""",
    pointers=2,
    threads=64,
    shared=256,
)
EXPECTED = {
    ("barrier dropped", "bar.sync 0;", ""),
    ("commit dropped", "cp.async.commit_group;", ""),
    ("wait dropped", "cp.async.wait_group 0;", ""),
    ("wait weakened", "cp.async.wait_group 0;", "cp.async.wait_group 1;"),
    ("comparison", "setp.lt.s32 %q0, %r5, 3;", "setp.le.s32 %q0, %r5, 3;"),
    ("comparison", "setp.ge.s32 %q1, %tid, 8;", "setp.gt.s32 %q1, %tid, 8;"),
    ("guard dropped", "@%q0 bra LOOP;", "bra LOOP;"),
    ("guard inverted", "@%q3 st.global.b32 [%l1+8], %r3;", "@!%q3 st.global.b32 [%l1+8], %r3;"),
    ("address offset", "@%q3 st.global.b32 [%l1+8], %r3;", "@%q3 st.global.b32 [%l1+4], %r3;"),
    ("address offset", "@%q3 st.global.b32 [%l1+8], %r3;", "@%q3 st.global.b32 [%l1+12], %r3;"),
    ("constant", "sub.s32 %r1, 63, %tid;", "sub.s32 %r1, 64, %tid;"),
    ("constant", "mad.lo.s32 %r2, %r1, 4, %r20;", "mad.lo.s32 %r2, %r1, 5, %r20;"),
    ("constant", "add.s32 %r5, %r5, 1;", "add.s32 %r5, %r5, 2;"),
    ("predicate logic", "and.pred %q3, %q1, %q2;", "or.pred %q3, %q1, %q2;"),
    ("shuffle offset", "shfl.sync.bfly.b32 %r6, %r3, 1, 31, -1;", "shfl.sync.bfly.b32 %r6, %r3, 2, 31, -1;"),
    ("extremum", "min.s32 %r7, %r6, %r3;", "max.s32 %r7, %r6, %r3;"),
    ("selection swapped", "selp.b32 %r8, %r6, %r7, %q3;", "selp.b32 %r8, %r7, %r6, %q3;"),
    ("rounding", "cvt.rn.f16.f32 %h0, %r8;", "cvt.rz.f16.f32 %h0, %r8;"),
}


def test_every_kind_of_damage():
    found = mutants(REVERSE, seed=0, per_kind=100)
    assert {(mutant.kind, mutant.original, mutant.changed) for mutant in found} >= EXPECTED
    swapped = [mutant.changed for mutant in found if mutant.kind == "product operand swapped"]
    assert len(swapped) == 1 and "{%r6, %r5}, {%r7}" in swapped[0]


def test_a_mutant_is_a_program_that_differs_in_one_line():
    original = REVERSE.split("\n")
    for mutant in mutants(REVERSE, seed=0, per_kind=100):
        lines = mutant.text.split("\n")
        different = [number for number, pair in enumerate(zip(original, lines, strict=True), 1) if pair[0] != pair[1]]
        assert different == [mutant.line], mutant
        assert lines[mutant.line - 1].strip() == mutant.changed
        assert Program(mutant.text).instructions


def test_the_choice_is_that_of_the_seed():
    first, again, other = (mutants(REVERSE, seed, per_kind=2) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    kinds = [mutant.kind for mutant in first]
    assert max(kinds.count(kind) for kind in kinds) == 2
    assert set(kinds) == {mutant.kind for mutant in mutants(REVERSE, seed=1, per_kind=100)}


def check_reverse(text: str) -> None:
    """Reverses 64 words, of which 8 .. 59 are stored two places further."""
    memory, source, result = Memory(), np.arange(100, 164, dtype=np.uint32), np.zeros(64, np.uint32)
    addresses = [memory.add(source, readonly=True), memory.add(result)]
    launch(Program(text), (1,), addresses, memory=memory, limit=200)
    expected = np.zeros(64, np.uint32)
    expected[10:62] = source[::-1][8:60]
    assert (result == expected).all()


def test_score_names_the_survivors():
    damaged = mutants(REVERSE, seed=0, per_kind=100)
    result = score(damaged, lambda text: reason_caught(lambda: check_reverse(text)))
    caught = result.caught
    assert caught["barrier dropped"] == caught["commit dropped"] == caught["wait dropped"] == 1
    assert caught["wait weakened"] == 1
    assert caught["address offset"] == 2
    assert caught["guard inverted"] == 1  # that of the store
    # The loop only counts, and nothing is stored after the shuffle: damage there changes no result.
    survivors = {mutant.kind for mutant in result.survivors}
    assert {"rounding", "extremum", "selection swapped", "shuffle offset", "product operand swapped"} <= survivors
    assert result.reasons["limit"] >= 1  # the loop without its guard never ends
    assert result.reasons["in-flight read"] >= 2
    assert result.ratio == caught.total() / len(damaged)
    assert caught.total() + len(result.survivors) == len(damaged)


def test_immune_instructions_are_not_damaged():
    every = mutants(REVERSE, seed=0, per_kind=100)
    spared = mutants(REVERSE, seed=0, per_kind=100, immune=("cvt.rn.f16.f32",))
    assert spared == [mutant for mutant in every if "cvt.rn.f16.f32" not in mutant.original] != every


def test_score_leaves_out_what_cannot_be_executed():
    def run(text):
        raise UnsupportedPTX("no")

    damaged = mutants(REVERSE, seed=0, per_kind=1)
    result = score(damaged, run)
    assert (result.unsupported, result.total.total(), result.ratio) == (damaged, 0, 1.0)


def test_the_test_itself_must_not_hide_its_mistakes():
    def broken():
        raise KeyError("a mistake of the test")

    with pytest.raises(KeyError):
        reason_caught(broken)
