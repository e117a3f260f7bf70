"""Level L3: the PTX that Triton compiles the kernels of N:M products to, executed on the CPU, against float64."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from compsparse_kernels.ops.masked_linear import triton as kernels
from python_tests.gpu import ledger
from python_tests.gpu.emulated import emulated
from python_tests.gpu.nm_products import OPS, Case, check, products
from python_tests.gpu.problems import as_tf32

WRITTEN = {"product_kernel": ("y",), "sampled_kernel": ("values",)}
RAGGED = Case(2, 4, (70, 102), 19, "float16", fewest_programs=0)
EVEN = Case(2, 4, (64, 128), 37, "bfloat16", fewest_programs=0)  # slots are read at once, operands asynchronously


def check_ops(case: Case, target: str, backwards: bool = False) -> list[torch.Tensor]:
    """Each op's result is within its budget; returns them."""
    results = []
    for product in products(case):
        torch.use_deterministic_algorithms(True)  # fresh memory holds NaN: what nobody writes is seen
        try:
            with case.settings(), emulated(kernels, WRITTEN, target, backwards):
                results.append(product.run(kernels))
        finally:
            torch.use_deterministic_algorithms(False)
        name = f"{product.op} {case.precision} {case.n}:{case.m} {case.features} {target}"
        check(case, product, results[-1], name, as_tf32 if case.precision == "tf32" else None)
        ledger.reached("L3", name)
    return results


@pytest.mark.parametrize(
    ("case", "target"),
    [
        (RAGGED, "sm_80"),
        (EVEN, "sm_90"),
        (replace(EVEN, n=4, m=8, precision="float16", integers=True), "sm_80"),
        (Case(3, 5, (33, 41), 5, "tf32"), "sm_80"),
    ],
    ids=["ragged", "even", "integers", "padded"],
)
def test_compiled_code_computes_the_reference(case, target):
    check_ops(case, target)


@pytest.mark.long
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("precision", ["tf32", "ieee", "float16", "bfloat16"])
@pytest.mark.parametrize("pattern", [(1, 2), (2, 4), (4, 8), (2, 16), (3, 17), (8, 32)], ids=str)
@pytest.mark.parametrize("case", [RAGGED, EVEN], ids=["ragged", "even"])
def test_every_pattern(case, pattern, precision, target):
    check_ops(replace(case, n=pattern[0], m=pattern[1], precision=precision), target)


@pytest.mark.long
@pytest.mark.parametrize("case", [RAGGED, EVEN], ids=["ragged", "even"])
def test_no_order_of_programs_changes_a_result(case):
    small = replace(case, fewest_programs=264)
    results = [check_ops(small, "sm_80", backwards) for backwards in (False, True)]
    assert len(results[0]) == len(OPS) and all(torch.equal(*pair) for pair in zip(*results, strict=True))
