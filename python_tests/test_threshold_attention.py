"""Thresholded attention against its float64 reference: outputs, supports, gradients, threads, instruction sets."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from compsparse_kernels import threshold_attention
from compsparse_kernels.ops.backends import cpu_isa
from compsparse_kernels.testing import attention_inputs
from python_tests.attention import NO_KERNELS, check, run

RULES = [("relative", 0.05), ("relative", 0.5), ("relative", 1.0), ("absolute", 0.5)]
DTYPES = [torch.float32, torch.float64]
needs_kernels = pytest.mark.skipif(NO_KERNELS is not None, reason=str(NO_KERNELS))
ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rule", "threshold"), RULES)
@pytest.mark.parametrize("causal", [False, True])
def test_matches_reference(dtype, rule, threshold, causal):
    support = check(attention_inputs(2, 3, 33, 33, 20, dtype=dtype), threshold=threshold, rule=rule, is_causal=causal)
    assert support.density < 0.9


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 8, 20, 64, 96, 256])
def test_widths(width, dtype):
    check(attention_inputs(1, 2, 33, 130, width, value_width=width + 3, dtype=dtype), threshold=0.1)
    check(attention_inputs(1, 2, 7, 33, 16, value_width=width, dtype=dtype), threshold=0.1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 7, 33, 130])
@pytest.mark.parametrize("causal", [False, True])
def test_lengths(tokens, dtype, causal):
    check(attention_inputs(2, 2, tokens, tokens, 8, dtype=dtype), threshold=0.1, is_causal=causal)


@pytest.mark.parametrize(("queries", "keys"), [(1, 130), (130, 1), (33, 70), (70, 33), (25, 2500)])
@pytest.mark.parametrize("causal", [False, True])
def test_cross_attention(queries, keys, causal):
    check(attention_inputs(1, 2, queries, keys, 16), threshold=0.1, is_causal=causal)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (6, 1), (4, 4)])
def test_grouped_queries(heads, kv_heads):
    check(attention_inputs(2, heads, 33, 40, 16, kv_heads=kv_heads), threshold=0.1, enable_gqa=True)


@pytest.mark.parametrize(
    "shape", [(2, 4, 33, 40), (1, 4, 33, 40), (4, 1, 40), (33, 1), (40,), (2, 1, 1, 40), (1, 4, 1, 40)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_float_bias(shape, dtype):
    bias = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    tensors = attention_inputs(2, 4, 33, 40, 16, dtype=dtype)
    check(tensors, bias, threshold=0.1)
    check(tensors, bias, threshold=0.5, rule="absolute", is_causal=True)


def test_one_bias_for_all():
    """Its gradient is zero in exact arithmetic, and the sum of many numbers that are not."""
    bias = torch.zeros(1, requires_grad=True)
    out = threshold_attention(*attention_inputs(2, 4, 33, 40, 16), threshold=0.1, attn_bias=bias)
    assert torch.autograd.grad(out.square().sum(), bias)[0].abs() < 1e-4


@pytest.mark.parametrize("shape", [(2, 4, 33, 40), (33, 40), (2, 1, 1, 40)])
def test_bool_bias(shape):
    bias = torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.3
    support = check(attention_inputs(2, 4, 33, 40, 16), bias, threshold=0.1)
    assert not (support.to_mask() & ~bias).any()


def test_bias_of_negative_infinity_hides_keys():
    bias = torch.zeros(33, 40).masked_fill(torch.rand(33, 40) > 0.5, -torch.inf)
    tensors = attention_inputs(1, 2, 33, 40, 16)
    out = threshold_attention(*tensors, threshold=0.1, attn_bias=bias)
    assert torch.equal(out, threshold_attention(*tensors, threshold=0.1, attn_bias=bias == 0))


def test_bias_is_read_through_strides():
    wide = torch.randn(40, 2, 33).permute(1, 2, 0)  # [heads, queries, keys], keys at a stride
    check(attention_inputs(2, 2, 33, 40, 16), wide, threshold=0.1)
    check(attention_inputs(2, 2, 33, 40, 16), wide[:, ::2].repeat_interleave(2, 1)[:, :33] > 0, threshold=0.1)


def test_padding():
    padding = torch.rand(3, 40, generator=torch.Generator().manual_seed(1)) > 0.5
    support = check(attention_inputs(3, 2, 33, 40, 16), threshold=0.1, key_padding_mask=padding)
    assert not (support.to_mask() & padding[:, None, None, :]).any()
    check(attention_inputs(3, 2, 33, 40, 16), threshold=0.1, key_padding_mask=padding, is_causal=True)


@pytest.mark.parametrize("keys", [20, 300, 3000])
def test_padded_keys_may_hold_anything(keys):
    query, key, value = attention_inputs(1, 2, 33, keys, 8)
    padding = torch.arange(keys)[None] >= keys - 5
    few, all_there = {"threshold": 0.9, "key_padding_mask": padding}, {"threshold": 1e-30, "key_padding_mask": padding}
    key[:, :, -5:], value[:, :, -5:] = 0, 0
    inputs = [tensor.clone() for tensor in (query, key, value)]
    key[:, :, -5:], value[:, :, -5:] = torch.nan, torch.nan
    assert torch.equal(threshold_attention(query, key, value, **few), threshold_attention(*inputs, **few))
    queries, many = query[:, :, :3], {"threshold": 0.1, "key_padding_mask": padding}  # queries too few for tiles
    assert torch.equal(
        threshold_attention(queries, key, value, **many), threshold_attention(queries, *inputs[1:], **many)
    )
    # By tiles, which add up all values, only where these are finite: equal to rounding.
    dense = threshold_attention(*inputs, **all_there)
    torch.testing.assert_close(threshold_attention(query, key, value, **all_there), dense)


def test_scale():
    check(attention_inputs(1, 2, 33, 40, 16), threshold=0.1, scale=0.7)
    check(attention_inputs(1, 2, 33, 40, 16), threshold=0.1, scale=-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_everything_kept_is_plain_attention(dtype):
    tensors = attention_inputs(2, 2, 33, 70, 16, dtype=dtype, grad=True)
    out, support = threshold_attention(*tensors, threshold=1e-300, return_support=True)
    assert support.density == 1
    torch.testing.assert_close(out, F.scaled_dot_product_attention(*tensors))


@given(
    batch=st.integers(1, 3),
    group=st.integers(1, 3),
    kv_heads=st.integers(1, 2),
    queries=st.integers(0, 60),
    keys=st.integers(1, 150),
    width=st.integers(1, 40),
    value_width=st.integers(1, 40),
    causal=st.booleans(),
    choice=st.sampled_from(RULES),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
@settings(max_examples=30, deadline=None)
def test_any_shape(batch, group, kv_heads, queries, keys, width, value_width, causal, choice, dtype, seed):
    tensors = attention_inputs(batch, group * kv_heads, queries, keys, width, value_width, kv_heads, dtype, seed)
    options = {"rule": choice[0], "threshold": choice[1], "is_causal": causal, "enable_gqa": True}
    out, support, grads = run(tensors, **options)
    exact_out, exact_support, exact_grads = run([t.double() for t in tensors], backend="reference", **options)
    assert torch.equal(support.to_mask(), exact_support.to_mask())
    for ours, truth in zip((out, *grads), (exact_out, *exact_grads), strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-4, atol=1e-4)


def test_empty():
    for queries, keys in ((0, 5), (5, 0), (0, 0)):
        tensors = [torch.randn(2, 2, n, 8, requires_grad=True) for n in (queries, keys, keys)]
        for backend in (None, "reference"):
            out = threshold_attention(*tensors, threshold=0.1, backend=backend)
            assert torch.equal(out, torch.zeros(2, 2, queries, 8))
        for grad in torch.autograd.grad(threshold_attention(*tensors, threshold=0.1).sum(), tensors):
            assert not grad.any()


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 2, 3)])
def test_leading_dimensions(leading):
    tensors = [torch.randn(*leading, 12, 8) for _ in range(3)]
    out, support = threshold_attention(*tensors, threshold=0.1, return_support=True)
    flat = [tensor.reshape(-1, 1, 12, 8) for tensor in tensors]
    assert torch.equal(out, threshold_attention(*flat, threshold=0.1).view(out.shape))
    assert out.shape == (*leading, 12, 8) and support.degree.numel() == out.numel() // 8
    bias = torch.randn(*leading, 1, 12)
    expected = threshold_attention(*flat, threshold=0.1, attn_bias=bias.reshape(-1, 1, 1, 12))
    assert torch.equal(threshold_attention(*tensors, threshold=0.1, attn_bias=bias).reshape(expected.shape), expected)


def test_not_contiguous():
    packed = torch.randn(2, 33, 3, 4, 16)  # [batch, tokens, which, heads, width]
    views = [packed[:, :, which].transpose(1, 2) for which in range(3)]
    expected = run([view.contiguous() for view in views], threshold=0.1)
    for given_views in (views, [view.mT.contiguous().mT for view in views]):
        out, support, grads = run(given_views, threshold=0.1)
        assert torch.equal(out, expected[0]) and torch.equal(support.col_idx, expected[1].col_idx)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(grads, expected[2], strict=True))


def test_expanded_gradient():
    tensors = attention_inputs(2, 2, 33, 40, 16, grad=True)
    expanded = torch.autograd.grad(threshold_attention(*tensors, threshold=0.1).sum(), tensors)
    plain = torch.autograd.grad(threshold_attention(*tensors, threshold=0.1), tensors, torch.ones(2, 2, 33, 16))
    assert all(torch.equal(a, b) for a, b in zip(expanded, plain, strict=True))


@pytest.mark.parametrize(("rule", "threshold"), [("relative", 0.2), ("absolute", 0.3)])
def test_gradcheck(rule, threshold):
    tensors = attention_inputs(1, 2, 5, 7, 3, value_width=4, kv_heads=1, dtype=torch.float64, grad=True)
    bias = torch.randn(2, 1, 7, dtype=torch.float64, requires_grad=True)

    def attend(*inputs):
        return threshold_attention(
            *inputs[:3], attn_bias=inputs[3], threshold=threshold, rule=rule, enable_gqa=True, is_causal=True
        )

    assert torch.autograd.gradcheck(attend, (*tensors, bias))


def test_partial_gradients():
    for wanted in range(3):
        tensors = attention_inputs(1, 2, 9, 20, 8)
        tensors[wanted].requires_grad_()
        grad = torch.autograd.grad(threshold_attention(*tensors, threshold=0.1).sum(), tensors[wanted])[0]
        assert grad.shape == tensors[wanted].shape


def test_second_derivative_is_refused():
    tensors = attention_inputs(1, 1, 5, 7, 4, grad=True)
    out = threshold_attention(*tensors, threshold=0.1)
    (grad,) = torch.autograd.grad(out.square().sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once differentiable"):
        grad.sum().backward()


@needs_kernels  # BLAS adds up the same product of a row and a column in another order at another place
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", [1.0, 0.3, 1e-3])
def test_equal_keys_are_kept_or_dropped_together(dtype, threshold):
    query, key, value = attention_inputs(1, 2, 33, 67, 33, dtype=dtype)
    copies = torch.cat([key, key.flip(2), key[:, :, :5]], 2)  # each key at two or three places of different tiles
    values = torch.cat([value, value.flip(2), value[:, :, :5]], 2)
    _, support = threshold_attention(query, copies, values, threshold=threshold, return_support=True)
    mask, weights = support.to_mask(), support.to_dense()
    for kind in (mask, weights):
        assert torch.equal(kind[..., :67], kind[..., 67:134].flip(3))
        assert torch.equal(kind[..., :5], kind[..., 134:])
    single, _ = threshold_attention(query, key, value, threshold=threshold, return_support=True)[1].to_mask(), None
    assert torch.equal(mask[..., :67], single)


def test_threshold_one_keeps_all_maxima():
    query, key, value = attention_inputs(1, 1, 20, 50, 16)
    key = torch.cat([key, key], 2)
    _, support = threshold_attention(query, key, torch.cat([value, value], 2), threshold=1.0, return_support=True)
    assert (support.degree == 2).all()


@needs_kernels  # the reference rounds scores in the dtype of the query
@pytest.mark.parametrize("offset", [-1e-6, 1e-6])
def test_scores_next_to_the_threshold_are_decided_exactly(offset):
    """The screen's rounding error is far larger than the offset; refinement in double decides."""
    query = torch.randn(1, 1, 1, 256, generator=torch.Generator().manual_seed(3))
    key = torch.randn(1, 1, 300, 256, generator=torch.Generator().manual_seed(4)) * 30
    exact = (query.double() @ key.double().mT / 16).flatten()
    for j in (3, 100, 299):
        threshold = exact[j].item() + offset
        _, support = threshold_attention(query, key, key, threshold=threshold, rule="absolute", return_support=True)
        assert torch.equal(support.to_mask().flatten(), exact >= threshold)


