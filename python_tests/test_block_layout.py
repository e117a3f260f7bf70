"""BlockLayout: construction, conversions, algebra; layouts/index.py, compiled and in numpy."""

import copy
import pickle
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compsparse_kernels import BlockLayout
from compsparse_kernels.layouts import index
from compsparse_kernels.testing import random_mask, random_tensor

SHAPES = [  # out_features, in_features, block_shape
    (64, 64, (16, 16)),
    (24, 40, (8, 4)),
    (37, 50, (8, 16)),  # both edges ragged
    (5, 3, (8, 8)),  # one block, larger than the weight
    (7, 9, (1, 1)),
    (130, 257, (128, 128)),
]


def layout_of(out_features, in_features, block_shape, density=0.4, seed=0):
    grid = (-(-out_features // block_shape[0]), -(-in_features // block_shape[1]))
    return BlockLayout.from_mask(random_mask(*grid, density, seed), block_shape, in_features, out_features)


def tensors(layout):
    return [*layout.by_output, *layout.by_input]


def assert_same_layout(a, b):
    assert (a.out_features, a.in_features, a.block_shape, a.num_slots, a.transposed) == (
        b.out_features,
        b.in_features,
        b.block_shape,
        b.num_slots,
        b.transposed,
    )
    for left, right in zip(tensors(a), tensors(b), strict=True):
        assert left.dtype == right.dtype and torch.equal(left, right)


# ---- construction


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_from_mask_holds_the_mask_in_both_orders(shape):
    out_features, in_features, (bo, bi) = shape
    mask = random_mask(-(-out_features // bo), -(-in_features // bi))
    layout = BlockLayout.from_mask(mask, (bo, bi), in_features=in_features, out_features=out_features)
    assert torch.equal(layout.block_mask(), mask)
    assert torch.equal(layout.T.block_mask(), mask.T)
    assert layout.grid == tuple(mask.shape)
    assert layout.nnz_blocks == layout.num_slots == int(mask.sum())
    assert not layout.shared and not layout.transposed
    elements = mask.repeat_interleave(bo, 0).repeat_interleave(bi, 1)[:out_features, :in_features]
    assert torch.equal(layout.to_mask(), elements)
    assert layout.density == pytest.approx(elements.double().mean().item())
    assert [t.dtype for t in tensors(layout)] == [torch.int64, torch.int32, torch.int32] * 2


def test_the_second_order_indexes_into_the_first():
    layout = layout_of(40, 72, (8, 8))
    rows, columns = layout.coordinates()
    t_columns, t_rows = layout.T.coordinates()
    slots = layout.by_input.slot.long()
    assert torch.equal(rows[slots].int(), t_rows) and torch.equal(columns.long()[slots], t_columns)


@pytest.mark.parametrize("fill", [False, True])
def test_empty_and_full_masks(fill):
    layout = BlockLayout.from_mask(torch.full((3, 2), fill), (4, 8))
    assert layout.nnz_blocks == 6 * fill and layout.density == float(fill)
    dense = random_tensor(12, 16)
    assert torch.equal(layout.unpack(layout.pack(dense)), dense * fill)


def test_from_entries_sorts():
    rows, columns = torch.tensor([2, 0, 2, 1]), torch.tensor([1, 3, 0, 2])
    layout = BlockLayout.from_entries(rows, columns, (4, 4), 12, 16)
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[rows, columns] = True
    assert_same_layout(layout, BlockLayout.from_mask(mask, (4, 4)))


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_from_entries_takes_any_integers(dtype):
    rows, columns = torch.tensor([1, 0], dtype=dtype), torch.tensor([0, 1], dtype=dtype)
    layout = BlockLayout.from_entries(rows, columns, (2, 2), 4, 4, slot=torch.tensor([0, 0], dtype=dtype))
    assert layout.nnz_blocks == 2 and layout.num_slots == 1
    assert [t.dtype for t in tensors(layout)] == [torch.int64, torch.int32, torch.int32] * 2


def test_from_entries_without_entries():
    none = torch.empty(0, dtype=torch.long)
    layout = BlockLayout.from_entries(none, none, (4, 4), 8, 8, slot=none)
    assert layout.nnz_blocks == 0 and layout.values_shape == (0, 4, 4)
    assert torch.equal(layout.unpack(torch.empty(0, 4, 4)), torch.zeros(8, 8))


def test_shared_slots_follow_their_entries():
    rows, columns, slot = torch.tensor([1, 0, 2]), torch.tensor([1, 0, 2]), torch.tensor([1, 0, 1])
    layout = BlockLayout.from_entries(rows, columns, (2, 2), 6, 6, slot=slot)
    assert layout.shared and layout.num_slots == 2 and layout.values_shape == (2, 2, 2)
    values = random_tensor(2, 2, 2)
    dense = layout.unpack(values)
    for row, column, s in zip(rows, columns, slot, strict=True):
        assert torch.equal(dense[2 * row : 2 * row + 2, 2 * column : 2 * column + 2], values[s])
    assert torch.equal(layout.pack(dense), values)
    dense[0, 0] += 1  # slot 0 has one entry: still consistent
    layout.pack(dense)
    dense[2, 2] += 1
    with pytest.raises(ValueError, match="weight: expected equal values in blocks that share a slot"):
        layout.pack(dense)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_from_dense_keeps_blocks_that_hold_anything(shape):
    layout = layout_of(*shape)
    weight = layout.unpack(random_tensor(*layout.values_shape))
    assert_same_layout(BlockLayout.from_dense(weight, shape[2]), layout)
    assert_same_layout(BlockLayout.from_dense(layout.to_mask(), shape[2]), layout)
    assert_same_layout(BlockLayout.from_dense(weight.T.contiguous().T, shape[2]), layout)


def test_from_dense_counts_nan_as_something():
    weight = torch.zeros(4, 4)
    weight[3, 0] = float("nan")
    assert BlockLayout.from_dense(weight, (2, 2)).block_mask().tolist() == [[False, False], [True, False]]


# ---- other formats


def test_torch_bsr_round_trip():
    layout = layout_of(24, 40, (8, 4))
    values = random_tensor(*layout.values_shape)
    bsr = layout.to_bsr(values)
    assert torch.equal(bsr.to_dense(), layout.unpack(values))
    back, back_values = BlockLayout.from_bsr(bsr)
    assert_same_layout(back, layout)
    assert torch.equal(back_values, values)
    assert torch.equal(layout.T.to_bsr(values).to_dense(), layout.unpack(values).T)


def test_from_bsr_with_int32_indices():
    values = random_tensor(2, 2, 2)
    ptr, idx = torch.tensor([0, 1, 2], dtype=torch.int32), torch.tensor([1, 0], dtype=torch.int32)
    layout, _ = BlockLayout.from_bsr(torch.sparse_bsr_tensor(ptr, idx, values, size=(4, 4), check_invariants=True))
    assert layout.by_output.ptr.dtype == torch.int64 and layout.nnz_blocks == 2


def test_scipy_round_trip():
    layout = layout_of(24, 40, (8, 4))
    values = random_tensor(*layout.values_shape, dtype=torch.float64)
    array = layout.to_scipy(values)
    assert np.array_equal(array.toarray(), layout.unpack(values).numpy())
    back, back_values = BlockLayout.from_scipy(array)
    assert_same_layout(back, layout)
    assert torch.equal(back_values, values)


def test_from_scipy_unsorted_with_duplicates():
    scipy_sparse = pytest.importorskip("scipy.sparse")
    data = np.arange(12.0).reshape(3, 2, 2)
    weight = scipy_sparse.bsr_matrix((data, np.array([1, 0, 1]), np.array([0, 3, 3])), shape=(4, 4))
    layout, values = BlockLayout.from_scipy(weight)
    assert layout.nnz_blocks == 2
    assert np.array_equal(layout.unpack(values).numpy(), weight.toarray())
    assert weight.indices.tolist() == [1, 0, 1], "the user's matrix stays as it was"


# ---- dense weights in and out, the algebra of T


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32])
def test_pack_and_unpack_are_inverse_on_the_pattern(shape, dtype):
    layout = layout_of(*shape)
    weight = random_tensor(layout.out_features, layout.in_features).mul(8).to(dtype)
    values = layout.pack(weight)
    assert values.shape == layout.values_shape and values.dtype == dtype and values.is_contiguous()
    assert torch.equal(layout.unpack(values), weight * layout.to_mask())
    assert torch.equal(layout.pack(layout.unpack(values)), values)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_T_is_the_transposed_weight_over_the_same_values(shape):
    layout = layout_of(*shape)
    values = layout.pack(random_tensor(layout.out_features, layout.in_features))
    assert layout.T.T is layout
    assert layout.T.values_shape == layout.values_shape
    assert layout.T.block_shape == layout.block_shape[::-1]
    assert torch.equal(layout.T.unpack(values), layout.unpack(values).T)
    assert torch.equal(layout.T.pack(layout.unpack(values).T), values)
    assert torch.equal(layout.T.to_mask(), layout.to_mask().T)
    assert layout.T.density == pytest.approx(layout.density)


def test_gradients_pass_through_pack_and_unpack():
    layout = layout_of(9, 10, (4, 4))
    weight = random_tensor(9, 10, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layout.pack, weight)
    values = random_tensor(*layout.values_shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layout.unpack, values)


@given(
    rows=st.integers(1, 7),
    columns=st.integers(1, 7),
    block=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    cut=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    seed=st.integers(0, 1000),
)
def test_round_trips_for_any_shape(rows, columns, block, cut, seed):
    out_features = rows * block[0] - cut[0] % block[0]
    in_features = columns * block[1] - cut[1] % block[1]
    mask = random_mask(rows, columns, seed=seed)
    layout = BlockLayout.from_mask(mask, block, in_features, out_features)
    weight = random_tensor(out_features, in_features, seed=seed)
    assert torch.equal(layout.unpack(layout.pack(weight)), weight * layout.to_mask())
    order = torch.randperm(layout.nnz_blocks, generator=torch.Generator().manual_seed(seed))
    at = [part[order] for part in layout.coordinates()]
    assert_same_layout(BlockLayout.from_entries(*at, block, out_features, in_features), layout)


# ---- as an object


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layout: pickle.loads(pickle.dumps(layout))])
def test_deepcopy_and_pickle(duplicate, transposed):
    layout = layout_of(37, 50, (8, 16))
    layout = layout.T if transposed else layout
    twin = duplicate(layout)
    assert_same_layout(twin, layout)
    assert_same_layout(twin.T, layout.T)
    assert twin.T.T is twin


