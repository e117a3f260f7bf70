"""compsparse_kernels.testing: the budget lets rounding pass and nothing else; inputs lie in memory as asked."""

import pytest
import torch

from compsparse_kernels.testing import (
    DTYPES,
    MEMORY_FORMS,
    assert_within_budget,
    budget_used,
    num_threads,
    random_mask,
    random_tensor,
    run_in_subprocess,
)


def products(dtype):
    """A product in dtype, in float32 and in float64, of the same numbers, and the magnitude of its terms."""
    a, b = random_tensor(20, 300, seed=1), random_tensor(300, 30, seed=2)
    ours, dense, exact = ((a.to(kind) @ b.to(kind)) for kind in (dtype, torch.float32, torch.float64))
    return ours, dense, exact, a.double().abs() @ b.double().abs()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_another_order_of_summation_is_within_the_budget(dtype):
    _, dense, exact, magnitude = products(dtype)
    a, b = random_tensor(20, 300, seed=1, dtype=dtype), random_tensor(300, 30, seed=2, dtype=dtype)
    other = sum(torch.outer(a[:, k], b[k]) for k in torch.randperm(300).tolist())
    assert_within_budget(other, dense, exact, "product", magnitude)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_magnitude", [False, True])
def test_what_is_more_than_rounding_is_not(dtype, with_magnitude):
    ours, dense, exact, magnitude = products(dtype)
    magnitude = magnitude if with_magnitude else None
    ours[3, 4] += 1e4 * torch.finfo(dtype).eps
    assert budget_used(ours, dense, exact, magnitude) > 1
    with pytest.raises(AssertionError, match=r"^product: error .* of the budget"):
        assert_within_budget(ours, dense, exact, "product", magnitude)


def test_half_as_precise_is_not():
    _, dense, exact, magnitude = products(torch.float64)
    assert budget_used(dense.double(), dense, exact, magnitude) > 1e6


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_are_not(bad):
    ours, dense, exact, magnitude = products(torch.float32)
    ours[0, 0] = bad
    assert budget_used(ours, dense, exact, magnitude) == float("inf")
    with pytest.raises(AssertionError, match="the reference itself is not finite"):
        assert_within_budget(dense, ours, exact, "product")


def test_other_shapes_and_nothing_at_all():
    ours, dense, exact, _ = products(torch.float32)
    with pytest.raises(AssertionError, match=r"^product: expected shape \[20, 30\], got \[1, 30\]"):
        assert_within_budget(ours[:1], dense, exact, "product")
    assert_within_budget(ours[:0], dense[:0], exact[:0], "nothing")
    zeros = torch.zeros(3)
    assert budget_used(zeros, zeros, zeros.double()) == 0
    assert budget_used(zeros + 1e-30, zeros, zeros.double()) == float("inf")


@pytest.mark.parametrize("memory", MEMORY_FORMS)
def test_inputs_lie_in_memory_as_asked(memory):
    tensor = random_tensor(4, 5, 6, memory=memory)
    assert tensor.shape == (4, 5, 6)
    strides = {"contiguous": (30, 6, 1), "transposed": (1, 4, 20), "strided": (65, 13, 2), "expanded": (0, 6, 1)}
    assert tensor.stride() == strides[memory]
    assert torch.equal(random_tensor(4, 5, 6, memory=memory, dtype=torch.float64), tensor.double())
    assert not torch.equal(random_tensor(4, 5, 6, memory=memory, seed=1), tensor)


def test_unknown_memory_form():
    with pytest.raises(ValueError, match=r"^memory: expected one of contiguous, .*, got 'dense'"):
        random_tensor(2, memory="dense")


def test_masks_have_about_their_density():
    assert random_mask(200, 200, density=0.1).double().mean().item() == pytest.approx(0.1, abs=0.01)


def test_threads_are_set_back():
    before = torch.get_num_threads()
    with num_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_subprocess_output_environment_and_failure():
    assert run_in_subprocess("print('here')") == "here\n"
    assert run_in_subprocess("import os; print(os.environ['COMPSPARSE_CPU'])", isa="scalar") == "scalar\n"
    with pytest.raises(AssertionError, match="import of csv halted"):
        run_in_subprocess("import csv", blocked=["csv"])
