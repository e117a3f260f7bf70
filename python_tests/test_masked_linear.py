"""masked_linear and sampled_matmul: values and gradients against the float64 reference."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compsparse_kernels import MaskLayout, masked_linear, sampled_matmul
from compsparse_kernels.layouts import index
from compsparse_kernels.ops import cpu_isa
from compsparse_kernels.testing import (
    DTYPES,
    HALVES,
    ISAS,
    MEMORY_FORMS,
    THREADS,
    assert_within_budget,
    num_threads,
    random_mask,
    random_tensor,
)
from python_tests.masked import (
    KINDS,
    assert_right,
    check_derivatives_of_any_order,
    check_empty_batch,
    check_every_output_is_written,
    check_expanded_gradient,
    check_leading_dimensions,
    check_no_graph_without_need,
    check_only_the_wanted_gradients,
    check_same_bits_for_any_number_of_threads,
    check_under_instruction_set,
    dense_linear,
    make_inputs,
    make_layout,
    ours_linear,
    output_and_gradients,
    with_int32_columns,
)

ALL_DTYPES = (*DTYPES, *HALVES)

# ---- shapes


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5, 8, 9, 16, 17, 31, 33, 48, 63, 64, 65, 66, 130])
def test_batches(batch, dtype):
    """Every width of a panel, alone and after full panels."""
    assert_right(make_layout(37, 51), batch, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (1, 70), (70, 1), (64, 128), (33, 47)], ids=str)
@pytest.mark.parametrize("density", [0.0, 0.2, 1.0])
def test_shapes_and_kinds(shape, density, transposed, kind, dtype):
    layout = make_layout(*shape, density, kind=kind)
    assert_right(layout.T if transposed else layout, 7, dtype)


@pytest.mark.parametrize("density", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_batch_of_one_and_many_outputs(dtype, density):
    """Its outputs are rounded some together; its entries are read 16, 4 or one at a time."""
    assert_right(make_layout(150, 70, density), 1, dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_empty_batch(kind):
    check_empty_batch(make_layout(24, 32, kind=kind))


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_empty_rows_and_columns(dtype):
    mask = torch.zeros(20, 30, dtype=torch.bool)
    mask[3, 4] = mask[3, 29] = mask[17, 4] = True
    layout = MaskLayout.from_mask(mask, "csr")
    assert_right(layout, 20, dtype)
    x, values, bias, _ = make_inputs(layout)
    assert torch.equal(masked_linear(x, values, layout, bias)[:, :3], bias[:3].expand(5, 3))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (1, 2, 1, 3), (0, 3)], ids=str)
def test_leading_dimensions(lead, kind):
    check_leading_dimensions(make_layout(24, 32, kind=kind), lead)


@given(
    shape=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    batch=st.integers(1, 150),
    density=st.sampled_from([0.0, 0.02, 0.1, 0.5, 1.0]),
    dtype=st.sampled_from(ALL_DTYPES),
    kind=st.sampled_from(KINDS),
    block_shape=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    transposed=st.booleans(),
    memory=st.sampled_from(MEMORY_FORMS),
    seed=st.integers(0, 2**20),
)
def test_any_shape(shape, batch, density, dtype, kind, block_shape, transposed, memory, seed):
    layout = make_layout(*shape, density, seed, kind, block_shape)
    assert_right(layout.T if transposed else layout, batch, dtype, seed, memory)


# ---- wide inputs, in blocks of columns: enough entries a row, in a batch of half as many rows as a block has columns

WIDE = [  # blocks of 256 columns, the last of them full, long or short, and of 512
    *(((21, 1100, 0.25), batch) for batch in (128, 129, 151)),
    ((17, 1280, 0.2), 140),
    ((19, 1025, 0.3), 130),
    ((6, 6200, 0.045), 257),
]


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("shape, batch", WIDE, ids=str)
def test_batches_of_wide_inputs(shape, batch, dtype):
    layout = make_layout(*shape)
    assert_right(layout, batch, dtype)
    assert_right(layout.T, batch, dtype)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_wide_rows_of_any_length(dtype):
    """Rows that are full or empty, have nothing in some blocks, or end with the array of all entries."""
    mask = random_mask(40, 1200, 0.3)
    mask[::7], mask[1::9], mask[5, 300:], mask[6, :900] = True, False, False, False
    assert_right(MaskLayout.from_mask(mask, "csr"), 140, dtype)


def test_wide_inputs_whose_columns_are_in_no_order():
    """The op itself makes no promise about them, but it reads each entry once and nothing else."""
    layout = make_layout(20, 1100, 0.3)
    x, values, bias, _ = make_inputs(layout, 130, torch.float64)
    ptr, idx, _ = layout.by_output
    order = torch.cat([begin + torch.randperm(end - begin) for begin, end in pairwise(ptr.tolist())])
    y = torch.ops.compsparse.masked_linear(x, values[order], bias, ptr, idx[order], None, 20)
    torch.testing.assert_close(y, masked_linear(x, values, layout, bias))


# ---- memory


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("memory", MEMORY_FORMS)
def test_memory_of_inputs_and_gradients(memory, dtype):
    assert_right(make_layout(40, 48), 18, dtype, memory=memory)


def test_expanded_gradient_of_a_sum():
    check_expanded_gradient(make_layout(40, 48))


def test_inputs_stay_as_they_are():
    layout = make_layout(40, 48)
    inputs = make_inputs(layout)
    copies = [tensor.clone() for tensor in inputs]
    output_and_gradients(ours_linear(layout), inputs[:3], inputs[3], torch.float32)
    assert all(torch.equal(tensor, before) for tensor, before in zip(inputs, copies, strict=True))


@pytest.mark.parametrize("batch", [1, 3, 65, 140])
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_every_output_is_written(batch, dtype):
    check_every_output_is_written(make_layout(37, 51), batch, dtype)


def test_indices_past_2_to_the_31():
    """8 GB of zeros that are never written take no memory; one survivor, in the last column."""
    columns = 2**30 + 128
    try:
        x = torch.from_numpy(np.zeros((2, columns), np.float32))
    except MemoryError as error:
        pytest.skip(f"no room for 8 GB of address space: {error}")
    x[1, -1] = 3
    ptr, idx = torch.tensor([0, 1]), torch.tensor([columns - 1]).int()
    for first in (0, 1):  # batch 1 reads x itself
        y = torch.ops.compsparse.masked_linear(x[first:][:1], torch.ones(1), None, ptr, idx, None, 1)
        assert y.item() == 3 * first


@pytest.mark.skipif(not ISAS, reason="the dense reference reads everything: no compiled kernels here")
@pytest.mark.parametrize("batch", [1, 6, 70])
def test_cost_is_on_survivors_only(batch):
    """0 * NaN is NaN: what is not NaN was not multiplied. Dense torch fails this, so something is skipped here."""
    mask = random_mask(24, 32, 0.3)
    mask[:, 5] = mask[7] = False
    layout = MaskLayout.from_mask(mask, "csr")
    x, values, bias, grad = make_inputs(layout, batch)
    assert values.numel() == layout.nnz == int(mask.sum())
    x[:, 5] = grad[:, 7] = float("nan")
    y, grad_x, grad_values, _ = output_and_gradients(ours_linear(layout), (x, values, bias), grad, x.dtype)
    assert torch.isfinite(y).all() and torch.isfinite(grad_x).all() and torch.isfinite(grad_values).all()
    assert dense_linear(layout)(x, values, bias).isnan().all()


@pytest.mark.parametrize("kind", ["block", "dense"])
def test_dropped_values_have_no_part(kind):
    layout = make_layout(24, 32, kind=kind)
    x, values, bias, grad = make_inputs(layout)
    kept = layout.pack(torch.ones(24, 32)) == 1
    clean = output_and_gradients(ours_linear(layout), (x, values, bias), grad, x.dtype)
    values = values.where(kept, float("nan"))
    dirty = output_and_gradients(ours_linear(layout), (x, values, bias), grad, x.dtype)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    assert not dirty[2][~kept].any()


# ---- columns of 16 and 32 bits


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape, batch", [*(((61, 83, 0.4), batch) for batch in (1, 2, 7, 33, 130)), ((20, 1100, 0.3), 130)], ids=str
)
def test_bitwise_equal_for_columns_of_16_and_32_bits(shape, batch, dtype):
    narrow = make_layout(*shape)
    wide = with_int32_columns(narrow)
    assert (narrow.index_dtype, wide.index_dtype) == (torch.int16, torch.int32)
    *inputs, grad = make_inputs(narrow, batch, dtype)
    results = [output_and_gradients(ours_linear(layout), inputs, grad, dtype) for layout in (narrow, wide)]
    results[0].append(sampled_matmul(inputs[0], grad, narrow.T))
    results[1].append(sampled_matmul(inputs[0], grad, wide.T))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("batch", [1, 9])
@pytest.mark.parametrize("features", [32768, 32769])
@pytest.mark.parametrize("transposed", [False, True])
def test_batches_of_as_many_columns_as_int16_numbers(transposed, features, batch, dtype):
    """A sign that is lost, or carried too far, reads another column."""
    mask = torch.zeros(3, features, dtype=torch.bool)
    mask[:, -40:] = mask[1, ::501] = True
    layout = MaskLayout.from_mask(mask, "csr")
    assert_right(layout.T if transposed else layout, batch, dtype)


# ---- positions of 64 bits


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_wide_positions(monkeypatch, dtype):
    monkeypatch.setattr(index, "INT32_LIMIT", 1)
    layout = make_layout(37, 51)
    assert layout.by_input.perm.dtype == torch.int64
    assert_right(layout, 20, dtype)
    assert_right(layout.T, 20, dtype)


# ---- derivatives


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transposed", [False, True])
def test_derivatives_of_any_order(transposed, kind):
    layout = make_layout(6, 5, 0.5, kind=kind, block_shape=(2, 3))
    check_derivatives_of_any_order(layout.T if transposed else layout)


@pytest.mark.parametrize("wanted", [("x",), ("values",), ("bias",), ("x", "values")], ids=str)
def test_only_the_wanted_gradients(wanted):
    check_only_the_wanted_gradients(make_layout(20, 30), wanted)


def test_no_graph_without_need():
    check_no_graph_without_need(make_layout(20, 30))


# ---- threads and instruction sets


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape, batch",
    [((250, 300), 61), ((40, 900), 260), ((900, 40), 129), ((700, 800), 1), ((600, 1100), 160), ((30, 1100), 384)],
    ids=str,
)
def test_bitwise_equal_for_any_number_of_threads(shape, batch, dtype):
    check_same_bits_for_any_number_of_threads(make_layout(*shape), batch, dtype)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("batch", [1, 61, 200])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_long_row_bitwise_equal_for_any_number_of_threads(transposed, batch, dtype):
    """Nearly all survivors in one row: the sampled product shares out its entries."""
    features = 250_000 // batch + 13  # enough work for three threads, and no share begins at a whole vector
    mask = torch.zeros(6, features, dtype=torch.bool)
    mask[3] = mask[0, 5] = mask[4, 7] = True
    layout = MaskLayout.from_mask(mask, kind="csr")
    a, b = random_tensor(batch, 6, dtype=dtype, seed=1), random_tensor(batch, features, dtype=dtype, seed=2)
    if transposed:
        a, b, layout = b, a, layout.T
    results = []
    for threads in THREADS:
        with num_threads(threads):
            results.append(sampled_matmul(a, b, layout))
    x, y = a.double(), b.double()
    exact, magnitude = layout.pack(x.mT @ y), layout.pack(x.abs().mT @ y.abs())
    assert_within_budget(results[0], layout.pack(a.float().mT @ b.float()), exact, "values", magnitude)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa != cpu_isa()])
def test_every_instruction_set(isa):
    tests = "test_batch or test_memory or test_every_output or survivors or wide or bitwise"
    check_under_instruction_set(isa, __file__, tests)
