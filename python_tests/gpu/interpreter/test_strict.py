"""strict(): each check lets a right kernel pass and catches one that is wrong in just that way."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from python_tests.gpu.interpreter.faults import KernelFault
from python_tests.gpu.interpreter.rounding import from_bf16, to_bf16, to_tf32
from python_tests.gpu.interpreter.strict import strict


def assert_faults(kind, launch, **flags):
    with strict(**flags), pytest.raises(KernelFault) as caught:
        launch()
    assert caught.value.kind == kind
    return str(caught.value)


@triton.jit
def copy_kernel(source, target, size, SIDE: tl.constexpr, MASK_LOAD: tl.constexpr, MASK_STORE: tl.constexpr):
    lane = tl.program_id(0) * SIDE + tl.arange(0, SIDE)
    inside = lane < size
    numbers = tl.load(source + lane, mask=inside, other=0.0) if MASK_LOAD else tl.load(source + lane)
    if MASK_STORE:
        tl.store(target + lane, numbers, mask=inside)
    else:
        tl.store(target + lane, numbers)


def copy(source, target, size=None, load=True, store=True):
    copy_kernel[(triton.cdiv(len(source), 8),)](source, target, size or len(source), 8, load, store)


def test_a_right_kernel_passes():
    source, target = torch.arange(21.0), torch.zeros(21)
    with strict():
        copy(source, target)
    assert torch.equal(source, target)


@pytest.mark.parametrize("missing", ["load", "store"])
def test_bounds_without_a_mask(missing):
    message = assert_faults("bounds", lambda: copy(torch.ones(21), torch.ones(21), **{missing: False}))
    assert f"3 lane(s) of a {missing} by program (2, 0, 0) out of bounds" in message
    assert "84 bytes from the start of a tensor of 84 bytes" in message


def test_bounds_are_those_of_the_view():
    storage = torch.zeros(32)
    assert_faults("bounds", lambda: copy(torch.ones(21), storage[:20]))


def test_bounds_are_those_of_the_tensor_that_the_pointer_came_from():
    storage = torch.zeros(40)
    assert_faults("bounds", lambda: copy(storage[:20], storage[20:], load=False))


def test_bounds_before_the_first_tensor():
    @triton.jit
    def backward(target):
        tl.store(target - 1, 1.0)

    assert "first is -4 bytes" in assert_faults("bounds", lambda: backward[(1,)](torch.zeros(64)[32:]))


def test_bounds_of_nothing():
    assert_faults("bounds", lambda: copy_kernel[(1,)](torch.zeros(0), torch.zeros(0), 1, 8, True, True))


@triton.jit
def pair_kernel(whole, part, target):
    tl.store(target, tl.load(whole + 39) + tl.load(part))


def test_views_that_overlap_are_both_allowed():
    storage, target = torch.arange(40.0), torch.zeros(1)
    with strict():
        pair_kernel[(1,)](storage, storage[8:16], target)
    assert target.item() == 39 + 8


def test_misaligned():
    @triton.jit
    def odd(target):
        tl.store((target.to(tl.int64) + 2).to(tl.pointer_type(tl.float32)), 1.0)

    assert_faults("misaligned", lambda: odd[(1,)](torch.zeros(4)))


@triton.jit
def poisoned_kernel(source, target, SIDE: tl.constexpr, OTHER: tl.constexpr):
    lane = tl.arange(0, SIDE)
    numbers = tl.load(source + lane, mask=lane < 5, other=0) if OTHER else tl.load(source + lane, mask=lane < 5)
    tl.store(target + lane, numbers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_masked_lanes_are_nan(dtype):
    target = torch.zeros(8, dtype=dtype)
    with strict():
        poisoned_kernel[(1,)](torch.ones(5, dtype=dtype), target, 8, False)
    assert target.isnan().tolist() == [False] * 5 + [True] * 3


def test_masked_lanes_are_huge_integers():
    target = torch.zeros(8, dtype=torch.int32)
    with strict():
        poisoned_kernel[(1,)](torch.ones(5, dtype=torch.int32), target, 8, False)
    assert (target[5:] > 2**28).all() and (target[:5] == 1).all()


def test_other_is_respected():
    target = torch.ones(8)
    with strict():
        poisoned_kernel[(1,)](torch.ones(5), target, 8, True)
    assert target.tolist() == [1] * 5 + [0] * 3


@triton.jit
def scalar_kernel(source, target, size):
    tl.store(target, tl.load(source, mask=size > 5, other=0))
    tl.store(target + 1, tl.load(source, mask=size > 5, other=3))
    tl.store(target + 2, tl.load(source, mask=size > 5))


def test_other_of_a_scalar_is_respected():
    target = torch.zeros(3)
    with strict():
        scalar_kernel[(1,)](torch.zeros(0), target, 2)
    assert target[:2].tolist() == [0, 3] and target[2].isnan()


@triton.jit
def shared_store_kernel(target):
    tl.store(target, 1.0)


@triton.jit
def neighbour_kernel(target, programs):
    """Each program writes its own place and reads its neighbour's."""
    pid = tl.program_id(0)
    neighbour = tl.load(target + (pid + 1) % programs)
    tl.store(target + pid, neighbour)


