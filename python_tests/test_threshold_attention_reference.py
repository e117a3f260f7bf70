"""The reference of thresholded attention against each rule's definition, a row at a time in plain Python."""

import math

import pytest
import torch

from compsparse_kernels.ops.threshold_attention import reference
from compsparse_kernels.ops.threshold_attention.dropout import kept_by_dropout, philox
from compsparse_kernels.testing import attention_inputs
from python_tests.attention import CHOICE_NAMES, CHOICES, op_arguments, row_by_definition

SHAPE = {"batch": 2, "heads": 4, "queries": 6, "keys": 9, "width": 3, "value_width": 2, "kv_heads": 2}
every_choice = pytest.mark.parametrize(("rule", "threshold", "weighting"), CHOICES, ids=CHOICE_NAMES)


def inputs(seed=0, dtype=torch.float64, **sizes):
    return attention_inputs(**(SHAPE | sizes), dtype=dtype, seed=seed)


def by_definition(tensors, sees, bias, rule, threshold, weighting, scale=0.7):
    """Output, mask and weights; ``sees(b, h, i, j)`` and ``bias(b, h, i, j)`` are functions of plain ints."""
    query, key, value = tensors
    group = query.shape[1] // key.shape[1]
    weights = torch.zeros(*query.shape[:3], key.shape[2], dtype=torch.float64)
    mask = torch.zeros(weights.shape, dtype=torch.bool)
    for b, h, i in ((b, h, i) for b in range(len(query)) for h in range(query.shape[1]) for i in range(query.shape[2])):
        visible = [j for j in range(key.shape[2]) if sees(b, h, i, j)]
        scores = [scale * query[b, h, i] @ key[b, h // group, j] + bias(b, h, i, j) for j in visible]
        cut = threshold if isinstance(threshold, float) else threshold(b, h, i)
        for place, weight in zip(*row_by_definition(scores, rule, cut, weighting), strict=True):
            weights[b, h, i, visible[place]], mask[b, h, i, visible[place]] = weight, True
    return weights @ value.repeat_interleave(group, 1), mask, weights


def compare(tensors, sees=lambda *_: True, bias=lambda *_: 0.0, cut=None, tolerance=1e-12, **options):
    """The reference against ``by_definition``: supports equal, numbers within rounding of float64."""
    choice = {name: options[name] for name in ("rule", "threshold", "weighting")}
    support = reference.threshold_attention_support(*op_arguments(*tensors, **options))
    out, row_ptr, col_idx, weights, log_sum, _ = support
    expected, mask, dense = by_definition(tensors, sees, bias, **(choice | ({"threshold": cut} if cut else {})))
    assert torch.equal(row_ptr[1:], mask.sum(-1).flatten().cumsum(0)) and row_ptr[0] == 0
    assert torch.equal(col_idx.long(), mask.flatten(0, 2).nonzero()[:, 1]) and col_idx.dtype == torch.int32
    torch.testing.assert_close(weights, dense[mask], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(reference.threshold_attention(*op_arguments(*tensors, **options)), out)
    assert torch.equal(log_sum.isneginf(), ~mask.any(-1))
    return mask, log_sum


@every_choice
def test_rules(rule, threshold, weighting):
    tensors = inputs()
    mask, log_sum = compare(tensors, rule=rule, threshold=threshold, weighting=weighting)
    assert 0 < mask.sum() < mask.numel()
    scores = 0.7 * tensors[0] @ tensors[1].repeat_interleave(2, 1).mT
    torch.testing.assert_close(log_sum, scores.masked_fill(~mask, -torch.inf).logsumexp(-1))


@every_choice
@pytest.mark.parametrize("keys", [0, 1, 2])
def test_few_keys(rule, threshold, weighting, keys):
    mask, _ = compare(inputs(keys=keys), rule=rule, threshold=threshold, weighting=weighting)
    assert mask.any() == (keys > 0)


@every_choice
def test_ties_are_kept_or_dropped_together(rule, threshold, weighting):
    """Small whole numbers: scores are exact and often equal, at the maximum and at the cut too."""
    tensors = [tensor.round() for tensor in inputs(keys=12)]
    threshold = {"absolute": 0.7}.get(rule, threshold)  # the score of a product of 1
    mask, _ = compare(tensors, rule=rule, threshold=threshold, weighting=weighting)
    scores = 0.7 * tensors[0] @ tensors[1].repeat_interleave(2, 1).mT
    equal = scores.unsqueeze(-1) == scores.unsqueeze(-2)
    assert not (equal & (mask.unsqueeze(-1) != mask.unsqueeze(-2))).any()
    assert (equal.sum((-1, -2)) > 12).any()


@every_choice
@pytest.mark.parametrize("bounds", [(2, 1), (-1, 0), (0, -1), (1, -1), (0, 0)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_windows(rule, threshold, weighting, bounds, is_causal):
    left, right = bounds

    def sees(b, h, i, j):
        distance = j - (i + 2)
        return (left < 0 or distance >= -left) and (right < 0 or distance <= right) and not (is_causal and distance > 0)

    options = {"window_left": left, "window_right": right, "is_causal": is_causal, "query_offset": 2}
    compare(inputs(queries=9), sees, rule=rule, threshold=threshold, weighting=weighting, **options)


@every_choice
def test_masks_and_biases(rule, threshold, weighting):
    generator = torch.Generator().manual_seed(1)
    padding = torch.rand(2, 9, generator=generator) > 0.6
    allowed = torch.rand(2, 1, 6, 9, generator=generator) > 0.4
    added = torch.randn(1, 4, 1, 9, generator=generator, dtype=torch.float64)
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0])
    choice = {"rule": rule, "threshold": threshold, "weighting": weighting}

    def sees(b, h, i, j):
        return not padding[b, j] and bool(allowed[b, 0, i, j])

    compare(inputs(), sees, attn_bias=allowed, key_padding_mask=padding, **choice)
    compare(inputs(), bias=lambda b, h, i, j: added[0, h, 0, j], attn_bias=added, **choice)
    hidden = torch.where(allowed, 0.25, -torch.inf).double()
    compare(inputs(), lambda b, h, i, j: allowed[b, 0, i, j], lambda *_: 0.25, attn_bias=hidden, **choice)
    compare(
        inputs(),
        lambda b, h, i, j: not padding[b, j],
        lambda b, h, i, j: -slopes[h].item() * abs(i + 3 - j),
        alibi_slopes=slopes,
        query_offset=3,
        key_padding_mask=padding,
        **choice,
    )


@every_choice
def test_sequences_are_each_alone(rule, threshold, weighting):
    """Empty ones among them; causality, the window and ALiBi count from the beginning of each."""
    lengths, key_lengths = [3, 0, 1, 4, 2], [4, 2, 0, 6, 5]
    tensors = inputs(batch=1, queries=sum(lengths), keys=sum(key_lengths))
    starts, key_starts = (torch.tensor([0, *sizes]).cumsum(0) for sizes in (lengths, key_lengths))
    options = {"rule": rule, "threshold": threshold, "weighting": weighting, "is_causal": True, "window_left": 2}
    options |= {"query_offset": 1, "alibi_slopes": torch.tensor([0.5, 0.1, 0.0, 1.0])}
    together = op_arguments(*tensors, cu_seqlens_q=starts, cu_seqlens_k=key_starts, **options)
    out, row_ptr, col_idx, weights, log_sum, slope = reference.threshold_attention_support(*together)
    dense = torch.zeros(4 * sum(lengths), sum(key_lengths), dtype=torch.float64)
    dense[torch.arange(len(dense)).repeat_interleave(row_ptr.diff()), col_idx.long()] = weights
    dense = dense.view(1, 4, sum(lengths), -1)
    covered = torch.zeros_like(dense)
    for s in range(5):
        rows, keys = slice(starts[s], starts[s + 1]), slice(key_starts[s], key_starts[s + 1])
        query, key, value = tensors[0][:, :, rows], tensors[1][:, :, keys], tensors[2][:, :, keys]
        alone, ptr, _, alone_weights, alone_sum, alone_slope = reference.threshold_attention_support(
            *op_arguments(query, key, value, **options)
        )
        torch.testing.assert_close(out[:, :, rows], alone)
        torch.testing.assert_close(log_sum[:, :, rows], alone_sum)
        torch.testing.assert_close(slope[:, :, rows], alone_slope)
        mine = dense[:, :, rows, keys]
        assert torch.equal((mine > 0).sum(-1).flatten(), ptr.diff())
        torch.testing.assert_close(mine[mine > 0], alone_weights)
        covered[:, :, rows, keys] = 1
    assert not dense[covered == 0].any() and dense.any()


@pytest.mark.parametrize("weighting", ["softmax", "shrink", "rectified"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 4, 1), (2, 1, 6), (2, 4, 6)])
def test_thresholds_of_each_query(weighting, shape):
    generator = torch.Generator().manual_seed(1)
    draws = torch.rand(shape, generator=generator, dtype=torch.float64) * 0.9 + 0.05
    wide = draws.expand(2, 4, 6)
    for rule in ("relative", "absolute"):
        options = {"rule": rule, "threshold": math.nan, "weighting": weighting, "thresholds": draws}
        compare(inputs(), cut=lambda b, h, i: wide[b, h, i].item(), **options)


@every_choice
def test_rows_without_keys(rule, threshold, weighting):
    padding = torch.tensor([[True] * 9, [False] * 9])
    choice = {"rule": rule, "threshold": threshold, "weighting": weighting}
    mask, log_sum = compare(inputs(), lambda b, *_: b == 1, key_padding_mask=padding, **choice)
    assert log_sum[0].isneginf().all() and not mask[0].any() and mask[1].any()


@every_choice
def test_hidden_keys_may_hold_anything(rule, threshold, weighting):
    query, key, value = inputs()
    padding = torch.arange(9).expand(2, 9) >= 6
    choice = {"rule": rule, "threshold": threshold, "weighting": weighting}
    expected, *_ = reference.threshold_attention_support(*op_arguments(query, key[:, :, :6], value[:, :, :6], **choice))
    key[:, :, 6:], value[:, :, 6:] = torch.nan, torch.inf
    out = reference.threshold_attention(*op_arguments(query, key, value, key_padding_mask=padding, **choice))
    torch.testing.assert_close(out, expected)


@every_choice
def test_undefined_scores_show(rule, threshold, weighting):
    """A row with a NaN score keeps exactly the NaN scores; one with a score of +inf gives NaN; no other row changes."""
    tensors = inputs()
    choice = {"rule": rule, "threshold": threshold, "weighting": weighting}
    expected = reference.threshold_attention(*op_arguments(*tensors, **choice))
    for undefined in (torch.nan, torch.inf):
        bias = torch.zeros(2, 4, 6, 9, dtype=torch.float64)
        bias[1, 2, 3, 4] = undefined
        out, row_ptr, col_idx, *_ = reference.threshold_attention_support(
            *op_arguments(*tensors, attn_bias=bias, **choice)
        )
        assert out[1, 2, 3].isnan().all()
        out[1, 2, 3] = expected[1, 2, 3]
        assert torch.equal(out, expected)
        row = (1 * 4 + 2) * 6 + 3
        if undefined != undefined:
            assert col_idx[row_ptr[row] : row_ptr[row + 1]].tolist() == [4]


def test_mass_of_one_keeps_every_visible_key():
    """The running sum of a float32 softmax reaches 1 long before the last of these keys."""
    tensors = attention_inputs(1, 1, 3, 200, 4)
    mask = reference.threshold_attention_support(*op_arguments(*tensors, rule="topp", threshold=1.0, scale=9.0))
    assert mask[1].tolist() == [0, 200, 400, 600]


@pytest.mark.parametrize("alpha", [1.5, 2.0])
@pytest.mark.parametrize("spread", [1e-3, 1.0, 1e3, 1e30])
def test_entmax_of_any_size_of_scores(alpha, spread):
    """In float32 too: squares of scores must not overflow, sums of them not cancel."""
    scores = torch.randn(10, 300, generator=torch.Generator().manual_seed(1)) * spread
    identity = torch.eye(300)[None, None]
    arguments = op_arguments(scores[None, None], identity, identity, rule="entmax", threshold=alpha, scale=1.0)
    weights = reference.threshold_attention(*arguments)[0, 0]
    truth = torch.zeros(10, 300, dtype=torch.float64)
    for i in range(10):
        kept, values = row_by_definition(scores[i].double(), "entmax", alpha, None)
        truth[i, kept] = torch.tensor(values, dtype=torch.float64)
    # tau is a mean over the kept scores, a weight at most twice as steep in both; each of these errs by a few roundings
    # of what lies within 2 of the largest, and by that of the scores times alpha - 1.
    size = scores.abs().amax(-1, keepdim=True) * (truth > 0)
    assert ((weights - truth).abs() <= 4 * torch.finfo(torch.float32).eps * (1 + size)).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(10))


WORDS = [  # counter, key, result: Random123's kat_vectors, philox4x32 of 10 rounds
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "key", "expected"), WORDS)
def test_philox_known_answers(counter, key, expected):
    counter, key, expected = ([int(word, 16) for word in words.split()] for words in (counter, key, expected))
    seed = key[0] | key[1] << 32
    seed = seed - 2**64 if seed >= 2**63 else seed  # an op's seed is an int64
    words = philox(seed, *(torch.tensor([word]) for word in counter))
    assert [word.item() for word in words] == expected