@pytest.mark.parametrize("factor", [1e-30, 1e-12, 1e6])
def test_sizes_of_norms(factor):
    query, key, value = attention_inputs(1, 2, 20, 70, 16)
    options = {"threshold": 0.5, "return_support": True}
    for tensors in ((query, key * factor, value), (query * factor, key, value)):
        out, support = threshold_attention(*tensors, **options)
        exact, exact_support = threshold_attention(*(t.double() for t in tensors), backend="reference", **options)
        assert torch.equal(support.to_mask(), exact_support.to_mask())
        torch.testing.assert_close(out.double(), exact, rtol=1e-3, atol=1e-3)


def test_one_huge_key_loses_no_other():
    query, key, value = attention_inputs(1, 1, 20, 70, 16)
    key[0, 0, 11] *= 1e8
    bias = torch.zeros(70)
    bias[11] = -torch.inf
    check([query, key, value], bias, threshold=0.1)


def test_many_to_one_and_one_to_many():
    query, key, value = attention_inputs(1, 1, 300, 700, 16)
    query[..., 0], key[..., 0] = 10, -10
    key[:, :, 123, 0] = 100
    support = check([query, key, value], threshold=0.01)
    assert (support.degree == 1).all() and (support.col_idx == 123).all()
    query.zero_()[:, :, 1:] = attention_inputs(1, 1, 299, 700, 16)[0] * 5
    support = check([query, key, value], threshold=0.5)
    assert support.degree[0, 0, 0] == 700


