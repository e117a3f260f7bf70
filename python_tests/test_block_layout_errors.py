"""Every error of BlockLayout: what was passed, the type of error, how its message begins."""

import re

import numpy as np
import pytest
import torch

from compsparse_kernels import BlockLayout
from compsparse_kernels.layouts import BlockOrder

MASK = torch.ones(2, 3, dtype=torch.bool)
ORDER = BlockOrder(torch.tensor([0, 1, 2]), torch.tensor([0, 1]).int(), torch.tensor([0, 1]).int())
ENTRIES = (torch.tensor([0, 1]), torch.tensor([0, 1]))


def order(**parts):
    return ORDER._replace(**parts)


def build(by_output):
    return BlockLayout(4, 4, (2, 2), by_output)


def entries(rows=ENTRIES[0], columns=ENTRIES[1], block_shape=(2, 2), out=4, inp=4, **slot):
    return BlockLayout.from_entries(rows, columns, block_shape, out, inp, **slot)


def ints(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


ERRORS = {
    "mask is a list": (
        lambda: BlockLayout.from_mask([[1]], (2, 2)),
        TypeError,
        "block_mask: expected 2-D bool tensor, got list",
    ),
    "mask is float": (
        lambda: BlockLayout.from_mask(MASK.float(), (2, 2)),
        ValueError,
        "block_mask: expected 2-D bool tensor, got 2-D float32 tensor [2, 3]",
    ),
    "mask is 1-D": (
        lambda: BlockLayout.from_mask(MASK[0], (2, 2)),
        ValueError,
        "block_mask: expected 2-D bool tensor, got 1-D bool tensor [3]",
    ),
    "mask is empty": (
        lambda: BlockLayout.from_mask(MASK[:0], (2, 2)),
        ValueError,
        "out_features: expected a positive int, got 0",
    ),
    "block_shape is an int": (
        lambda: BlockLayout.from_mask(MASK, 2),
        TypeError,
        "block_shape: expected a pair (block_out, block_in), got 2",
    ),
    "block_shape of three": (
        lambda: BlockLayout.from_mask(MASK, (2, 2, 2)),
        TypeError,
        "block_shape: expected a pair (block_out, block_in), got (2, 2, 2)",
    ),
    "block of 0": (
        lambda: BlockLayout.from_mask(MASK, (0, 2)),
        ValueError,
        "block_shape[0]: expected an int in 1..128, got 0",
    ),
    "block of 129": (
        lambda: BlockLayout.from_mask(MASK, (2, 129)),
        ValueError,
        "block_shape[1]: expected an int in 1..128, got 129",
    ),
    "block is a float": (
        lambda: BlockLayout.from_mask(MASK, (2.0, 2)),
        TypeError,
        "block_shape[0]: expected an int in 1..128, got float",
    ),
    "in_features does not fit": (
        lambda: BlockLayout.from_mask(MASK, (2, 2), in_features=7),
        ValueError,
        "in_features: expected 3 blocks of 2, the last perhaps ragged, got 7",
    ),
    "out_features does not fit": (
        lambda: BlockLayout.from_mask(MASK, (2, 2), out_features=2),
        ValueError,
        "out_features: expected 2 blocks of 2, the last perhaps ragged, got 2",
    ),
    "in_features is a bool": (
        lambda: BlockLayout.from_mask(MASK, (2, 2), in_features=True),
        TypeError,
        "in_features: expected a positive int, got bool",
    ),
    "weight is a list": (
        lambda: BlockLayout.from_dense([[1.0]], (2, 2)),
        ValueError,
        "weight: expected 2-D tensor, got list",
    ),
    "weight is 3-D": (
        lambda: BlockLayout.from_dense(torch.ones(1, 2, 3), (2, 2)),
        ValueError,
        "weight: expected 2-D tensor, got 3-D float32 tensor [1, 2, 3]",
    ),
    "not a BSR tensor": (
        lambda: BlockLayout.from_bsr(torch.ones(2, 2)),
        ValueError,
        "weight: expected 2-D sparse BSR tensor, got 2-D float32 tensor [2, 2]",
    ),
    "not a scipy matrix": (
        lambda: BlockLayout.from_scipy(np.ones((2, 2))),
        ValueError,
        "weight: expected scipy.sparse BSR matrix, got ndarray",
    ),
    "rows are floats": (
        lambda: entries(rows=torch.ones(2)),
        ValueError,
        "rows: expected 1-D integer tensor, got 1-D float32 tensor [2]",
    ),
    "rows are a mask": (
        lambda: entries(rows=torch.tensor([False, True])),
        ValueError,
        "rows: expected 1-D integer tensor, got 1-D bool tensor [2]",
    ),
    "columns are a list": (
        lambda: entries(columns=[0, 1]),
        ValueError,
        "columns: expected 1-D integer tensor, got list",
    ),
    "row out of range": (lambda: entries(rows=ints(0, 2)), ValueError, "rows: expected values in 0..1, got [0, 2]"),
    "negative column": (
        lambda: entries(columns=ints(0, -1)),
        ValueError,
        "columns: expected values in 0..1, got [0, -1]",
    ),
    "fewer columns than rows": (
        lambda: entries(columns=ints(0)),
        ValueError,
        "columns: expected 2 values, as many as rows, got 1",
    ),
    "an entry twice": (
        lambda: entries(rows=ints(1, 1), columns=ints(0, 0)),
        ValueError,
        "col_idx: expected strictly ascending values in each row, got duplicate or unsorted values",
    ),
    "out_features is a float": (
        lambda: entries(out=4.0),
        TypeError,
        "out_features: expected a positive int, got float",
    ),
    "fewer slots than entries": (
        lambda: entries(slot=ints(0)),
        ValueError,
        "slot: expected 2 values, as many as rows, got 1-D int32 tensor [1]",
    ),
    "slots are a list": (lambda: entries(slot=[0, 1]), ValueError, "slot: expected 1-D integer tensor, got list"),
    "slots are floats": (
        lambda: entries(slot=torch.tensor([0.0, 0.5])),
        ValueError,
        "slot: expected 1-D integer tensor, got 1-D float32 tensor [2]",
    ),
    "slot past 2^31": (
        lambda: entries(slot=torch.tensor([0, 2**32])),
        ValueError,
        "slot: expected values in 0..1, got 0..4294967296",
    ),
    "negative slot": (lambda: entries(slot=ints(0, -1)), ValueError, "slot: expected values in 0..1, got -1..0"),
    "slot past the entries": (lambda: entries(slot=ints(0, 2)), ValueError, "slot: expected values in 0..1, got 0..2"),
    "unused slot": (
        lambda: entries(slot=ints(1, 1)),
        ValueError,
        "slot: expected every number from 0 to the largest, 1, got 1 of them unused",
    ),
    "slots are int64": (
        lambda: build(order(slot=torch.tensor([0, 1]))),
        ValueError,
        "slot: expected int32 tensor [2], got 1-D int64 tensor [2]",
    ),
    "ptr is int32": (
        lambda: build(order(ptr=ints(0, 1, 2))),
        ValueError,
        "row_ptr: expected 1-D int64 tensor, got 1-D int32 tensor [3]",
    ),
    "idx is int64": (
        lambda: build(order(idx=torch.tensor([0, 1]))),
        ValueError,
        "col_idx: expected 1-D int32 tensor, got 1-D int64 tensor [2]",
    ),
    "ptr is short": (
        lambda: build(order(ptr=torch.tensor([0, 2]))),
        ValueError,
        "row_ptr: expected 3 offsets, got 2",
    ),
    "ptr descends": (
        lambda: build(order(ptr=torch.tensor([0, 3, 2]))),
        ValueError,
        "row_ptr: expected offsets ascending from 0 to 2, got 0..2",
    ),
    "ptr starts late": (
        lambda: build(order(ptr=torch.tensor([1, 1, 2]))),
        ValueError,
        "row_ptr: expected offsets ascending from 0 to 2, got 1..2",
    ),
    "ptr ends early": (
        lambda: build(order(ptr=torch.tensor([0, 1, 1]))),
        ValueError,
        "row_ptr: expected offsets ascending from 0 to 2, got 0..1",
    ),
    "column out of range": (
        lambda: build(order(idx=ints(0, 2))),
        ValueError,
        "col_idx: expected values in 0..1, got 0..2",
    ),
    "columns unsorted": (
        lambda: build(order(ptr=torch.tensor([0, 2, 2]), idx=ints(1, 0))),
        ValueError,
        "col_idx: expected strictly ascending values in each row, got duplicate or unsorted values",
    ),
    "in_features of 0": (
        lambda: BlockLayout(4, 0, (2, 2), ORDER),
        ValueError,
        "in_features: expected a positive int, got 0",
    ),
    "pack of another shape": (
        lambda: build(ORDER).pack(torch.ones(4, 5)),
        ValueError,
        "weight: expected tensor [4, 4], got 2-D float32 tensor [4, 5]",
    ),
    "pack of a list": (lambda: build(ORDER).pack([1.0]), ValueError, "weight: expected tensor [4, 4], got list"),
    "unpack of another shape": (
        lambda: build(ORDER).unpack(torch.ones(2, 2, 3)),
        ValueError,
        "values: expected tensor [2, 2, 2], got 3-D float32 tensor [2, 2, 3]",
    ),
    "to_bsr of ragged blocks": (
        lambda: BlockLayout.from_mask(MASK, (2, 2), in_features=5).to_bsr(torch.ones(6, 2, 2)),
        ValueError,
        "layout: expected whole blocks (torch.sparse_bsr has no ragged ones), got BlockLayout(4 x 5,",
    ),
    "to_bsr of other values": (
        lambda: build(ORDER).to_bsr(torch.ones(3, 2, 2)),
        ValueError,
        "values: expected tensor [2, 2, 2], got 3-D float32 tensor [3, 2, 2]",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_argument_what_was_wanted_and_what_came(case):
    call, error, message = ERRORS[case]
    with pytest.raises(error, match="^" + re.escape(message)):
        call()


def strided(values, dtype, between):
    """The values with another number between each two."""
    return torch.stack([torch.tensor(values), torch.full((len(values),), between)], 1).to(dtype)[:, 0]


def test_kernels_read_what_was_checked():
    ptr, idx = strided([0, 1, 2], torch.int64, 10**9), strided([0, 1], torch.int32, 10**9)
    layout = BlockLayout(4, 4, (2, 2), BlockOrder(ptr, idx, idx.clone()))
    assert all(part.is_contiguous() for part in layout.by_output)
    idx[:] = 1  # the caller's tensor, not the layout's
    assert layout.by_output.idx.tolist() == [0, 1]


@pytest.mark.parametrize("by_output", [None, (1, 2), "abcd"])
def test_by_output_is_three_tensors(by_output):
    with pytest.raises(TypeError, match="by_output: expected"):
        BlockLayout(4, 4, (2, 2), by_output)
