"""block_sparse_linear and sampled_block_matmul in float16 and bfloat16 on the CPU: one rounding, at the end."""

import pytest
import torch

from compsparse_kernels import BlockLayout, block_sparse_linear, sampled_block_matmul
from compsparse_kernels.ops import cpu_isa
from compsparse_kernels.testing import HALVES, random_tensor
from python_tests.block_sparse import dense_linear, make_inputs, make_layout, ours_linear, output_and_gradients


def finite_numbers(dtype):
    """Every finite number of a half precision dtype, ``[512, 128]``."""
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(512, 128)
    return numbers.where(numbers.isfinite(), 0)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("block", [4, 8, 32])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision_is_rounded_once(dtype, block, transposed):
    """A product of two halves is exact in float32, so what comes out is that, rounded: ties, overflow, subnormals."""
    layout = BlockLayout.from_mask(torch.eye(128 // block, dtype=torch.bool), (block, block))
    layout = layout.T if transposed else layout
    scale = random_tensor(128, dtype=dtype) * 2
    values = layout.pack(torch.diag(scale))
    for x in (finite_numbers(dtype), finite_numbers(dtype)[7::79]):  # many rows, and few
        exact = x.float() * scale.float()
        ours, expected = block_sparse_linear(x, values, layout), exact.to(dtype)
        same = ours == expected
        if cpu_isa() == "avx512_bf16" and dtype == torch.bfloat16:  # its instruction takes subnormal numbers as 0
            tiny = torch.finfo(dtype).tiny
            same |= (ours == 0) & ((x.abs() < tiny) | (expected.abs() <= tiny))
        assert same.all()


@pytest.mark.parametrize("activation", ["gelu", "silu"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_fused_activation_is_that_of_the_sums_in_half_precision(dtype, activation):
    """Not of the rounded output: so the error is half a unit of the result, and a little of float32."""
    layout = make_layout(61, 90, (16, 8))
    for batch in (3, 37):
        x, values, bias, _ = make_inputs(layout, batch, dtype)
        ours = block_sparse_linear(x, values, layout, bias, activation).double()
        exact = dense_linear(layout, activation)(x.double(), values.double(), bias.double())
        half_a_unit = exact.abs() * torch.finfo(dtype).eps / 2
        # A sum of K terms errs by K roundings of their magnitudes at most, an activation by a few more.
        terms = dense_linear(layout)(x.double().abs(), values.double().abs(), bias.double().abs())
        in_float32 = (layout.in_features + 8) * torch.finfo(torch.float32).eps * terms
        assert bool(((ours - exact).abs() <= half_a_unit + in_float32).all())


@pytest.mark.parametrize("block_shape", [(8, 8), (16, 16), (3, 5), (7, 12), (32, 20)], ids=str)
@pytest.mark.parametrize("batch", [3, 21])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_nan_and_infinity_pass_through_half_precision(dtype, batch, block_shape):
    """They reach what dense torch lets them reach, and nothing else: not over the edge of an odd block or batch."""
    layout = BlockLayout.from_mask(torch.ones(3, 3, dtype=torch.bool), block_shape, 3 * block_shape[1] - 1)
    x, values, bias, grad = make_inputs(layout, batch, dtype)
    x[0, 0], x[1, -1] = float("nan"), float("inf")
    grad[-1, -1] = float("inf")
    results = output_and_gradients(ours_linear(layout), (x, values, bias), grad, dtype)
    expected = output_and_gradients(dense_linear(layout), (x, values, bias), grad, torch.float64)
    for ours, exact in zip(results, expected, strict=True):
        assert not exact.isfinite().all()
        torch.testing.assert_close(ours.isnan(), exact.isnan())
        torch.testing.assert_close(ours.isinf() * ours.sign(), (exact.isinf() * exact.sign()).to(dtype), equal_nan=True)


@pytest.mark.parametrize("batch", [3, 21])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision_may_begin_anywhere(dtype, batch):
    """A view that begins at an odd element is contiguous, but pairs of its numbers lie across words."""
    layout = make_layout(48, 64, (16, 16))
    inputs = make_inputs(layout, batch, dtype)
    shifted = [torch.cat([tensor.new_ones(1), tensor.flatten()])[1:].view(tensor.shape) for tensor in inputs]
    assert all(tensor.is_contiguous() and tensor.data_ptr() % 4 == 2 for tensor in shifted)
    results = output_and_gradients(ours_linear(layout), inputs[:3], inputs[3], dtype)
    others = [block_sparse_linear(*shifted[:2], layout, shifted[2])]
    others.append(block_sparse_linear(shifted[3], shifted[1], layout.T))
    others.append(sampled_block_matmul(shifted[3], shifted[0], layout))
    assert all(torch.equal(a, b) for a, b in zip(results, others, strict=False))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_shared_blocks_are_added_up_before_they_are_rounded_to_half_precision(dtype):
    """300 entries of one slot: a running sum in half precision would stop growing at 256 of bfloat16's units."""
    layout = BlockLayout.from_entries(*[torch.arange(300)] * 2, (2, 2), 600, 600, slot=torch.zeros(300).long())
    ones = torch.ones(1, 600, dtype=dtype)
    assert torch.equal(sampled_block_matmul(ones, ones, layout), torch.full((1, 2, 2), 300.0).to(dtype))
