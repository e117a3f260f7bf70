"""Launches of the block-sparse kernels whose offsets pass 2^31, on memory that exists only where it is touched.

Each puts a few numbers into the far ends of one large tensor, and returns the result beside the exact one.
"""

import torch

from compsparse_kernels.ops.block_sparse_linear import triton as shipped
from compsparse_kernels.testing import random_tensor
from python_tests.gpu.interpreter.guard_pages import far
from python_tests.gpu.interpreter.strict import strict

BATCH = 300  # many tiles, so that the steps along the batch are long as well
WIDE = 2**23 - 5  # features: 300 rows pass 2^31, no tile of the product does; the last block is ragged
WIDER = 2**26 - 5  # 64 rows, a tile of the sampled product, pass 2^31
SLOTS = 2**17 + 8  # blocks of 128 x 128
BLOCK_OUT, BLOCK_IN = 16, 64
DTYPE = torch.float16


def _numbers(*shape: int, seed: int) -> torch.Tensor:
    """Small integers: their products and sums are exact."""
    return random_tensor(*shape, seed=seed).mul(2).round().to(DTYPE)


def _order(*columns: int, slots: tuple[int, ...] | None = None):
    """One row of blocks."""
    slots = tuple(range(len(columns))) if slots is None else slots
    int32 = (torch.tensor(part, dtype=torch.int32) for part in (columns, slots))
    return torch.tensor([0, len(columns)]), *int32


def _wide(features: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """[BATCH, features], what it holds in its first and in its last, ragged block of columns, and which that is."""
    wide = far((BATCH, features), DTYPE)
    last = (features - 1) // BLOCK_IN
    rest = features - last * BLOCK_IN
    ends = _numbers(BATCH, BLOCK_IN + rest, seed=1)
    wide[:, :BLOCK_IN] = ends[:, :BLOCK_IN]
    wide[:, -rest:] = ends[:, BLOCK_IN:]
    return wide, ends, last


def far_x(kernels=shipped):
    x, ends, last = _wide(WIDE)
    values = _numbers(2, BLOCK_OUT, BLOCK_IN, seed=2)
    with strict():
        y = kernels.block_sparse_linear(x, values, None, *_order(0, last), BLOCK_OUT, False, "none")
    weight = torch.cat([values[0], values[1]], dim=1)[:, : ends.shape[1]]
    return y.double(), ends.double() @ weight.double().mT


def far_y(kernels=shipped):
    """Only the first row of blocks: a grid over all of them would take hours."""
    y = far((BATCH, WIDE), DTYPE)
    x, values = _numbers(BATCH, BLOCK_IN, seed=1), _numbers(1, BLOCK_OUT, BLOCK_IN, seed=2)
    with strict():
        kernels.product_launch(x, values, None, *_order(0), False, "none", y)()
    return y[:, :BLOCK_OUT].double(), x.double() @ values[0].double().mT


def far_values(kernels=shipped):
    values = far((SLOTS, 128, 128), DTYPE)
    values[-1], values[0] = _numbers(128, 128, seed=1), _numbers(128, 128, seed=2)
    x = _numbers(5, 256, seed=3)
    with strict():
        y = kernels.block_sparse_linear(x, values, None, *_order(0, 1, slots=(SLOTS - 1, 0)), 128, False, "none")
    weight = torch.cat([values[-1], values[0]], dim=1)
    return y.double(), x.double() @ weight.double().mT


def far_sampled_inputs(kernels=shipped):
    """b is large: a first and a last block of columns."""
    b, ends, last = _wide(WIDER)
    a = _numbers(BATCH, BLOCK_OUT, seed=2)
    with strict():
        values = kernels.sampled_block_matmul(a, b, *_order(0, last), 2, False, BLOCK_OUT, BLOCK_IN)
    exact = torch.zeros(BLOCK_OUT, 2 * BLOCK_IN, dtype=torch.float64)
    exact[:, : ends.shape[1]] = a.double().mT @ ends.double()
    return values.double(), exact.view(BLOCK_OUT, 2, BLOCK_IN).transpose(0, 1)


def far_sampled_outer_inputs(kernels=shipped):
    """a is large: one row of blocks of it."""
    a = far((BATCH, WIDER), DTYPE)
    a[:, :BLOCK_OUT], b = _numbers(BATCH, BLOCK_OUT, seed=1), _numbers(BATCH, BLOCK_IN, seed=2)
    values = torch.empty(1, BLOCK_OUT, BLOCK_IN, dtype=DTYPE)
    with strict():
        kernels.sampled_launch(a, b, *_order(0), False, values)()
    return values[0].double(), a[:, :BLOCK_OUT].double().mT @ b.double()


def far_sampled_output(kernels=shipped):
    """Only the one entry's program: there are as many as blocks otherwise."""
    values = far((SLOTS, 128, 128), DTYPE)
    a, b = _numbers(5, 128, seed=1), _numbers(5, 128, seed=2)
    launch = kernels.sampled_launch(a, b, *_order(0, slots=(SLOTS - 1,)), False, values)
    with strict():
        launch._replace(programs=1)()
    return values[-1].double(), a.double().mT @ b.double()


def far_shared_output(kernels=shipped):
    """Only the last program of many: its block is shared by two entries, one beside the other."""
    values = far((SLOTS, 128, 128), DTYPE)
    a, b = _numbers(5, 128, seed=1), _numbers(5, 256, seed=2)
    launch = kernels.sampled_launch(a, b, *_order(0, 1, slots=(SLOTS - 1, SLOTS - 1)), True, values)
    with strict(first_program=SLOTS - 1):
        launch._replace(programs=1)()
    return values[-1].double(), a.double().mT @ (b[:, :128] + b[:, 128:]).double()


FAR_CASES = (
    far_x,
    far_y,
    far_values,
    far_sampled_inputs,
    far_sampled_outer_inputs,
    far_sampled_output,
    far_shared_output,
)
