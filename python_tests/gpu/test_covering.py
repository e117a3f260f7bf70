"""Every pair of values occurs, in few rows."""

from itertools import combinations, product

import pytest

from python_tests.gpu.covering import covering


@pytest.mark.parametrize("sizes", [(2, 2), (3, 1, 4), (4, 4, 4), (6, 2, 2, 4, 4), (5, 4, 4, 4)], ids=str)
def test_every_pair_occurs_in_few_rows(sizes):
    parameters = [[f"{letter}{i}" for i in range(size)] for letter, size in zip("abcde", sizes, strict=False)]
    rows = covering(*parameters)
    for one, other in combinations(range(len(sizes)), 2):
        assert {(row[one], row[other]) for row in rows} == set(product(parameters[one], parameters[other]))
    largest, second = sorted(sizes)[-1:-3:-1]
    assert len(rows) <= 1.4 * largest * second  # fewer rows than that product can't be


def test_equal_values_of_different_parameters_are_different():
    assert sorted(covering((0, 1), (0, 1))) == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_rows_are_the_same_each_time():
    parameters = "abc", (1, 2), (True, False)
    assert covering(*parameters) == covering(*parameters)