def test_layouts_are_frozen_and_print_themselves():
    layout = BlockLayout.from_mask(torch.eye(4, dtype=torch.bool), (16, 8))
    with pytest.raises(AttributeError):
        layout.out_features = 3
    assert repr(layout) == "BlockLayout(64 x 32, blocks 16 x 8, 4 entries, density 0.250)"
    shared = BlockLayout.from_entries(*torch.tensor([[0, 1], [0, 1]]), (2, 2), 4, 4, slot=torch.tensor([0, 0]))
    assert "2 entries, 1 slots" in repr(shared)


def test_to_another_device():
    layout = layout_of(24, 40, (8, 4))
    assert layout.to("cpu") is layout
    moved = layout.to("meta")
    assert moved.device.type == moved.T.device.type == "meta"
    assert layout.device.type == layout.T.device.type == "cpu"
    assert (moved.block_shape, moved.num_slots) == (layout.block_shape, layout.num_slots)


# ---- index arrays: compiled and numpy


def numpy_twin(name, *arguments, **options):
    compiled, index.compiled = index.compiled, None
    try:
        return getattr(index, name)(*arguments, **options)
    finally:
        index.compiled = compiled


def assert_same_arrays(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a, b)


needs_compiled = pytest.mark.skipif(index.compiled is None, reason="compsparse_kernels._layout was not built")
GRIDS = [(1, 1), (3, 5), (8, 8), (17, 33), (64, 1), (1, 64), (0, 4), (4, 0)]


