"""What the launchers of thresholded attention decide before anything is compiled, and that public calls reach them."""

from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

from compsparse_kernels import explain
from compsparse_kernels.ops.threshold_attention import contract, reference
from compsparse_kernels.ops.threshold_attention import triton as kernels
from python_tests.attention import backward_arguments, op_arguments
from python_tests.gpu.aot import TARGETS
from python_tests.gpu.attention_cases import BACKWARD, FORWARD, WIDTHS, launch_of
from python_tests.gpu.cases import DTYPES, shared_memory_of


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [*WIDTHS, 1, 8, 40])
def test_every_target_has_a_few_configurations_that_fit(width, dtype):
    for kernel in FORWARD + BACKWARD:
        given = launch_of(kernel, dtype, width, 64).arguments
        for target in TARGETS:
            launch = launch_of(kernel, dtype, width, 64)
            chosen = kernels.suitable(launch.kernel.configs, given, shared_memory_of(target))
            assert 1 <= len(chosen) <= 4


def test_few_queries_have_small_tiles():
    sizes = [launch_of("attend", "bf16", 64, tokens).arguments["BLOCK_M"] for tokens in (1, 16, 17, 64, 1000)]
    assert sizes == [16, 16, 32, 64, 64]
    assert launch_of("attend", "bf16", 256).arguments["BLOCK_M"] == 32
    assert launch_of("attend", "fp32", 64).arguments["BLOCK_M"] == 32


def test_a_program_for_each_tile_row_and_key():
    launches = {kernel: launch_of(kernel, "bf16", 64, 100) for kernel in FORWARD + BACKWARD}
    assert [launches[kernel].programs for kernel in FORWARD] == [4 * 2] * 3
    assert launches["rows"].programs == 4 * 100
    assert launches["keys"].programs == 2 * 100


def test_inputs_are_read_through_their_strides():
    query = torch.randn(2, 5, 4, 16).transpose(1, 2)
    key = torch.randn(2, 2, 16, 7).mT  # not along the width
    bias = torch.randn(1, 4, 5, 1).expand(1, 4, 5, 7)
    arguments = op_arguments(query, key, key, attn_bias=bias, thresholds=torch.rand(1, 4, 1, dtype=torch.float64))
    given = kernels.scoring(*arguments[:9], *arguments[10:18])
    assert given["query"] is query and given["bias"] is bias
    assert given["key"].is_contiguous() and torch.equal(given["key"], key)
    assert [given[f"{name}_q"] for name in ("batch_stride", "head_stride", "stride")] == [320, 16, 64]
    assert [given[f"{name}_b"] for name in ("batch_stride", "head_stride", "stride", "column_stride")] == [0, 5, 1, 0]
    assert [given[f"{name}_t"] for name in ("batch_stride", "head_stride", "stride")] == [0, 1, 0]


def test_the_bound_of_the_screen_holds_for_products_in_float32():
    """|x - s| <= error |q| |k|, far from it for random numbers and near it for none."""
    for width in (8, 64, 256):
        query, key = torch.randn(1, 1, 40, width), torch.randn(1, 1, 40, width)
        bound = (
            kernels._error(query, 0.3)
            * kernels._norm_above(query)[..., :, None]
            * kernels._norm_above(key)[..., None, :]
        )
        exact = 0.3 * query.double() @ key.double().mT
        assert ((0.3 * (query @ key.mT) - exact).abs() <= bound).all()
        assert (kernels._norm_above(query).double() >= query.double().norm(dim=-1)).all()


def test_the_public_op_is_the_launcher_on_a_gpu():
    """The kernel of key CUDA runs the launcher for what it can, and the reference for what it can't."""
    with FakeTensorMode():
        tensors = [torch.empty(1, 2, 8, 16, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
        states = {
            rule: explain("threshold_attention", *tensors, rule=rule) for rule in ("relative", "absolute", "topk")
        }
        wide = explain("threshold_attention", tensors[0].new_empty(1, 1, 2, 300))
        whole = explain("threshold_attention", tensors[0].double())
    assert states["relative"]["triton"] == states["absolute"]["triton"] == "runs"
    assert states["topk"]["triton"] == "rule 'topk' (has relative, absolute)" and states["topk"]["reference"] == "runs"
    assert wide["triton"] == "heads 300 wide (takes at most 256)"
    assert whole["triton"].startswith("dtype float64 (has")


@pytest.mark.parametrize("rule", ["relative", "topk"])
def test_what_decides_is_read_from_the_right_arguments(rule):
    tensors = [torch.randn(1, 2, 8, 16) for _ in range(3)]
    arguments = op_arguments(*tensors, rule=rule, threshold=1.0)
    support = reference.threshold_attention_support(*arguments)
    backward = backward_arguments(tensors[0], arguments, support[1:])
    asked = contract._asked_of_forward(*arguments), contract._asked_of_backward(*backward)
    assert [one["rule"] for one in asked] == [rule] * 2
    assert all(torch.is_tensor(tensor) for one in asked for tensor in one["tensors"])


def test_dropping_counts_as_philox_does():
    assert kernels.dropping(0.25, 7) == {"seed": 7, "dropped_below": 2**30, "kept_factor": 4 / 3, "DROPOUT": True}
    assert kernels.dropping(0.0, 7)["DROPOUT"] is False
    assert kernels.dropping(1.0, 7)["dropped_below"] == 2**32


def test_nothing_is_launched_for_nothing():
    empty = op_arguments(*(torch.empty(1, 2, 0, 16) for _ in range(3)))
    with mock.patch.object(kernels.Launch, "__call__", side_effect=AssertionError):
        out, row_ptr, *_ = kernels.threshold_attention_support(*empty)
    assert out.shape == (1, 2, 0, 16) and row_ptr.tolist() == [0]