def test_returned_support():
    tensors = attention_inputs(2, 3, 20, 50, 16, grad=True)
    out, support = threshold_attention(*tensors, threshold=0.3, return_support=True)
    assert support.shape == (2, 3, 20, 50) and out.requires_grad and not support.weights.requires_grad
    assert torch.equal(support.degree, support.to_mask().sum(-1))
    assert support.density == support.nnz / 6000
    torch.testing.assert_close(support.to_dense().sum(-1), torch.ones(2, 3, 20))
    torch.testing.assert_close(support.to_dense() @ tensors[2], out)
    assert "6000" not in repr(support) and f"{support.nnz} kept" in repr(support)
    without_grad = threshold_attention(*(t.detach() for t in tensors), threshold=0.3, return_support=True)[1]
    assert torch.equal(without_grad.col_idx, support.col_idx)


def test_only_survivors_are_stored():
    query, key, value = attention_inputs(1, 2, 200, 400, 32, grad=True)
    out, support = threshold_attention(query * 4, key, value, threshold=0.1, return_support=True)
    assert 0 < support.density < 0.05
    saved = [tensor.numel() for tensor in out.grad_fn.saved_tensors if tensor is not None]
    assert support.nnz in saved and sum(saved) < 200 * 400
    assert support.col_idx.untyped_storage().nbytes() == 4 * support.nnz