@needs_compiled
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.1, 0.6, 1.0])
def test_numpy_twin_of_compress_and_transpose(grid, density):
    mask = random_mask(*grid, density).numpy()
    ptr, idx = index.compress(mask)
    assert_same_arrays((ptr, idx), numpy_twin("compress", mask))
    assert (ptr.dtype, idx.dtype) == (np.int64, np.int32)
    for wide, dtype in ((False, np.int32), (True, np.int64)):
        turned = index.transpose(ptr, idx, grid[1], wide=wide)
        assert turned[2].dtype == dtype
        assert_same_arrays(turned, numpy_twin("transpose", ptr, idx, grid[1], wide=wide))
    assert_same_arrays(turned[:2], index.compress(np.ascontiguousarray(mask.T)))


@needs_compiled
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    block=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    density=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
)
def test_numpy_twin_of_block_any(rows, columns, block, density):
    mask = random_mask(rows, columns, density).numpy()
    assert_same_arrays([index.block_any(mask, *block)], [numpy_twin("block_any", mask, *block)])


@needs_compiled
def test_compiled_functions_take_strided_masks():
    mask = random_mask(12, 20).numpy()[::2, ::3]
    assert_same_arrays(index.compress(mask), numpy_twin("compress", mask))
    assert_same_arrays([index.block_any(mask, 4, 2)], [numpy_twin("block_any", mask, 4, 2)])


@needs_compiled
def test_a_large_mask_takes_no_time():
    """16384 x 16384 blocks: at most 2 s on a quiet machine (the time is printed); the bound is for a busy one."""
    mask = torch.zeros(16384, 16384, dtype=torch.bool)
    mask.view(-1)[torch.randint(mask.numel(), (2_000_000,), generator=torch.Generator().manual_seed(0))] = True
    begin = time.perf_counter()
    layout = BlockLayout.from_mask(mask, (1, 1))
    seconds = time.perf_counter() - begin
    print(f"16384 x 16384 mask, {layout.nnz_blocks} entries: {seconds:.2f} s")
    assert layout.nnz_blocks == int(mask.sum())
    assert seconds < 20
