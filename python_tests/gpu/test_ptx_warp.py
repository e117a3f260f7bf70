"""Instructions of the PTX emulator in which the lanes of a warp meet, against the pseudo code of the PTX ISA."""

import numpy as np
import pytest

from python_tests.gpu.ptx import PTXFault
from python_tests.gpu.ptx.snippets import evaluate, run

WORDS = np.random.default_rng(0).integers(0, 2**32, 64, dtype=np.uint32)  # two warps


def shuffled(mode: str, lane: int, offset: int, control: int) -> tuple[int, bool]:
    """The pseudo code of shfl: (source lane, predicate)."""
    segment, clamp = control >> 8 & 31, control & 31
    largest = lane & segment | clamp & ~segment
    smallest = lane & segment
    if mode == "up":
        source = lane - offset
        valid = source >= largest
    elif mode == "down":
        source = lane + offset
        valid = source <= largest
    elif mode == "bfly":
        source = lane ^ offset
        valid = source <= largest
    else:
        source = smallest | offset & ~segment
        valid = source <= largest
    return (source if valid else lane), valid


@pytest.mark.parametrize("segment", [0x00, 0x10, 0x18, 0x1C])
@pytest.mark.parametrize("offset", [0, 1, 3, 16, 31])
@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shuffle(mode, offset, segment):
    control = segment << 8 | (0 if mode == "up" else 31)
    text = f"shfl.sync.{mode}.b32 %d|%q0, %a, {offset}, {control}, -1;"
    values = evaluate(text, "b32", ("b32", WORDS))
    valid = evaluate(text + "selp.b32 %d, 1, 0, %q0;", "b32", ("b32", WORDS))
    for thread in range(64):
        source, is_valid = shuffled(mode, thread % 32, offset, control)
        assert values[thread] == WORDS[thread // 32 * 32 + source]
        assert valid[thread] == is_valid


def test_shuffle_by_a_lane_in_a_register():
    lanes = np.random.default_rng(1).integers(0, 32, 64, dtype=np.uint32)
    got = evaluate("shfl.sync.idx.b32 %d, %a, %b, 31, -1;", "b32", ("b32", WORDS), ("b32", lanes))
    assert got.tolist() == [WORDS[thread // 32 * 32 + lane] for thread, lane in enumerate(lanes)]


VOTES = {
    "any": lambda votes: int(any(votes)),
    "all": lambda votes: int(all(votes)),
    "uni": lambda votes: int(len(set(votes)) == 1),
}


@pytest.mark.parametrize("pattern", [0x0, 0x1, 0xFFFFFFFF, 0x80000000, 0xF0F0])
@pytest.mark.parametrize("mode", list(VOTES))
def test_votes(mode, pattern):
    bits = [pattern >> lane & 1 for lane in range(32)] + [1] * 32
    text = f"setp.ne.b32 %q0, %a, 0; vote.sync.{mode}.pred %q1, %q0, -1; selp.b32 %d, 1, 0, %q1;"
    got = evaluate(text, "b32", ("b32", bits))
    assert got.tolist() == [VOTES[mode](bits[:32])] * 32 + [1] * 32


def test_ballot_and_active_mask():
    bits = [int(lane % 3 == 0) for lane in range(32)]
    number = sum(bit << lane for lane, bit in enumerate(bits))
    got = evaluate("setp.ne.b32 %q0, %a, 0; vote.sync.ballot.b32 %d, %q0, -1;", "b32", ("b32", bits))
    assert got.tolist() == [number] * 32
    active = evaluate("setp.ne.b32 %q0, %a, 0; mov.b32 %d, 0; @%q0 activemask.b32 %d;", "b32", ("b32", bits))
    assert active.tolist() == [number * bit for bit in bits]


@pytest.mark.parametrize("type_name", ["u32", "s32"])
@pytest.mark.parametrize("operation", ["add", "min", "max", "and", "or", "xor"])
def test_redux(operation, type_name):
    if operation in ("and", "or", "xor"):
        type_name = "b32"
    functions = {
        "add": lambda values: sum(values) & 0xFFFFFFFF,
        "min": min,
        "max": max,
        "and": lambda values: int(np.bitwise_and.reduce(np.array(values, np.uint64))),
        "or": lambda values: int(np.bitwise_or.reduce(np.array(values, np.uint64))),
        "xor": lambda values: int(np.bitwise_xor.reduce(np.array(values, np.uint64))),
    }
    got = evaluate(f"redux.sync.{operation}.{type_name} %d, %a, -1;", "b32", ("b32", WORDS))
    read = WORDS.view(np.int32) if type_name == "s32" else WORDS
    for warp in (0, 1):
        values = read[32 * warp : 32 * (warp + 1)].tolist()
        assert got[32 * warp : 32 * (warp + 1)].tolist() == [functions[operation](values) & 0xFFFFFFFF] * 32


def test_elect_names_the_lowest_member():
    text = "elect.sync %r0|%q0, {}; selp.b32 %r1, 100, 0, %q0; add.s32 %d, %r0, %r1;"
    assert evaluate(text.format(-1), "b32").tolist() == [100] + [0] * 31
    guarded = "mov.b32 %d, 0; setp.ge.u32 %q1, %tid, 8; @!%q1 bra END; " + text.format("0xFFFFFF00") + " END:"
    assert evaluate(guarded, "b32").tolist() == [0] * 8 + [108] + [8] * 23


@pytest.mark.parametrize(
    "text",
    [
        "shfl.sync.bfly.b32 %r0, %tid, 1, 31, -1;",
        "vote.sync.any.pred %q1, %q0, -1;",
        "redux.sync.add.u32 %r0, %tid, -1;",
    ],
)
def test_a_missing_member_is_a_fault(text):
    with pytest.raises(PTXFault, match="lanes") as caught:
        run(f"setp.lt.u32 %q0, %tid, 16; @%q0 {text}")
    assert caught.value.kind == "partial warp"
    run(f"setp.lt.u32 %q0, %tid, 16; @%q0 {text.replace('-1;', '0xFFFF;')}")