def test_dropout_keeps_its_share():
    rows, columns = torch.arange(200)[:, None].expand(200, 300), torch.arange(300).expand(200, 300)
    for p in (0.1, 0.5, 0.9):
        kept = kept_by_dropout(rows, columns, p, 7)
        # Six standard deviations of a binomial count: one seed in 10^9 would fail.
        assert abs(kept.sum() - (1 - p) * 60000) < 6 * math.sqrt(60000 * p * (1 - p))
    assert not torch.equal(kept_by_dropout(rows, columns, 0.5, 7), kept_by_dropout(rows, columns, 0.5, 8))
    far = kept_by_dropout(rows + (5 << 32), columns, 0.5, 7)
    assert not torch.equal(kept_by_dropout(rows, columns, 0.5, 7), far)


@every_choice
def test_dropout_is_of_the_weights(rule, threshold, weighting):
    tensors = inputs()
    options = {"rule": rule, "threshold": threshold, "weighting": weighting}
    out, row_ptr, col_idx, weights, *rest = reference.threshold_attention_support(
        *op_arguments(*tensors, dropout_p=0.4, seed=11, **options)
    )
    _, *expected = reference.threshold_attention_support(*op_arguments(*tensors, **options))
    for ours, theirs in zip((row_ptr, col_idx, weights, *rest), expected, strict=True):
        assert torch.equal(ours, theirs)  # the support is that before dropout
    rows = torch.arange(48).repeat_interleave(row_ptr.diff())
    dense = torch.zeros(48, 9, dtype=torch.float64)
    for row, column, weight in zip(rows.tolist(), col_idx.tolist(), weights.tolist(), strict=True):
        if kept_by_dropout(torch.tensor([row]), torch.tensor([column]), 0.4, 11):
            dense[row, column] = weight / 0.6
    assert 0 < (dense > 0).sum() < len(weights)
    torch.testing.assert_close(out, dense.view(2, 4, 6, 9) @ tensors[2].repeat_interleave(2, 1))
