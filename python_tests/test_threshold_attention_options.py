"""Options of thresholded attention: windows, ALiBi, sequences, nested tensors, caches, dropout, what is returned."""

import pytest
import torch
import torch.nn.functional as F

from compsparse_kernels import AttentionSupport, threshold_attention
from compsparse_kernels.ops.threshold_attention.dropout import kept_by_dropout
from compsparse_kernels.testing import DTYPES, HALVES, attention_inputs
from python_tests.attention import alibi, check, choice_options, run, whole_inputs

SCALE = 0.375  # whole_inputs
# One choice of each way to weigh.
CHOICES = [
    ("relative", 0.3, "softmax"),
    ("absolute", 0.4, "shrink"),
    ("relative", 0.3, "rectified"),
    ("topk", 5, "softmax"),
    ("topp", 0.7, "softmax"),
    ("entmax", 1.5, "softmax"),
]
every_choice = pytest.mark.parametrize("choice", CHOICES, ids=[f"{c[0]}-{c[2]}" for c in CHOICES])
KEEP_ALL = {"threshold": 1e-300}


def distances(queries, keys, offset=0):
    """Position of the key minus that of the query, ``[Tq, Tk]``."""
    return torch.arange(keys) - torch.arange(queries)[:, None] - offset


@every_choice
@pytest.mark.parametrize("window", [0, 3, (5, 0), (-1, 2), (2, -1), (0, 40)])
def test_window_is_a_mask(choice, window):
    tensors = whole_inputs(2, 2, 30, 40, 8)
    options = choice_options(choice) | {"scale": SCALE}
    left, right = (window, window) if isinstance(window, int) else window
    for causal, offset in ((False, 0), (True, 4), (False, -3)):
        far = distances(30, 40, offset)
        sees = (far >= -left if left >= 0 else far == far) & (far <= right if right >= 0 else far == far)
        sees = sees & (far <= 0) if causal else sees
        expected = run(tensors, sees, **options)
        ours = run(tensors, window=window, is_causal=causal, query_offset=offset, **options)
        assert torch.equal(ours[1].to_mask(), expected[1].to_mask())
        torch.testing.assert_close((ours[0], *ours[2]), (expected[0], *expected[2]))
        assert torch.equal(ours[1].visible.expand(1, 1, 30).flatten(), sees.sum(-1))
        assert ours[1].share_kept == expected[1].share_kept


def test_window_in_full():
    """With everything kept, SDPA with the same mask."""
    tensors = attention_inputs(1, 2, 30, 40, 8)
    sees = distances(30, 40).abs() <= 4
    expected = F.scaled_dot_product_attention(*tensors, attn_mask=sees)
    torch.testing.assert_close(threshold_attention(*tensors, window=4, **KEEP_ALL), expected)


@every_choice
@pytest.mark.parametrize("dtype", DTYPES + HALVES)
def test_alibi(choice, dtype):
    tensors = whole_inputs(2, 4, 20, 40, 8, dtype=dtype)
    slopes = torch.tensor([0.0, 1.0, 2.0, 0.5]) * SCALE
    options = choice_options(choice) | {"scale": SCALE, "alibi_slopes": slopes, "query_offset": 20}
    check(tensors, is_causal=True, **options)
    check(tensors, **options)
    bias = alibi(slopes, 20, 40, 20).float()
    tensors = [tensor.float() for tensor in tensors]
    with_bias = threshold_attention(*tensors, attn_bias=bias, scale=SCALE, **choice_options(choice))
    torch.testing.assert_close(with_bias, threshold_attention(*tensors, **options))


