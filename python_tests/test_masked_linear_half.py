"""masked_linear and sampled_matmul in float16 and bfloat16 on the CPU: sums in float32, one rounding, at the end."""

import pytest
import torch

from compsparse_kernels import MaskLayout, masked_linear, sampled_matmul
from compsparse_kernels.testing import HALVES, random_tensor
from python_tests.masked import dense_linear, make_inputs, make_layout, ours_linear, output_and_gradients


def finite_numbers(dtype):
    """Every finite number of a half precision dtype, ``[512, 128]``; each row goes through all exponents."""
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(128, 512).mT
    return numbers.where(numbers.isfinite(), 0)


@pytest.mark.parametrize("step", [1, 79, 512], ids=["512 rows", "7 rows", "1 row"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_product_of_two_is_rounded_once(dtype, transposed, step):
    """It is exact in float32, so what comes out is that, rounded: ties, overflow, subnormal numbers."""
    layout = MaskLayout.from_mask(torch.eye(128, dtype=torch.bool), "csr")
    layout = layout.T if transposed else layout
    scale = random_tensor(128, dtype=dtype) * 2
    x = finite_numbers(dtype)[7::step]
    exact = x.float() * scale.float()
    assert torch.equal(masked_linear(x, scale, layout), exact.to(dtype))
    if len(x) == 1:
        assert torch.equal(sampled_matmul(x, scale[None], layout), exact[0].to(dtype))


@pytest.mark.parametrize("batch", [1, 3, 37, 200])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_sum_is_rounded_once(dtype, batch):
    """Half a unit of the result, and a sum of K terms in float32: K roundings of their magnitudes at most."""
    layout = make_layout(61, 90)
    x, values, bias, grad = (tensor.to(dtype) for tensor in make_inputs(layout, batch))
    results = output_and_gradients(ours_linear(layout), (x, values, bias), grad, dtype)[:3]
    results.append(sampled_matmul(grad, x, layout))
    linear, terms = dense_linear(layout), max(batch, *grad.shape, *x.shape) + 1
    exact = output_and_gradients(linear, (x, values, bias), grad, torch.float64)
    sizes = output_and_gradients(linear, [tensor.abs() for tensor in (x, values, bias)], grad.abs(), torch.float64)
    for ours, wanted, size in zip(results, (*exact[:3], exact[2]), (*sizes[:3], sizes[2]), strict=True):
        half_a_unit = wanted.abs() * torch.finfo(dtype).eps / 2
        in_float32 = terms * torch.finfo(torch.float32).eps * size
        assert bool(((ours.double() - wanted).abs() <= half_a_unit + in_float32).all())


@pytest.mark.parametrize("batch", [1, 3, 40])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_nan_and_infinity_pass_through(dtype, batch):
    """They reach what dense torch lets them reach, and nothing else: not over the edge of a ragged panel."""
    layout = MaskLayout.from_mask(torch.ones(19, 21, dtype=torch.bool), "csr")
    x, values, bias, grad = make_inputs(layout, batch, dtype)
    x[0, 0], x[-1, -1] = float("nan"), float("inf")
    grad[-1, -1] = float("inf")
    results = output_and_gradients(ours_linear(layout), (x, values, bias), grad, dtype)
    expected = output_and_gradients(dense_linear(layout), (x, values, bias), grad, torch.float64)
    for ours, exact in zip(results, expected, strict=True):
        assert not exact.isfinite().all()
        torch.testing.assert_close(ours.isnan(), exact.isnan())
        torch.testing.assert_close(ours.isinf() * ours.sign(), (exact.isinf() * exact.sign()).to(dtype), equal_nan=True)


@pytest.mark.parametrize("batch", [1, 3, 40])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_numbers_may_begin_anywhere(dtype, batch):
    """A view that begins at an odd element is contiguous, but lies across words."""
    layout = make_layout(48, 64)
    inputs = make_inputs(layout, batch, dtype)
    shifted = [torch.cat([tensor.new_ones(1), tensor.flatten()])[1:].view(tensor.shape) for tensor in inputs]
    assert all(tensor.is_contiguous() and tensor.data_ptr() % 4 == 2 for tensor in shifted)
    results = output_and_gradients(ours_linear(layout), inputs[:3], inputs[3], dtype)
    others = [masked_linear(*shifted[:2], layout, shifted[2])]
    others.append(masked_linear(shifted[3], shifted[1], layout.T))
    others.append(sampled_matmul(shifted[3], shifted[0], layout))
    assert all(torch.equal(a, b) for a, b in zip(results, others, strict=False))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_panels_are_added_up_before_they_are_rounded(dtype):
    """A running sum in half precision would stop growing at 2048 (float16) or 256 (bfloat16)."""
    layout = MaskLayout.from_mask(torch.eye(5, dtype=torch.bool), "csr")
    ones = torch.ones(4096, 5, dtype=dtype)
    assert torch.equal(sampled_matmul(ones, ones, layout), torch.full((5,), 4096.0).to(dtype))
    wide = MaskLayout.from_mask(torch.ones(1, 4096, dtype=torch.bool), "csr")
    ones = torch.ones(3, 4096, dtype=dtype)
    assert torch.equal(masked_linear(ones, ones[0], wide), torch.full((3, 1), 4096.0).to(dtype))
