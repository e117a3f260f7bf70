"""What the launchers decide before anything is compiled: tiles, configurations, derived indices."""

import copy
import gc
import weakref
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

from compsparse_kernels import BlockLayout, block_sparse_linear, explain, sampled_block_matmul
from compsparse_kernels.ops.arguments import compute_dtype
from compsparse_kernels.ops.block_sparse_linear import triton as kernels
from compsparse_kernels.testing import random_mask
from python_tests.gpu.aot import TARGETS
from python_tests.gpu.cases import shared_memory_of

BLOCKS = [(1, 1), (8, 8), (16, 16), (24, 40), (32, 128), (64, 64), (128, 16), (128, 128)]


def layout_of(block=(16, 16), grid=(3, 4), slot=None):
    rows, columns = random_mask(*grid, 0.6, seed=1).nonzero(as_tuple=True)
    return BlockLayout.from_entries(rows, columns, block, grid[0] * block[0], grid[1] * block[1], slot=slot)


def product_launch(block, batch, dtype=torch.bfloat16):
    layout = layout_of(block)
    x, y = torch.empty(batch, layout.in_features, dtype=dtype), torch.empty(batch, layout.out_features, dtype=dtype)
    values = torch.empty(layout.values_shape, dtype=dtype)
    return kernels.product_launch(x, values, None, *layout.by_output, False, "none", y)


def sampled_launch(block, batch, dtype=torch.bfloat16):
    layout = layout_of(block)
    a, b = torch.empty(batch, layout.out_features, dtype=dtype), torch.empty(batch, layout.in_features, dtype=dtype)
    return kernels.sampled_launch(a, b, *layout.by_output, False, torch.empty(layout.values_shape, dtype=dtype))


@pytest.mark.parametrize("launcher", [product_launch, sampled_launch])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_target_has_a_few_configurations_that_fit(launcher, block, dtype):
    for batch in (1, 100, 100_000):
        arguments = launcher(block, batch, dtype).arguments
        kept = ("TILE_BATCH", "TILE_OUT") if launcher is product_launch else ("TILE_OUT", "TILE_IN")
        summed = arguments["TILE_IN" if launcher is product_launch else "TILE_BATCH"]
        step_bytes = sum(arguments[side] for side in kept) * summed * dtype.itemsize
        for target in TARGETS:
            shared_memory = shared_memory_of(target)
            chosen = kernels.suitable(kernels.CONFIGS, arguments, shared_memory)
            assert 1 <= len(chosen) <= 8
            assert all((config.num_stages - 1) * step_bytes <= shared_memory for config in chosen)


def test_large_tiles_get_many_warps_and_small_ones_few():
    large = kernels.suitable(kernels.CONFIGS, product_launch((128, 128), 100_000).arguments, 163 * 1024)
    small = kernels.suitable(kernels.CONFIGS, product_launch((16, 16), 16).arguments, 163 * 1024)
    assert {config.num_warps for config in large} == {8} and {config.num_warps for config in small} == {1}


def test_the_autotuner_asks_the_device_for_its_shared_memory():
    arguments = product_launch((128, 128), 100_000).arguments
    utils = SimpleNamespace(get_device_properties=lambda device: {"max_shared_mem": 64 * 1024})
    active = SimpleNamespace(utils=utils, get_current_device=lambda: 0)
    with mock.patch.object(kernels.triton.runtime.driver, "_active", active):
        pruned = kernels.product_kernel.early_config_prune(kernels.CONFIGS, {}, **arguments)
    assert pruned == kernels.suitable(kernels.CONFIGS, arguments, 64 * 1024)
    assert pruned != kernels.suitable(kernels.CONFIGS, arguments, 163 * 1024)


def test_the_batch_tile_leaves_enough_programs():
    assert kernels.batch_tile(100_000, rows=64, in_features=64, most=256) == 256
    assert kernels.batch_tile(512, rows=64, in_features=64, most=256) == 64  # 8 x 64 programs; 128 would leave 256
    assert kernels.batch_tile(1, rows=4, in_features=64, most=256) == 16


def test_offsets_inside_a_tile_fit_in_32_bits():
    assert kernels.batch_tile(100_000, rows=64, in_features=2**23, most=256) == 128
    assert kernels.batch_tile(100_000, rows=64, in_features=2**26, most=256) == 16
    with pytest.raises(ValueError, match=r"^x: expected fewer than 134217728 features.*, got 134217728"):
        kernels.batch_tile(100_000, rows=64, in_features=2**27, most=256)


