"""Thresholded attention against its float64 reference: outputs, supports, gradients, contract, errors."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from compsparse_kernels import AttentionSupport, explain, threshold_attention
from compsparse_kernels.ops.backends import cpu_isa

RULES = [("relative", 0.05), ("relative", 0.5), ("relative", 1.0), ("absolute", 0.5)]
DTYPES = [torch.float32, torch.float64]
ROOT = Path(__file__).parents[1]


def make(batch, heads, queries, keys, width, value_width=None, kv_heads=None, dtype=torch.float32, seed=0, grad=False):
    """Query (scaled so that supports are small), key and value."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [
        (batch, heads, queries, width),
        (batch, kv_heads or heads, keys, width),
        (batch, kv_heads or heads, keys, value_width or width),
    ]
    query, key, value = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return [tensor.requires_grad_(grad) for tensor in (query * 2, key, value)]


def run(tensors, bias=None, **options):
    """Output, support and the gradients of a fixed loss for query, key, value and a float bias."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    if bias is not None and bias.is_floating_point():
        bias = bias.detach().requires_grad_()
    out, support = threshold_attention(*leaves, attn_bias=bias, return_support=True, **options)
    weights = torch.cos(torch.arange(out.numel(), dtype=torch.float64)).view(out.shape).to(out.dtype)
    wanted = leaves + ([bias] if bias is not None and bias.is_floating_point() else [])
    return out.detach(), support, torch.autograd.grad(out, wanted, weights)


def dense(tensors, mask, bias, options):
    """Dense torch on the same problem: softmax over the same support, gradients by autograd."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    wanted = list(leaves)
    query, key, value = leaves
    group = query.shape[1] // key.shape[1]
    scores = (options.get("scale") or query.shape[-1] ** -0.5) * query @ key.repeat_interleave(group, 1).mT
    if bias is not None and bias.is_floating_point():
        wanted.append(bias.detach().to(query.dtype).requires_grad_())
        scores = scores + wanted[-1]
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1).masked_fill(~mask.any(-1, keepdim=True), 0)
    out = weights @ value.repeat_interleave(group, 1)
    loss = torch.cos(torch.arange(out.numel(), dtype=torch.float64)).view(out.shape).to(out.dtype)
    return out.detach(), *torch.autograd.grad(out, wanted, loss)


def dense_errors(tensors, mask, bias, options):
    """Largest errors of dense torch in float32; in float64, where nothing exact is at hand, those times the units' ratio."""
    narrow = [tensor.float() for tensor in tensors]
    pairs = zip(
        dense(narrow, mask, bias, options), dense([t.double() for t in narrow], mask, bias, options), strict=True
    )
    ratio = torch.finfo(tensors[0].dtype).eps / torch.finfo(torch.float32).eps
    return [(result.double() - truth).abs().max().item() * ratio for result, truth in pairs]


def check(tensors, bias=None, **options):
    """Support equal to the reference's; errors within twice dense torch's, plus one rounding of the largest value."""
    out, support, grads = run(tensors, bias, **options)
    wide_bias = bias.double() if bias is not None and bias.is_floating_point() else bias
    exact_out, exact_support, exact_grads = run([t.double() for t in tensors], wide_bias, backend="reference", **options)
    mask = exact_support.to_mask()
    assert torch.equal(support.to_mask(), mask)
    exact = (exact_out, *exact_grads)
    budgets = dense_errors(tensors, mask, bias, options)
    roundoff = torch.finfo(tensors[0].dtype).eps
    factor = 2 if tensors[0].dtype == torch.float32 else 3  # in float64 the truth has an error of its own
    for name, ours, truth, budget in zip(("out", "dq", "dk", "dv", "db"), (out, *grads), exact, budgets, strict=False):
        error, size = (ours.double() - truth).abs().max().item(), truth.abs().max().item()
        assert error <= factor * budget + roundoff * max(size, 1e-30), (name, error, budget, size)
    weights = exact_support.to_dense()
    torch.testing.assert_close(support.to_dense().double(), weights, rtol=2e4 * roundoff, atol=2e3 * roundoff)
    return support


# ---- values and gradients


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rule", "threshold"), RULES)
@pytest.mark.parametrize("causal", [False, True])
def test_matches_reference(dtype, rule, threshold, causal):
    support = check(make(2, 3, 33, 33, 20, dtype=dtype), threshold=threshold, rule=rule, is_causal=causal)
    assert support.density < 0.9


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 8, 20, 64, 96, 256])
def test_widths(width, dtype):
    check(make(1, 2, 33, 130, width, value_width=width + 3, dtype=dtype), threshold=0.1)
    check(make(1, 2, 7, 33, 16, value_width=width, dtype=dtype), threshold=0.1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 7, 33, 130])
