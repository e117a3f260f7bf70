"""Measures of locality against brute force, and against supports whose measure is known."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compsparse_kernels import FunctionGraph, theory


def random_mask(rows, columns, density, seed):
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < density


# ---- geometry


@pytest.mark.parametrize("n", [1, 2, 5, 6])
def test_the_ring_wraps_around(n):
    expected = [[min((i - j) % n, (j - i) % n) for j in range(n)] for i in range(n)]
    assert theory.ring_distance(n).tolist() == expected
    assert theory.ring_distance(n).dtype == torch.int64


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize(("metric", "combine"), [("chebyshev", max), ("manhattan", sum)])
@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 3)])
def test_grid_distances(shape, metric, combine, wrap):
    places = list(itertools.product(*map(range, shape)))

    def along(a, b, size):
        return min((a - b) % size, (b - a) % size) if wrap else abs(a - b)

    expected = [[combine(map(along, one, other, shape)) for other in places] for one in places]
    assert theory.grid_distance(shape, metric, wrap).tolist() == expected


# ---- adjacency lift


def brute_force_lift(mask, distance):
    rows, n = mask.tolist(), mask.shape[1]
    pairs = list(itertools.combinations(range(n), 2))
    drawn = sum(math.comb(sum(row), 2) for row in rows)
    lifts = []
    for d in range(int(distance.max()) + 1):
        near = [(i, j) for i, j in pairs if distance[i, j] == d]
        kept = sum(row[i] and row[j] for row in rows for i, j in near)
        chance = drawn * len(near) / len(pairs) if pairs else 0
        lifts.append(kept / chance if chance else math.nan)
    return torch.tensor(lifts, dtype=torch.float64)


@given(st.integers(0, 6), st.integers(1, 9), st.sampled_from([0.0, 0.2, 0.5, 1.0]), st.integers(0, 10**6))
def test_lift_equals_brute_force(rows, n, density, seed):
    mask = random_mask(rows, n, density, seed)
    distance = torch.randint(0, 4, (n, n), generator=torch.Generator().manual_seed(seed)).triu(1)
    distance = distance + distance.T  # any geometry, distinct inputs at distance 0 included
    lift = theory.adjacency_lift(mask, distance)
    assert lift.dtype == torch.float64
    # Numerator and denominator are exact integers on both sides: a few roundings are left.
    torch.testing.assert_close(lift, brute_force_lift(mask, distance), rtol=1e-14, atol=0, equal_nan=True)


@pytest.mark.parametrize("degree", [2, 3, 5, 7])
def test_over_all_supports_of_a_size_the_lift_is_one(degree):
    """The formula's chance is that of a random support, without replacement: exactly, on average."""
    n = 7
    supports = list(itertools.combinations(range(n), degree))
    mask = torch.zeros(len(supports), n, dtype=torch.bool)
    for row, support in enumerate(supports):
        mask[row, list(support)] = True
    lift = theory.adjacency_lift(mask, theory.ring_distance(n))
    assert lift[0].isnan() and lift[1:].tolist() == [1.0, 1.0, 1.0]


def test_neighbours_across_the_seam_of_the_ring():
    mask = torch.zeros(1, 6, dtype=torch.bool)
    mask[0, [0, 5]] = True
    # 6 of the 15 pairs are neighbours on the ring, 5 on the line.
    assert theory.adjacency_lift(mask, theory.ring_distance(6)).tolist()[1:] == [2.5, 0.0, 0.0]
    line = theory.adjacency_lift(mask, theory.grid_distance((6,)))
    assert line.tolist()[1:] == [0.0, 0.0, 0.0, 0.0, 15.0]


def test_units_without_pairs_do_not_count():
    ring = theory.ring_distance(8)
    mask = ring[:4] <= 1
    alone = torch.zeros(3, 8, dtype=torch.bool)
    alone[1, 4] = True  # one unit with one input, two with none
    expected = theory.adjacency_lift(mask, ring)
    assert torch.equal(theory.adjacency_lift(torch.cat([alone, mask]), ring)[1:], expected[1:])
    assert theory.adjacency_lift(alone, ring).isnan().all()
    assert theory.adjacency_lift(mask[:0], ring).isnan().all()


def test_masks_are_pooled_by_their_pairs():
    ring = theory.ring_distance(9)
    masks = [random_mask(rows, 9, density, rows) for rows, density in ((3, 0.3), (5, 0.8), (1, 0.5))]
    pooled = theory.adjacency_lift(masks, ring)
    assert torch.equal(pooled[1:], theory.adjacency_lift(torch.cat(masks), ring)[1:])


