"""Every kernel that ships, of any op."""

from python_tests.gpu import cases, dag_cases, proximal_cases


def shipped(long: bool = False) -> list[cases.Case | dag_cases.DagCase | proximal_cases.ProximalCase]:
    """Every configuration that a target's autotuner would try; or a few kernels, first choices only."""
    return [*cases.shipped(long), *dag_cases.shipped(long), *proximal_cases.shipped(long)]
