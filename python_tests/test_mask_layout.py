"""MaskLayout: every way in and out, both orders, the choice of a kind, and every error message."""

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compsparse_kernels import BlockLayout, MaskLayout
from compsparse_kernels.layouts import MaskOrder, index
from compsparse_kernels.testing import random_mask, random_tensor
from python_tests.masked import with_int32_columns

KINDS = ("csr", "block", "dense")
SHAPES = [(1, 1), (1, 40), (40, 1), (48, 64), (37, 53)]


def assert_same(layout, other):
    assert (layout.out_features, layout.in_features, layout.kind) == (other.out_features, other.in_features, other.kind)
    assert layout.transposed == other.transposed and layout.values_shape == other.values_shape
    assert torch.equal(layout.to_mask(), other.to_mask())


# ---- construction and round trips


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_masks_and_weights_come_back(shape, density, kind):
    mask = random_mask(*shape, density)
    weight = random_tensor(*shape)
    layout = MaskLayout.from_mask(mask, kind)
    assert torch.equal(layout.to_mask(), mask) and layout.to_mask().dtype == torch.bool
    assert layout.nnz == int(mask.sum()) and layout.density == pytest.approx(mask.double().mean().item())
    values = layout.pack(weight)
    assert tuple(values.shape) == layout.values_shape and values.is_contiguous()
    assert torch.equal(layout.unpack(values), weight * mask)
    assert torch.equal(layout.pack(layout.unpack(values)), values)
    assert torch.equal(layout.unpack(random_tensor(*layout.values_shape)) != 0, mask)


def test_values_shapes():
    mask = random_mask(37, 53, 0.1)
    assert MaskLayout.from_mask(mask, "csr").values_shape == (int(mask.sum()),)
    assert MaskLayout.from_mask(mask, "dense").values_shape == (37, 53)
    layout = MaskLayout.from_mask(mask, "block", (8, 4))
    assert layout.values_shape == (layout.blocks.nnz_blocks, 8, 4)
    assert MaskLayout.from_mask(mask, "block").blocks.block_shape == (16, 16)


def test_both_orders():
    mask = random_mask(37, 53)
    layout = MaskLayout.from_mask(mask, "csr")
    for order, pattern in ((layout.by_output, mask), (layout.by_input, mask.T)):
        assert (order.ptr.dtype, order.idx.dtype) == (torch.int64, torch.int16)
        columns = pattern.nonzero()[:, 1]
        assert torch.equal(order.ptr.diff(), pattern.sum(1)) and torch.equal(order.idx.long(), columns)
    assert layout.by_output.perm is None and layout.by_input.perm.dtype == torch.int32
    position = torch.full((37, 53), -1)
    position[mask] = torch.arange(layout.nnz)
    assert torch.equal(position.T[mask.T], layout.by_input.perm.long())


@pytest.mark.parametrize("given", [torch.int16, torch.int32], ids=str)
@pytest.mark.parametrize("features, kept", [(32768, torch.int16), (32769, torch.int32)])
def test_columns_take_the_narrowest_dtype(features, kept, given):
    """The first and the last column that a row may have, in whatever dtype they come."""
    last = min(features, 32768) - 1
    ptr, idx = torch.tensor([0, 2, 3]), torch.tensor([0, last, 7], dtype=given)
    layout = MaskLayout(2, features, "csr", MaskOrder(ptr, idx, None))
    assert (layout.index_dtype, layout.T.index_dtype) == (kept, torch.int16)
    assert (layout.by_output.idx.dtype, layout.by_input.idx.dtype) == (kept, torch.int16)
    rows, columns = layout.coordinates()
    assert rows.tolist() == [0, 0, 1] and columns.tolist() == [0, last, 7] and columns.dtype == torch.int64
    mask = layout.to_mask()
    assert mask.nonzero().tolist() == [[0, 0], [0, last], [1, 7]]
    tall = MaskLayout.from_mask(mask.T, "csr")
    assert (tall.index_dtype, tall.T.index_dtype) == (torch.int16, kept)
    weight = random_tensor(2, features)
    back, values = MaskLayout.from_csr(layout.to_csr(layout.pack(weight)))
    assert back.index_dtype == kept and torch.equal(back.unpack(values), weight * mask)


def test_columns_beyond_int16():
    mask = torch.zeros(2, 70_000, dtype=torch.bool)
    mask[0, 32768] = mask[1, 65536] = mask[1, 69_999] = True
    layout = MaskLayout.from_mask(mask, "csr")
    assert layout.by_output.idx.tolist() == [32768, 65536, 69_999] and torch.equal(layout.to_mask(), mask)


