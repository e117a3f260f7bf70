"""Pictures of masks: what is on them, read back from the axes."""

import itertools

import matplotlib
import pytest
import torch

from compsparse_kernels import prune, theory
from compsparse_kernels.testing import run_in_subprocess

matplotlib.use("Agg")
from matplotlib import pyplot


@pytest.fixture
def axes():
    figure, axes = pyplot.subplots()
    yield axes
    pyplot.close(figure)


def random_mask(rows, columns, density=0.3):
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(0)) < density


def drawn(axes):
    (image,) = axes.images
    return torch.from_numpy(image.get_array().filled(float("nan")))


def test_a_small_mask_is_drawn_as_it_is(axes):
    mask = random_mask(5, 9)
    assert prune.draw_mask(mask, axes) is axes
    assert torch.equal(drawn(axes), mask.float())
    assert axes.images[0].get_extent() == [-0.5, 8.5, 4.5, -0.5]
    axes.figure.canvas.draw()


@pytest.mark.parametrize(("shape", "block"), [((1100, 3), (3, 1)), ((2, 513), (1, 2)), ((515, 514), (2, 2))])
def test_a_large_mask_is_averaged_over_blocks(shape, block, axes):
    mask = random_mask(*shape)
    shown = drawn(prune.draw_mask(mask, axes))
    tops, lefts = (range(0, many, size) for many, size in zip(shape, block, strict=True))
    blocks = [[mask[top : top + block[0], left : left + block[1]] for left in lefts] for top in tops]
    expected = torch.tensor([[cell.double().mean().item() for cell in row] for row in blocks])
    # A sum of at most 4 ones is exact: what is compared is one division in float32 with one in float64, rounded.
    torch.testing.assert_close(shown, expected, rtol=2**-23, atol=0)
    assert max(shown.shape) <= 512
    # A ragged block is drawn whole and cut by the limits of the axes.
    assert axes.images[0].get_extent() == [-0.5, len(lefts) * block[1] - 0.5, len(tops) * block[0] - 0.5, -0.5]
    assert axes.get_xlim() == (-0.5, shape[1] - 0.5) and axes.get_ylim() == (shape[0] - 0.5, -0.5)
    assert axes.get_title(loc="left").endswith(f", blocks of {block[0]} x {block[1]}")
    axes.figure.canvas.draw()


def test_an_empty_mask_has_a_scale_too(axes):
    prune.draw_mask(torch.zeros(4, 4, dtype=torch.bool), axes)
    assert axes.images[0].get_clim() == (0, 1)
    axes.figure.canvas.draw()


