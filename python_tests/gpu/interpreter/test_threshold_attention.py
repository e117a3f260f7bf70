"""The Triton kernels of thresholded attention, strictly interpreted, against the float64 reference."""

from dataclasses import replace
from inspect import signature

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compsparse_kernels.ops.backends import why_not
from compsparse_kernels.ops.threshold_attention import reference
from compsparse_kernels.ops.threshold_attention import triton as kernels
from compsparse_kernels.testing import random_tensor
from python_tests.attention import op_arguments
from python_tests.gpu import ledger
from python_tests.gpu.attention_problems import Case, check
from python_tests.gpu.interpreter.cases import PRECISIONS
from python_tests.gpu.interpreter.strict import strict

pytestmark = pytest.mark.usefixtures("unwritten_is_nan")

FULL = (True, True, True, True)
WEIGHTINGS = ("softmax", "shrink", "rectified")
CHOICES = [(rule, weighting) for rule in ("relative", "absolute") for weighting in WEIGHTINGS]
LONG = pytest.mark.long
SOME_CHOICES = [pytest.param(*one, marks=() if number % 5 == 1 else LONG) for number, one in enumerate(CHOICES)]
SMALL = Case(queries=19, keys=41, width=16, value_width=16, batch=1, kv_heads=2)


def interpreted(seed=0, kernels=kernels):
    def run(op, arguments):
        with strict(seed):
            return getattr(kernels, op)(*arguments)

    return run


def check_case(case: Case, **options) -> dict:
    results = check(case, interpreted(case.seed), **options)
    ledger.reached("L1", f"threshold_attention {case.rule} {case.weighting} {case.precision} {case.width}")
    return results


@st.composite
def cases(draw):
    kv_heads = draw(st.integers(1, 2))
    sequences = draw(st.sampled_from([0, 0, 1, 3]))
    kinds = st.tuples(st.sampled_from(["bool", "float"]), st.tuples(*[st.booleans()] * 4))
    bound = st.sampled_from([-1, -1, 0, 3, 40])
    rule = draw(st.sampled_from(["relative", "absolute"]))
    return Case(
        queries=draw(st.sampled_from([1, 2, 16, 33, 65])),
        keys=draw(st.sampled_from([1, 5, 31, 32, 33, 97])),
        width=draw(st.sampled_from([1, 8, 16, 24, 40, 64])),
        value_width=draw(st.sampled_from([1, 8, 16, 30, 64])),
        batch=1 if sequences else draw(st.integers(1, 2)),
        heads=kv_heads * draw(st.integers(1, 2)),
        kv_heads=kv_heads,
        rule=rule,
        threshold=draw(st.sampled_from([0.01, 0.3, 1.0] if rule == "relative" else [-1.0, 0.5, 3.0])),
        weighting=draw(st.sampled_from(WEIGHTINGS)),
        precision=draw(st.sampled_from(list(PRECISIONS))),
        bias=draw(st.one_of(st.none(), kinds)),
        padding=draw(st.booleans()),
        alibi=draw(st.booleans()),
        per_query=draw(st.booleans()),
        sequences=sequences,
        is_causal=draw(st.booleans()),
        window=draw(st.tuples(bound, bound)),
        query_offset=draw(st.sampled_from([0, 0, 7])),
        dropout_p=draw(st.sampled_from([0.0, 0.0, 0.3])),
        integers=draw(st.booleans()),
        transposed=draw(st.booleans()),
        seed=draw(st.integers(0, 100)),
    )


@given(case=cases())
@settings(max_examples=3)
def test_any_attention(case):
    check_case(case)


@pytest.mark.long
@given(case=cases())
@settings(max_examples=60)
def test_many_attentions(case):
    check_case(case)


@pytest.mark.parametrize(("rule", "weighting"), CHOICES)
def test_rules(rule, weighting):
    number = CHOICES.index((rule, weighting))
    precision = list(PRECISIONS)[number % len(PRECISIONS)]
    check_case(replace(SMALL, rule=rule, weighting=weighting, precision=precision, threshold=0.3))


