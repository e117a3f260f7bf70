"""Which weights dropout keeps: a function of the seed and of the entry's row and column alone.

Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) with the seed as its key and the
counter (column, row, row / 2^32, 0). An entry is kept where the first word of the result is at least p 2^32.
"""

import torch

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def kept_by_dropout(rows: torch.Tensor, columns: torch.Tensor, dropout_p: float, seed: int) -> torch.Tensor:
    """bool, of the shape of ``rows`` and ``columns`` (int64)."""
    words = philox(seed, columns, rows & _WORD, rows >> 32, torch.zeros_like(rows))
    return words[0] >= round(dropout_p * 2**32)


def philox(seed: int, *counter: torch.Tensor) -> list[torch.Tensor]:
    """The four words of Philox-4x32-10 of a counter of four words; words are below 2^32, in int64."""
    key = [seed & _WORD, seed >> 32 & _WORD]
    for _ in range(10):
        low0, high0 = _product(counter[0], _MULTIPLIERS[0])
        low1, high1 = _product(counter[2], _MULTIPLIERS[1])
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [(word + step) & _WORD for word, step in zip(key, _WEYL, strict=True)]
    return list(counter)


def _product(word, multiplier):
    """The low and the high word of a product of two words; int64 has no room for it in one piece."""
    upper = (word >> 16) * multiplier + ((word & 0xFFFF) * multiplier >> 16)
    low = ((upper & 0xFFFF) << 16) + ((word & 0xFFFF) * multiplier & 0xFFFF)
    return low, upper >> 16