@triton.jit
def atomic_kernel(target, READ: tl.constexpr):
    tl.atomic_add(target, 1.0)
    if READ:
        tl.store(target + 1 + tl.program_id(0), tl.load(target))


@triton.jit
def widths_kernel(wide, narrow):
    """Program 0 writes eight bytes, program 1 the last two of them."""
    if tl.program_id(0) == 0:
        tl.store(wide, 1)
    else:
        tl.store(narrow + 3, 1)


@triton.jit
def lanes_kernel(target, DISTINCT: tl.constexpr):
    lane = tl.arange(0, 8)
    tl.store(target + lane // 2, lane if DISTINCT else lane // 2)


def test_race_of_two_stores():
    message = assert_faults("race", lambda: shared_store_kernel[(2,)](torch.zeros(1)))
    assert "programs (0, 0, 0) and (1, 0, 0) touch one address, by store and store" in message


def test_race_of_a_store_and_a_load():
    assert "by store and load" in assert_faults("race", lambda: neighbour_kernel[(3,)](torch.zeros(3), 3))


def test_a_program_does_not_race_with_itself():
    with strict():
        neighbour_kernel[(1,)](torch.zeros(1), 1)


def test_atomics_do_not_race_with_each_other_but_with_loads():
    target = torch.zeros(1)
    with strict():
        atomic_kernel[(5,)](target, False)
    assert target.item() == 5
    assert "by atomic and load" in assert_faults("race", lambda: atomic_kernel[(2,)](torch.zeros(3), True))


def test_race_of_elements_of_different_size():
    storage = torch.zeros(1, dtype=torch.int64)
    assert_faults("race", lambda: widths_kernel[(2,)](storage, storage.view(torch.int16)))


def test_race_of_two_lanes_of_one_store():
    with strict():
        lanes_kernel[(1,)](torch.zeros(4, dtype=torch.int32), False)
    assert "two lanes" in assert_faults("race", lambda: lanes_kernel[(1,)](torch.zeros(4, dtype=torch.int32), True))


def test_races_can_be_left_out():
    with strict(races=False):
        shared_store_kernel[(2,)](torch.zeros(1))
        lanes_kernel[(1,)](torch.zeros(4, dtype=torch.int32), True)


@triton.jit
def last_kernel(target):
    tl.store(target, tl.program_id(0) * 100 + tl.program_id(1))


def test_order_is_shuffled_and_every_program_runs_once():
    def last(seed):
        target = torch.zeros(1, dtype=torch.int32)
        with strict(seed, races=False):
            last_kernel[(4, 3)](target)
        return target.item()

    @triton.jit
    def count_kernel(counts):
        tl.atomic_add(counts + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), 1)

    counts = torch.zeros(12, dtype=torch.int32)
    with strict():
        count_kernel[(4, 3)](counts)
    assert counts.tolist() == [1] * 12
    assert last(1) == last(1)
    assert len({last(seed) for seed in range(8)}) > 3


def test_first_program():
    target = torch.zeros(1, dtype=torch.int32)
    with strict(first_program=41, races=False):
        last_kernel[(1, 1)](target)
    assert target.item() == 4100


@triton.jit
def product_kernel(a, b, c, SIDE: tl.constexpr, TERMS: tl.constexpr, PRECISION: tl.constexpr):
    i, k = tl.arange(0, SIDE), tl.arange(0, TERMS)
    left = tl.load(a + i[:, None] * TERMS + k[None, :])
    right = tl.load(b + k[:, None] * SIDE + i[None, :])
    tl.store(c + i[:, None] * SIDE + i[None, :], tl.dot(left, right, input_precision=PRECISION))


def product(dtype=torch.float32, terms=16, precision="tf32", **flags):
    """(interpreted product, its inputs)"""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(16, terms, generator=generator), torch.randn(terms, 16, generator=generator)
    a, b, c = a.to(dtype), b.to(dtype), torch.zeros(16, 16)
    with strict(**flags):
        product_kernel[(1,)](a, b, c, 16, terms, precision)
    return c, a, b


def largest_error(result, a, b):
    return float((result.double() - a.double() @ b.double()).abs().max())


