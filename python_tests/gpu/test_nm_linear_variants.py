"""Level L2 for N:M patterns and sizes that fill no tile, and for small batches."""

import pytest
import torch

pytest.importorskip("triton")

from compsparse_kernels.ops.masked_linear import triton as kernels
from python_tests.gpu import ledger
from python_tests.gpu.aot import TARGETS, compile_launch
from python_tests.gpu.cases import DTYPES, shared_memory_of
from python_tests.gpu.covering import covering
from python_tests.gpu.nm_cases import OPS, launch_of, layout_of
from python_tests.gpu.static.analyse import analyse
from python_tests.gpu.static.gates import violations

LARGE, DECODING = 16383, 3  # rows of a batch; the last tile is ragged
EVEN, RAGGED = (512, 512), (500, 518)
PATTERNS = ((2, 4), (4, 8), (1, 16), (3, 17), (8, 32), (5, 256))


def check(kernel, pattern, features, batch, dtype, target, most: int | None = None) -> None:
    """In each configuration that suits, or in the first ``most`` of them."""
    launch = launch_of(kernel, dtype, layout_of(pattern, features), batch, torch.empty, with_bias=True)
    for config in kernels.suitable(launch.kernel.configs, launch.arguments, shared_memory_of(target))[:most]:
        told = f"nm {kernel} {pattern} {features} {batch} {dtype} w{config.num_warps}s{config.num_stages} {target}"
        found = analyse(compile_launch(launch, config, target), target)
        # Slots that are read one by one are an inner loop of their own.
        assert violations(found, tensor_cores=False, async_copies=False) == [], told
        assert dtype == "fp32" or found.total["tensor core"] > 0, told
        ledger.reached("L2", told)


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize(
    ("kernel", "pattern", "features", "batch", "dtype"),
    [
        ("product", (2, 4), RAGGED, LARGE, "bf16"),
        ("transposed", (3, 17), RAGGED, DECODING, "fp16"),
        ("transposed", (2, 4), EVEN, LARGE, "tf32"),  # whose layouts Triton once could not make
        ("sampled", (4, 8), RAGGED, LARGE, "bf16"),
    ],
)
def test_nothing_spills(kernel, pattern, features, batch, dtype, target):
    check(kernel, pattern, features, batch, dtype, target, most=1)


@pytest.mark.long
@pytest.mark.parametrize(
    ("pattern", "features", "batch", "dtype", "target"),
    covering(PATTERNS, [EVEN, RAGGED], [LARGE, DECODING], DTYPES, TARGETS),
)
@pytest.mark.parametrize("kernel", OPS)
def test_nothing_spills_anywhere(kernel, pattern, features, batch, dtype, target):
    check(kernel, pattern, features, batch, dtype, target)