@every_choice
@pytest.mark.parametrize("dtype", DTYPES + HALVES)
def test_sequences_are_each_alone(choice, dtype):
    lengths, key_lengths = [7, 0, 1, 20, 5], [9, 3, 0, 20, 11]
    tensors = whole_inputs(1, 4, sum(lengths), sum(key_lengths), 8, dtype=dtype, kv_heads=2)
    starts, key_starts = (torch.tensor([0, *sizes]).cumsum(0) for sizes in (lengths, key_lengths))
    options = choice_options(choice) | {"scale": SCALE, "is_causal": True, "window": (9, 0), "enable_gqa": True}
    options |= {"query_offset": 2, "alibi_slopes": torch.tensor([0.0, 1.0, 2.0, 0.0]) * SCALE}
    bounds = {"cu_seqlens_q": starts, "cu_seqlens_k": key_starts.int()}
    out, support, grads = run(tensors, **bounds, **options)
    mask, seen = support.to_mask(), torch.zeros_like(support.to_mask())
    visible = 0
    for s in range(5):
        rows, keys = slice(starts[s], starts[s + 1]), slice(key_starts[s], key_starts[s + 1])
        one = [tensors[0][:, :, rows], tensors[1][:, :, keys], tensors[2][:, :, keys]]
        alone, alone_support = threshold_attention(*one, return_support=True, **options)
        torch.testing.assert_close(out[:, :, rows], alone)
        assert torch.equal(mask[:, :, rows, keys], alone_support.to_mask())
        seen[:, :, rows, keys] = True
        visible += int(alone_support.visible.expand(alone_support.shape[:3]).sum())
    assert not (mask & ~seen).any() and mask.any()
    assert int(support.visible.expand(support.shape[:3]).sum()) == visible
    assert support.share_kept == support.nnz / visible
    exact = run([t.double() for t in tensors], backend="reference", **bounds, **options)
    tolerance = 1e-5 if dtype in DTYPES else 4 * torch.finfo(dtype).eps
    torch.testing.assert_close([g.double() for g in grads], list(exact[2]), rtol=tolerance, atol=tolerance)


def test_sequences_without_batch():
    query, key, value = attention_inputs(1, 2, 12, 12, 8)
    starts = torch.tensor([0, 5, 12])
    options = {"threshold": 0.2, "cu_seqlens_q": starts, "cu_seqlens_k": starts}
    out = threshold_attention(query[0], key[0], value[0], **options)
    assert torch.equal(out, threshold_attention(query, key, value, **options)[0])


def jagged(lengths, heads, width, seed):
    """``[B, H, tokens, width]``, and its parts ``[1, H, tokens, width]``."""
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(1, heads, n, width, generator=generator) for n in lengths]
    values = torch.cat([part[0].transpose(0, 1) for part in parts])
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return values, offsets, parts


@every_choice
def test_nested_tensors(choice):
    lengths, key_lengths = [7, 1, 20], [9, 4, 13]
    sources = [jagged(lengths, 4, 8, 0), jagged(key_lengths, 2, 8, 1), jagged(key_lengths, 2, 6, 2)]
    leaves = [values.requires_grad_() for values, _, _ in sources]
    bounds = sources[0][1], sources[1][1], sources[1][1]
    nested = [torch.nested.nested_tensor_from_jagged(v, b).transpose(1, 2) for v, b in zip(leaves, bounds, strict=True)]
    options = choice_options(choice) | {"enable_gqa": True, "is_causal": True}
    out, support = threshold_attention(*nested, return_support=True, **options)
    assert out.is_nested and out.layout == torch.jagged and out.shape[:2] == (3, 4) and out.shape[3] == 6
    assert out.shape == (*nested[0].shape[:3], 6)  # the ragged size is that of the query
    parts = zip(*(parts for _, _, parts in sources), strict=True)
    for ours, one in zip(out.unbind(), parts, strict=True):
        torch.testing.assert_close(ours, threshold_attention(*one, **options)[0])
    assert isinstance(support, AttentionSupport) and support.shape == (1, 4, 28, 26)
    _, degree = threshold_attention(*nested, return_support="degree", **options)
    for ours, one in zip(degree.unbind(), zip(*(parts for _, _, parts in sources), strict=True), strict=True):
        assert torch.equal(ours, threshold_attention(*one, return_support="degree", **options)[1][0])
    grads = torch.autograd.grad(out.values().sum(), leaves)
    assert all(grad.shape == leaf.shape and grad.any() for grad, leaf in zip(grads, leaves, strict=True))


