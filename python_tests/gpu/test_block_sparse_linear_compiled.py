"""Level L3: the PTX that Triton compiles the block-sparse kernels to, executed on the CPU, against float64."""

import pytest
import torch

pytest.importorskip("triton")

from compsparse_kernels.ops.block_sparse_linear import triton as kernels
from python_tests.gpu import ledger
from python_tests.gpu.problems import BACKWARD, DIRECTIONS, FORWARD, SAMPLED, Check, problem

TARGETS = ("sm_80", "sm_90", "sm_100")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Block, features, batch. Multiples of 16 are copied asynchronously, others element by element. With tiles that fit
# exactly a lost mask would change nothing, so most don't.
SHAPES = {
    "ragged, copied": ((32, 64), (80, 144), 37),
    "ragged, by element": ((16, 32), (70, 100), 37),
    "even": ((64, 64), (128, 192), 70),
    "padded": ((24, 40), (70, 90), 5),
    "large": ((128, 128), (208, 304), 33),
    "small": ((8, 8), (36, 44), 19),
    "ones": ((16, 16), (1, 1), 1),  # sizes of 1 become constants
}
DEFAULT = [("ragged, copied", dtype) for dtype in DTYPES]
DEFAULT += [("ragged, by element", torch.float16), ("even", torch.bfloat16), ("padded", torch.bfloat16)]
DEFAULT += [("large", torch.bfloat16), ("small", torch.float16), ("ones", torch.float32)]
CASES = [
    pytest.param(shape, dtype, marks=[] if (shape, dtype) in DEFAULT else pytest.mark.long)
    for shape in SHAPES
    for dtype in DTYPES
]


def by_name(direction):
    return direction.name


def run(check: Check, **options) -> None:
    check.run(**options)
    ledger.reached("L3", check.name)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("direction", DIRECTIONS, ids=by_name)
@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_compiled_code_computes_the_reference(shape, dtype, direction, target):
    run(Check(direction, problem(*SHAPES[shape], dtype), target))


@pytest.mark.parametrize("direction", DIRECTIONS, ids=by_name)
def test_exact_sums_are_rounded_correctly(direction):
    run(Check(direction, problem(*SHAPES["ragged, copied"], torch.float16, integers=True), "sm_80"))


@pytest.mark.parametrize("direction", DIRECTIONS, ids=by_name)
def test_nan_stays_where_it_belongs(direction):
    run(Check(direction, direction.spoil(problem(*SHAPES["ragged, copied"], torch.bfloat16)), "sm_80"))


@pytest.mark.parametrize("direction", DIRECTIONS, ids=by_name)
def test_an_empty_last_row_reads_no_index(direction):
    run(Check(direction, problem(*SHAPES["ragged, copied"], torch.float16, empty_last_row=True), "sm_80"))


@pytest.mark.parametrize("direction", [FORWARD, BACKWARD, SAMPLED], ids=by_name)
def test_shared_slots(direction):
    run(Check(direction, problem(*SHAPES["ragged, copied"], torch.float16, shared=True), "sm_80"))


def test_exact_float32_products():
    run(Check(FORWARD, problem(*SHAPES["ragged, copied"], torch.float32), "sm_80", tf32=False))


@pytest.mark.parametrize("direction", [FORWARD, SAMPLED], ids=by_name)
def test_no_order_of_programs_and_no_division_among_warps_changes_a_result(direction):
    """The size and order of the steps are in the launch's arguments, not in the configuration."""
    p = problem(*SHAPES["even"], torch.bfloat16)
    results = []
    for number, config in enumerate(kernels.CONFIGS[:2] + kernels.CONFIGS[4:5]):
        check = Check(direction, p, "sm_80", config)
        order = list(range(check.launch.programs))
        run(check, order=order[::-1] if number else order)
        results.append(check.output)
    assert all(torch.equal(results[0], result) for result in results)