def test_tf32_rounds_its_inputs():
    rounded = product()
    assert largest_error(*rounded) > 2**-12
    assert largest_error(rounded[0], *(torch.from_numpy(to_tf32(part.numpy())) for part in rounded[1:])) < 1e-5
    assert largest_error(*product(tf32=False)) < 1e-5
    assert largest_error(*product(precision="ieee")) < 1e-5
    assert largest_error(*product(precision="tf32x3")) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_products_are_summed_in_float32(dtype):
    assert largest_error(*product(dtype, terms=64)) < 2e-5


@pytest.mark.parametrize("dtype,least", [(torch.float32, 8), (torch.float16, 16), (torch.bfloat16, 16)])
def test_dot_over_too_few_terms(dtype, least):
    product(dtype, terms=least)
    with pytest.raises(KernelFault, match=f"over {least // 2} terms of .*, a GPU needs {least}") as caught:
        product(dtype, terms=least // 2)
    assert caught.value.kind == "dot"


@triton.jit
def offset_kernel(target, row, stride, WIDE: tl.constexpr):
    tl.store(target + (row.to(tl.int64) if WIDE else row) * stride % 7, 1.0)


def test_overflow_of_int32():
    with strict():
        offset_kernel[(1,)](torch.zeros(7), 70_000, 70_000, True)
    message = assert_faults("overflow", lambda: offset_kernel[(1,)](torch.zeros(7), 70_000, 70_000, False))
    assert "int32 overflow detected for operation mul, program (0, 0, 0)" in message


def test_overflow_can_be_left_out():
    with strict(overflow=False):
        offset_kernel[(1,)](torch.zeros(7), 2**16, 2**16, False)


@triton.jit
def add_one(numbers):
    return numbers + 2_147_483_647


@triton.jit
def nested_kernel(target):
    tl.store(target, add_one(tl.program_id(0) + 1))


def test_faults_come_out_of_inner_functions():
    assert_faults("overflow", lambda: nested_kernel[(1,)](torch.zeros(1, dtype=torch.int32)))


@triton.jit
def bf16_kernel(a, b, results, SIDE: tl.constexpr):
    lane = tl.arange(0, SIDE)
    x, y = tl.load(a + lane), tl.load(b + lane)
    tl.store(results + lane, x + y)
    tl.store(results + SIDE + lane, x * y)
    tl.store(results + 2 * SIDE + lane, -x)
    tl.store(results + 3 * SIDE + lane, tl.where(x < y, x, y))
    tl.store(results + 4 * SIDE + lane, (x.to(tl.float32) / 3).to(tl.bfloat16))
    tl.store(results + 5 * SIDE + lane, x.to(tl.float16).to(tl.bfloat16))


def test_bf16_arithmetic_is_that_of_torch():
    a, b = (torch.randn(256, generator=torch.Generator().manual_seed(seed)).bfloat16() for seed in (1, 2))
    results = torch.zeros(6, 256, dtype=torch.bfloat16)
    with strict():
        bf16_kernel[(1,)](a, b, results, 256)
    exact = [a + b, a * b, -a, torch.minimum(a, b), (a.float() / 3).bfloat16(), a.half().bfloat16()]
    for result, wanted in zip(results, exact, strict=True):
        assert torch.equal(result, wanted)


def test_to_bf16_is_torch():
    generator = np.random.default_rng(0)
    bits = generator.integers(0, 2**32, 100_000, dtype=np.uint64).astype(np.uint32)
    ties = (bits & np.uint32(0xFFFF0000)) | np.uint32(0x8000)
    special = np.array([0, -0.0, np.inf, -np.inf, 3.4e38, 1e-45], np.float32)
    numbers = np.concatenate([bits.view(np.float32), ties.view(np.float32), special])
    ours, theirs = torch.from_numpy(from_bf16(to_bf16(numbers))), torch.from_numpy(numbers).bfloat16().float()
    assert torch.equal(ours.nan_to_num(7), theirs.nan_to_num(7))
    assert torch.equal(ours.isnan(), theirs.isnan())


def test_to_tf32_is_the_nearest_with_ten_bits():
    numbers = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    mantissa, exponent = np.frexp(numbers.astype(np.float64))
    nearest = np.ldexp(np.rint(mantissa * 2**11), exponent - 11)  # rint rounds ties to even
    assert np.array_equal(to_tf32(numbers), nearest.astype(np.float32))
    special = np.array([np.inf, -np.inf, np.nan, 0], np.float32)
    assert np.array_equal(to_tf32(special), special, equal_nan=True)


def test_the_interpreter_is_itself_again_afterwards():
    with pytest.raises(RuntimeError, match="on purpose"), strict():
        raise RuntimeError("on purpose")
    shared_store_kernel[(2,)](torch.zeros(1))
    source, target = torch.ones(8), torch.zeros(16)
    copy_kernel[(1,)](source, target[:4], 8, 8, True, True)
    assert target.sum() == 8
