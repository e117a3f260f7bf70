"""Level L3: the PTX that Triton compiles the kernels of thresholded attention to, executed on the CPU, against
float64."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from compsparse_kernels.ops.threshold_attention import triton as kernels
from python_tests.gpu import ledger
from python_tests.gpu.attention_problems import WRITTEN, Case, check
from python_tests.gpu.emulated import emulated

EVEN = Case(16, 64, 16, 16, 1, 1, 1, precision="bfloat16")
RAGGED = Case(5, 37, 11, 9, 1, 1, 1, precision="float16", rule="absolute", threshold=0.4, weighting="shrink")


def check_case(case: Case, target: str, backwards: bool = False) -> dict:
    """Forward and backward are within their budgets; returns what they computed."""

    def run(op, arguments):
        torch.use_deterministic_algorithms(True)  # fresh memory holds NaN: what nobody writes is seen
        try:
            with emulated(kernels, WRITTEN, target, backwards):
                return getattr(kernels, op)(*arguments)
        finally:
            torch.use_deterministic_algorithms(False)

    results = check(case, run)
    ledger.reached("L3", f"threshold_attention {case.rule} {case.weighting} {case.precision} {case.width} {target}")
    return results


@pytest.mark.parametrize(("case", "target"), [(EVEN, "sm_90"), (RAGGED, "sm_80")], ids=["even", "ragged"])
def test_compiled_code_computes_the_reference(case, target):
    check_case(case, target)


SMALL_EVEN = replace(EVEN, keys=32)
OPTIONS = {
    "relative shrink": {"weighting": "shrink", "threshold": 0.3},
    "rectified": {"weighting": "rectified", "rule": "absolute", "threshold": 0.2},
    "causal": {"is_causal": True, "query_offset": 3, "alibi": True},
    "window": {"window": (5, 2), "padding": True},
    "bias": {"bias": ("float", (True, False, True, True)), "per_query": True},
    "bool": {"bias": ("bool", (False, True, True, True)), "dropout_p": 0.3},
    "sequences": {"sequences": 2, "integers": True, "threshold": 1.0},
}


@pytest.mark.long
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("precision", ["tf32", "ieee", "float16", "bfloat16"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("case", [SMALL_EVEN, RAGGED], ids=["even", "ragged"])
def test_every_option(case, options, precision, target):
    check_case(replace(case, precision=precision, **OPTIONS[options]), target)


@pytest.mark.long
def test_no_order_of_programs_changes_a_result():
    case = replace(SMALL_EVEN, queries=70, dropout_p=0.2)
    first, second = (check_case(case, "sm_80", backwards) for backwards in (False, True))
    assert all(torch.equal(first[name], second[name]) for name in first)
