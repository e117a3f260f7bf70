"""Which way to store a mask is fastest, by a cost model."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from compsparse_kernels.layouts import index
from compsparse_kernels.layouts.costs import BLOCK_SIZES, CostModel
from compsparse_kernels.layouts.nm import tightest

# Sparse must be this share of dense to be chosen: what is as fast as dense is better dense, where nothing can be odd.
MARGIN = 0.95
# A mask with fewer survivors is hardly N:M, and looking takes longer than all the rest: half of the sparsest pattern's.
LEAST_OF_NM = 1 / 32


class Choice(NamedTuple):
    """A kind, with the blocks or the N:M pattern that it has."""

    kind: str
    block_shape: tuple[int, int] | None = None
    nm: tuple[int, int] | None = None


def choose_kind(mask: torch.Tensor, block_shape: tuple[int, int] | None, costs: CostModel) -> Choice:
    """The kind that runs fastest for a mask ``[out, in]``.

    Blocks are 32 x 32, 16 x 16 or 8 x 8, or ``block_shape`` alone; they may be partly filled, and then cost as much as
    whole ones; so may the slots of an N:M pattern. Of ways that cost the same, the first of blocks, csr, N:M is taken.
    """
    rows, columns = mask.shape
    dense = costs.microseconds("dense", rows + columns, mask.numel())
    cost, choice = min(_ways(mask, block_shape, costs), key=lambda way: way[0])
    return choice if cost < MARGIN * dense else Choice("dense")


def _ways(mask, block_shape, costs) -> Iterator[tuple[float, Choice]]:
    features, survivors = sum(mask.shape), count(mask)
    if survivors:  # no blocks at all is the same as no entries, and csr says so more simply
        for shape in [(size, size) for size in BLOCK_SIZES] if block_shape is None else [block_shape]:
            cost = costs.microseconds(_way_of_blocks(shape), features, elements_of_blocks(mask, shape))
            yield cost, Choice("block", block_shape=shape)
    yield costs.microseconds("csr", features, survivors), Choice("csr")
    if block_shape is None and survivors >= LEAST_OF_NM * mask.numel() and (pattern := tightest(mask)):
        slots = mask.shape[0] * -(-mask.shape[1] // pattern[1]) * pattern[0]
        yield costs.microseconds("nm", features, slots), Choice("nm", nm=pattern)


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