def test_nested_tensors_under_autocast():
    values, bounds, parts = jagged([7, 1, 20], 2, 8, 0)
    nested = torch.nested.nested_tensor_from_jagged(values, bounds).transpose(1, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = threshold_attention(nested, nested, nested, threshold=0.1)
    assert out.dtype == torch.bfloat16
    expected = threshold_attention(parts[2], parts[2], parts[2], threshold=0.1)[0].bfloat16()
    torch.testing.assert_close(out.unbind()[2], expected)


@every_choice
@pytest.mark.parametrize("dtype", DTYPES + HALVES)
def test_decoding_equals_the_whole(choice, dtype):
    """A cache that grows: one query at a time, or a few, gives the rows of the whole causal attention."""
    query, key, value = whole_inputs(2, 4, 25, 25, 8, dtype=dtype, kv_heads=2)
    options = choice_options(choice) | {"scale": SCALE, "enable_gqa": True, "is_causal": True, "window": (12, 0)}
    options["alibi_slopes"] = torch.tensor([0.0, 1.0, 2.0, 3.0]) * SCALE
    whole, support = threshold_attention(query, key, value, return_support=True, **options)
    index = torch.ops.compsparse.threshold_attention_index(torch.empty_like(key))
    first = 0
    for count in (10, 1, 1, 4, 1, 8):
        end = first + count
        torch.ops.compsparse.threshold_attention_index_(index, key[:, :, first:end], first)
        panels = -(-end // 64)
        out, rows = threshold_attention(
            query[:, :, first:end],
            key[:, :, :end],
            value[:, :, :end],
            query_offset=first,
            index=index[:, :, :panels],
            return_support=True,
            **options,
        )
        torch.testing.assert_close(out, whole[:, :, first:end])
        assert torch.equal(rows.to_mask(), support.to_mask()[:, :, first:end, :end])
        first = end


@pytest.mark.parametrize("keys", [1, 150, 700])
def test_index_changes_sums_at_most(keys):
    tensors = attention_inputs(2, 4, 9, keys, 8, kv_heads=2)
    index = torch.ops.compsparse.threshold_attention_index(tensors[1])
    check(tensors, threshold=0.1, enable_gqa=True, index=index)
    check(tensors, threshold=0.4, rule="absolute", enable_gqa=True, index=index)


@every_choice
@pytest.mark.parametrize("dtype", DTYPES + HALVES)
def test_dropout(choice, dtype):
    tensors = whole_inputs(2, 4, 20, 40, 8, dtype=dtype, kv_heads=2)
    options = choice_options(choice) | {"scale": SCALE, "enable_gqa": True}
    support = check(tensors, dropout_p=0.3, seed=-5, **options)
    without = run(tensors, **options)[1]
    assert torch.equal(support.col_idx, without.col_idx)
    torch.testing.assert_close(support.weights, without.weights)  # to rounding: these may have gone by tiles
    few = [tensors[0][:, :, :3], *tensors[1:]]  # too few for tiles
    with_dropout, without = run(few, dropout_p=0.3, seed=-5, **options)[1], run(few, **options)[1]
    assert torch.equal(with_dropout.weights, without.weights)


def test_dropout_of_everything_kept():
    query, key, value = attention_inputs(1, 2, 30, 40, 8, dtype=torch.float64)
    out = threshold_attention(query, key, value, dropout_p=0.25, seed=2**62 + 3, **KEEP_ALL)
    weights = (query @ key.mT / 8**0.5).softmax(-1)
    rows = torch.arange(60).view(1, 2, 30, 1).expand(weights.shape)
    stays = kept_by_dropout(rows, torch.arange(40).expand(weights.shape), 0.25, 2**62 + 3)
    torch.testing.assert_close(out, (weights * stays / 0.75) @ value)


def test_seed_of_dropout():
    tensors = attention_inputs(1, 2, 30, 40, 8)
    options = {"threshold": 0.01, "dropout_p": 0.5}

    def attend(seed=None):
        return threshold_attention(*tensors, seed=seed, **options)

    assert torch.equal(attend(1), attend(1)) and not torch.equal(attend(1), attend(2))
    assert not torch.equal(attend(1), attend(1 + 2**32))  # all 64 bits count
    torch.manual_seed(0)
    first, second = attend(), attend()
    torch.manual_seed(0)
    assert torch.equal(attend(), first) and torch.equal(attend(), second) and not torch.equal(first, second)


def test_a_seed_without_dropout_draws_nothing():
    tensors = attention_inputs(1, 2, 3, 4, 8)
    before = torch.get_rng_state()
    out = threshold_attention(*tensors, threshold=0.1, seed=3)
    assert torch.equal(out, threshold_attention(*tensors, threshold=0.1)) and torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 2, 3)])