def test_only_csr_has_an_index_dtype():
    assert {MaskLayout.from_mask(random_mask(8, 8), kind).index_dtype for kind in ("block", "dense")} == {None}


def test_partly_filled_blocks_have_a_mask():
    whole = torch.zeros(37, 53, dtype=torch.bool)
    whole[:16, 16:32] = whole[32:, 48:] = True  # the second block is ragged
    assert MaskLayout.from_mask(whole, "block").mask is None
    whole[0, 16] = False
    layout = MaskLayout.from_mask(whole, "block")
    assert layout.mask.shape == (2, 16, 16) and int(layout.mask.sum()) == layout.nnz == int(whole.sum())


def test_from_dense_keeps_the_non_zeros():
    weight = random_tensor(20, 30) * random_mask(20, 30)
    for kind in KINDS:
        layout = MaskLayout.from_dense(weight.requires_grad_(), kind)
        assert torch.equal(layout.to_mask(), weight != 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transposed", [False, True])
def test_torch_sparse(transposed, kind):
    weight = random_tensor(20, 30) * random_mask(20, 30)
    layout = MaskLayout.from_dense(weight, kind)
    values = layout.pack(weight)
    layout, weight = (layout.T, weight.T) if transposed else (layout, weight)
    sparse = layout.to_csr(values)
    assert sparse.layout == torch.sparse_csr and torch.equal(sparse.to_dense(), weight)
    back, values = MaskLayout.from_csr(sparse)
    assert back.kind == "csr" and torch.equal(back.unpack(values), weight)


@pytest.mark.parametrize("transposed", [False, True])
def test_scipy(transposed):
    scipy = pytest.importorskip("scipy.sparse")
    weight = random_tensor(20, 30) * random_mask(20, 30)
    layout = MaskLayout.from_dense(weight, "csr")
    values = layout.pack(weight)
    layout, weight = (layout.T, weight.T) if transposed else (layout, weight)
    sparse = layout.to_scipy(values.requires_grad_())
    assert np.array_equal(sparse.toarray(), weight.numpy())
    back, values = MaskLayout.from_scipy(scipy.csr_matrix(sparse))
    assert torch.equal(back.unpack(values), weight)
    unsorted = scipy.csr_array(([1.0, 2.0, 3.0], [2, 0, 2], [0, 3, 3]), shape=(2, 4))
    layout, values = MaskLayout.from_scipy(unsorted)
    assert torch.equal(layout.unpack(values), torch.tensor([[2.0, 0, 4, 0], [0, 0, 0, 0]]).double())


def test_stored_zeros_survive():
    sparse = torch.sparse_csr_tensor([0, 1, 1], [1], torch.zeros(1), size=(2, 3), check_invariants=True)
    layout, values = MaskLayout.from_csr(sparse)
    assert layout.nnz == 1 and values.tolist() == [0]


# ---- algebra and copies


@pytest.mark.parametrize("kind", KINDS)
def test_transposes(kind):
    mask = random_mask(20, 30)
    layout, weight = MaskLayout.from_mask(mask, kind, (8, 4) if kind == "block" else None), random_tensor(20, 30)
    values = layout.pack(weight)
    assert layout.T.T is layout and layout.T is layout.T
    assert (layout.T.out_features, layout.T.in_features) == (30, 20)
    assert layout.T.values_shape == layout.values_shape and layout.T.nnz == layout.nnz
    assert torch.equal(layout.T.to_mask(), mask.T)
    assert torch.equal(layout.T.pack(weight.T), values)
    assert torch.equal(layout.T.unpack(values), (weight * mask).T)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("copier", [copy.copy, copy.deepcopy, lambda layout: pickle.loads(pickle.dumps(layout))])
def test_copies(copier, transposed, kind):
    layout = MaskLayout.from_mask(random_mask(20, 30), kind)
    layout = layout.T if transposed else layout
    other = copier(layout)
    assert_same(layout, other)
    assert_same(layout.T, other.T)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_pickle_with_int32_columns_is_read(transposed):
    layout = MaskLayout.from_mask(random_mask(20, 30), "csr")
    older = pickle.loads(pickle.dumps(with_int32_columns(layout.T if transposed else layout)))
    assert older.index_dtype == older.T.index_dtype == torch.int32
    assert_same(layout.T if transposed else layout, older)


@pytest.mark.parametrize("kind", KINDS)
def test_devices(kind):
    layout = MaskLayout.from_mask(random_mask(20, 30), kind)
    assert layout.device.type == "cpu" and layout.to("cpu") is layout
    transpose = layout.T  # noqa: F841  (cached, must not follow to another device)
    moved = layout.to("meta")
    assert moved.device.type == moved.T.device.type == "meta" and layout.T.device.type == "cpu"
    assert moved.values_shape == layout.values_shape


def test_is_frozen_and_says_what_it_is():
    layout = MaskLayout.from_mask(torch.eye(64, dtype=torch.bool), "csr")
    with pytest.raises(AttributeError):
        layout.kind = "dense"
    assert repr(layout) == "MaskLayout(64 x 64, csr, 64 survivors, density 0.016)"
    assert repr(MaskLayout.from_mask(layout.to_mask(), "block")) == (
        "MaskLayout(64 x 64, 4 blocks 16 x 16, 64 survivors, density 0.016)"
    )


def test_the_mask_is_not_shared_with_the_caller():
    mask = random_mask(20, 30)
    layout = MaskLayout.from_mask(mask, "dense")
    before = mask.clone()
    mask.zero_()
    assert torch.equal(layout.to_mask(), before)


# ---- index arrays


@given(
    shape=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    density=st.floats(0, 1),
    wide=st.booleans(),
    seed=st.integers(0, 99),
)
def test_compiled_and_numpy_agree(shape, density, wide, seed):
    mask = random_mask(*shape, density, seed).numpy()
    compiled = index.compiled
    if compiled is None:
        pytest.skip("no compiled index arrays here")
    results = []
    for part in (compiled, None):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(index, "compiled", part)
            ptr, idx = index.compress(mask)
            results.append([ptr, idx, *index.transpose(ptr, idx, shape[1], wide), index.block_any(mask, 7, 5)])
    for ours, twin in zip(*results, strict=True):
        assert ours.dtype == twin.dtype and np.array_equal(ours, twin)


# ---- errors


MASK = random_mask(4, 6)
CSR = MaskLayout.from_mask(MASK, "csr")
BLOCKS = BlockLayout.from_dense(MASK, (2, 2))


def order(ptr, idx, perm=None):
    return MaskOrder(torch.tensor(ptr), torch.tensor(idx, dtype=torch.int32), perm)


def csr(ptr, idx, perm=None):
    return MaskLayout(2, 3, "csr", order(ptr, idx, perm))


ERRORS = {
    "mask list": (lambda: MaskLayout.from_mask([[True]]), TypeError, "mask: expected 2-D bool tensor, got list"),
    "mask dtype": (
        lambda: MaskLayout.from_mask(MASK.float()),
        ValueError,
        "mask: expected 2-D bool tensor, got 2-D float32 tensor [4, 6]",
    ),
    "mask empty": (
        lambda: MaskLayout.from_mask(MASK[:0]),
        ValueError,
        "mask: expected at least one row and one column, got 2-D bool tensor [0, 6]",
    ),
    "kind": (
        lambda: MaskLayout.from_mask(MASK, "coo"),
        ValueError,
        "kind: expected auto or one of csr, block, nm, dense, got 'coo'",
    ),
    "block shape": (
        lambda: MaskLayout.from_mask(MASK, block_shape=(0, 3)),
        ValueError,
        "block_shape[0]: expected an int in 1..128, got 0",
    ),
    "constructor kind": (
        lambda: MaskLayout(2, 3, "auto"),
        ValueError,
        "kind: expected one of csr, block, nm, dense, got 'auto'",
    ),
    "out_features": (
        lambda: MaskLayout(0, 3, "dense", mask=MASK),
        ValueError,
        "out_features: expected a positive int, got 0",
    ),
    "in_features": (
        lambda: MaskLayout(3, 2.0, "dense", mask=MASK),
        TypeError,
        "in_features: expected a positive int, got float",
    ),
    "weight": (
        lambda: MaskLayout.from_dense(MASK[0]),
        ValueError,
        "weight: expected 2-D tensor, got 1-D bool tensor [6]",
    ),
    "no order": (
        lambda: MaskLayout(2, 3, "csr"),
        TypeError,
        "by_output: expected (row_ptr, col_idx, None), got NoneType",
    ),
    "no blocks": (lambda: MaskLayout(2, 3, "block"), TypeError, "blocks: expected BlockLayout, got NoneType"),
    "no mask": (lambda: MaskLayout(2, 3, "dense"), ValueError, "mask: expected bool tensor [2, 3], got NoneType"),
    "mask shape": (
        lambda: MaskLayout(2, 3, "dense", mask=MASK),
        ValueError,
        "mask: expected bool tensor [2, 3], got 2-D bool tensor [4, 6]",
    ),
    "block mask": (
        lambda: MaskLayout(4, 6, "block", blocks=BLOCKS, mask=MASK),
        ValueError,
        f"mask: expected bool tensor {list(BLOCKS.values_shape)}, got 2-D bool tensor [4, 6]",
    ),
    "blocks shape": (
        lambda: MaskLayout(4, 5, "block", blocks=BLOCKS),
        ValueError,
        f"blocks: expected 4 x 5, got {BLOCKS}",
    ),
    "blocks transposed": (
        lambda: MaskLayout(6, 4, "block", blocks=BLOCKS.T),
        ValueError,
        f"blocks: expected neither shared nor transposed, got {BLOCKS.T}",
    ),
    "needless": (
        lambda: MaskLayout(4, 6, "dense", blocks=BLOCKS, mask=MASK),
        ValueError,
        "blocks: expected None with kind dense, got BlockLayout",
    ),
    "unsorted": (
        lambda: csr([0, 2, 2], [1, 0]),
        ValueError,
        "col_idx: expected strictly ascending values in each row, got duplicate or unsorted values",
    ),
    "duplicate": (
        lambda: csr([0, 2, 2], [1, 1]),
        ValueError,
        "col_idx: expected strictly ascending values in each row, got duplicate or unsorted values",
    ),
    "column dtype": (
        lambda: MaskLayout(2, 3, "csr", MaskOrder(torch.tensor([0, 1, 1]), torch.tensor([1]), None)),
        ValueError,
        "col_idx: expected 1-D int16 or int32 tensor, got 1-D int64 tensor [1]",
    ),
    "column out of range": (lambda: csr([0, 1, 1], [3]), ValueError, "col_idx: expected values in 0..2, got 3..3"),
    "offsets": (lambda: csr([0, 2, 1], [1]), ValueError, "row_ptr: expected offsets ascending from 0 to 1, got 0..1"),
    "too few offsets": (lambda: csr([0, 1], [1]), ValueError, "row_ptr: expected 3 offsets, got 2"),
    "perm": (
        lambda: csr([0, 1, 1], [1], torch.zeros(1)),
        ValueError,
        "by_output[2]: expected None: values lie by output, got 1-D float32 tensor [1]",
    ),
    "pack": (
        lambda: CSR.pack(torch.ones(6, 4)),
        ValueError,
        "weight: expected tensor [4, 6], got 2-D float32 tensor [6, 4]",
    ),
    "pack transposed": (
        lambda: CSR.T.pack(torch.ones(4, 6)),
        ValueError,
        "weight: expected tensor [6, 4], got 2-D float32 tensor [4, 6]",
    ),
    "unpack": (
        lambda: CSR.unpack(torch.ones(1)),
        ValueError,
        f"values: expected tensor [{CSR.nnz}], got 1-D float32 tensor [1]",
    ),
    "to_csr": (
        lambda: CSR.to_csr(torch.ones(1)),
        ValueError,
        f"values: expected tensor [{CSR.nnz}], got 1-D float32 tensor [1]",
    ),
    "from_csr": (
        lambda: MaskLayout.from_csr(torch.ones(2, 2)),
        ValueError,
        "weight: expected 2-D sparse CSR tensor, got 2-D float32 tensor [2, 2]",
    ),
    "from_scipy": (
        lambda: MaskLayout.from_scipy(np.ones((2, 2))),
        ValueError,
        "weight: expected scipy.sparse CSR matrix, got ndarray",
    ),
    "coordinates": (
        lambda: MaskLayout.from_mask(MASK, "dense").coordinates(),
        ValueError,
        "layout: expected kind csr, got MaskLayout(4 x 6, dense",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    call, error, message = ERRORS[case]
    with pytest.raises(error) as raised:
        call()
    assert str(raised.value).startswith(message)


def test_kernels_read_what_was_checked():
    ptr = torch.tensor([0, 10**9, 1, 10**9, 2])[::2]
    idx = torch.tensor([0, 10**9, 1]).int()[::2]
    layout = MaskLayout(2, 2, "csr", MaskOrder(ptr, idx, None))
    assert layout.by_output.ptr.is_contiguous() and layout.by_output.idx.is_contiguous()
    idx[:] = 1  # the caller's tensor, not the layout's
    assert layout.by_output.idx.tolist() == [0, 1]


def test_block_shape_is_for_blocks():
    with pytest.raises(ValueError, match="block_shape: expected None with kind csr"):
        MaskLayout.from_mask(torch.ones(4, 4, dtype=torch.bool), "csr", block_shape=(2, 2))
