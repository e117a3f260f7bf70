"""The screens of thresholded attention lose no survivor: supports against float64 on data made to be hard for them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compsparse_kernels import threshold_attention
from compsparse_kernels.testing import attention_inputs
from python_tests.attention import NO_KERNELS, check

pytestmark = pytest.mark.skipif(NO_KERNELS is not None, reason=str(NO_KERNELS))


def gaussian(shape, generator):
    return torch.randn(shape, generator=generator)


def clustered(shape, generator):
    centers = 3 * torch.randn(*shape[:2], 7, shape[3], generator=generator)
    which = torch.randint(7, (shape[2],), generator=generator)
    return centers[:, :, which] + 0.3 * torch.randn(shape, generator=generator)


def tied(shape, generator):
    """Small whole numbers: many equal scores, many at the threshold itself."""
    return torch.randint(-2, 3, shape, generator=generator).float()


def one_dominates(shape, generator):
    x = torch.randn(shape, generator=generator)
    x[:, :, shape[2] // 2] *= 1e4
    return x


def of_all_sizes(shape, generator):
    return torch.randn(shape, generator=generator) * 10.0 ** torch.randint(-6, 5, (*shape[:3], 1), generator=generator)


def huge(shape, generator):
    return 1e15 * torch.randn(shape, generator=generator)


def tiny(shape, generator):
    """Products underflow: scores are 0, or the bias alone."""
    return 1e-25 * torch.randn(shape, generator=generator)


def denormal(shape, generator):
    return 1e-41 * torch.randn(shape, generator=generator)


FLAVOURS = [gaussian, clustered, tied, one_dominates, of_all_sizes, huge, tiny, denormal]


def exact_scores(query, key, bias, scale):
    """Scores in float64, and how far these and those that the kernels decide by may be off together."""
    scores = scale * query.double() @ key.double().mT
    norms = query.double().norm(dim=-1, keepdim=True) * key.double().norm(dim=-1)[:, :, None]
    error = 2 * (query.shape[-1] + 8) * 2.0**-53 * scale * norms
    if bias is not None:
        scores = scores + bias.double()
        error = error + 2.0**-50 * bias.double().abs().nan_to_num(posinf=0, neginf=0)
    return scores, error


def assert_exact_support(query, key, rule, threshold, bias=None, scale=0.3, **options):
    value = torch.randn(*key.shape[:3], 8)
    options |= {"rule": rule, "threshold": threshold, "attn_bias": bias, "scale": scale}
    _, support = threshold_attention(query, key, value, return_support=True, **options)
    scores, error = exact_scores(query, key, bias, scale)
    cut = threshold
    if rule == "relative":
        top = scores.amax(-1, keepdim=True)
        cut = top + math.log(threshold)
        error = error + error.gather(-1, scores.argmax(-1, keepdim=True)) + 2.0**-50 * top.abs().nan_to_num(neginf=0)
    expected, decided = scores >= cut, (scores - cut).abs() > error
    expected &= scores > -math.inf
    decided |= scores == -math.inf
    wrong = (support.to_mask() != expected) & decided
    assert not wrong.any(), (int(wrong.sum()), int(expected.sum()))
    return support


@given(
    flavours=st.tuples(st.sampled_from(FLAVOURS), st.sampled_from(FLAVOURS)),
    queries=st.integers(9, 60),
    keys=st.integers(256, 900),
    width=st.integers(1, 70),
    choice=st.sampled_from([("relative", 0.9), ("relative", 0.05), ("relative", 1e-6), ("absolute", 0.5)]),
    hidden=st.sampled_from([None, 0.2, 0.95]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_no_survivor_is_lost(flavours, queries, keys, width, choice, hidden, seed):
    generator = torch.Generator().manual_seed(seed)
    query = flavours[0]((1, 2, queries, width), generator)
    key = flavours[1]((1, 2, keys, width), generator)
    bias = None
    if hidden is not None:
        bias = torch.randn(2, queries, keys, generator=generator)
        bias = bias.masked_fill(torch.rand(2, queries, keys, generator=generator) < hidden, -torch.inf)
    assert_exact_support(query, key, *choice, bias)


@pytest.mark.parametrize("width", [4, 5, 8, 64, 67, 256])
@pytest.mark.parametrize("pattern", ["equal", "alternating", "first of eight", "pairs"])
def test_codes_of_the_largest_size(pattern, width):
    """All numbers of a token are equal in size, or a few are all there is: sums of products of codes are the largest
    that the screen can meet."""
    place = torch.arange(width)
    query = {
        "equal": torch.ones(width),
        "alternating": 1.0 - 2.0 * (place % 2),
        "first of eight": (place % 8 == 0).float(),
        "pairs": (place // 2 % 2 == 0).float(),
    }[pattern]
    key = query * (1 + 1e-4 * torch.arange(300)[:, None])
    key[::3] *= -1  # whose codes are the smallest
    key[1] = query.sign()
    assert_exact_support(query.expand(1, 1, 30, width), key[None, None], "relative", 0.999, scale=1.0)
    assert_exact_support(-query.expand(1, 1, 30, width), key[None, None], "relative", 0.999, scale=1.0)


@pytest.mark.parametrize("keys", [256, 2048, 5000])
@pytest.mark.parametrize("sharpness", [0.01, 1.0, 20.0])  # nearly all are kept, some, hardly any
@pytest.mark.parametrize("queries", [1, 8, 9, 50])
def test_every_way_through_a_block(queries, sharpness, keys):
    query, key, _ = attention_inputs(1, 2, queries, keys, 32)
    support = assert_exact_support(sharpness * query, key, "relative", 0.05)
    kept = support.density
    assert kept == 1 if sharpness == 0.01 else 0 < kept < 1 if sharpness == 1 else kept < 0.05


@pytest.mark.parametrize("sharpness", [0.01, 0.5, 20.0])
@pytest.mark.parametrize("weights", ["softmax", "rectified"])
def test_long_rows_within_budget(weights, sharpness):
    query, key, value = attention_inputs(1, 2, 30, 2500, 16)
    check((sharpness * query, key, value), threshold=0.05, weights=weights)


@pytest.mark.parametrize("sharpness", [0.01, 0.5])
def test_backward_of_blocks_that_keep_most_and_of_others(sharpness):
    """Few keys are seen by the first queries, all by the last: blocks of both kinds, the last one ragged."""
    query, key, value = attention_inputs(1, 4, 200, 330, 24, kv_heads=2)
    check((sharpness * query, key, value), threshold=0.05, is_causal=True, query_offset=130, enable_gqa=True)


def test_numbers_that_are_none_stay_where_they_are():
    """Zero times a NaN is a NaN, so where most keys are kept only finite values are multiplied with what is dropped."""
    query, key, value = attention_inputs(1, 1, 48, 300, 16)
    value[:, :, 7] = torch.nan
    bias = torch.zeros(48, 300)
    bias[::2, 7] = -torch.inf
    options = {"threshold": 0.1, "attn_bias": bias, "return_support": True}
    out, support = threshold_attention(0.1 * query, key, value, **options)
    assert support.density > 0.9
    assert torch.equal(out.isnan().any(-1)[0, 0], torch.arange(48) % 2 == 1)