def test_channels_of_a_pixel_are_at_distance_zero():
    distance = theory.grid_distance((2, 2)).repeat(3, 3)
    mask = torch.zeros(1, 12, dtype=torch.bool)
    mask[0, [1, 5, 9]] = True  # one pixel, all channels: 3 of the 12 pairs at distance 0, and 66 pairs in all
    assert theory.adjacency_lift(mask, distance).tolist() == [5.5, 0.0]


def test_a_convolution_is_local():
    mask = torch.eye(16, dtype=torch.bool) | torch.eye(16, dtype=torch.bool).roll(1, 0)
    lift = theory.adjacency_lift(mask, theory.ring_distance(16))
    assert lift[1] == 7.5 and not lift[2:].any()  # all pairs are among the 16 of 120 at distance 1


# ---- displacement map


def brute_force_map(mask, in_shape, out_shape):
    height, width = in_shape[-2:]
    result = torch.zeros(2 * height - 1, 2 * width - 1, dtype=torch.int64)

    def place(feature, shape):
        return divmod(feature % (shape[-2] * shape[-1]), shape[-1])

    for unit, row in enumerate(mask):
        support = row.nonzero().flatten().tolist()
        if out_shape is None:
            centres = [place(i, in_shape) for i in support]
        else:
            y, x = place(unit, out_shape)
            centres = [(math.floor((y + 0.5) * height / out_shape[-2]), math.floor((x + 0.5) * width / out_shape[-1]))]
        for (cy, cx), i in itertools.product(centres, support):
            y, x = place(i, in_shape)
            result[height - 1 + y - cy, width - 1 + x - cx] += 1
    return result


SHAPES = [
    ((3, 4), (3, 4)),
    ((4, 4), (2, 2)),
    ((2, 3), (4, 6)),
    ((5, 3), (2, 2)),
    ((1, 6), (1, 3)),
    ((2, 3, 2), (3, 3, 2)),
    ((3, 2), None),
    ((2, 3, 2), None),
]


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("in_shape", "out_shape"), SHAPES)
def test_map_equals_brute_force(in_shape, out_shape, density):
    mask = random_mask(math.prod(out_shape or (7,)), math.prod(in_shape), density, 0)
    found = theory.displacement_map(mask, in_shape, out_shape)
    assert found.dtype == torch.int64
    assert torch.equal(found, brute_force_map(mask, in_shape, out_shape))
    if out_shape is not None:
        assert found.sum() == mask.sum()


def test_the_map_of_a_convolution_is_its_kernel():
    graph = FunctionGraph.conv2d((6, 6), 3, padding=1)
    mask = torch.zeros(36, 36, dtype=torch.bool)
    mask[graph.parents.node_of_edge().tolist(), graph.parents.idx.tolist()] = True
    found = theory.displacement_map(mask, (6, 6), (6, 6))
    kernel = found[4:7, 4:7]
    assert kernel.sum() == found.sum() == mask.sum()
    assert kernel[1, 1] == 36 and kernel[0, 1] == 30 and kernel[0, 0] == 25  # the border has fewer


def test_the_map_without_places_is_symmetric():
    found = theory.displacement_map(random_mask(9, 20, 0.4, 1), (4, 5))
    assert torch.equal(found, found.flip(0, 1))


# ---- inverse participation ratio


@pytest.mark.parametrize("k", [1, 3, 8])
def test_k_equal_weights(k):
    weights = torch.zeros(8, dtype=torch.float64)
    weights[:k] = torch.tensor([-2.0, 2.0] * 4)[:k]
    assert theory.inverse_participation_ratio(weights) == torch.tensor(1 / k, dtype=torch.float64)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_along_a_dimension(dim):
    weights = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = (weights**4).sum(dim) / (weights**2).sum(dim) ** 2
    torch.testing.assert_close(theory.inverse_participation_ratio(weights, dim), expected)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_fourth_powers_do_not_leave_the_range(scale):
    """1e-120 and 1e120 are no float32."""
    assert theory.inverse_participation_ratio(torch.full((4,), scale)) == 0.25


def test_no_weights_have_no_ratio():
    ratio = theory.inverse_participation_ratio(torch.tensor([[0.0, 0.0], [0.0, 1.0]]))
    assert ratio[0].isnan() and ratio[1] == 1
    assert theory.inverse_participation_ratio(torch.zeros(3, 0)).isnan().all()


# ---- messages