def test_operands_are_made_contiguous():
    layout = layout_of()
    x = torch.randn(layout.in_features, 5).T
    grad = torch.randn(1, layout.out_features).expand(5, -1)
    values = torch.randn(*layout.values_shape[:2], 2 * layout.values_shape[2])[..., ::2]
    bias = torch.randn(2 * layout.out_features)[::2]
    product = kernels.product_launch(x, values, bias, *layout.by_output, False, "none", torch.empty(grad.shape))
    sampled = kernels.sampled_launch(grad, x, *layout.by_output, False, torch.empty(layout.values_shape))
    for launch, given in ((product, {"x": x, "values": values, "bias": bias}), (sampled, {"a": grad, "b": x})):
        for name, tensor in given.items():
            assert launch.arguments[name].is_contiguous() and torch.equal(launch.arguments[name], tensor)


@pytest.mark.parametrize("shared", [False, True])
def test_what_is_kept_for_a_layout_goes_with_it(shared):
    count = int(random_mask(3, 4, 0.6, seed=1).sum())
    layout = layout_of(slot=torch.arange(count) % 2 if shared else None)
    ptr, idx, slot = layout.by_output
    kernels.longest_first(ptr)
    kernels.entries_by_slot(ptr, idx, slot, layout.num_slots if shared else None)
    alive = weakref.ref(ptr)
    del layout, ptr, idx, slot
    gc.collect()
    assert alive() is None


def test_precision_follows_torch():
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for setting, expected in (("tf32", "tf32"), ("ieee", "ieee")):
            torch.backends.cuda.matmul.fp32_precision = setting
            assert kernels.dot_precision(torch.float32) == expected
            assert kernels.dot_precision(torch.float16) == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_rows_are_ordered_longest_first_and_kept():
    ptr = torch.tensor([0, 1, 4, 4, 6])
    assert kernels.longest_first(ptr).tolist() == [1, 3, 0, 2]
    assert kernels.longest_first(ptr) is kernels.longest_first(ptr)
    assert kernels.longest_first(ptr.clone()) is not kernels.longest_first(ptr)


def test_entries_by_slot():
    layout = layout_of(slot=torch.tensor([1, 0, 1, 0, 2, 1, 0])[: int(random_mask(3, 4, 0.6, seed=1).sum())])
    ptr, idx, slot = layout.by_output
    offsets, rows, columns = kernels.entries_by_slot(ptr, idx, slot, layout.num_slots)
    all_rows = torch.arange(len(ptr) - 1).repeat_interleave(ptr.diff())
    for number in range(layout.num_slots):
        mine = slice(offsets[number], offsets[number + 1])
        assert rows[mine].tolist() == all_rows[slot == number].tolist()
        assert columns[mine].tolist() == idx[slot == number].tolist()


def test_other_indices_beside_the_same_ptr_are_not_taken_for_the_old_ones():
    ptr, idx, slot = layout_of().by_output
    other = idx.flip(0)
    assert kernels.entries_by_slot(ptr, idx, slot, None)[2] is idx
    assert kernels.entries_by_slot(ptr, other, slot, None)[2] is other


REAL_LAYOUT = layout_of()


def on_fake_gpu(layout):
    other = copy.copy(layout)
    for name in ("by_output", "by_input"):
        order = getattr(layout, name)
        object.__setattr__(
            other, name, type(order)(*(torch.empty(part.shape, dtype=part.dtype, device="cuda") for part in order))
        )
    return other


def test_on_a_gpu_the_same_public_call_takes_half_precision():
    """Fake tensors lie on a GPU that is not there: everything runs but the kernel."""
    with FakeTensorMode():
        x = torch.empty(5, 64, device="cuda", dtype=torch.bfloat16)
        assert explain("block_sparse_linear", x)["triton"] == "runs"
        assert explain("block_sparse_linear", x.double())["triton"].startswith("dtype float64 (has")
        layout = on_fake_gpu(REAL_LAYOUT)
        values = torch.empty(layout.values_shape, device="cuda", dtype=torch.bfloat16)
        y = block_sparse_linear(x, values, layout, activation="gelu")
        assert y.dtype == torch.bfloat16 and y.device.type == "cuda" and y.shape == (5, 48)
        assert sampled_block_matmul(y, x, layout).shape == layout.values_shape


def test_autocast_computes_in_half_precision_where_there_are_kernels_for_it():
    assert compute_dtype("block_sparse_linear", "cuda") == torch.get_autocast_dtype("cuda") == torch.float16
    assert compute_dtype("op without kernels", "cuda") == torch.float32
    assert compute_dtype("block_sparse_linear", "cpu") == torch.get_autocast_dtype("cpu") == torch.bfloat16