@pytest.mark.parametrize("rule", ["relative", "absolute"])
def test_rows_without_keys_give_zero(rule):
    padding = torch.tensor([[True] * 20, [False] * 20])
    tensors = attention_inputs(2, 2, 9, 20, 8, grad=True)
    for backend in (None, "reference"):
        out = threshold_attention(*tensors, threshold=0.1, rule=rule, key_padding_mask=padding, backend=backend)
        assert not out[0].any()
        for grad in torch.autograd.grad(out.sum(), tensors):
            assert not grad[0].any() and grad.isfinite().all()
    out, support = threshold_attention(*tensors, threshold=1e9, rule="absolute", return_support=True)
    assert not out.any() and support.nnz == 0
    assert not any(grad.any() for grad in torch.autograd.grad(out.sum(), tensors))


@pytest.mark.parametrize("rule", ["relative", "absolute"])
@pytest.mark.parametrize("keys", [20, 5000])
def test_undefined_scores_show(rule, keys):
    query, key, value = attention_inputs(1, 2, 30, keys, 8)
    query[0, 0, 4, 3] = torch.nan
    key[0, 1, 11, 2] = torch.nan
    options = {"threshold": 0.1, "rule": rule, "return_support": True}
    out, support = threshold_attention(query, key, value, **options)
    assert out[0, 0, 4].isnan().all() and out[0, 1].isnan().all()
    assert not out[0, 0, :4].isnan().any() and not out[0, 0, 5:].isnan().any()
    assert (support.degree[0, 1] == 1).all() and support.degree[0, 0, 4] == keys
    _, exact = threshold_attention(query.double(), key.double(), value.double(), backend="reference", **options)
    assert torch.equal(support.to_mask(), exact.to_mask())
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    grad = torch.autograd.grad(threshold_attention(*leaves, threshold=0.1, rule=rule).sum(), leaves)
    assert grad[0][0, 0, 4].isnan().all() and not grad[0][0, 0, :4].isnan().any()