@pytest.mark.parametrize("number", range(8))
def test_options(number):
    """Each option by itself and with a few others; hypothesis draws all of them together."""
    options = (
        {"is_causal": True, "query_offset": 5, "width": 8},
        {"window": (7, 3), "rule": "absolute", "threshold": 0.5},
        {"padding": True, "bias": ("bool", (False, True, False, True))},
        {"bias": ("float", FULL), "transposed": True},
        {"alibi": True, "sequences": 3, "is_causal": True},
        {"per_query": True, "kv_heads": 1, "weighting": "shrink"},
        {"dropout_p": 0.4, "weighting": "rectified"},
        {"width": 100, "value_width": 130, "queries": 3, "keys": 35},
    )
    check_case(replace(SMALL, **options[number], precision=list(PRECISIONS)[number % 4]))


@pytest.mark.parametrize("precision", ["tf32", *(pytest.param(one, marks=LONG) for one in list(PRECISIONS)[1:])])
@pytest.mark.parametrize("choice", [("relative", 1.0), ("absolute", 0.5)])
def test_ties_are_kept_or_dropped_together(choice, precision):
    """Scores are halves of whole numbers: many equal the largest of their row, or the cut."""
    rule, threshold = choice
    results = check_case(replace(SMALL, rule=rule, threshold=threshold, integers=True, precision=precision))
    assert len(results["col_idx"]) > SMALL.queries * SMALL.heads  # of rule relative: ties of the largest


@pytest.mark.parametrize("precision", ["tf32", pytest.param("ieee", marks=LONG)])
def test_scores_next_to_the_cut_are_decided_exactly(precision):
    """Steps of 2^-40 of the score, which neither float32 nor tf32 can see."""
    query = torch.tensor([1.0, 2.0**-20]).expand(1, 1, 3, 2).contiguous()
    key = torch.tensor([[1.0, step * 2.0**-20] for step in range(-20, 21)]).view(1, 1, 41, 2)
    case = Case(1 * 3, 41, 2, 2, 1, 1, 1, rule="absolute", precision=precision)
    cut = torch.full((1, 1, 3), 1.0, dtype=torch.float64)
    arguments = op_arguments(query, key, key, rule="absolute", thresholds=cut, scale=1.0)
    results = check(case, interpreted(), arguments)
    assert results["col_idx"].tolist() == [*range(20, 41)] * 3
    exact_cut = cut + 5 * 2.0**-40
    arguments = op_arguments(query, key, key, rule="absolute", thresholds=exact_cut, scale=1.0)
    assert check(case, interpreted(), arguments)["col_idx"].tolist() == [*range(25, 41)] * 3


def test_threshold_one_keeps_every_maximum_of_equal_keys():
    query, key = random_tensor(1, 1, 9, 24), random_tensor(1, 1, 7, 24, seed=1).repeat(1, 1, 10, 1)
    arguments = op_arguments(query, key, key, threshold=1.0, scale=0.1)
    _, row_ptr, col_idx, weights, *_ = interpreted()("threshold_attention_support", arguments)
    assert (row_ptr.diff() == 10).all() and (col_idx.view(9, 10).diff() == 7).all()
    torch.testing.assert_close(weights, torch.full((90,), 0.1))


@pytest.mark.parametrize("factor", [1e-30, *(pytest.param(one, marks=LONG) for one in (1e-19, 1e15, 3e18))])
def test_sizes_of_norms(factor):
    """Squares underflow and overflow; the scores are what they were."""
    case = replace(SMALL, precision="ieee", threshold=0.3)
    query, key, value, *options = case.arguments()
    check(case, interpreted(), (query * factor, key / factor, value, *options))