def test_what_is_returned(leading):
    tensors = [torch.randn(*leading, n, 8) for n in (12, 15, 15)]
    options = {"threshold": 0.1, "is_causal": True}
    out, support = threshold_attention(*tensors, return_support="csr", **options)
    same, degree = threshold_attention(*tensors, return_support="degree", **options)
    assert torch.equal(out, same) and degree.dtype == torch.int64
    assert degree.shape == (*leading, 12) and torch.equal(degree.flatten(), support.degree.flatten())
    scores = (tensors[0] @ tensors[1].mT / 8**0.5).reshape(support.shape)
    expected = scores.masked_fill(~support.to_mask(), -torch.inf).logsumexp(-1)
    torch.testing.assert_close(support.log_sum, expected)
    pairs = support.degree.numel() // 12 * sum(range(1, 13))
    assert support.share_kept == support.nnz / pairs > support.density


def test_log_sum_of_an_empty_row():
    out, support = threshold_attention(
        *attention_inputs(1, 1, 3, 4, 8), threshold=1e9, rule="absolute", return_support=True
    )
    assert support.log_sum.isneginf().all() and support.share_kept == 0 and not out.any()


def test_visible_keys_of_masks():
    """Counts of what padding, bool bias, causality and a window leave together, broadcast as they are."""
    tensors = attention_inputs(2, 4, 10, 20, 8)
    generator = torch.Generator().manual_seed(0)
    padding = torch.rand(2, 20, generator=generator) > 0.6
    sees = (distances(10, 20, 5) <= 0) & (distances(10, 20, 5) >= -6)
    options = {"threshold": 0.1, "is_causal": True, "window": (6, -1), "query_offset": 5, "return_support": True}
    for shape in ((10, 20), (20,), (10, 1), (4, 1, 20), (2, 4, 10, 20)):
        bias = torch.rand(shape, generator=generator) > 0.3
        _, support = threshold_attention(*tensors, attn_bias=bias, key_padding_mask=padding, **options)
        expected = (bias & sees & ~padding[:, None, None]).expand(2, 4, 10, 20)
        assert torch.equal(support.visible.expand(2, 4, 10), expected.sum(-1))
    assert torch.equal(threshold_attention(*tensors, **options)[1].visible.flatten(), sees.sum(-1))


@pytest.mark.parametrize("width", [3, 8, 20, 96, 256])
@pytest.mark.parametrize("dtype", DTYPES + HALVES)
def test_widths(width, dtype):
    scale = SCALE / 2 ** max(0, width.bit_length() // 2 - 1)  # scores of the same size for all
    for choice in CHOICES:
        check(whole_inputs(1, 2, 9, 70, width, width + 3, dtype=dtype), scale=scale, **choice_options(choice))


@every_choice
def test_not_contiguous(choice):
    packed = torch.randn(2, 33, 3, 4, 16, generator=torch.Generator().manual_seed(0))
    views = [packed[:, :, which].transpose(1, 2) for which in range(3)]
    expected = run([view.contiguous() for view in views], **choice_options(choice))
    for given_views in (views, [view.mT.contiguous().mT for view in views]):
        out, support, grads = run(given_views, **choice_options(choice))
        assert torch.equal(out, expected[0]) and torch.equal(support.col_idx, expected[1].col_idx)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(grads, expected[2], strict=True))


@every_choice
def test_no_heads_and_no_batch(choice):
    for batch, heads in ((0, 2), (2, 0)):
        tensors = [torch.zeros(batch, heads, n, 4, requires_grad=True) for n in (3, 5, 5)]
        out, support = threshold_attention(*tensors, return_support=True, **choice_options(choice))
        assert out.shape == (batch, heads, 3, 4) and support.nnz == 0
        grads = torch.autograd.grad(out.sum(), tensors)
        assert [grad.shape for grad in grads] == [tensor.shape for tensor in tensors]
