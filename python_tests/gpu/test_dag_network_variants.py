"""Level L2 for what real graphs have and trees of round widths have not: ragged nodes and sums, epilogues, sources."""

import pytest
import torch

pytest.importorskip("triton")

from compsparse_kernels import DAGLayout, FunctionGraph
from compsparse_kernels.ops.dag_network import triton as kernels
from python_tests.gpu import ledger
from python_tests.gpu.aot import compile_launch, float32_precision
from python_tests.gpu.cases import DTYPES, shared_memory_of
from python_tests.gpu.static.analyse import analyse
from python_tests.gpu.static.gates import violations

BATCH = 8192


def launches_of(width: int, dtype: str, activation: str):
    """One of each kernel that is not like another, for a tree that ends in a few channels and begins with them."""
    layout = DAGLayout(FunctionGraph.tree(64), width, in_channels=3, out_channels=5)
    weights, biases = (
        [torch.empty(shape, dtype=DTYPES[dtype]) for shape in shapes]
        for shapes in (layout.weight_shapes, layout.bias_shapes)
    )
    shapes = layout.weight_shapes
    h, slopes = (torch.empty(1 + layout.columns, BATCH, dtype=DTYPES[dtype]) for _ in range(2))
    forward = kernels.forward_rows(layout.nodes, layout.edge_ptr, layout.edges, layout.steps, shapes)
    index = (layout.nodes, layout.child_ptr, layout.children, layout.steps)
    backward = kernels.backward_rows(*index, shapes, layout.in_features)
    rest = (layout.linear, activation, BATCH)
    with float32_precision("ieee" if dtype == "fp32" else "tf32"):
        first, second, *_, last = kernels.forward_launches(h, slopes, weights, biases, forward, *rest)
        after_sink, *_, inner, sources = kernels.backward_launches(h, slopes, weights, backward, *rest)
        launches = {
            "forward, from sources": first,
            "forward": second,
            "forward, to sinks": last,
            "backward, from sinks": after_sink,
            "backward": inner,
            "backward, to sources": sources,
        }
        for i, pair in enumerate(zip(shapes, forward.kinds, strict=True)):
            launches[f"weight {i}"] = kernels.weight_launch(h, h, *pair)
        return launches


def check(name: str, width: int, dtype: str, activation: str, target: str, most: int | None = None) -> None:
    """In each configuration that suits, or in the first ``most`` of them."""
    launch = launches_of(width, dtype, activation)[name]
    for config in kernels.suitable(launch.kernel.configs, launch.arguments, shared_memory_of(target))[:most]:
        told = f"dag {name} {dtype} {width} {activation} w{config.num_warps}s{config.num_stages} {target}"
        found = analyse(compile_launch(launch, config, target), target)
        assert violations(found, tensor_cores=dtype != "fp32", async_copies=False) == [], told
        ledger.reached("L2", told)


KERNELS = tuple(launches_of(16, "bf16", "gelu"))


@pytest.mark.parametrize("name", ["forward", "backward"])
def test_nothing_spills(name):
    check(name, 72, "bf16", "gelu", "sm_80", most=1)


@pytest.mark.long
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "tf32", "fp32"])
@pytest.mark.parametrize(("width", "activation"), [(20, "relu"), (72, "silu"), (130, "gelu"), (300, "none")])
@pytest.mark.parametrize("name", KERNELS)
def test_nothing_spills_anywhere(name, width, activation, dtype, target):
    check(name, width, dtype, activation, target)