def test_what_float32_overflows_on_is_decided_in_float64():
    """Scores of 1e39 in float64: the support is right, though the weights of float32 are undefined."""
    query, key, value, *options = SMALL.arguments()
    arguments = (query * 1e20, key * 1e20, value, *options)
    ours = interpreted()("threshold_attention_support", arguments)
    exact = reference.threshold_attention_support(*(one.double() for one in arguments[:3]), *options)
    assert torch.equal(ours[1], exact[1]) and torch.equal(ours[2], exact[2])
    assert (exact[1].diff() == 1).all()


def test_one_huge_key_loses_no_other():
    query, key, value, *options = replace(SMALL, rule="absolute", threshold=0.5).arguments()
    key[:, :, 7] *= 1e6
    case = replace(SMALL, rule="absolute", threshold=0.5, weighting="softmax")
    check(case, interpreted(), (query, key, value, *options), backward=False)


@pytest.mark.parametrize(("rule", "weighting"), SOME_CHOICES)
@pytest.mark.parametrize("where", ["query", "key", pytest.param("bias", marks=LONG)])
def test_undefined_scores_show(rule, weighting, where):
    case = replace(SMALL, rule=rule, weighting=weighting, threshold=0.3, bias=("float", FULL), padding=True)
    arguments = case.arguments()
    given = dict(zip(signature(reference.threshold_attention_support).parameters, arguments, strict=True))
    tensor = given["attn_bias"] if where == "bias" else given[where]
    tensor[0, 1, 5, 3] = float("nan")
    given["key_padding_mask"][0, [3, 5]] = False
    results = check(case, interpreted(), arguments, backward=False)
    assert results["out"].isnan().any() and not results["out"].isnan().all()


def test_infinite_scores_are_undefined_as_in_softmax():
    case = replace(SMALL, bias=("float", FULL))
    arguments = case.arguments()
    bias = arguments[3]
    bias[0, 1, 5, 3] = float("inf")
    results = check(case, interpreted(), arguments, backward=False)
    assert results["out"][0, 1, 5].isnan().all() and results["out"].isnan().sum() == case.value_width


def test_rows_of_values_count_only_for_who_keeps_them():
    query, key, value, *options = SMALL.arguments()
    clean, row_ptr, col_idx, *_ = interpreted()("threshold_attention_support", (query, key, value, *options))
    value[0, 1, 8, 2] = float("nan")
    value[0, 1, 9, 3] = float("inf")
    spoilt = interpreted()("threshold_attention", (query, key, value, *options))
    rows = torch.arange(len(row_ptr) - 1).repeat_interleave(row_ptr.diff())
    mask = torch.zeros(SMALL.heads, SMALL.queries, SMALL.keys, dtype=torch.bool)
    mask.view(-1, SMALL.keys)[rows, col_idx.long()] = True
    assert torch.equal(spoilt[0, 1, :, 2].isnan(), mask[1, :, 8]) and mask[1, :, 8].any()
    assert torch.equal(spoilt[0, 1, :, 3].isinf(), mask[1, :, 9]) and mask[1, :, 9].any()
    assert torch.equal(spoilt.masked_fill(~spoilt.isfinite(), 0), clean.masked_fill(~spoilt.isfinite(), 0))


def test_padded_keys_may_hold_anything():
    case = replace(SMALL, padding=True)
    query, key, value, *options = case.arguments()
    padding = options[1]
    clean = interpreted()("threshold_attention_support", (query, key, value, *options))
    hidden = padding[:, None, :, None]
    key, value = (tensor.masked_fill(hidden, float("nan")) for tensor in (key, value))
    spoilt = interpreted()("threshold_attention_support", (query, key, value, *options))
    assert padding.any() and all(torch.equal(*pair) for pair in zip(clean, spoilt, strict=True))