@pytest.mark.parametrize("in_shape", [(3, 4), (2, 3, 2), (1, 12), (12, 1)])
def test_supports_are_rows_as_images(in_shape, axes):
    mask = random_mask(9, 12)
    units = [7, 0, 4, 4, 1]
    assert prune.draw_supports(mask, in_shape, units, axes) is axes
    sheet = drawn(axes)
    height, width = in_shape[-2:]
    gap = max(1, height // 6)
    corners = list(itertools.product(range(0, sheet.shape[0], height + gap), range(0, sheet.shape[1], width + 1)))
    for unit, (top, left) in zip(units, corners, strict=False):
        image = mask[unit].view(-1, height, width).sum(0)
        assert torch.equal(sheet[top : top + height, left : left + width], image.float())
    assert int(sheet.nansum()) == int(mask[units].sum())
    assert [text.get_text() for text in axes.texts] == [f"{unit}: {int(mask[unit].sum())}" for unit in units]
    axes.figure.canvas.draw()


def test_the_units_with_most_inputs_are_drawn(axes):
    mask = torch.ones(20, 20, dtype=torch.bool).tril()  # row r has r + 1 inputs
    mask[3] = True
    prune.draw_supports(mask, (4, 5), ax=axes)
    assert [int(text.get_text().split(":")[0]) for text in axes.texts] == [3, *range(19, 4, -1)]


def test_densities_are_lines(axes):
    history = [{"a": 1.0, "b": 1.0}, {"b": 0.5, "a": 0.25}, {"a": 0.1, "b": 0.3}]
    assert prune.draw_density(history, axes) is axes
    lines = {line.get_label(): line.get_ydata().tolist() for line in axes.lines}
    assert lines == {"a": [1.0, 0.25, 0.1], "b": [1.0, 0.5, 0.3]}
    assert axes.get_yscale() == "log"
    axes.figure.canvas.draw()


def test_a_density_of_zero_is_seen(axes):
    prune.draw_density([{"a": 1}, {"a": 0.0}], axes)
    assert axes.get_yscale() == "linear"


def test_displacements_end_their_colours_beside_the_middle(axes):
    mask = random_mask(6, 20)
    counts = theory.displacement_map(mask, (4, 5))
    assert prune.draw_displacements(counts, axes) is axes
    assert torch.equal(drawn(axes), counts.double())
    assert axes.images[0].get_extent() == [-4.5, 4.5, 3.5, -3.5]
    beside = counts.clone()
    beside[3, 4] = 0
    assert axes.images[0].get_clim() == (0, int(beside.max())) and counts[3, 4] > beside.max()
    axes.figure.canvas.draw()


@pytest.mark.parametrize("counts", [torch.zeros(3, 3), torch.eye(1)])
def test_maps_with_nothing_beside_the_middle(counts, axes):
    prune.draw_displacements(counts, axes)
    assert axes.images[0].get_clim() == (0, 1)


DRAWINGS = [
    lambda: prune.draw_mask(random_mask(3, 4)),
    lambda: prune.draw_supports(random_mask(3, 4), (2, 2)),
    lambda: prune.draw_density([{"a": 0.5}]),
    lambda: prune.draw_displacements(torch.ones(3, 3)),
]


@pytest.mark.parametrize("draw", DRAWINGS, ids=["mask", "supports", "density", "displacements"])
def test_a_figure_of_its_own(draw):
    axes = draw()
    assert axes.figure.get_layout_engine() is not None
    pyplot.close(axes.figure)


def test_without_matplotlib():
    code = """
import torch
from compsparse_kernels import prune
try:
    prune.draw_mask(torch.ones(2, 2, dtype=torch.bool))
except ImportError as error:
    print(error)
"""
    printed = run_in_subprocess(code, blocked=["matplotlib"])
    assert printed.strip() == "matplotlib is needed here: pip install compsparse_kernels[graphs]"


MASK = torch.ones(2, 6, dtype=torch.bool)
TWO_OR_THREE = "(height, width) or (channels, height, width)"
REAL_MAP = "a real tensor with an odd number of rows and of columns"
ERRORS = [
    (prune.draw_mask, ([[True]],), TypeError, "mask: expected 2-D bool tensor, got list"),
    (prune.draw_mask, (MASK.float(),), ValueError, "mask: expected 2-D bool tensor, got 2-D float32 tensor [2, 6]"),
    (
        prune.draw_mask,
        (MASK[:0],),
        ValueError,
        "mask: expected at least one row and column, got 2-D bool tensor [0, 6]",
    ),
    (prune.draw_mask, (MASK, 3), TypeError, "ax: expected matplotlib Axes or None, got int"),
    (prune.draw_density, ([{"a": 1.0}], "ax"), TypeError, "ax: expected matplotlib Axes or None, got str"),
    (prune.draw_supports, (MASK[0], (2, 3)), ValueError, "mask: expected 2-D bool tensor, got 1-D bool tensor [6]"),
    (prune.draw_supports, (MASK, 6), TypeError, f"in_shape: expected {TWO_OR_THREE}, got 6"),
    (prune.draw_supports, (MASK, (6,)), ValueError, f"in_shape: expected {TWO_OR_THREE}, got (6,)"),
    (prune.draw_supports, (MASK, (2, 3.0)), TypeError, "in_shape[1]: expected a positive int, got float"),
    (prune.draw_supports, (MASK, (2, 2)), ValueError, "in_shape: expected a shape of 6 inputs, got (2, 2)"),
    (prune.draw_supports, (MASK, (2, 3), 1), TypeError, "units: expected a sequence of row numbers, got int"),
    (prune.draw_supports, (MASK, (2, 3), []), ValueError, "units: expected 1 to 64 row numbers, got 0"),
    (prune.draw_supports, (MASK, (2, 3), [0] * 65), ValueError, "units: expected 1 to 64 row numbers, got 65"),
    (prune.draw_supports, (MASK, (2, 3), [0, 2]), ValueError, "units[1]: expected a row number in 0..1, got 2"),
    (prune.draw_density, ({"a": 1.0},), TypeError, "history: expected a sequence of {layer: density}, got dict"),
    (prune.draw_density, ([],), ValueError, "history: expected at least one round, got none"),
    (prune.draw_density, ([0.5],), TypeError, "history[0]: expected {layer: density}, got float"),
    (prune.draw_density, ([{}],), ValueError, "history[0]: expected the layers [], got []"),
    (prune.draw_density, ([{"a": 1}, {"b": 1}],), ValueError, "history[1]: expected the layers ['a'], got ['b']"),
    (prune.draw_density, ([{"a": 50}],), ValueError, "history[0]['a']: expected a density in 0..1, got 50"),
    (prune.draw_displacements, ([[1]],), TypeError, f"counts: expected {REAL_MAP}, got list"),
    (
        prune.draw_displacements,
        (torch.ones(3, 2),),
        ValueError,
        f"counts: expected {REAL_MAP}, got 2-D float32 tensor [3, 2]",
    ),
    (
        prune.draw_displacements,
        (-torch.ones(1, 1),),
        ValueError,
        "counts: expected no negative numbers and no NaN, got -1.0",
    ),
]


@pytest.mark.parametrize(("function", "arguments", "error", "message"), ERRORS, ids=[case[3] for case in ERRORS])
def test_messages(function, arguments, error, message):
    with pytest.raises(error) as caught:
        function(*arguments)
    assert str(caught.value) == message
