"""Level L2 for what real layers have and benchmarks have not: ragged blocks and batches, shared slots, epilogues."""

import pytest
import torch

pytest.importorskip("triton")

from compsparse_kernels import BlockLayout
from compsparse_kernels.ops.block_sparse_linear import triton as kernels
from python_tests.gpu import ledger
from python_tests.gpu.aot import compile_launch, float32_precision
from python_tests.gpu.cases import DTYPES, shared_memory_of
from python_tests.gpu.static.analyse import analyse
from python_tests.gpu.static.gates import violations

BATCH = 16384  # fills a GPU, so that tiles are as large as they get
VARIANTS = {
    "product, ragged": {"cut": (16, 16)},
    "product, unaligned": {"cut": (12, 12)},  # rows of x begin at no multiple of 16 bytes: copied element by element
    "sampled, odd batch": {"batch": BATCH - 1},
    "sampled, ragged": {"cut": (16, 16), "batch": BATCH - 1},
    "sampled, shared": {"shared": True},
    "sampled, shared and ragged": {"cut": (16, 16), "batch": BATCH - 1, "shared": True},
}


def launch_of(kernel: str, side: int, dtype: str, cut=(0, 0), batch: int = BATCH, shared: bool = False):
    features = [1024 - less for less in cut]
    rows, columns = torch.ones(*(-(-size // side) for size in features)).nonzero(as_tuple=True)
    slot = torch.arange(len(rows)) % 4 if shared else None
    layout = BlockLayout.from_entries(rows, columns, (side, side), *features, slot=slot)
    a, b = (torch.empty(batch, size, dtype=DTYPES[dtype]) for size in features)
    values, bias = torch.empty(layout.values_shape, dtype=a.dtype), torch.empty(features[0], dtype=a.dtype)
    with float32_precision("ieee" if dtype == "fp32" else "tf32"):
        if kernel == "sampled":
            return kernels.sampled_launch(a, b, *layout.by_output, shared, values)
        return kernels.product_launch(b, values, bias, *layout.by_output, False, "gelu", a)


def check(variant: str, side: int, dtype: str, target: str) -> None:
    kernel = variant.split(",")[0]
    launch = launch_of(kernel, side, dtype, **VARIANTS[variant])
    for config in kernels.suitable(launch.kernel.configs, launch.arguments, shared_memory_of(target)):
        name = f"{variant} {dtype} {side}x{side} w{config.num_warps}s{config.num_stages} {target}"
        found = analyse(compile_launch(launch, config, target), target)
        assert violations(found, tensor_cores=dtype != "fp32", async_copies=False) == [], name
        ledger.reached("L2", name)


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_spills(variant, target):
    check(variant, 64, "bf16", target)


@pytest.mark.long
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "tf32", "fp32"])
@pytest.mark.parametrize("side", [16, 32, 64, 128])
@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_spills_anywhere(variant, side, dtype, target):
    check(variant, side, dtype, target)
