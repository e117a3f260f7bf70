"""Launches of the N:M kernels whose offsets pass 2^31, on memory that exists only where it is touched.

Each runs the last program of very many, on a few numbers at the far ends of large tensors, and returns the result
beside the exact one.
"""

import torch

from compsparse_kernels.layouts.nm import pack_offsets
from compsparse_kernels.ops.masked_linear import reference
from compsparse_kernels.ops.masked_linear import triton as shipped
from compsparse_kernels.testing import random_tensor
from python_tests.gpu.interpreter.guard_pages import far
from python_tests.gpu.interpreter.strict import strict

DTYPE = torch.float16
M, BITS, SIDE = 4, 2, 64
ROWS, COLUMNS = 2**26 + SIDE, 256  # rows times bytes of their positions, and batch times rows: past 2^31
WIDE, BATCH = 2**26, 36


def _numbers(*shape: int, seed: int) -> torch.Tensor:
    """Small integers: their products and sums are exact."""
    return random_tensor(*shape, seed=seed).mul(2).round().to(DTYPE)


def _end(shape: tuple[int, ...], values: torch.Tensor) -> torch.Tensor:
    """A matrix that holds these numbers where its last rows and columns meet."""
    tensor = far(shape, values.dtype)
    tensor[tuple(slice(size - own, size) for size, own in zip(shape, values.shape, strict=True))] = values
    return tensor


def _weight(n: int, rows: int, columns: int, out_features: int, in_features: int):
    """(values and positions of the last rows at the last columns, the same at the end of a large weight)."""
    values = _numbers(rows, columns // M, n, seed=3)
    offsets = torch.rand(values.shape[0], values.shape[1], M, generator=torch.Generator().manual_seed(n))
    positions = pack_offsets(offsets.argsort(-1)[..., :n].sort(-1).values, BITS)
    large = _end((out_features, in_features // M, n), values)
    return values, positions, large, _end((out_features, in_features * n * BITS // M // 8), positions)


def _last(launch) -> None:
    with strict(first_program=launch.programs - 1):
        launch._replace(programs=1)()


def _product(kernels, n: int):
    values, positions, all_values, all_positions = _weight(n, SIDE, COLUMNS, ROWS, COLUMNS)
    x = _numbers(BATCH, COLUMNS, seed=1)
    y = far((BATCH, ROWS), DTYPE)
    launch = kernels.product_launch(x, all_values, None, all_positions, M, False, y)
    _last(launch)
    rows = (BATCH - 1) % launch.arguments["TILE_BATCH"] + 1
    exact = reference.nm_linear(x[-rows:].double(), values.double(), None, positions, M)
    return y[-rows:, -SIDE:].double(), exact


def far_product(kernels=shipped):
    return _product(kernels, 2)


def far_product_slot_by_slot(kernels=shipped):
    return _product(kernels, 3)


def far_transposed(kernels=shipped):
    values, positions, all_values, all_positions = _weight(2, SIDE, SIDE, 2 * SIDE, WIDE)
    x, y = _numbers(SIDE, 2 * SIDE, seed=1), far((SIDE, WIDE), DTYPE)
    _last(kernels.product_launch(x, all_values, None, all_positions, M, True, y))
    exact = reference.nm_linear_transposed(x[:, -SIDE:].double(), values.double(), None, positions, M, SIDE)
    return y[:, -SIDE:].double(), exact


def far_sampled_columns(kernels=shipped):
    """b and the values are large."""
    _, positions, all_values, all_positions = _weight(2, SIDE, SIDE, 2 * SIDE, WIDE)
    a, ends = _numbers(SIDE, 2 * SIDE, seed=1), _numbers(SIDE, SIDE, seed=2)
    _last(kernels.sampled_launch(a, _end((SIDE, WIDE), ends), all_positions, M, all_values))
    exact = reference.nm_sampled(a[:, -SIDE:].double(), ends.double(), positions, 2, M)
    return all_values[-SIDE:, -SIDE // M :].double(), exact


def far_sampled_rows(kernels=shipped):
    """a is large."""
    _, positions, all_values, all_positions = _weight(2, SIDE, SIDE, ROWS, SIDE)
    ends, b = _numbers(BATCH, SIDE, seed=1), _numbers(BATCH, SIDE, seed=2)
    _last(kernels.sampled_launch(_end((BATCH, ROWS), ends), b, all_positions, M, all_values))
    return all_values[-SIDE:].double(), reference.nm_sampled(ends.double(), b.double(), positions, 2, M)


FAR_CASES = (far_product, far_product_slot_by_slot, far_transposed, far_sampled_columns, far_sampled_rows)
