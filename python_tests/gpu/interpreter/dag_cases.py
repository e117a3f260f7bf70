"""The kernels of dag_network, strictly interpreted: how near to the float64 reference their results must be."""

from dataclasses import replace

import torch

from compsparse_kernels.ops.dag_network import reference
from compsparse_kernels.ops.dag_network import triton as shipped
from compsparse_kernels.testing import assert_within_budget, budget_used
from python_tests.gpu import ledger
from python_tests.gpu.dag_networks import Case, Network, dense, network
from python_tests.gpu.interpreter.strict import strict

FEW = 64  # numbers: in so few, dense torch may be exact by luck (compsparse_kernels/testing.py)


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
        few = number > 0 and len(net.x) > 0 and parts[0].numel() < FEW
        magnitude = _magnitude(net, number) if few and budget_used(*parts) > 1 else None
        _check(f"gradient {number}", case, *parts, magnitude=magnitude)
    return ours


def _magnitude(net: Network, number: int) -> torch.Tensor:
    """Sum over the batch of the size of what each row adds to the gradient of a parameter."""
    exact = net.to(torch.float64)
    rows = (replace(exact, x=exact.x[n : n + 1], grad=exact.grad[n : n + 1]) for n in range(len(net.x)))
    return sum(row.backward(reference.dag_network_backward)[number].abs() for row in rows)


def _check(kernel: str, case: Case, ours, yardstick, exact, magnitude=None) -> None:
    assert ours.dtype == case.dtype and ours.is_contiguous()
    assert_within_budget(ours, yardstick, exact, f"{kernel} of {case}", magnitude)
    ledger.reached("L1", f"dag_network {kernel.split()[0]} {case.precision} {case.graph} width {case.width}")
