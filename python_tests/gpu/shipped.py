"""Every kernel that ships, of any op."""

from python_tests.gpu import cases, dag_cases, nm_cases


def shipped(long: bool = False) -> list[cases.Case | dag_cases.DagCase | nm_cases.NMCase]:
    """Every configuration that a target's autotuner would try; or a few kernels, first choices only."""
    return [*cases.shipped(long), *dag_cases.shipped(long), *nm_cases.shipped(long)]
