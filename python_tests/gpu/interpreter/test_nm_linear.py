"""The Triton kernels of N:M products, strictly interpreted, against the float64 reference."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compsparse_kernels.ops.masked_linear import triton as kernels
from python_tests.gpu import ledger
from python_tests.gpu.interpreter.cases import PRECISIONS
from python_tests.gpu.interpreter.mutants import Mutant, load, mutants
from python_tests.gpu.interpreter.nm_far_cases import FAR_CASES
from python_tests.gpu.interpreter.strict import strict
from python_tests.gpu.nm_products import OPS, Case, check, products
from python_tests.nm import PATTERNS

pytestmark = pytest.mark.usefixtures("unwritten_is_nan")

# Whole tiles whose slots are read at once: each width of a position, each number of slots.
EVEN = Case(features=(64, 64), batch=16, with_bias=False)
AT_ONCE = ((1, 2), (2, 4), (4, 4), (1, 8), (8, 16), (2, 32), (1, 64))


def check_ops(case: Case, ops=OPS, kernels=kernels) -> list[torch.Tensor]:
    """Each op of ``kernels`` is within its budget; returns what they computed."""
    results = []
    for product in products(case):
        if product.op in ops:
            with case.settings(kernels), strict(case.seed):
                results.append(product.run(kernels))
            check(case, product, results[-1], f"{product.op} of {case}")
            ledger.reached("L1", f"{product.op} {case.precision} {case.n}:{case.m} {case.features}")
    return results


@st.composite
def cases(draw):
    m = draw(st.one_of(st.integers(1, 20), st.sampled_from([32, 64, 129, 256])))
    side = st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 128]))
    return Case(
        n=draw(st.integers(1, min(m, 9))),
        m=m,
        features=(draw(side), draw(side)),
        batch=draw(st.sampled_from([1, 2, 15, 16, 17, 33, 70])),
        precision=draw(st.sampled_from(list(PRECISIONS))),
        with_bias=draw(st.booleans()),
        integers=draw(st.booleans()),
        fewest_programs=draw(st.sampled_from([0, 264])),
        seed=draw(st.integers(0, 100)),
    )


@given(case=cases())
@settings(max_examples=3)
def test_any_product(case):
    check_ops(case)


@pytest.mark.long
@given(case=cases())
@settings(max_examples=300)
def test_many_products(case):
    check_ops(case)


@pytest.mark.parametrize(
    "pattern", [pytest.param(one, marks=pytest.mark.long) if one[0] > 20 else one for one in PATTERNS], ids=str
)
def test_patterns(pattern):
    """A ragged last group, rows past a tile."""
    n, m = pattern
    check_ops(Case(n, m, features=(35, 2 * m + m // 2 + 1), precision="float16"))


@pytest.mark.parametrize("number", range(len(AT_ONCE)))
def test_whole_tiles(number):
    n, m = AT_ONCE[number]
    case = replace(EVEN, n=n, m=m, precision=list(PRECISIONS)[number % 4])
    for product in products(case)[:2]:
        assert launch_of(case, product).arguments["EVEN"]
    check_ops(case)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_integers_are_exact(precision):
    check_ops(Case(4, 8, (35, 53), 17, precision, integers=True))  # some tiles in each direction, ragged
    check_ops(replace(EVEN, precision=precision, integers=True))


def test_tiles_of_a_large_product():
    check_ops(Case(features=(70, 70), batch=33, precision="float16", fewest_programs=0))
    check_ops(Case(features=(128, 64), batch=70, precision="float16", fewest_programs=0))


def test_no_order_of_programs_and_no_size_of_a_tile_changes_a_result():
    case = Case(features=(64, 64), batch=32, precision="float16", fewest_programs=0)
    several = replace(case, fewest_programs=4)
    assert all(launch_of(several, product).programs == 4 for product in products(several)[:2])
    results = [check_ops(one, OPS[:2]) for one in (case, several)]  # one program, and some in an order
    with several.settings(), strict(seed=1):  # in another
        results.append([product.run(kernels) for product in products(several)[:2]])
    assert all(torch.equal(*pair) for one in results[1:] for pair in zip(one, results[0], strict=True))


def test_rows_of_a_batch_do_not_mix():
    case = Case(features=(35, 53), batch=20)
    for product in products(case)[:2]:
        x, *others = product.tensors
        spoilt = x.clone()
        spoilt[7] = float("nan")
        with case.settings(), strict():
            clean, result = (replace(product, tensors=(inputs, *others)).run(kernels) for inputs in (x, spoilt))
        kept = torch.arange(20) != 7
        assert result[7].isnan().all() and torch.equal(result[kept], clean[kept])


def test_nan_in_one_column_stays_in_its_slots():
    case = Case(2, 4, features=(20, 22))
    sampled = products(case)[2]
    grad, x = sampled.tensors
    x[:, -1] = float("nan")
    with case.settings(), strict():
        values = replace(sampled, tensors=(grad, x)).run(kernels)
    assert torch.equal(values.isnan(), case.layout().columns() == 21)
    assert (values[~case.layout().inside()] == 0).all()


@pytest.mark.parametrize("far_case", FAR_CASES, ids=lambda case: case.__name__)
def test_offsets_past_32_bits(far_case):
    result, exact = far_case()
    assert torch.equal(result, exact)
    assert (result != 0).any()


def test_an_empty_batch():
    y, transposed, values = check_ops(Case(batch=0))
    assert y.shape == (0, 70) and transposed.shape == (0, 101) and (values == 0).all()


def launch_of(case: Case, product) -> kernels.Launch:
    x, values, bias = product.tensors
    transposed = product.op == OPS[1]
    y = x.new_empty(case.batch, case.features[transposed])
    with case.settings():
        return kernels.product_launch(x, values, bias, *product.rest[:2], transposed, y)


# Few, small and ragged in every way, and one of whole tiles: what kernels damaged in one place are tried on.
PROBES = (
    Case(2, 4, (37, 70), 19, precision="float16"),
    Case(3, 5, (18, 23), 33, integers=True, fewest_programs=0),
    Case(4, 8, (64, 64), 17, precision="float16", with_bias=False, fewest_programs=0),
)


def damage_seen(mutant: Mutant, folder) -> bool:
    damaged = load(mutant, folder)
    try:
        for case in PROBES:
            check_ops(case, kernels=damaged)
        if mutant.kind == "int64 dropped":  # seen nowhere else
            for far_case in FAR_CASES:
                assert torch.equal(*far_case(damaged))
    except Exception:
        return True
    return False


def test_undamaged_kernels_pass(tmp_path):
    with open(kernels.__file__) as file:
        assert not damage_seen(Mutant("none", 0, "", file.read()), tmp_path)


def check_damage_is_seen(damaged, folder):
    """At least four of five: some changes have no effect, such as a row that is read and not stored."""
    survivors = [mutant for mutant in damaged if not damage_seen(mutant, folder)]
    print(f"\ninterpreter: {len(damaged) - len(survivors)} of {len(damaged)} damaged kernels caught")
    for mutant in survivors:
        print(f"interpreter: survives: line {mutant.line}, {mutant.kind}: {mutant.changed}")
    assert len(survivors) <= 0.2 * len(damaged)


def test_some_damage_is_seen(tmp_path):
    check_damage_is_seen(mutants(kernels.__file__)[::25], tmp_path)


@pytest.mark.long
def test_any_damage_is_seen(tmp_path):
    check_damage_is_seen(mutants(kernels.__file__), tmp_path)
