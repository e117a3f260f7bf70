"""What the launchers of N:M products decide before anything is compiled, and that public calls reach them."""

import copy

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

from compsparse_kernels import MaskLayout, explain, masked_linear, sampled_matmul
from compsparse_kernels.ops.masked_linear import triton as kernels
from python_tests.gpu.aot import TARGETS
from python_tests.gpu.cases import shared_memory_of
from python_tests.gpu.nm_cases import OPS, launch_of, layout_of
from python_tests.nm import PATTERNS, nm_layout


def launched(kernel="product", pattern=(2, 4), features=(512, 512), batch=4096, dtype="bf16"):
    return launch_of(kernel, dtype, layout_of(pattern, features), batch, torch.empty)


@pytest.mark.parametrize("kernel", OPS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_every_target_has_a_few_configurations_that_fit(kernel, pattern, dtype):
    for batch in (1, 100, 100_000):
        given = launched(kernel, pattern, (60, 300), batch, dtype).arguments
        sides = given["TILE_BATCH"], given["TILE_OUT"], given["GROUPS"] * given["TILE_M"]
        for target in TARGETS:
            chosen = kernels.suitable(kernels.CONFIGS, given, shared_memory_of(target))
            assert 1 <= len(chosen) <= 8
            copied = {"product": sides[0] * sides[2], "transposed": sides[0] * sides[1]}.get(kernel)
            if copied is not None:  # x, the operand that is staged whole
                size = given["x"].element_size()
                assert all((one.num_stages - 1) * copied * size <= shared_memory_of(target) for one in chosen)


def test_tiles_leave_enough_programs():
    def tile(batch):
        launch = launched(features=(2048, 64), batch=batch)
        return launch.arguments["TILE_BATCH"], launch.arguments["TILE_OUT"], launch.programs

    assert tile(8192) == (64, 64, 128 * 32)
    assert tile(256) == (16, 64, 16 * 32)  # 32 rows would leave 256
    assert tile(1) == (16, 32, 64)


@pytest.mark.parametrize(
    ("pattern", "features", "even"),
    [
        ((2, 4), (512, 512), True),
        ((2, 4), (500, 512), False),  # the last tile of rows is ragged
        ((2, 4), (512, 516), False),  # and that of columns
        ((3, 4), (512, 512), False),  # no load has three numbers
        ((3, 3), (512, 512), False),
        ((1, 64), (512, 512), True),
        ((1, 256), (512, 512), True),
    ],
)
def test_what_is_read_at_once(pattern, features, even):
    assert [launched(kernel, pattern, features).arguments["EVEN"] for kernel in OPS] == [even] * len(OPS)


def test_operands_are_made_contiguous():
    layout = nm_layout(8, 12, 2, 4).nm
    x, grad = torch.randn(12, 5).T, torch.randn(1, 8).expand(5, -1)
    values, bias = torch.randn(*layout.values_shape[:2], 4)[..., ::2], torch.randn(16)[::2]
    product = kernels.product_launch(x, values, bias, layout.positions, 4, False, torch.empty(5, 8))
    sampled = kernels.sampled_launch(grad, x, layout.positions, 4, torch.empty(layout.values_shape))
    for launch, given in ((product, {"x": x, "values": values, "bias": bias}), (sampled, {"a": grad, "b": x})):
        for name, tensor in given.items():
            assert launch.arguments[name].is_contiguous() and torch.equal(launch.arguments[name], tensor)


REAL_LAYOUT = nm_layout(48, 64, 2, 4)


def on_fake_gpu(layout: MaskLayout) -> MaskLayout:
    other, slots = copy.copy(layout), copy.copy(layout.nm)
    positions = torch.empty(slots.positions.shape, dtype=torch.uint8, device="cuda")
    object.__setattr__(slots, "positions", positions)
    object.__setattr__(other, "nm", slots)
    return other


def test_on_a_gpu_the_same_public_call_takes_half_precision():
    """Fake tensors lie on a GPU that is not there: everything runs but the kernel."""
    with FakeTensorMode():
        x = torch.empty(5, 64, device="cuda", dtype=torch.bfloat16)
        assert explain("nm_linear", x)["triton"] == "runs"
        assert explain("nm_linear", x.double())["triton"].startswith("dtype float64 (has")
        layout = on_fake_gpu(REAL_LAYOUT)
        values = torch.empty(layout.values_shape, device="cuda", dtype=torch.bfloat16)
        y = masked_linear(x, values, layout)
        assert (y.dtype, y.device.type, y.shape) == (torch.bfloat16, "cuda", (5, 48))
        assert masked_linear(y, values, layout.T).shape == x.shape
        assert sampled_matmul(y, x, layout).shape == layout.values_shape
