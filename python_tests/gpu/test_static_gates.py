"""Each gate is shut by a kernel that deserves it, and open for one that is good."""

from collections import Counter
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from python_tests.gpu.aot import TARGETS, compile_launch
from python_tests.gpu.static.analyse import analyse
from python_tests.gpu.static.gates import violations
from python_tests.gpu.static.occupancy import Occupancy


@triton.jit
def product(a, b, c, idx, depth, stride, SIDE: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr):
    """c = a b, of one tile; the rows of b are found by ``idx``, as in a sparse row."""
    rows = tl.arange(0, SIDE)
    steps = tl.arange(0, STEP)
    acc = tl.zeros((SIDE, SIDE), tl.float32)
    for start in range(0, depth, STEP):
        first = tl.load(idx + start)
        left = tl.load(a + rows[:, None] * stride + start + steps[None, :])
        right = tl.load(b + (first * STEP + steps)[:, None] * stride + rows[None, :])
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
    tl.store(c + rows[:, None] * stride + rows[None, :], acc.to(c.dtype.element_ty))


@cache
def analysed(target="sm_80", side=64, stride=256, dtype=torch.float16, num_warps=4):
    arguments = {
        "a": torch.empty(256 * stride, dtype=dtype),
        "b": torch.empty(256 * stride, dtype=dtype),
        "c": torch.empty(256 * stride, dtype=dtype),
        "idx": torch.empty(256, dtype=torch.int32),
        "depth": 256,
        "stride": stride,
        "SIDE": side,
        "STEP": 32,
        "PRECISION": "ieee",
    }
    launch = SimpleNamespace(kernel=SimpleNamespace(fn=product), arguments=arguments, programs=1)
    return analyse(compile_launch(launch, triton.Config({}, num_warps=num_warps, num_stages=3), target), target)


@pytest.mark.parametrize("target", TARGETS)
def test_a_good_kernel_passes(target):
    assert violations(analysed(target), least_occupancy=0.1) == []


@pytest.mark.parametrize("target", TARGETS)
def test_what_was_analysed(target):
    found = analysed(target)
    assert found.kernel == "product"
    assert found.inner["tensor core"] > 0
    assert 0 < found.inner_instructions < found.instructions
    assert found.shared >= 2 * 32 * 64 * 2  # at least one tile of each operand
    assert found.occupancy.blocks > 0
    assert found.total["tensor core"] >= found.inner["tensor core"]


def test_a_target_that_is_unknown_is_an_error():
    with pytest.raises(ValueError, match=r"target: expected one of sm_80, .*, got 'sm_70'"):
        analyse(None, "sm_70")


def test_one_warp_with_a_large_accumulator_spills():
    """128 x 128 float32 in 32 lanes are 512 registers, of 255."""
    failed = violations(analysed(side=128, num_warps=1))
    assert any(sentence.startswith("stack: expected 0 bytes a thread, got ") for sentence in failed)
    assert any(sentence.startswith("spills: expected none, got ") for sentence in failed)


@pytest.mark.parametrize("target", TARGETS)
def test_products_without_tensor_cores(target):
    """Exact float32 products have none. gfx942's matrix cores do have them."""
    exact = analysed(target, side=32, dtype=torch.float32)
    failed = [sentence for sentence in violations(exact) if sentence.startswith("tensor cores")]
    assert failed == (
        [] if target == "gfx942" else ["tensor cores: expected their instructions in the inner loop, got none"]
    )
    assert not any(sentence.startswith("tensor cores") for sentence in violations(exact, tensor_cores=False))


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_rows_that_are_not_known_to_be_aligned_cannot_be_copied_asynchronously(target):
    failed = violations(analysed(target, stride=257))
    assert "async copies: expected some of 16 bytes a lane in the inner loop, got none" in failed
    assert any(sentence.startswith("global loads: expected no operand tile loaded") for sentence in failed)
    assert violations(analysed(target, stride=257), async_copies=False) == []


def test_more_narrow_loads_than_indices():
    """As where an operand tile is loaded 4 bytes a lane."""
    good = analysed()
    loop = good.inner_loop
    load = replace(loop.instructions[0], mnemonic="LDG.E")
    many = replace(loop, instructions=loop.instructions + (load,) * 5)
    many = replace(good, inner_loop=many, inner=good.inner + Counter({"global load": 5}))
    present = good.inner["global load"]
    failed = violations(many)
    assert failed == [f"global loads: expected at most 4 of indices in the inner loop, got {5 + present}"]
    assert violations(many, index_loads=5 + present) == []


def test_operand_tiles_in_registers():
    unaligned = analysed(stride=257)
    loads = unaligned.inner["global load"]
    found = [sentence for sentence in violations(unaligned, tile_loads=1) if "operand tile" in sentence]
    assert len(found) == 1 and found[0].startswith("global loads: expected at most 1 operand tile loaded")
    assert not any("operand tile" in sentence for sentence in violations(unaligned, tile_loads=loads))


def test_too_few_warps():
    crowded = replace(analysed(), occupancy=Occupancy(0.0625, "registers", 1))
    assert violations(crowded, least_occupancy=0.125) == [
        "occupancy: expected at least 0.125, got 0.062, limited by registers"
    ]


def test_a_block_that_does_not_fit():
    large = replace(analysed(), occupancy=Occupancy(0.0, "shared memory of a block", 0))
    assert violations(large) == [
        "blocks: expected at least one to fit on a multiprocessor, got none, limited by shared memory of a block"
    ]


def test_no_loop():
    without = replace(analysed(), inner_loop=None)
    assert violations(without) == ["inner loop: expected one, got none"]
    assert violations(without, inner_loop=False) == []
    spilled = replace(without, spills=8)
    assert violations(spilled, inner_loop=False) == ["spills: expected none, got 8"]


def test_scalars_that_are_parked_in_vector_registers():
    parked = replace(analysed(), spills=8, scalar_spills=8)
    assert violations(parked) == ["spills: expected none, got 8"]
    assert violations(parked, spilled_scalars=8) == []
    assert violations(parked, spilled_scalars=7) == ["spills: expected none, got 8"]
    assert violations(replace(parked, spills=9), spilled_scalars=64) == ["spills: expected none, got 9"]