@pytest.mark.parametrize(("rule", "weighting"), SOME_CHOICES)
def test_rows_without_survivors(rule, weighting):
    case = replace(SMALL, rule=rule, weighting=weighting, threshold=0.3, is_causal=True, query_offset=-4, padding=True)
    results = check_case(case)
    none = (results["row_ptr"].diff() == 0).view(1, SMALL.heads, SMALL.queries)
    assert none.sum() >= 4 * SMALL.heads
    assert (results["out"][none] == 0).all() and (results["query_grad"][none] == 0).all()
    assert results["log_sum"][none].isneginf().all() and (results["cut_grad"][none] == 0).all()


@pytest.mark.parametrize("empty", [{"queries": 0}, {"keys": 0}, {"batch": 0}])
def test_empty(empty):
    case = replace(SMALL, **empty)
    results = check_case(case)
    assert results["out"].shape == (case.batch, case.heads, case.queries, case.value_width)


def test_no_survivor_at_all():
    results = check_case(replace(SMALL, rule="absolute", threshold=1e3))
    assert len(results["col_idx"]) == 0 and (results["out"] == 0).all() and (results["value_grad"] == 0).all()


def test_one_key_for_all_and_all_for_one():
    query, key, value, *options = SMALL.arguments()
    query, key = query.abs(), key * 0.01
    key[:, :, 17] = 3.0
    query[:, :, 4] = 0.0
    results = check(SMALL, interpreted(), (query, key, value, *options))
    degree = results["row_ptr"].diff().view(SMALL.heads, SMALL.queries)
    assert (degree[:, 4] == SMALL.keys).all() and (degree[:, 5:] == 1).all()


def test_the_output_alone_is_the_same():
    arguments = replace(SMALL, dropout_p=0.2).arguments()
    with_support = interpreted()("threshold_attention_support", arguments)[0]
    assert torch.equal(interpreted(1)("threshold_attention", arguments), with_support)


def test_no_order_of_programs_changes_a_bit():
    case = replace(SMALL, weighting="shrink", queries=33, heads=1, kv_heads=1, width=8, value_width=8)
    first, second = (check(case, interpreted(seed)) for seed in (1, 2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("rows", "keys"), [(16, 16), pytest.param(32, 16, marks=LONG)])
def test_no_size_of_a_tile_changes_the_support(rows, keys, monkeypatch):
    case = replace(SMALL, queries=40, heads=1, kv_heads=1, integers=True, threshold=0.3)
    usual = check(case, interpreted())
    monkeypatch.setattr(kernels, "FEW_ROWS", rows)
    monkeypatch.setattr(kernels, "KEYS", keys)
    other = check(case, interpreted())
    assert torch.equal(usual["row_ptr"], other["row_ptr"]) and torch.equal(usual["col_idx"], other["col_idx"])


def test_tiles_without_candidates_are_skipped():
    """Keys in clusters, in order: a query looks at the tiles of its own cluster alone, but for those before the first
    good one. What is hidden by the window is not even screened."""
    centers = 8 * torch.eye(8, 16).repeat_interleave(64, 0)
    key = (centers + 0.1 * random_tensor(512, 16)).view(1, 1, 512, 16)
    query = key[:, :, 64:128].contiguous()
    case = Case(64, 512, 16, 16, 1, 1, 1, threshold=0.1)
    given = (
        case.settings(),
        kernels.scoring(query, key, key, *[None] * 6, 0.1, "relative", "softmax", False, -1, -1, 0, 1.0),
    )
    with given[0], strict():
        screen = kernels.screen_launch(given[1])
        screen()
    tiles, counts = screen.arguments["tiles"], screen.arguments["tile_count"]
    listed = [tiles[program, :count].tolist() for program, count in enumerate(counts.tolist())]
    assert listed == [[0, 1, 2, 3]] * len(counts)  # of 16: two before the first good one


@pytest.mark.parametrize("rule", ["topk", "topp", "entmax"])
def test_other_rules_are_refused_with_a_reason(rule):
    reason = why_not("triton", "threshold_attention", rule=rule)
    assert reason == f"rule {rule!r} (has relative, absolute)"
