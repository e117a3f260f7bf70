"""The backward op of thresholded attention against autograd of the reference's forward, in float64."""

import pytest
import torch

from compsparse_kernels import threshold_attention
from compsparse_kernels.ops.threshold_attention import reference
from compsparse_kernels.testing import attention_inputs
from python_tests.attention import (
    CHOICE_NAMES,
    CHOICES,
    LEARNABLE,
    LEARNABLE_NAMES,
    backward_arguments,
    op_arguments,
)

every_choice = pytest.mark.parametrize(("rule", "threshold", "weighting"), CHOICES, ids=CHOICE_NAMES)


def compare(tensors, thresholds=None, **options):
    """All five gradients of both, for a random gradient of the output. Returns that of the scores as a dense tensor."""
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    shape = (*tensors[0].shape[:3], tensors[1].shape[2])
    bias = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    leaves = [*tensors, bias]
    if thresholds is not None:
        leaves.append(thresholds := thresholds.requires_grad_())
    arguments = op_arguments(*tensors, attn_bias=bias, thresholds=thresholds, **options)
    out, *support = reference.threshold_attention_support(*arguments)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    expected = torch.autograd.grad(out, leaves, grad, allow_unused=True)
    support = [tensor.detach() for tensor in support]
    ours = list(torch.ops.compsparse.threshold_attention_backward(*backward_arguments(grad, arguments, support)))
    row_ptr, col_idx = support[:2]
    dense = torch.zeros(shape, dtype=torch.float64)
    rows = torch.arange(len(row_ptr) - 1).repeat_interleave(row_ptr.diff())
    dense.flatten(0, 2)[rows, col_idx.long()] = ours[3]
    for mine, truth in zip((*ours[:3], dense), expected, strict=False):
        torch.testing.assert_close(mine, truth, rtol=1e-10, atol=1e-10)
    if thresholds is not None:
        per_threshold = ours[4] / thresholds.detach() if options["rule"] == "relative" else ours[4]
        torch.testing.assert_close(per_threshold.sum_to_size(thresholds.shape), expected[4], rtol=1e-10, atol=1e-10)
        assert expected[4].any()
    return dense


@every_choice
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_every_choice(rule, threshold, weighting, dropout_p, kv_heads):
    tensors = attention_inputs(2, 4, 6, 9, 3, 2, kv_heads, torch.float64)
    options = {"rule": rule, "threshold": threshold, "weighting": weighting, "dropout_p": dropout_p, "seed": 3}
    score_grad = compare(tensors, **options)
    assert score_grad.any()
    compare(tensors, is_causal=True, window_left=3, key_padding_mask=torch.rand(2, 9) > 0.7, **options)


@every_choice
def test_ties(rule, threshold, weighting):
    """Small whole numbers: many keys share the row's largest score, and scores lie at the cut."""
    tensors = [tensor.round() for tensor in attention_inputs(2, 4, 6, 12, 3, 2, 2, torch.float64)]
    tensors[2] = tensors[2] + attention_inputs(2, 2, 12, 1, 2, dtype=torch.float64)[0]  # values unlike each other
    compare(tensors, rule=rule, threshold={"absolute": 0.7}.get(rule, threshold), weighting=weighting)


@pytest.mark.parametrize(("rule", "threshold", "weighting"), LEARNABLE, ids=LEARNABLE_NAMES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 4, 1), (2, 1, 6), (2, 4, 6)])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_thresholds(rule, threshold, weighting, shape, dropout_p):
    draws = torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 0.5 + 0.05
    tensors = attention_inputs(2, 4, 6, 9, 3, 2, 2, torch.float64)
    compare(tensors, draws, rule=rule, threshold=threshold, weighting=weighting, dropout_p=dropout_p, seed=3)


@pytest.mark.parametrize(("rule", "threshold", "weighting"), LEARNABLE, ids=LEARNABLE_NAMES)
def test_thresholds_with_ties(rule, threshold, weighting):
    tensors = [tensor.round() for tensor in attention_inputs(2, 4, 6, 12, 3, 2, 2, torch.float64)]
    tensors[2] = tensors[2] + attention_inputs(2, 2, 12, 1, 2, dtype=torch.float64)[0]
    compare(
        tensors, torch.full((1, 1, 1), 0.7, dtype=torch.float64), rule=rule, threshold=threshold, weighting=weighting
    )


@every_choice
def test_rows_without_keys_have_no_gradient(rule, threshold, weighting):
    padding = torch.tensor([[True] * 9, [False] * 9])
    tensors = attention_inputs(2, 4, 6, 9, 3, 2, 2, torch.float64)
    score_grad = compare(tensors, key_padding_mask=padding, rule=rule, threshold=threshold, weighting=weighting)
    assert not score_grad[0].any() and score_grad[1].any()


@pytest.mark.parametrize("weighting", ["shrink", "rectified"])
def test_a_row_with_nothing_above_its_cut(weighting):
    """The largest score equals the cut: one key is kept, with weight 0; output and gradients are 0, not 0 / 0."""
    tensors = [torch.ones(1, 1, 1, 2, dtype=torch.float64), torch.ones(1, 1, 3, 2, dtype=torch.float64)]
    tensors[1][0, 0, 1:] = -1
    tensors.append(torch.randn(1, 1, 3, 2, dtype=torch.float64))
    options = {"rule": "absolute", "threshold": 2.0, "weighting": weighting, "scale": 1.0}
    assert not compare(tensors, **options).any()
    out, _, col_idx, weights, _, slope = reference.threshold_attention_support(*op_arguments(*tensors, **options))
    assert col_idx.tolist() == [0] and not out.any() and not weights.any() and not slope.any()


def test_keys_that_nobody_keeps_may_hold_anything():
    query, key, value = attention_inputs(1, 2, 5, 9, 3, dtype=torch.float64)
    arguments = op_arguments(query, key, value, key_padding_mask=torch.arange(9)[None] >= 6)
    out, *support = reference.threshold_attention_support(*arguments)
    grad = torch.ones_like(out)
    expected = reference.threshold_attention_backward(*backward_arguments(grad, arguments, support))
    for tensor in (key, value):
        tensor[:, :, 6:] = torch.nan
    ours = reference.threshold_attention_backward(*backward_arguments(grad, arguments, support))
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("threshold", [0.9, 0.01])  # few keys are kept, and most
def test_values_without_width_pass_no_gradient(threshold):
    query, key, _ = attention_inputs(1, 2, 30, 70, 5, grad=True)
    value = torch.zeros(1, 2, 70, 0, requires_grad=True)
    out = threshold_attention(query, key, value, threshold=threshold)
    grads = torch.autograd.grad(out, (query, key, value), torch.zeros_like(out))
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads)
