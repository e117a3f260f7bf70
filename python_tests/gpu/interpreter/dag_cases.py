"""The kernels of dag_network, strictly interpreted: how near to the float64 reference their results must be."""

import torch

from compsparse_kernels.ops.dag_network import reference
from compsparse_kernels.ops.dag_network import triton as shipped
from compsparse_kernels.testing import assert_within_budget
from python_tests.gpu import ledger
from python_tests.gpu.dag_networks import Case, dense, network
from python_tests.gpu.interpreter.strict import strict


def check_forward(case: Case, kernels=shipped) -> torch.Tensor:
    """The output by ``kernels`` is within its budget; returns it."""
    net = network(case)
    with case.settings(kernels), strict(case.seed):
        ours = net.forward(kernels.dag_network)
    yardstick = dense(case, lambda: net.forward(reference.dag_network))
    exact = net.to(torch.float64).forward(reference.dag_network)
    _check("forward", case, ours, yardstick, exact)
    return ours


def check_backward(case: Case, kernels=shipped) -> list[torch.Tensor]:
    """Every gradient by ``kernels`` is within its budget; returns them."""
    net = network(case)
    with case.settings(kernels), strict(case.seed):
        ours = net.backward(kernels.dag_network_backward)
    yardstick = dense(case, lambda: net.backward(reference.dag_network_backward))
    exact = net.to(torch.float64).backward(reference.dag_network_backward)
    for number, parts in enumerate(zip(ours, yardstick, exact, strict=True)):
        _check(f"gradient {number}", case, *parts)
    return ours


def _check(kernel: str, case: Case, ours, yardstick, exact) -> None:
    assert ours.dtype == case.dtype and ours.is_contiguous()
    assert_within_budget(ours, yardstick, exact, f"{kernel} of {case}")
    ledger.reached("L1", f"dag_network {kernel.split()[0]} {case.precision} {case.graph} width {case.width}")
