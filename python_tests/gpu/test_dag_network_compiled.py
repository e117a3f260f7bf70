"""Level L3: the PTX that Triton compiles the kernels of dag_network to, executed on the CPU, against float64.

The op runs as on a GPU; each of its launches is compiled for a target and emulated.
"""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from compsparse_kernels.ops.dag_network import reference
from compsparse_kernels.ops.dag_network import triton as kernels
from compsparse_kernels.testing import assert_within_budget
from python_tests.gpu import ledger
from python_tests.gpu.dag_networks import GRAPHS, Case, dense, network
from python_tests.gpu.emulated import emulated
from python_tests.gpu.problems import as_tf32

WRITTEN = {"forward_kernel": ("h", "slopes"), "backward_kernel": ("gradients",), "weight_kernel": ("sums",)}


def check(case: Case, target: str, backwards: bool = False) -> list[torch.Tensor]:
    """Output and gradients are within their budgets; returns them."""
    net = network(case)

    def compute(net, ops):
        return [net.forward(ops.dag_network), *net.backward(ops.dag_network_backward)]

    torch.use_deterministic_algorithms(True)  # fresh memory holds NaN: what nobody writes is seen
    try:
        with case.settings(), emulated(kernels, WRITTEN, target, backwards):
            ours = compute(net, kernels)
    finally:
        torch.use_deterministic_algorithms(False)
    yardstick = dense(case, lambda: compute(net, reference), as_tf32)
    exact = compute(net.to(torch.float64), reference)
    for number, parts in enumerate(zip(ours, yardstick, exact, strict=True)):
        name = f"dag_network {'gradient' if number else 'forward'} {case.precision} {case.graph} {case.width} {target}"
        assert_within_budget(*parts, f"{name}, result {number}")
        ledger.reached("L3", name)
    return ours


RAGGED = Case("two levels", width=20, in_channels=20, out_channels=3, batch=37, precision="float16", activation="silu")
EVEN = Case("two levels", width=32, in_channels=32, out_channels=32, batch=64, precision="bfloat16")


@pytest.mark.parametrize(
    ("case", "target"), [(RAGGED, "sm_80"), (EVEN, "sm_90")], ids=lambda value: getattr(value, "precision", value)
)
def test_compiled_code_computes_the_reference(case, target):
    check(case, target)


@pytest.mark.long
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("precision", ["tf32", "ieee", "float16", "bfloat16"])
@pytest.mark.parametrize("graph", GRAPHS)
def test_every_graph(graph, precision, target):
    number = list(GRAPHS).index(graph)
    activation = ("none", "relu", "gelu", "silu")[number % 4]
    width = (16, 20, 32)[number % 3]
    check(
        Case(graph, width, in_channels=width, batch=(37, 64)[number % 2], precision=precision, activation=activation),
        target,
    )


@pytest.mark.long
def test_no_order_of_programs_changes_a_result():
    results = [
        check(replace(RAGGED, graph="skip edges", out_channels=1), "sm_80", backwards) for backwards in (False, True)
    ]
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
