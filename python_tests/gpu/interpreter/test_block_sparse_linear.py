"""The Triton kernels of block_sparse_linear, strictly interpreted, against the float64 reference."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compsparse_kernels.ops.block_sparse_linear import triton
from python_tests.gpu.interpreter.cases import PRECISIONS, Case, check_product, check_sampled, check_sampled_nan
from python_tests.gpu.interpreter.strict import strict

pytestmark = pytest.mark.usefixtures("unwritten_is_nan")

SQUARE = [(side, side) for side in (1, 2, 3, 7, 8, 15, 16, 17, 24, 32, 33, 48, 63, 64, 65, 96, 127, 128)]
RECTANGULAR = [(1, 128), (128, 1), (16, 64), (64, 16), (8, 32), (12, 20), (100, 9), (33, 66)]
ACTIVATIONS = ("none", "relu", "gelu", "silu")

sides = st.one_of(st.integers(1, 20), st.sampled_from([31, 32, 33, 48, 64, 65, 127, 128]))


@st.composite
def cases(draw):
    block_shape = draw(sides), draw(sides)
    most = 3 if max(block_shape) > 32 else 10
    grid = draw(st.integers(1, most)), draw(st.integers(1, min(most, 4)))
    return Case(
        block_shape=block_shape,
        grid=grid,
        cut=tuple(draw(st.integers(0, side - 1)) for side in block_shape),
        batch=draw(st.sampled_from([1, 2, 15, 16, 17, 33, 70, 129])),
        precision=draw(st.sampled_from(list(PRECISIONS))),
        transposed=draw(st.booleans()),
        with_bias=draw(st.booleans()),
        activation=draw(st.sampled_from(ACTIVATIONS)),
        density=draw(st.sampled_from([0.2, 0.6, 1.0])),
        slots=draw(st.sampled_from([None, 1, 3])),
        fewest_programs=draw(st.sampled_from([0, 264])),
        group=draw(st.sampled_from([1, 3, 8])),
        seed=draw(st.integers(0, 100)),
    )


@given(case=cases())
@settings(max_examples=60)
def test_any_product(case):
    check_product(case)


@given(case=cases())
@settings(max_examples=60)
def test_any_sampled_product(case):
    check_sampled(case)


@pytest.mark.long
@given(case=cases())
@settings(max_examples=600)
def test_many_products(case):
    check_product(case)
    check_sampled(case)


@pytest.mark.parametrize("block_shape", SQUARE + RECTANGULAR, ids=str)
def test_block_shapes(block_shape):
    """Whole blocks, and ragged ones over the other storage."""
    whole = Case(block_shape, precision="tf32", density=1.0)
    block_out, block_in = block_shape
    ragged = replace(whole, cut=(block_out // 3, block_in // 2), transposed=True)
    for case in (whole, ragged):
        check_product(case)
        check_sampled(case)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_flags(precision, activation, with_bias, transposed):
    check_product(Case((16, 24), (2, 3), (5, 7), 18, precision, transposed, with_bias, activation))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("slots", [None, 1, 3])
@pytest.mark.parametrize("batch", [1, 31, 32, 64, 65])
def test_sampled_batches_and_slots(batch, slots, precision):
    check_sampled(Case((16, 32), (3, 2), batch=batch, precision=precision, slots=slots, density=1.0))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_empty_layout_leaves_the_bias(activation):
    case = Case((16, 16), activation=activation, density=0.0)
    assert case.layout().nnz_blocks == 0
    check_product(case)
    assert check_sampled(case).shape == (0, 16, 16)
    assert (check_product(replace(case, with_bias=False)) == 0).all()


def test_empty_rows_and_columns():
    case = Case((16, 16), (12, 4), (3, 1), density=0.15)
    mask = case.layout().block_mask()
    assert (~mask.any(0)).any() and (~mask.any(1)).any() and mask.any()
    for transposed in (False, True):
        check_product(replace(case, transposed=transposed))
        check_sampled(replace(case, transposed=transposed))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_one_block_and_one_row(precision):
    case = Case((32, 64), (1, 1), batch=1, precision=precision, density=1.0)
    check_product(case)
    check_sampled(case)


def test_nothing_to_do():
    case = Case((16, 16), batch=0)
    assert check_product(case).shape == (0, 32)
    assert (check_sampled(case) == 0).all()


@pytest.mark.parametrize("precision", ["ieee", "bfloat16"])
def test_results_do_not_depend_on_the_order_of_programs_nor_on_how_they_are_grouped(precision):
    case = Case((16, 16), (10, 3), (1, 3), 40, precision)
    layout = case.layout()
    results = set()
    for group in (3, 8):
        for fewest_programs in (0, 264):
            y = check_product(replace(case, group=group, fewest_programs=fewest_programs))
            results.add(y.view(torch.uint8).numpy().tobytes())
    assert layout.grid[0] > 8 and len(results) == 1


@pytest.mark.parametrize("slots", [None, 2])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_nan_stays_inside_the_weight(precision, slots):
    check_sampled_nan(Case((24, 20), (2, 3), (7, 3), 21, precision, slots=slots, density=1.0))


def test_relu_keeps_nan_and_rows_of_a_batch_do_not_mix():
    case = Case((16, 16), batch=20, density=1.0)
    layout = case.layout()
    x, values = case.tensor(20, 32, seed=1), case.tensor(*layout.values_shape, seed=2)
    spoilt = x.clone()
    spoilt[7] = float("nan")
    rest = (values, None, *layout.by_output, layout.out_features, False, "relu")
    with strict():
        clean, result = (triton.block_sparse_linear(inputs, *rest) for inputs in (x, spoilt))
    assert result[7].isnan().all()
    others = torch.arange(20) != 7
    assert torch.equal(result[others], clean[others])
