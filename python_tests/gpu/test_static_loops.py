"""Innermost loops, on control-flow graphs drawn by hand."""

from python_tests.gpu.static.instruction import Instruction
from python_tests.gpu.static.loops import innermost_loops, outer_loops


def program(*lines):
    """Instructions at addresses 0, 1, ...; a line is a mnemonic and perhaps a target, "goto" is unconditional."""
    made = []
    for address, line in enumerate(lines):
        mnemonic, _, target = line.partition(" ")
        falls = mnemonic not in ("goto", "exit")
        made.append(Instruction(address, mnemonic, target=int(target) if target else None, falls_through=falls))
    return made


def addresses(instructions):
    return [one.address for one in instructions]


def test_a_loop():
    (loop,) = innermost_loops(program("a", "b", "c", "d", "e", "branch 1", "exit"))
    assert addresses(loop.instructions) == addresses(loop.every_time) == [1, 2, 3, 4, 5]


def test_only_the_inner_of_two_nested_loops():
    code = program("a", "b", "c", "d", "e", "f", "branch 2", "g", "branch 1", "exit")
    (loop,) = innermost_loops(code)
    assert addresses(loop.instructions) == [2, 3, 4, 5, 6]


def test_the_outer_of_two_nested_loops_without_the_inner():
    code = program("a", "b", "c", "d", "e", "f", "branch 2", "g", "branch 9", "h", "branch 1", "exit")
    (loop,) = outer_loops(code)
    assert addresses(loop.instructions) == [1, 7, 8, 9, 10]
    assert addresses(loop.every_time) == [1, 7, 8, 9, 10]
    assert outer_loops(program("a", "b", "c", "d", "e", "branch 1", "exit")) == []


def test_two_loops_side_by_side():
    code = program("a", "b", "c", "d", "branch 0", "a", "b", "c", "d", "branch 5", "exit")
    assert [addresses(loop.instructions) for loop in innermost_loops(code)] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]


def test_what_a_branch_skips_is_not_run_every_time():
    (loop,) = innermost_loops(program("a", "b", "branch 4", "skipped", "d", "branch 0", "exit"))
    assert addresses(loop.instructions) == [0, 1, 2, 3, 4, 5]
    assert addresses(loop.every_time) == [0, 1, 2, 4, 5]


def test_a_wait_behind_the_end_belongs_to_the_loop_and_is_no_loop_of_its_own():
    """As on sm_100: 2 jumps to a spin at 7 that returns to 3."""
    code = program("a", "try", "branch 7", "b", "c", "branch 0", "exit", "try", "branch 7", "goto 3")
    (loop,) = innermost_loops(code)
    assert addresses(loop.instructions) == [0, 1, 2, 3, 4, 5, 7, 8, 9]
    assert addresses(loop.every_time) == [0, 1, 2, 3, 4, 5]


def test_the_endless_branch_behind_the_end_is_no_loop():
    assert innermost_loops(program("a", "b", "exit", "nop", "nop", "nop", "nop", "goto 3")) == []


def test_two_ways_back_to_the_head_are_one_loop():
    (loop,) = innermost_loops(program("a", "b", "branch 0", "c", "d", "branch 0", "exit"))
    assert addresses(loop.instructions) == [0, 1, 2, 3, 4, 5]
    assert addresses(loop.every_time) == [0, 1, 2]
