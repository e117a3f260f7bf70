"""The Triton kernels of block_sparse_linear: offsets past 2^31, protected pages, and damage that must be seen."""

import pytest
import torch

from compsparse_kernels.ops.block_sparse_linear import reference, triton
from python_tests.gpu.interpreter.cases import Case, check_product, check_sampled, check_sampled_nan
from python_tests.gpu.interpreter.far_cases import FAR_CASES
from python_tests.gpu.interpreter.guard_pages import exit_code_of, guarded
from python_tests.gpu.interpreter.mutants import Mutant, load, mutants

pytestmark = pytest.mark.usefixtures("unwritten_is_nan")


@pytest.mark.parametrize("far_case", FAR_CASES, ids=lambda case: case.__name__)
def test_offsets_past_32_bits(far_case):
    result, exact = far_case()
    assert torch.equal(result, exact)
    assert (result != 0).any()


@pytest.mark.parametrize("at", ["start", "end"])
@pytest.mark.parametrize("transposed", [False, True])
def test_protected_pages(transposed, at):
    """Without the strict interpreter, whose own check of bounds is thus checked as well."""
    case = Case((24, 20), (3, 4), (5, 7), 21, transposed=transposed)
    layout = case.layout()
    shapes = (21, layout.in_features), layout.values_shape, (layout.out_features,)
    x, values, bias = (guarded(case.tensor(*shape, seed=seed), at) for seed, shape in enumerate(shapes))
    order = [guarded(part, at) for part in layout.by_output]
    y = guarded(torch.zeros(21, layout.out_features), at)
    exact = reference.block_sparse_linear(x, values, bias, *order, layout.out_features, transposed, "relu")

    def product():
        triton.product_launch(x, values, bias, *order, transposed, "relu", y)()
        torch.testing.assert_close(y, exact)

    grad = guarded(torch.ones(layout.num_slots, *layout.block_shape), at)

    def sampled():
        triton.sampled_launch(y, x, *order, False, grad)()

    assert exit_code_of(product) == 0
    assert exit_code_of(sampled) == 0


EMPTY_LAST_ROW = 4
# Few, small, and ragged in every way: what kernels damaged in one place are tried on.
PROBES = (
    Case((24, 20), (3, 3), (5, 7), 21, activation="gelu"),
    Case((24, 20), (3, 3), (5, 7), 21, activation="silu", transposed=True, slots=3),
    Case((16, 64), (2, 2), (0, 3), 33, "float16", activation="relu", fewest_programs=0, density=1.0),
    Case((16, 32), (2, 2), (3, 0), 40, "tf32", slots=2, density=1.0),
    Case((16, 128), (9, 2), (0, 0), 17, "bfloat16", with_bias=False, density=0.5),
    Case((20, 16), (9, 2), (0, 0), 17, "tf32", density=0.5, fewest_programs=0),
    Case((16, 16), (8, 3), (0, 0), 16, density=0.15, seed=EMPTY_LAST_ROW),
)


def damage_seen(mutant: Mutant, folder) -> bool:
    """Does any of the checks of this folder fail?"""
    kernels = load(mutant, folder)
    try:
        for case in PROBES:
            check_product(case, kernels)
            check_sampled(case, kernels)
        check_sampled_nan(PROBES[0], kernels)
        for far_case in FAR_CASES:
            assert torch.equal(*far_case(kernels))
    except Exception:
        return True
    return False


def test_undamaged_kernels_pass(tmp_path):
    empty = PROBES[-1].layout().block_mask()
    assert empty.any() and not empty[-1].any()
    with open(triton.__file__) as file:
        assert not damage_seen(Mutant("none", 0, "", file.read()), tmp_path)


def check_damage_is_seen(damaged, folder):
    """At least four of five: some changes have no effect, such as a mask of lanes that are not stored later on."""
    survivors = [mutant for mutant in damaged if not damage_seen(mutant, folder)]
    print(f"\ninterpreter: {len(damaged) - len(survivors)} of {len(damaged)} damaged kernels caught")
    for mutant in survivors:
        print(f"interpreter: survives: line {mutant.line}, {mutant.kind}: {mutant.changed}")
    assert len(survivors) <= 0.2 * len(damaged)


def test_some_damage_is_seen(tmp_path):
    check_damage_is_seen(mutants(triton.__file__)[::10], tmp_path)


@pytest.mark.long
def test_any_damage_is_seen(tmp_path):
    check_damage_is_seen(mutants(triton.__file__), tmp_path)