def test_infinite_bias_is_undefined_as_in_softmax():
    bias = torch.zeros(20)
    bias[3] = torch.inf
    for backend in (None, "reference"):
        out = threshold_attention(*attention_inputs(1, 1, 4, 20, 8), threshold=0.1, attn_bias=bias, backend=backend)
        assert out.isnan().all()


# Few heads, whose keys all threads share, and so many that one thread packs them one by one, and two do not.
@pytest.mark.parametrize("sizes", [(2, 4, 150, 700, 64), (5, 4, 60, 90, 20)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bitwise_equal_for_any_number_of_threads(sizes, dtype):
    tensors = attention_inputs(*sizes, kv_heads=2, dtype=dtype)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out, support, grads = run(tensors, torch.ones(sizes[3], dtype=dtype), threshold=0.1, enable_gqa=True)
            results.append((out, support.row_ptr, support.col_idx, support.weights, *grads))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_every_output_is_written():
    """Deterministic mode fills fresh memory with NaN."""
    tensors = attention_inputs(2, 2, 33, 140, 20)
    plain = run(tensors, threshold=0.1, key_padding_mask=torch.arange(140).expand(2, 140) < 3)
    torch.use_deterministic_algorithms(True)
    try:
        filled = run(tensors, threshold=0.1, key_padding_mask=torch.arange(140).expand(2, 140) < 3)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(plain[0], filled[0]) and torch.equal(plain[1].weights, filled[1].weights)
    assert all(torch.equal(a, b) for a, b in zip(plain[2], filled[2], strict=True))


def test_output_alone_equals_output_with_support():
    tensors = attention_inputs(2, 2, 50, 70, 16)
    out, _ = threshold_attention(*tensors, threshold=0.1, return_support=True)
    assert torch.equal(out, threshold_attention(*tensors, threshold=0.1))


PARITY = """
import sys
sys.path[:0] = [".", "python_tests"]
import test_threshold_attention as tests
import test_threshold_attention_halves as halves
import test_threshold_attention_options as options
import test_threshold_attention_recompute as recompute
import test_threshold_attention_rules as rules
from compsparse_kernels.ops.backends import cpu_isa
from python_tests.attention import CHOICES, LEARNABLE
assert cpu_isa() == sys.argv[1], cpu_isa()
for dtype in tests.DTYPES:
    for width in (20, 64):
        tests.test_widths(width, dtype)
    for sizes in ((2, 4, 150, 700, 64), (5, 4, 60, 90, 20)):
        tests.test_bitwise_equal_for_any_number_of_threads(sizes, dtype)
    tests.test_equal_keys_are_kept_or_dropped_together(dtype, 0.3)
    tests.test_float_bias((4, 1, 40), dtype)
    for width in (20, 67):
        recompute.test_widths(width, dtype)
    recompute.test_bits_are_the_support({"is_causal": True}, "own", dtype)
    recompute.test_bitwise_equal_for_any_number_of_threads((1, 1, 200, 1700, 32, 24, 1), dtype)
    recompute.test_gradients_that_are_not_finite(float("inf"), dtype)
for rule in ("relative", "absolute"):
    tests.test_undefined_scores_show(rule, 20)
tests.test_scores_next_to_the_threshold_are_decided_exactly(1e-6)
tests.test_padding()
for choice in CHOICES:
    rules.test_equal_keys_are_kept_or_dropped_together(choice)
    rules.test_bitwise_equal_for_any_number_of_threads(choice, rules.DTYPES[0])
    for dtype in rules.DTYPES + rules.HALVES:
        rules.test_within_budget(choice, dtype)
        if choice in LEARNABLE:
            rules.test_thresholds_within_budget(choice, dtype, (4,))
    for dtype in rules.HALVES:
        halves.test_rounded_once(choice, dtype)
for choice in options.CHOICES:
    options.test_window_is_a_mask(choice, (5, 0))
    options.test_alibi(choice, rules.DTYPES[0])
    options.test_dropout(choice, rules.DTYPES[0])
    for dtype in rules.DTYPES + rules.HALVES:
        options.test_sequences_are_each_alone(choice, dtype)
        options.test_decoding_equals_the_whole(choice, dtype)
"""


@needs_kernels
@pytest.mark.parametrize("isa", ["scalar", "avx2"])
def test_instruction_sets(isa):
    if isa == "avx2" and cpu_isa() == "scalar":
        pytest.skip("this processor has no AVX2")
    environment = os.environ | {"COMPSPARSE_CPU": isa, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PARITY, isa]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
