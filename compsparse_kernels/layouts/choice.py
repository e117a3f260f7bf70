"""Which way to store a mask is fastest, by a cost model."""

from collections.abc import Iterator

import numpy as np
import torch

from compsparse_kernels.layouts import index
from compsparse_kernels.layouts.costs import BLOCK_SIZES, CostModel

# Sparse must be this share of dense to be chosen: what is as fast as dense is better dense, where nothing can be odd.
MARGIN = 0.95


def choose_kind(
    mask: torch.Tensor, block_shape: tuple[int, int] | None, costs: CostModel
) -> tuple[str, tuple[int, int] | None]:
    """The kind that runs fastest for a mask ``[out, in]``, and its blocks if it is of kind block.

    Blocks are 32 x 32, 16 x 16 or 8 x 8, or ``block_shape`` alone; they may be partly filled, and then cost as much as
    whole ones. Where two ways cost the same, the first of these and then csr is taken.
    """
    rows, columns = mask.shape
    dense = costs.microseconds("dense", rows + columns, mask.numel())
    ways = list(_ways(mask, block_shape, costs))
    cost, kind, shape = min(ways, key=lambda way: way[0])
    return (kind, shape) if cost < MARGIN * dense else ("dense", None)


def _ways(mask, block_shape, costs) -> Iterator[tuple[float, str, tuple[int, int] | None]]:
    features, survivors = sum(mask.shape), count(mask)
    if survivors:  # no blocks at all is the same as no entries, and csr says so more simply
        for shape in [(size, size) for size in BLOCK_SIZES] if block_shape is None else [block_shape]:
            cost = costs.microseconds(_way_of_blocks(shape), features, elements_of_blocks(mask, shape))
            yield cost, "block", shape
    yield costs.microseconds("csr", features, survivors), "csr", None


def _way_of_blocks(shape) -> str:
    """The line of blocks that do no better than these; blocks too small for any cost at most what csr does."""
    size = next((size for size in BLOCK_SIZES if size <= min(shape)), None)
    return "csr" if size is None else f"block {size}"


def count(mask: torch.Tensor) -> int:
    return int(np.count_nonzero(mask.numpy()))  # many times faster than torch's sum of bools


def elements_of_blocks(mask: torch.Tensor, block_shape: tuple[int, int]) -> int:
    """How many elements the blocks have that hold any survivor."""
    blocks = torch.from_numpy(index.block_any(mask.numpy(), *block_shape))
    sizes = [
        (features - torch.arange(0, features, size)).clamp(max=size)
        for features, size in zip(mask.shape, block_shape, strict=True)
    ]
    return int((blocks * sizes[1]).sum(1) @ sizes[0])
