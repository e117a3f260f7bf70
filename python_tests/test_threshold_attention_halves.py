"""Thresholded attention in float16 and bfloat16: summed in float32, rounded once."""

import pytest
import torch

from compsparse_kernels import threshold_attention
from compsparse_kernels.testing import HALVES, attention_inputs
from python_tests.attention import CHOICE_NAMES, CHOICES, LEARNABLE, choice_options, dense_errors, run, whole_inputs

SCALE = 0.375  # whole_inputs
every_choice = pytest.mark.parametrize("choice", CHOICES, ids=CHOICE_NAMES)
every_half = pytest.mark.parametrize("dtype", HALVES)


@every_choice
@every_half
def test_rounded_once(choice, dtype):
    """Each element is off by at most half a unit in its last place, and by what the budget of float32 allows."""
    tensors = whole_inputs(2, 4, 33, 70, 20, dtype=dtype, kv_heads=2)
    bias = (torch.randn(4, 1, 70, generator=torch.Generator().manual_seed(1)).round() * SCALE).to(dtype)
    thresholds = torch.tensor([0.1123, 0.2123, 0.3123, 0.4123]) if choice in LEARNABLE else None
    options = choice_options(choice) | {"scale": SCALE, "enable_gqa": True}
    if thresholds is not None:
        del options["threshold"]
    out, support, grads = run(tensors, bias, thresholds, **options)
    wide = [tensor.double() for tensor in tensors]
    exact, exact_support, exact_grads = run(wide, bias.double(), thresholds, backend="reference", **options)
    mask = exact_support.to_mask()
    assert torch.equal(support.to_mask(), mask) and support.weights.dtype == support.log_sum.dtype == torch.float32
    narrow = [tensor.float() for tensor in tensors]
    out_error, _, *errors = dense_errors(narrow, mask, bias, thresholds, **options)
    roundoff = torch.finfo(dtype).eps / 2
    results = zip((out, *grads), (exact, *exact_grads), (out_error, *errors), strict=True)
    for place, (ours, truth, error) in enumerate(results):
        assert ours.dtype == (torch.float32 if place == 5 else dtype)  # thresholds are float32 themselves
        single = 2 * error + torch.finfo(torch.float32).eps * truth.abs().max()
        least = torch.finfo(dtype).smallest_normal * roundoff  # below the normal numbers steps stay as they are
        assert ((ours.double() - truth).abs() <= roundoff * truth.abs() + 2 * single + least).all(), place


@every_half
def test_scores_beyond_the_range_of_float16(dtype):
    query, key, value = (tensor.to(dtype) for tensor in attention_inputs(1, 2, 9, 30, 16))
    query, key = query * 100, key * 100
    assert (query.float() @ key.float().mT).abs().max() > 70000
    out, support = threshold_attention(query, key, value, threshold=0.5, return_support=True)
    assert out.isfinite().all()
    _, exact = threshold_attention(query.double(), key.double(), value.double(), threshold=0.5, return_support=True)
    assert torch.equal(support.to_mask(), exact.to_mask())


@every_half
def test_half_steps_would_decide_otherwise(dtype):
    """Two scores that are equal in half precision are told apart in float32."""
    query = torch.ones(1, 1, 1, 2, dtype=dtype)
    key = torch.tensor([[64.0, 0.0], [64.0, -(2.0**-8)], [64.0, -0.5]], dtype=dtype)[None, None]
    assert (query @ key.mT).unique().numel() < 3
    options = {"threshold": 1.0, "scale": 1.0, "return_support": True}
    _, support = threshold_attention(query, key, key, **options)
    assert support.col_idx.tolist() == [0]
    _, support = threshold_attention(query, key, key, **(options | {"threshold": 0.9}))
    assert support.col_idx.tolist() == [0, 1]


@every_half
def test_bool_bias_and_padding(dtype):
    tensors = [tensor.to(dtype) for tensor in attention_inputs(2, 2, 9, 30, 8)]
    generator = torch.Generator().manual_seed(0)
    bias, padding = torch.rand(9, 30, generator=generator) > 0.3, torch.rand(2, 30, generator=generator) > 0.7
    options = {"threshold": 0.01, "attn_bias": bias, "key_padding_mask": padding}
    wide = threshold_attention(*(tensor.float() for tensor in tensors), **options)
    ours = threshold_attention(*tensors, **options)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, wide.to(dtype))


@pytest.mark.parametrize("which", ["query", "key", "value"])
@every_half
def test_any_strides(which, dtype):
    """Widening to float32 keeps strides, also those of a transposed last dimension."""
    tensors = attention_inputs(1, 2, 9, 9, 16, dtype=dtype)
    place = ("query", "key", "value").index(which)
    expected, _, expected_grads = run(tensors, threshold=0.1)
    strided = list(tensors)
    strided[place] = tensors[place].mT.contiguous().mT
    assert strided[place].stride(-1) != 1
    out, _, grads = run(strided, threshold=0.1)
    assert torch.equal(out, expected)
    assert all(map(torch.equal, grads, expected_grads))
