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


def choose_kind(
    mask: torch.Tensor,
    block_shape: tuple[int, int] | None,
    costs: CostModel,
    with_step: bool = False,
    state_of_zeros: bool = True,
) -> Choice:
    """The kind that runs fastest for a mask ``[out, in]``; ``with_step`` counts the optimizer's step in, where
    ``state_of_zeros`` tells whether its state is 0 (and not 1) where the mask drops.

    Blocks are 32 x 32, 16 x 16 or 8 x 8, or ``block_shape`` alone; they may be partly filled, and then cost as much as
    whole ones; so may the slots of an N:M pattern. Of ways that cost the same, the first of blocks, csr, N:M is taken.
    """
    features, survivors = sum(mask.shape), count(mask)

    def cost(way: str, stored: int) -> float:
        step = costs.step_microseconds(stored, state_of_zeros and stored != survivors) if with_step else 0
        return costs.microseconds(way, features, stored) + step

    costed = [(cost(way, stored), choice) for way, stored, choice in _ways(mask, block_shape, survivors)]
    least, choice = min(costed, key=lambda pair: pair[0])
    return choice if least < MARGIN * cost("dense", mask.numel()) else Choice("dense")


def _ways(mask, block_shape, survivors) -> Iterator[tuple[str, int, Choice]]:
    """Each sparse way to store a mask, and how many elements it stores."""
    if survivors:  # no blocks at all is the same as no entries, and csr says so more simply
        for shape in [(size, size) for size in BLOCK_SIZES] if block_shape is None else [block_shape]:
            yield _way_of_blocks(shape), elements_of_blocks(mask, shape), Choice("block", block_shape=shape)
    yield "csr", survivors, Choice("csr")
    if block_shape is None and survivors >= LEAST_OF_NM * mask.numel() and (pattern := tightest(mask)):
        yield "nm", mask.shape[0] * -(-mask.shape[1] // pattern[1]) * pattern[0], Choice("nm", nm=pattern)


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
        (features - torch.arange(0, features, size, device="cpu")).clamp(max=size)
        for features, size in zip(mask.shape, block_shape, strict=True)
    ]
    return int((blocks * sizes[1]).sum(1) @ sizes[0])
