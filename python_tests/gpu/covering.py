"""Covering arrays: what stands in for a full product of parameters that would take hours."""

from collections.abc import Hashable, Iterable, Iterator
from itertools import combinations, product


def covering(*parameters: Iterable[Hashable]) -> list[tuple]:
    """A few rows, each with a value of every parameter, such that every pair of values of two parameters has a row.

    Greedy: the next row is the one with most pairs that no row before it has.
    """
    rows = list(product(*parameters))
    missing = {pair for row in rows for pair in pairs(row)}
    chosen = []
    while missing:
        chosen.append(max(rows, key=lambda row: sum(pair in missing for pair in pairs(row))))
        missing.difference_update(pairs(chosen[-1]))
    return chosen


def pairs(row: tuple) -> Iterator[tuple]:
    """Of the values of a row, each with its place."""
    return combinations(enumerate(row), 2)
