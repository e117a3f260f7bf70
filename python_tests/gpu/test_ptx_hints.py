"""Instructions of the PTX emulator that move no number: hints change nothing, addresses stay what they are."""

import numpy as np
import pytest

from python_tests.gpu.ptx.instructions.registry import DECODERS
from python_tests.gpu.ptx.snippets import evaluate, run

WORDS = np.random.default_rng(0).integers(0, 2**32, 32, dtype=np.uint32)
HINTS = {
    "membar": "membar.gl;",
    "fence": "fence.acq_rel.gpu;",
    "griddepcontrol": "griddepcontrol.wait;",
    "nanosleep": "nanosleep.u32 20;",
    "prefetch": "prefetch.global.L2 [%p0];",
    "discard": "discard.global.L2 [%p0], 128;",
    "applypriority": "applypriority.global.L2::evict_normal [%p0], 128;",
    "pragma": '.pragma "nounroll";',
    "createpolicy": "createpolicy.fractional.L2::evict_first.b64 %l0, 1.0;",
}
COPY = "shl.b64 %l1, %wide, 2; add.s64 %l2, %p0, %l1; add.s64 %l3, %p1, %l1;"


@pytest.mark.parametrize("name", HINTS)
def test_a_hint_changes_nothing(name):
    copied = np.zeros(32, np.uint32)
    run(f"{COPY}\nld.global.b32 %r0, [%l2];\n{HINTS[name]}\nst.global.b32 [%l3], %r0;", WORDS.copy(), copied)
    assert copied.tolist() == WORDS.tolist()


@pytest.mark.parametrize("name", HINTS)
def test_every_hint_is_an_instruction_that_the_emulator_has(name):
    assert name in DECODERS


def test_generic_addresses_are_those_of_global_memory():
    copied = np.zeros(32, np.uint32)
    there = "cvta.to.global.u64 %l4, %l2;\ncvta.global.u64 %l5, %l4;\nld.u32 %r0, [%l5];"
    run(f"{COPY}\n{there}\nst.global.b32 [%l3], %r0;", WORDS.copy(), copied)
    assert copied.tolist() == WORDS.tolist()


def test_a_uniform_load_reads_one_address_for_all():
    got = evaluate("ldu.global.b32 %d, [%p1];", "b32", ("b32", WORDS))
    assert got.tolist() == [WORDS[0]] * 32
