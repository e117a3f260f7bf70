"""The Triton kernels of thresholded attention, strictly interpreted, against the float64 reference."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compsparse_kernels.ops.threshold_attention import reference
from compsparse_kernels.ops.threshold_attention import triton as kernels
from python_tests.gpu import ledger
from python_tests.gpu.attention_problems import Case, check
from python_tests.gpu.interpreter.cases import PRECISIONS
from python_tests.gpu.interpreter.strict import strict

pytestmark = pytest.mark.usefixtures("unwritten_is_nan")

FULL = (True, True, True, True)
WEIGHTINGS = ("softmax", "shrink", "rectified")
CHOICES = [(rule, weighting) for rule in ("relative", "absolute") for weighting in WEIGHTINGS]
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
@settings(max_examples=4)
def test_any_attention(case):
    check_case(case)


@pytest.mark.long
@given(case=cases())
@settings(max_examples=300)
def test_many_attentions(case):
    check_case(case)


@pytest.mark.parametrize(("rule", "weighting"), CHOICES)
def test_rules(rule, weighting):
    number = CHOICES.index((rule, weighting))
    precision = list(PRECISIONS)[number % len(PRECISIONS)]
    check_case(replace(SMALL, rule=rule, weighting=weighting, precision=precision, threshold=0.3))


