"""Every rule and weighting of thresholded attention: supports, error budgets, gradients, threads, any shape."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compsparse_kernels import threshold_attention
from compsparse_kernels.testing import DTYPES, HALVES, THREADS, attention_inputs, num_threads
from python_tests.attention import (
    CHOICE_NAMES,
    CHOICES,
    LEARNABLE,
    LEARNABLE_NAMES,
    check,
    choice_options,
    run,
    whole_inputs,
)

SCALE = 0.375  # whole_inputs
every_choice = pytest.mark.parametrize("choice", CHOICES, ids=CHOICE_NAMES)
every_learnable = pytest.mark.parametrize("choice", LEARNABLE, ids=LEARNABLE_NAMES)


@every_choice
@pytest.mark.parametrize("dtype", DTYPES + HALVES)
def test_within_budget(choice, dtype):
    tensors = whole_inputs(2, 4, 33, 70, 20, dtype=dtype, kv_heads=2)
    support = check(tensors, scale=SCALE, enable_gqa=True, is_causal=True, query_offset=37, **choice_options(choice))
    assert 0 < support.share_kept < 0.9


@every_choice
@pytest.mark.parametrize("dtype", DTYPES)
def test_within_budget_of_any_numbers(choice, dtype):
    """Scores that round: this seed has none next to a cut."""
    support = check(attention_inputs(1, 2, 20, 60, 16, dtype=dtype), **choice_options(choice))
    assert support.density < 0.9


@every_choice
@pytest.mark.parametrize("dtype", DTYPES + HALVES)
def test_float_bias(choice, dtype):
    tensors = whole_inputs(2, 4, 9, 40, 8, dtype=dtype)
    for shape in ((2, 4, 9, 40), (4, 1, 40), (40,)):
        bias = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 3).round() * SCALE
        check(tensors, bias.to(dtype), scale=SCALE, **choice_options(choice))


@every_choice
def test_equal_keys_are_kept_or_dropped_together(choice):
    tensors = whole_inputs(1, 2, 33, 67, 6)
    _, support = threshold_attention(*tensors, scale=SCALE, return_support=True, **choice_options(choice))
    scores, mask = tensors[0] @ tensors[1].mT, support.to_mask()
    kept, dropped = scores.masked_fill(~mask, torch.inf), scores.masked_fill(mask, -torch.inf)
    assert (kept.amin(-1) > dropped.amax(-1)).all()
    equal = support.to_dense().unsqueeze(-1) == support.to_dense().unsqueeze(-2)
    assert equal[(scores.unsqueeze(-1) == scores.unsqueeze(-2))].all()


@pytest.mark.parametrize("count", [1, 2, 7, 40, 1000])
def test_topk_counts(count):
    tensors = attention_inputs(1, 2, 10, 40, 8)
    _, support = threshold_attention(*tensors, threshold=count, rule="topk", return_support=True)
    assert (support.degree == min(count, 40)).all()
    _, support = threshold_attention(*tensors, threshold=count, rule="topk", is_causal=True, return_support=True)
    assert torch.equal(support.degree[0, 0], torch.arange(1, 11).clamp(max=count))


@pytest.mark.parametrize("mass", [1e-6, 0.3, 0.9, 0.999, 1.0])
def test_topp_masses(mass):
    query, key, value = attention_inputs(1, 2, 10, 40, 8)
    _, support = threshold_attention(query, key, value, threshold=mass, rule="topp", return_support=True)
    full = (query.double() @ key.double().mT / math.sqrt(8)).softmax(-1)
    kept = full.masked_fill(~support.to_mask(), 0)
    weakest = kept.masked_fill(~support.to_mask(), torch.inf).amin(-1)
    assert (kept.sum(-1) >= mass - 1e-6).all() and (kept.sum(-1) - weakest < mass + 1e-6).all()
    if mass == 1:
        assert support.density == 1


@pytest.mark.parametrize("alpha", [1.5, 2])
def test_entmax_weights_add_up_to_one_and_vanish_at_the_cut(alpha):
    tensors = attention_inputs(2, 2, 10, 300, 8)
    _, support = threshold_attention(*tensors, threshold=alpha, rule="entmax", return_support=True)
    assert support.density < 0.2 and (support.weights > 0).all()
    torch.testing.assert_close(support.to_dense().sum(-1), torch.ones(2, 2, 10))


@every_choice
def test_gradcheck(choice):
    tensors = attention_inputs(1, 2, 4, 6, 3, value_width=2, kv_heads=1, dtype=torch.float64, grad=True)
    bias = torch.randn(2, 1, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2), requires_grad=True)

    def attend(*inputs):
        options = {"dropout_p": 0.3, "seed": 4, "enable_gqa": True, "window": (3, 2)}
        return threshold_attention(*inputs[:3], attn_bias=inputs[3], **options, **choice_options(choice))

    assert torch.autograd.gradcheck(attend, (*tensors, bias))


@every_learnable
@pytest.mark.parametrize("shape", [(), (1,), (2,), (2, 1, 1), (4, 1), (1, 2, 4, 1), (3, 1, 1, 1)])
def test_gradcheck_of_thresholds(choice, shape):
    tensors = attention_inputs(3, 2, 4, 6, 3, dtype=torch.float64, grad=True)
    draws = torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 0.5 + 0.05

    def attend(threshold, *inputs):
        options = choice_options(choice) | {"threshold": threshold}
        return threshold_attention(*inputs, **options)

    assert torch.autograd.gradcheck(attend, (draws.requires_grad_(), *tensors), fast_mode=True)


@every_learnable
@pytest.mark.parametrize("dtype", DTYPES + HALVES)
@pytest.mark.parametrize("shape", [(4,), (4, 33, 1)])
def test_thresholds_within_budget(choice, dtype, shape):
    tensors = whole_inputs(2, 4, 33, 70, 20, dtype=dtype, kv_heads=2)
    draws = torch.randint(1, 8, shape, generator=torch.Generator().manual_seed(1)) * 0.1 + 0.0123  # near no score
    options = choice_options(choice) | {"enable_gqa": True, "scale": SCALE}
    del options["threshold"]
    check(tensors, thresholds=draws, **options)


@pytest.mark.parametrize("rule", ["relative", "absolute"])
def test_thresholds_without_gradient(rule):
    """A tensor decides like the numbers in it, for every weighting."""
    tensors = attention_inputs(2, 4, 9, 30, 8)
    numbers = [0.1, 0.3, 0.7, 0.9]
    for options in ({}, {"shrink": True}, {"weights": "rectified"}):
        options["rule"] = rule
        out = threshold_attention(*tensors, threshold=torch.tensor(numbers).double(), **options)
        for head, number in enumerate(numbers):
            alone = threshold_attention(*(t[:, head : head + 1] for t in tensors), threshold=number, **options)
            torch.testing.assert_close(out[:, head : head + 1], alone)


def test_gradient_of_a_threshold_reaches_its_own_tensor():
    tensors = attention_inputs(2, 4, 9, 30, 8)
    threshold = torch.full((4,), 0.2, requires_grad=True)  # float32
    threshold_attention(*tensors, threshold=threshold, shrink=True).square().sum().backward()
    assert threshold.grad.dtype == torch.float32 and threshold.grad.shape == (4,) and threshold.grad.all()


@every_learnable
def test_output_is_continuous_in_the_threshold(choice):
    """Where softmax weights jump as a key is dropped: the step across the score of a key is as small as any other."""
    query, key, value = attention_inputs(1, 1, 1, 12, 4, dtype=torch.float64)
    scores = (query @ key.mT / 2).flatten()
    at = scores.sort().values[-4].item()
    at = math.exp(at - scores.max().item()) if choice[0] == "relative" else at
    options = choice_options(choice)
    sides = [threshold_attention(query, key, value, **(options | {"threshold": at * f})) for f in (1 - 1e-9, 1 + 1e-9)]
    torch.testing.assert_close(*sides, rtol=1e-7, atol=1e-7)
    jump = [threshold_attention(query, key, value, rule=choice[0], threshold=at * f) for f in (1 - 1e-9, 1 + 1e-9)]
    assert (jump[0] - jump[1]).abs().max() > 1e-3


@every_choice
@pytest.mark.parametrize("dtype", DTYPES + HALVES)
def test_bitwise_equal_for_any_number_of_threads(choice, dtype):
    tensors = attention_inputs(2, 4, 90, 300, 32, kv_heads=2, dtype=dtype)
    options = choice_options(choice) | {"enable_gqa": True, "dropout_p": 0.2, "seed": 9}
    thresholds = torch.tensor([0.1, 0.2, 0.3, 0.4]) if choice in LEARNABLE else None
    results = []
    for threads in THREADS:
        with num_threads(threads):
            out, support, grads = run(tensors, torch.ones(300, dtype=dtype), thresholds, **options)
        results.append((out, support.row_ptr, support.col_idx, support.weights, support.log_sum, *grads))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@every_choice
def test_many_to_one_and_one_to_many(choice):
    query, key, value = whole_inputs(1, 1, 120, 200, 8)
    query[..., 0], key[..., 0] = 4, -8
    key[:, :, 123, 0] = 64
    options = choice_options(choice) | {"scale": SCALE}
    support = check([query, key, value], **options)  # all queries select one key
    if choice[0] not in ("topk", "absolute"):
        assert (support.degree == 1).all() and (support.col_idx == 123).all()
    if choice[0] != "absolute":
        query, key, value = whole_inputs(1, 1, 120, 200, 8, seed=1)
        query[:, :, 0] = 0
        support = check([query, key, value], **options)  # to the first query all keys are equal
        assert support.degree[0, 0, 0] == 200


@every_choice
def test_second_derivative_is_refused(choice):
    tensors = attention_inputs(1, 1, 5, 7, 4, grad=True)
    leaves = list(tensors)
    options = choice_options(choice)
    if choice in LEARNABLE:
        leaves.append(torch.tensor(0.2, requires_grad=True))
        options["threshold"] = leaves[-1]
    grads = torch.autograd.grad(threshold_attention(*tensors, **options).sum(), leaves, create_graph=True)
    for grad in grads:
        with pytest.raises(RuntimeError, match="once differentiable"):
            torch.autograd.grad(grad.sum(), leaves, allow_unused=True, retain_graph=True)


def test_reference_is_differentiable_twice():
    tensors = attention_inputs(1, 1, 3, 4, 2, dtype=torch.float64, grad=True)
    threshold = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)

    def attend(threshold, *inputs):
        return threshold_attention(*inputs, threshold=threshold, shrink=True, backend="reference")

    assert torch.autograd.gradgradcheck(attend, (threshold, *tensors))


@given(
    choice=st.sampled_from(CHOICES),
    batch=st.integers(1, 2),
    group=st.integers(1, 3),
    kv_heads=st.integers(1, 2),
    queries=st.integers(0, 40),
    keys=st.integers(0, 100),
    width=st.integers(1, 20),
    value_width=st.integers(1, 20),
    causal=st.booleans(),
    window=st.none() | st.integers(0, 50) | st.tuples(st.integers(-1, 50), st.integers(-1, 50)),
    offset=st.integers(-5, 60),
    padding=st.booleans(),
    slopes=st.booleans(),
    bias=st.sampled_from([None, "float", "bool"]),
    dropout_p=st.sampled_from([0.0, 0.3]),
    dtype=st.sampled_from(DTYPES + HALVES),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_any_shape_and_options(
    choice, batch, group, kv_heads, queries, keys, width, value_width, causal, window, offset, padding, slopes, bias,
    dropout_p, dtype, seed,
):  # fmt: skip
    heads = group * kv_heads
    tensors = whole_inputs(batch, heads, queries, keys, width, value_width, dtype=dtype, seed=seed, kv_heads=kv_heads)
    generator = torch.Generator().manual_seed(seed)
    options = choice_options(choice) | {"scale": SCALE, "enable_gqa": True, "is_causal": causal, "window": window}
    options |= {"query_offset": offset, "dropout_p": dropout_p, "seed": seed}
    if padding:
        options["key_padding_mask"] = torch.rand(batch, keys, generator=generator) > 0.7
    if slopes:
        options["alibi_slopes"] = torch.arange(heads) * SCALE
    if bias is not None:
        bias = torch.randint(-2, 3, (heads, 1, keys), generator=generator) * SCALE
        bias = bias.to(dtype) if width % 2 else bias > 0
    out, support, grads = run(tensors, bias, **options)
    wide = bias.double() if bias is not None and bias.is_floating_point() else bias
    exact_out, exact_support, exact_grads = run([t.double() for t in tensors], wide, backend="reference", **options)
    assert torch.equal(support.to_mask(), exact_support.to_mask())
    assert torch.equal(support.visible, exact_support.visible)
    tolerance = 1e-4 if dtype in DTYPES else 4 * torch.finfo(dtype).eps
    for ours, truth in zip((out, *grads), (exact_out, *exact_grads), strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("keys", [64, 75, 130])
@pytest.mark.parametrize("dtype", DTYPES)
def test_topp_of_an_infinite_score(dtype, keys):
    """No mass is enough then: all keys are kept but those that are masked, and none that is not there."""
    query, key, value = attention_inputs(1, 1, 12, keys, 16, dtype=dtype)
    bias = torch.zeros(12, keys, dtype=dtype)
    bias[5, 3], bias[5, 7:10], bias[2, 1] = math.inf, -math.inf, math.inf
    _, support = threshold_attention(query, key, value, rule="topp", threshold=0.9, attn_bias=bias, return_support=True)
    _, expected = threshold_attention(
        query, key, value, rule="topp", threshold=0.9, attn_bias=bias, return_support=True, backend="reference"
    )
    assert torch.equal(support.degree, expected.degree)
    assert torch.equal(support.col_idx, expected.col_idx)
