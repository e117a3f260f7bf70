"""Every kernel that ships, of any op."""

from python_tests.gpu import attention_cases, cases, dag_cases, nm_cases, proximal_cases

ROOMS = (cases, dag_cases, nm_cases, proximal_cases, attention_cases)


def shipped(long: bool = False) -> list:
    """Every configuration that a target's autotuner would try; or a few kernels, first choices only."""
    return [case for room in ROOMS for case in room.shipped(long)]