@pytest.mark.parametrize("causal", [False, True])
def test_lengths(tokens, dtype, causal):
    check(make(2, 2, tokens, tokens, 8, dtype=dtype), threshold=0.1, is_causal=causal)


@pytest.mark.parametrize(("queries", "keys"), [(1, 130), (130, 1), (33, 70), (70, 33), (25, 2500)])
@pytest.mark.parametrize("causal", [False, True])
def test_cross_attention(queries, keys, causal):
    check(make(1, 2, queries, keys, 16), threshold=0.1, is_causal=causal)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (6, 1), (4, 4)])
def test_grouped_queries(heads, kv_heads):
    check(make(2, heads, 33, 40, 16, kv_heads=kv_heads), threshold=0.1, enable_gqa=True)


@pytest.mark.parametrize("shape", [(2, 4, 33, 40), (1, 4, 33, 40), (4, 1, 40), (33, 1), (40,), (2, 1, 1, 40), (1, 4, 1, 40)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_float_bias(shape, dtype):
    bias = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    tensors = make(2, 4, 33, 40, 16, dtype=dtype)
    check(tensors, bias, threshold=0.1)
    check(tensors, bias, threshold=0.5, rule="absolute", is_causal=True)


def test_one_bias_for_all():
    """Its gradient is zero in exact arithmetic, and the sum of many numbers that are not."""
    bias = torch.zeros(1, requires_grad=True)
    out = threshold_attention(*make(2, 4, 33, 40, 16), threshold=0.1, attn_bias=bias)
    assert torch.autograd.grad(out.square().sum(), bias)[0].abs() < 1e-4


@pytest.mark.parametrize("shape", [(2, 4, 33, 40), (33, 40), (2, 1, 1, 40)])
def test_bool_bias(shape):
    bias = torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.3
    support = check(make(2, 4, 33, 40, 16), bias, threshold=0.1)
    assert not (support.to_mask() & ~bias).any()


def test_bias_of_negative_infinity_hides_keys():
    bias = torch.zeros(33, 40).masked_fill(torch.rand(33, 40) > 0.5, -torch.inf)
    tensors = make(1, 2, 33, 40, 16)
    out = threshold_attention(*tensors, threshold=0.1, attn_bias=bias)
    assert torch.equal(out, threshold_attention(*tensors, threshold=0.1, attn_bias=bias == 0))


def test_bias_is_read_through_strides():
    wide = torch.randn(40, 2, 33).permute(1, 2, 0)  # [heads, queries, keys], keys at a stride
    check(make(2, 2, 33, 40, 16), wide, threshold=0.1)
    check(make(2, 2, 33, 40, 16), wide[:, ::2].repeat_interleave(2, 1)[:, :33] > 0, threshold=0.1)


def test_padding():
    padding = torch.rand(3, 40, generator=torch.Generator().manual_seed(1)) > 0.5
    support = check(make(3, 2, 33, 40, 16), threshold=0.1, key_padding_mask=padding)
    assert not (support.to_mask() & padding[:, None, None, :]).any()
    check(make(3, 2, 33, 40, 16), threshold=0.1, key_padding_mask=padding, is_causal=True)


def test_padded_keys_may_hold_anything():
    query, key, value = make(1, 2, 9, 20, 8)
    padding = torch.arange(20)[None] >= 15
    expected = threshold_attention(query, key[:, :, :15], value[:, :, :15], threshold=0.1)
    key[:, :, 15:], value[:, :, 15:] = torch.nan, torch.nan
    assert torch.equal(threshold_attention(query, key, value, threshold=0.1, key_padding_mask=padding), expected)


def test_scale():
    check(make(1, 2, 33, 40, 16), threshold=0.1, scale=0.7)
    check(make(1, 2, 33, 40, 16), threshold=0.1, scale=-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_everything_kept_is_plain_attention(dtype):
    tensors = make(2, 2, 33, 70, 16, dtype=dtype, grad=True)
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
    tensors = make(batch, group * kv_heads, queries, keys, width, value_width, kv_heads, dtype, seed)
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
    tensors = make(2, 2, 33, 40, 16, grad=True)
    expanded = torch.autograd.grad(threshold_attention(*tensors, threshold=0.1).sum(), tensors)
    plain = torch.autograd.grad(threshold_attention(*tensors, threshold=0.1), tensors, torch.ones(2, 2, 33, 16))
    assert all(torch.equal(a, b) for a, b in zip(expanded, plain, strict=True))


@pytest.mark.parametrize(("rule", "threshold"), [("relative", 0.2), ("absolute", 0.3)])
def test_gradcheck(rule, threshold):
    tensors = make(1, 2, 5, 7, 3, value_width=4, kv_heads=1, dtype=torch.float64, grad=True)
    bias = torch.randn(2, 1, 7, dtype=torch.float64, requires_grad=True)

    def attend(*inputs):
        return threshold_attention(
            *inputs[:3], attn_bias=inputs[3], threshold=threshold, rule=rule, enable_gqa=True, is_causal=True
        )

    assert torch.autograd.gradcheck(attend, (*tensors, bias))


def test_partial_gradients():
    for wanted in range(3):
        tensors = make(1, 2, 9, 20, 8)
        tensors[wanted].requires_grad_()
        grad = torch.autograd.grad(threshold_attention(*tensors, threshold=0.1).sum(), tensors[wanted])[0]
        assert grad.shape == tensors[wanted].shape


def test_second_derivative_is_refused():
    tensors = make(1, 1, 5, 7, 4, grad=True)
    out = threshold_attention(*tensors, threshold=0.1)
    (grad,) = torch.autograd.grad(out.square().sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# ---- the support


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", [1.0, 0.3, 1e-3])
def test_equal_keys_are_kept_or_dropped_together(dtype, threshold):
    query, key, value = make(1, 2, 33, 67, 33, dtype=dtype)
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
    query, key, value = make(1, 1, 20, 50, 16)
    key = torch.cat([key, key], 2)
    _, support = threshold_attention(query, key, torch.cat([value, value], 2), threshold=1.0, return_support=True)
    assert (support.degree == 2).all()


@pytest.mark.parametrize("offset", [-1e-6, 1e-6])
def test_scores_next_to_the_threshold_are_decided_exactly(offset):
    """The screen's rounding error is far larger than the offset; refinement in double decides."""
    query = torch.randn(1, 1, 1, 256, generator=torch.Generator().manual_seed(3))
    key = torch.randn(1, 1, 300, 256, generator=torch.Generator().manual_seed(4)) * 30
    exact = (query.double() @ key.double().mT / 16).flatten()
    for j in (3, 100, 299):
        threshold = exact[j].item() + offset
        _, support = threshold_attention(
            query, key, key, threshold=threshold, rule="absolute", return_support=True
        )
        assert torch.equal(support.to_mask().flatten(), exact >= threshold)


@pytest.mark.parametrize("factor", [1e-30, 1e-12, 1e6])
def test_sizes_of_norms(factor):
    query, key, value = make(1, 2, 20, 70, 16)
    options = {"threshold": 0.5, "return_support": True}
    for tensors in ((query, key * factor, value), (query * factor, key, value)):
        out, support = threshold_attention(*tensors, **options)
        exact, exact_support = threshold_attention(*(t.double() for t in tensors), backend="reference", **options)
        assert torch.equal(support.to_mask(), exact_support.to_mask())
        torch.testing.assert_close(out.double(), exact, rtol=1e-3, atol=1e-3)


def test_one_huge_key_loses_no_other():
    query, key, value = make(1, 1, 20, 70, 16)
    key[0, 0, 11] *= 1e8
    bias = torch.zeros(70)
    bias[11] = -torch.inf
    check([query, key, value], bias, threshold=0.1)


def test_many_to_one_and_one_to_many():
    query, key, value = make(1, 1, 300, 700, 16)
    query[..., 0], key[..., 0] = 10, -10
    key[:, :, 123, 0] = 100
    support = check([query, key, value], threshold=0.01)
    assert (support.degree == 1).all() and (support.col_idx == 123).all()
    query.zero_()[:, :, 1:] = make(1, 1, 299, 700, 16)[0] * 5
    support = check([query, key, value], threshold=0.5)
    assert support.degree[0, 0, 0] == 700


def test_returned_support():
    tensors = make(2, 3, 20, 50, 16, grad=True)
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
    query, key, value = make(1, 2, 200, 400, 32, grad=True)
    out, support = threshold_attention(query * 4, key, value, threshold=0.1, return_support=True)
    assert 0 < support.density < 0.05
    saved = [tensor.numel() for tensor in out.grad_fn.saved_tensors]
    assert support.nnz in saved and sum(saved) < 200 * 400
    assert support.col_idx.untyped_storage().nbytes() == 4 * support.nnz


# ---- rows without keys, and what is not a number


@pytest.mark.parametrize("rule", ["relative", "absolute"])
def test_rows_without_keys_give_zero(rule):
    padding = torch.tensor([[True] * 20, [False] * 20])
    tensors = make(2, 2, 9, 20, 8, grad=True)
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
    query, key, value = make(1, 2, 30, keys, 8)
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
        out = threshold_attention(*make(1, 1, 4, 20, 8), threshold=0.1, attn_bias=bias, backend=backend)
        assert out.isnan().all()


# ---- threads, determinism, instruction sets


@pytest.mark.parametrize("dtype", DTYPES)
def test_bitwise_equal_for_any_number_of_threads(dtype):
    tensors = make(2, 4, 150, 700, 64, kv_heads=2, dtype=dtype)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out, support, grads = run(tensors, torch.ones(700, dtype=dtype), threshold=0.1, enable_gqa=True)
            results.append((out, support.row_ptr, support.col_idx, support.weights, *grads))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_every_output_is_written():
    """Deterministic mode fills fresh memory with NaN."""
    tensors = make(2, 2, 33, 140, 20)
    plain = run(tensors, threshold=0.1, key_padding_mask=torch.arange(140).expand(2, 140) < 3)
    torch.use_deterministic_algorithms(True)
    try:
        filled = run(tensors, threshold=0.1, key_padding_mask=torch.arange(140).expand(2, 140) < 3)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(plain[0], filled[0]) and torch.equal(plain[1].weights, filled[1].weights)
    assert all(torch.equal(a, b) for a, b in zip(plain[2], filled[2], strict=True))


def test_output_alone_equals_output_with_support():
    tensors = make(2, 2, 50, 70, 16)
    out, _ = threshold_attention(*tensors, threshold=0.1, return_support=True)
    assert torch.equal(out, threshold_attention(*tensors, threshold=0.1))


PARITY = """
import sys
sys.path.insert(0, "python_tests")
import torch
import test_threshold_attention as tests
from compsparse_kernels.ops.backends import cpu_isa
assert cpu_isa() == sys.argv[1], cpu_isa()
for dtype in tests.DTYPES:
    for width in (20, 64):
        tests.test_widths(width, dtype)
    tests.test_bitwise_equal_for_any_number_of_threads(dtype)
    tests.test_equal_keys_are_kept_or_dropped_together(dtype, 0.3)
    tests.test_float_bias((4, 1, 40), dtype)
for rule in ("relative", "absolute"):
    tests.test_undefined_scores_show(rule, 20)
tests.test_scores_next_to_the_threshold_are_decided_exactly(1e-6)
tests.test_padding()
"""


@pytest.mark.skipif(cpu_isa() is None, reason="compiled kernels are not there")
@pytest.mark.parametrize("isa", ["scalar", "avx2"])
def test_instruction_sets(isa):
    if isa == "avx2" and cpu_isa() == "scalar":
        pytest.skip("this processor has no AVX2")
    environment = os.environ | {"COMPSPARSE_CPU": isa, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PARITY, isa]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


# ---- contract


def op_arguments(transposed=False, bias=None, padding=None, rule="relative"):
    tensors = make(2, 4, 5, 9, 8, value_width=6, kv_heads=2, grad=False)
    if transposed:
        tensors = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in tensors]
    return (*tensors, bias, padding, 0.3, rule, True, 0.7)


@pytest.mark.parametrize(
    "arguments",
    [
        op_arguments(),
        op_arguments(transposed=True, bias=torch.randn(1, 4, 1, 9), rule="absolute"),
        op_arguments(bias=torch.rand(5, 9)[None, None] > 0.2, padding=torch.rand(2, 9) > 0.8),
    ],
)
def test_opcheck(arguments):
    ops = torch.ops.compsparse
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ops.threshold_attention.default, arguments)
    torch.library.opcheck(ops.threshold_attention_support.default, arguments, test_utils=tests)
    out, *support = ops.threshold_attention_support(*arguments)
    backward = (torch.randn_like(out), *arguments[:3], *support, 0.7)
    torch.library.opcheck(ops.threshold_attention_backward.default, backward)


@pytest.mark.parametrize("scale", [0.7, 3])
def test_scalars_are_boxed_right(scale):
    query, key, value = make(1, 1, 4, 6, 8)
    for rule, threshold in (("relative", 1), ("absolute", 3), ("absolute", 0.7)):
        options = {"threshold": threshold, "rule": rule, "scale": scale}
        expected = threshold_attention(query, key, value, backend="reference", **options)
        torch.testing.assert_close(threshold_attention(query, key, value, **options), expected)


def test_compile():
    def attend(query, key, value, bias):
        return threshold_attention(query, key, value, threshold=0.1, attn_bias=bias, is_causal=True)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    tensors = [*make(2, 2, 9, 9, 8), torch.randn(2, 1, 9)]
    assert torch.equal(compiled(*tensors), attend(*tensors))
    leaves = [tensor.requires_grad_() for tensor in tensors]
    results = [torch.autograd.grad(f(*leaves).square().sum(), leaves) for f in (compiled, attend)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_compile_with_support():
    compiled = torch.compile(threshold_attention, fullgraph=True, backend="aot_eager")
    tensors = make(2, 2, 9, 9, 8)
    out, support = compiled(*tensors, threshold=0.1, return_support=True)
    expected, expected_support = threshold_attention(*tensors, threshold=0.1, return_support=True)
    assert torch.equal(out, expected) and torch.equal(support.to_dense(), expected_support.to_dense())


def test_autocast():
    query, key, value = make(1, 2, 9, 12, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = threshold_attention(query.bfloat16(), key, value, threshold=0.1, attn_bias=torch.zeros(12).bfloat16())
        pair = threshold_attention(query, key, value, threshold=0.1, return_support=True)
    assert out.dtype == pair[0].dtype == torch.bfloat16 and pair[1].weights.dtype == torch.float32
    expected = threshold_attention(query.bfloat16().float(), key, value, threshold=0.1)
    assert torch.equal(out, expected.bfloat16())


def test_backends_and_explain():
    tensors = make(1, 2, 9, 12, 8)
    reference, support = threshold_attention(*tensors, threshold=0.1, backend="reference", return_support=True)
    out, ours = threshold_attention(*tensors, threshold=0.1, backend="cpu", return_support=True)
    torch.testing.assert_close(out, reference)
    assert torch.equal(support.col_idx, ours.col_idx) and torch.equal(support.row_ptr, ours.row_ptr)
    assert explain("threshold_attention", *tensors)["reference"] == "available"


def test_fallback_backward_matches():
    """The dense fallback of the backward op, which devices without a kernel run."""
    from compsparse_kernels.ops.threshold_attention import reference

    arguments = op_arguments(bias=torch.randn(1, 4, 1, 9))
    out, *support = torch.ops.compsparse.threshold_attention_support(*arguments)
    backward = (torch.randn_like(out), *arguments[:3], *support, 0.7)
    ours = torch.ops.compsparse.threshold_attention_backward(*backward)
    for a, b in zip(ours, reference.threshold_attention_backward(*backward), strict=True):
        torch.testing.assert_close(a, b)


# ---- errors


Q, K, V = torch.zeros(2, 4, 5, 8), torch.zeros(2, 4, 6, 8), torch.zeros(2, 4, 6, 8)
T = {"threshold": 0.1}


@pytest.mark.parametrize(
    ("tensors", "options", "error", "message"),
    [
        (([], K, V), T, TypeError, "query: expected tensor [..., heads, tokens, width], got list"),
        ((Q[0, 0, 0], K, V), T, ValueError, "query: expected tensor [..., heads, tokens, width], got 1-D float32 tensor"),
        ((Q, K[0], V), T, ValueError, "key: expected 4-D tensor, like query, got 3-D"),
        ((Q, K, None), T, TypeError, "value: expected 4-D tensor, like query, got NoneType"),
        ((Q, K.double(), V), T, TypeError, "key: expected float32, like query, got 4-D float64"),
        ((Q.half(), K.half(), V.half()), T, TypeError, "query: expected float32 or float64, got 4-D float16"),
        ((Q, K[:1], V), T, ValueError, "key: expected leading dimensions [2], like query"),
        ((Q, K[:, :2], V[:, :2]), T, ValueError, "key: expected 4 heads, like query (or enable_gqa=True), got 2"),
        ((Q, K[:, :3], V[:, :3]), T | {"enable_gqa": True}, ValueError, "key: expected a divisor of 4 heads, got 3"),
        ((Q, K[..., :7], V), T, ValueError, "key: expected width 8, like query"),
        ((Q[..., :0], K[..., :0], V), T, ValueError, "query: expected a width of at least 1"),
        ((Q, K, V[:, :, :5]), T, ValueError, "value: expected tensor [2, 4, 6, 'any width'], like key"),
        ((Q, K, V), {"threshold": 0.0}, ValueError, "threshold: expected a number in (0, 1] (rule 'relative'), got 0.0"),
        ((Q, K, V), {"threshold": 1.5}, ValueError, "threshold: expected a number in (0, 1]"),
        ((Q, K, V), {"threshold": "1"}, TypeError, "threshold: expected a number, got str"),
        ((Q, K, V), {"threshold": float("nan"), "rule": "absolute"}, ValueError, "threshold: expected a finite number"),
        ((Q, K, V), T | {"scale": float("inf")}, ValueError, "scale: expected a finite number, got inf"),
        ((Q, K, V), T | {"scale": True}, TypeError, "scale: expected a number, got bool"),
        ((Q, K, V), T | {"rule": "topk"}, ValueError, "rule: expected one of relative, absolute, got 'topk'"),
        ((Q, K, V), T | {"weights": "rectified"}, ValueError, "weights: expected one of softmax, got 'rectified'"),
        ((Q, K, V), T | {"attn_bias": torch.zeros(5, 5)}, ValueError, "attn_bias: expected tensor broadcastable to [2, 4"),
        ((Q, K, V), T | {"attn_bias": torch.zeros(6).double()}, TypeError, "attn_bias: expected float32, like query"),
        ((Q, K, V), T | {"attn_bias": 3}, ValueError, "attn_bias: expected tensor broadcastable to [2, 4, 5, 6], got int"),
        ((Q, K, V), T | {"key_padding_mask": torch.zeros(2, 6)}, ValueError, "key_padding_mask: expected bool tensor [2, 6]"),
        ((Q, K, V), T | {"key_padding_mask": torch.zeros(6, 2) > 0}, ValueError, "key_padding_mask: expected bool tensor"),
        ((Q, K, V), T | {"backend": "gpu"}, ValueError, "backend: expected one of cpu, reference or None, got 'gpu'"),
    ],
)
def test_errors(tensors, options, error, message):
    with pytest.raises(error) as raised:
        threshold_attention(*tensors, **options)
    assert message in str(raised.value)


def test_errors_of_devices():
    meta = torch.zeros(6, device="meta")
    for options, name in (
        ({"attn_bias": meta > 0}, "attn_bias"),
        ({"attn_bias": meta}, "attn_bias"),
        ({"key_padding_mask": meta.expand(2, 6) > 0}, "key_padding_mask"),
    ):
        with pytest.raises(ValueError, match=f"{name}: expected a tensor on cpu, like query, got one on meta"):
            threshold_attention(Q, K, V, threshold=0.1, **options)
    with pytest.raises(ValueError, match="key: expected a tensor on cpu, like query"):
        threshold_attention(Q, K.to("meta"), V, threshold=0.1)


PTR, IDX, W = torch.tensor([0, 2, 3]), torch.tensor([0, 2, 1]).int(), torch.ones(3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((PTR, IDX, W, [1, 1, 2, 4]), TypeError, "shape: expected a tuple (B, H, Tq, Tk)"),
        ((PTR, IDX, W, (1, 1, -2, 4)), ValueError, "shape: Tq: expected a positive int, got -2"),
        ((PTR.int(), IDX, W, (1, 1, 2, 4)), ValueError, "row_ptr: expected 1-D int64 tensor"),
        ((PTR, IDX, W, (1, 1, 3, 4)), ValueError, "row_ptr: expected 4 offsets, got 3"),
        ((PTR, IDX, W, (1, 1, 2, 2)), ValueError, "col_idx: expected values in 0..1"),
        ((PTR, torch.tensor([2, 0, 1]).int(), W, (1, 1, 2, 4)), ValueError, "col_idx: expected strictly ascending values"),
        ((PTR, IDX, W[:2], (1, 1, 2, 4)), ValueError, "weights: expected float tensor [3]"),
        ((PTR, IDX, W.int(), (1, 1, 2, 4)), ValueError, "weights: expected float tensor [3]"),
        ((PTR, IDX, W.to("meta"), (1, 1, 2, 4)), ValueError, "weights: expected a tensor on cpu, like row_ptr"),
    ],
)
def test_errors_of_support(arguments, error, message):
    with pytest.raises(error) as raised:
        AttentionSupport(*arguments)
    assert message in str(raised.value)
