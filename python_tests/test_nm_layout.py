"""NMLayout, and MaskLayout of kind nm: positions, padding, the choice of a pattern, copies, and every error message."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compsparse_kernels import MaskLayout
from compsparse_kernels.layouts import NMLayout
from compsparse_kernels.layouts.nm import COMMON, tightest
from compsparse_kernels.testing import random_mask, random_tensor
from python_tests.nm import PATTERNS, nm_layout, nm_mask

SHAPES = [(1, 1), (1, 40), (40, 1), (48, 64), (37, 53)]


# ---- round trips


@pytest.mark.parametrize("nm", PATTERNS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("missing", [0.0, 0.4, 1.0])
def test_masks_and_weights_come_back(shape, nm, missing):
    mask = nm_mask(*shape, *nm, missing)
    weight = random_tensor(*shape)
    layout = MaskLayout.from_mask(mask, "nm", nm=nm)
    assert (layout.nm.n, layout.nm.m) == nm
    assert layout.values_shape == (shape[0], -(-shape[1] // nm[1]), nm[0])
    assert torch.equal(layout.to_mask(), mask) and layout.to_mask().dtype == torch.bool
    assert layout.nnz == int(mask.sum()) and layout.density == pytest.approx(mask.double().mean().item())
    values = layout.pack(weight)
    assert tuple(values.shape) == layout.values_shape and values.is_contiguous()
    assert torch.equal(layout.unpack(values), weight * mask)
    assert torch.equal(layout.pack(layout.unpack(values)), values)
    assert torch.equal(layout.unpack(random_tensor(*layout.values_shape)) != 0, mask)
    assert torch.equal(layout.T.to_mask(), mask.T) and torch.equal(layout.T.pack(weight.T), values)
    assert torch.equal(layout.T.unpack(values), (weight * mask).T)


@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 300)),
    n=st.integers(1, 256),
    more=st.integers(0, 255),
    missing=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_any_pattern(shape, n, more, missing, seed):
    nm = n, min(n + more, 256)
    mask = nm_mask(*shape, *nm, missing, seed)
    slots = NMLayout.from_mask(mask, *nm)
    offsets, columns = slots.offsets(), slots.columns()
    assert bool((offsets.diff(dim=-1) > 0).all()) and int(offsets.max()) < nm[1]
    assert torch.equal(columns // nm[1], torch.arange(slots.groups)[:, None].expand_as(columns))
    has_slot = slots.to_mask()
    assert not (mask & ~has_slot).any()
    assert int(has_slot.sum()) == slots.nnz == round(slots.density * mask.numel())
    again = NMLayout(*shape, *nm, slots.positions)
    assert torch.equal(again.offsets(), offsets)


def test_positions_are_packed():
    mask = torch.tensor([[1, 0, 0, 1, 0, 1, 0, 1, 0, 0, 1, 1], [1, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 1]]).bool()
    slots = NMLayout.from_mask(mask, 2, 4)
    # Slots 0 3 1 3 2 3, and 0 1 0 1 1 3: the third group of row 1 has no survivor and gets its first two columns.
    assert slots.offsets().tolist() == [[[0, 3], [1, 3], [2, 3]], [[0, 1], [0, 1], [1, 3]]]
    expected = [[0b11_01_11_00, 0b11_10], [0b01_00_01_00, 0b11_01]]
    assert slots.positions.tolist() == expected and slots.nbytes == 4


@pytest.mark.parametrize("m, bits", [(1, 2), (4, 2), (5, 4), (16, 4), (17, 8), (256, 8)])
def test_bytes(m, bits):
    slots = NMLayout.from_mask(nm_mask(6, 1024, 1, m), 1, m)
    assert slots.bits == bits and slots.nbytes == 6 * -(-slots.groups * bits // 8)


def test_bytes_of_2_to_4():
    """Of a dense float32 weight, half the values and 2 bits for each of them: 0.53."""
    layout = nm_layout(64, 128, 2, 4)
    values = layout.pack(torch.zeros(64, 128))
    assert layout.mask is None
    assert values.nbytes + layout.nm.nbytes == 64 * 128 * 4 * (0.5 + 0.5 * 2 / 32)


def test_groups_that_hold_less_have_a_mask():
    assert nm_layout(8, 16, 2, 4).mask is None
    mask = nm_mask(8, 16, 2, 4)
    mask[3, 4:8] = False
    layout = MaskLayout.from_mask(mask, "nm", nm=(2, 4))
    assert layout.mask.shape == (8, 4, 2) and int((~layout.mask).sum()) == 2 and not layout.mask[3, 1].any()
    ragged = nm_layout(8, 17, 2, 4)  # the last group has one column and two slots
    assert ragged.mask is None and ragged.nnz == 8 * 9
    assert ragged.pack(torch.ones(8, 17))[:, -1].tolist() == [[1, 0]] * 8


# ---- the choice of a pattern


def test_tightest():
    for n, m in COMMON:
        assert tightest(nm_mask(64, 96, n, m)) == (n, m)
        assert MaskLayout.from_mask(nm_mask(64, 96, n, m), "nm").nm.m == m
    assert tightest(torch.zeros(3, 50, dtype=torch.bool)) == (1, 16)
    assert tightest(torch.ones(3, 50, dtype=torch.bool)) is None
    assert tightest(torch.tensor([[True, True, False, False, False]])) == (2, 16)
    costs = [(n / m, m) for n, m in COMMON]
    assert costs == sorted(costs)


# ---- copies


def padded():
    return nm_layout(20, 30, 2, 4, missing=0.3)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("copier", [copy.copy, copy.deepcopy, lambda layout: pickle.loads(pickle.dumps(layout))])
def test_copies(copier, transposed):
    layout = padded().T if transposed else padded()
    other = copier(layout)
    assert other.values_shape == layout.values_shape and other.transposed == layout.transposed
    assert torch.equal(other.to_mask(), layout.to_mask()) and torch.equal(other.T.to_mask(), layout.T.to_mask())


def test_transposes():
    layout = padded()
    assert layout.T.T is layout and layout.T is layout.T and layout.T.nm is layout.nm
    assert (layout.T.out_features, layout.T.in_features) == (30, 20) and layout.T.nnz == layout.nnz


def test_devices():
    layout = padded()
    transpose = layout.T  # noqa: F841  (cached, must not follow to another device)
    assert layout.device.type == "cpu" and layout.to("cpu") is layout and layout.nm.to("cpu") is layout.nm
    moved = layout.to("meta")
    assert moved.device.type == moved.T.device.type == moved.nm.device.type == moved.mask.device.type == "meta"
    assert layout.T.device.type == "cpu" and moved.values_shape == layout.values_shape


@pytest.mark.parametrize("transposed", [False, True])
def test_torch_sparse_and_scipy(transposed):
    pytest.importorskip("scipy.sparse")
    layout, weight = padded(), random_tensor(20, 30)
    values, weight = layout.pack(weight), weight * layout.to_mask()
    layout, weight = (layout.T, weight.T) if transposed else (layout, weight)
    assert torch.equal(layout.to_csr(values).to_dense(), weight)
    assert torch.equal(torch.from_numpy(layout.to_scipy(values).toarray()), weight)


def test_from_dense_keeps_the_non_zeros():
    weight = random_tensor(20, 32) * nm_mask(20, 32, 2, 4)
    layout = MaskLayout.from_dense(weight.requires_grad_(), "nm", nm=(2, 4))
    assert torch.equal(layout.to_mask(), weight != 0)


def test_it_says_what_it_is():
    layout = nm_layout(8, 16, 2, 4)
    assert repr(layout) == "MaskLayout(8 x 16, 2:4, 64 survivors, density 0.500)"
    assert repr(layout.T) == "MaskLayout(16 x 8, 2:4 of the transpose, 64 survivors, density 0.500)"
    assert repr(layout.nm) == "NMLayout(8 x 16, 2:4, density 0.500)"
    with pytest.raises(AttributeError):
        layout.nm.m = 8


def test_kernels_read_what_was_checked():
    wide = torch.full((2, 4), 0b01_00, dtype=torch.uint8)
    slots = NMLayout(2, 16, 1, 4, wide[:, ::4])
    assert slots.positions.is_contiguous()
    wide.fill_(0)
    assert slots.offsets().tolist() == [[[0], [1], [0], [0]]] * 2  # the caller's tensor changed, not the layout's


# ---- errors


MASK = random_mask(4, 6)
SLOTS = NMLayout.from_mask(nm_mask(4, 6, 2, 3), 2, 3)
RAGGED = NMLayout.from_mask(nm_mask(4, 5, 2, 4), 2, 4)  # the last group has one column
FULL = torch.ones(4, 6, dtype=torch.bool)


def slots_at(*positions, n=2, m=4):
    return NMLayout(1, 8, n, m, torch.tensor([positions], dtype=torch.uint8))


ERRORS = {
    "mask list": (lambda: NMLayout.from_mask([[True]], 2, 4), TypeError, "mask: expected 2-D bool tensor, got list"),
    "mask dtype": (
        lambda: NMLayout.from_mask(MASK.float(), 2, 4),
        ValueError,
        "mask: expected 2-D bool tensor, got 2-D float32 tensor [4, 6]",
    ),
    "mask empty": (
        lambda: NMLayout.from_mask(MASK[:, :0], 2, 4),
        ValueError,
        "mask: expected at least one row and one column, got 2-D bool tensor [4, 0]",
    ),
    "too many": (
        lambda: NMLayout.from_mask(torch.tensor([[0, 1, 0, 1, 0, 0], [0, 1, 0, 0, 1, 1]]).bool(), 1, 4),
        ValueError,
        "mask: expected at most 1 survivors in each 4 columns of a row, got 2 in row 0, columns 0..3",
    ),
    "too many in a ragged group": (
        lambda: MaskLayout.from_mask(torch.tensor([[0, 1, 0, 0, 1, 1]]).bool(), "nm", nm=(1, 4)),
        ValueError,
        "mask: expected at most 1 survivors in each 4 columns of a row, got 2 in row 0, columns 4..5",
    ),
    "no common pattern": (
        lambda: MaskLayout.from_mask(FULL, "nm"),
        ValueError,
        "mask: expected a mask that is 1:16, 1:8, 2:16, 1:4, 2:8, 4:16, 1:2, 2:4 or 4:8 (or give nm=(n, m)),"
        " got 6 survivors in row 0, columns 0..5",
    ),
    "tightest": (
        lambda: tightest(MASK.int()),
        ValueError,
        "mask: expected 2-D bool tensor, got 2-D int32 tensor [4, 6]",
    ),
    "nm list": (lambda: MaskLayout.from_mask(MASK, "nm", nm=[2, 4]), TypeError, "nm: expected (n, m), got [2, 4]"),
    "nm three": (
        lambda: MaskLayout.from_mask(MASK, "nm", nm=(2, 4, 8)),
        TypeError,
        "nm: expected (n, m), got (2, 4, 8)",
    ),
    "nm with csr": (
        lambda: MaskLayout.from_mask(MASK, "csr", nm=(2, 4)),
        ValueError,
        "nm: expected None with kind csr, got (2, 4)",
    ),
    "n": (lambda: NMLayout.from_mask(MASK, 5, 4), ValueError, "n: expected an int in 1..4, got 5"),
    "n zero": (lambda: NMLayout.from_mask(MASK, 0, 4), ValueError, "n: expected an int in 1..4, got 0"),
    "n float": (lambda: NMLayout.from_mask(MASK, 2.0, 4), TypeError, "n: expected an int in 1..4, got float"),
    "m": (lambda: NMLayout.from_mask(MASK, 2, 257), ValueError, "m: expected an int in 1..256, got 257"),
    "out_features": (
        lambda: NMLayout(0, 8, 2, 4, SLOTS.positions),
        ValueError,
        "out_features: expected a positive int, got 0",
    ),
    "in_features": (
        lambda: NMLayout(1, 8.0, 2, 4, SLOTS.positions),
        TypeError,
        "in_features: expected a positive int, got float",
    ),
    "positions": (
        lambda: NMLayout(1, 8, 2, 4, [0]),
        ValueError,
        "positions: expected uint8 tensor [1, 1], got list",
    ),
    "positions shape": (
        lambda: slots_at(0b11_01_11_00, 0),
        ValueError,
        "positions: expected uint8 tensor [1, 1], got 2-D uint8 tensor [1, 2]",
    ),
    "positions dtype": (
        lambda: NMLayout(1, 8, 2, 4, torch.zeros(1, 1)),
        ValueError,
        "positions: expected uint8 tensor [1, 1], got 2-D float32 tensor [1, 1]",
    ),
    "position too large": (
        lambda: slots_at(0b11_00, n=1, m=3),
        ValueError,
        "positions: expected values in 0..2, got 3",
    ),
    "positions unsorted": (
        lambda: slots_at(0b11_01_00_11),
        ValueError,
        "positions: expected strictly ascending values in each group, got duplicate or unsorted values",
    ),
    "positions twice": (
        lambda: slots_at(0b11_01_10_10),
        ValueError,
        "positions: expected strictly ascending values in each group, got duplicate or unsorted values",
    ),
    "unused bits": (
        lambda: slots_at(0b01_00_00, n=1),
        ValueError,
        "positions: expected 0 in the bits that no slot uses, got 1",
    ),
    "pack": (
        lambda: SLOTS.pack(torch.ones(6, 4)),
        ValueError,
        "weight: expected tensor [4, 6], got 2-D float32 tensor [6, 4]",
    ),
    "unpack": (
        lambda: SLOTS.unpack(torch.ones(4, 2)),
        ValueError,
        "values: expected tensor [4, 2, 2], got 2-D float32 tensor [4, 2]",
    ),
    "no slots": (lambda: MaskLayout(4, 6, "nm"), TypeError, "nm: expected NMLayout, got NoneType"),
    "slots of another shape": (
        lambda: MaskLayout(4, 5, "nm", nm=SLOTS),
        ValueError,
        f"nm: expected 4 x 5, got {SLOTS}",
    ),
    "needless slots": (
        lambda: MaskLayout(4, 6, "dense", mask=MASK, nm=SLOTS),
        ValueError,
        "nm: expected None with kind dense, got NMLayout",
    ),
    "mask of slots": (
        lambda: MaskLayout(4, 6, "nm", nm=SLOTS, mask=MASK),
        ValueError,
        "mask: expected bool tensor [4, 2, 2], got 2-D bool tensor [4, 6]",
    ),
    "mask past the end": (
        lambda: MaskLayout(4, 5, "nm", nm=RAGGED, mask=torch.ones(4, 2, 2, dtype=torch.bool)),
        ValueError,
        "mask: expected False past the last column, got True",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    call, error, message = ERRORS[case]
    with pytest.raises(error) as raised:
        call()
    assert str(raised.value) == message