RING = theory.ring_distance(3)
MASK = torch.ones(2, 3, dtype=torch.bool)
ERRORS = [
    (theory.ring_distance, (2.0,), TypeError, "n: expected a positive int, got float"),
    (theory.ring_distance, (0,), ValueError, "n: expected a positive int, got 0"),
    (theory.grid_distance, (4,), TypeError, "shape: expected 1 to 3 positive ints, got 4"),
    (theory.grid_distance, ((),), ValueError, "shape: expected 1 to 3 positive ints, got ()"),
    (theory.grid_distance, ((2, 0),), ValueError, "shape[1]: expected a positive int, got 0"),
    (theory.grid_distance, ((2,), "l2"), ValueError, "metric: expected 'chebyshev' or 'manhattan', got 'l2'"),
    (
        theory.adjacency_lift,
        (MASK.float(), RING),
        ValueError,
        "mask_or_masks: expected 2-D bool tensor, got 2-D float32 tensor [2, 3]",
    ),
    (theory.adjacency_lift, (3, RING), TypeError, "mask_or_masks: expected a mask or a sequence of masks, got int"),
    (theory.adjacency_lift, ([], RING), ValueError, "mask_or_masks: expected at least one mask, got none"),
    (
        theory.adjacency_lift,
        ([MASK, None], RING),
        TypeError,
        "mask_or_masks[1]: expected 2-D bool tensor, got NoneType",
    ),
    (
        theory.adjacency_lift,
        ([MASK, MASK[:, :2]], RING),
        ValueError,
        "mask_or_masks[1]: expected 3 columns, as the first mask, got 2",
    ),
    (
        theory.adjacency_lift,
        (MASK, 1),
        TypeError,
        "distance: expected an integer tensor [3, 3], as mask has 3 columns, got int",
    ),
    (
        theory.adjacency_lift,
        (MASK, RING.float()),
        ValueError,
        "distance: expected an integer tensor [3, 3], as mask has 3 columns, got 2-D float32 tensor [3, 3]",
    ),
    (
        theory.adjacency_lift,
        (MASK, RING[:2]),
        ValueError,
        "distance: expected an integer tensor [3, 3], as mask has 3 columns, got 2-D int64 tensor [2, 3]",
    ),
    (theory.adjacency_lift, (MASK[:, :0], RING[:0, :0]), ValueError, "distance: expected at least one input, got none"),
    (theory.adjacency_lift, (MASK, -RING), ValueError, "distance: expected no negative entries, got -1"),
    (
        theory.adjacency_lift,
        (MASK, RING.triu()),
        ValueError,
        "distance: expected a symmetric matrix, got an asymmetric one",
    ),
    (theory.adjacency_lift, (MASK, RING + 1), ValueError, "distance: expected 0 on the diagonal, got 1"),
    (theory.displacement_map, ([], (1, 3)), TypeError, "mask: expected 2-D bool tensor, got list"),
    (theory.displacement_map, (MASK, (3,)), ValueError, "in_shape: expected 2 to 3 positive ints, got (3,)"),
    (
        theory.displacement_map,
        (MASK, (2, 2)),
        ValueError,
        "in_shape: expected a shape of 3 features (columns of mask), got (2, 2)",
    ),
    (
        theory.displacement_map,
        (MASK, (1, 3), (1, 3)),
        ValueError,
        "out_shape: expected a shape of 2 features (rows of mask), got (1, 3)",
    ),
    (
        theory.inverse_participation_ratio,
        (MASK,),
        TypeError,
        "weights: expected a floating-point tensor, got 2-D bool tensor [2, 3]",
    ),
    (theory.inverse_participation_ratio, (MASK.float(), "0"), TypeError, "dim: expected an int, got '0'"),
    (
        theory.inverse_participation_ratio,
        (MASK.float(), 2),
        ValueError,
        "dim: expected a dimension of weights, -2..1, got 2",
    ),
    (
        theory.inverse_participation_ratio,
        (torch.tensor(1.0),),
        ValueError,
        "weights: expected at least one dimension, got 0-D float32 tensor []",
    ),
]


@pytest.mark.parametrize(("function", "arguments", "error", "message"), ERRORS, ids=[case[3] for case in ERRORS])
def test_messages(function, arguments, error, message):
    with pytest.raises(error) as caught:
        function(*arguments)
    assert str(caught.value) == message


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_participation_ratio_of_half_precision(dtype):
    assert theory.inverse_participation_ratio(torch.ones(1024, dtype=dtype), 0).item() == 1 / 1024
