"""CUDA C++ kernels: their launches executed on the CPU, plain and under sanitizers, and what nvcc makes of them."""

import re

import pytest
import torch

from compsparse_kernels import MaskLayout
from compsparse_kernels.ops.masked_linear import reference
from compsparse_kernels.testing import assert_within_budget, random_mask, random_tensor
from python_tests.gpu import ledger
from python_tests.gpu.hostcuda import build, masked_linear, nvcc

DTYPES = tuple(masked_linear.ELEMENT_TYPES)
BATCHES = (0, 1, 2, 3, 4, 9, 33, 130)  # every warp shape of every dtype, and more than one piece of the batch
TARGETS = ("sm_80", pytest.param("sm_90", marks=pytest.mark.long), pytest.param("sm_100", marks=pytest.mark.long))

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))


def ragged_layout(out_features=60, in_features=530, seed=0):
    """Unsorted row lengths; empty rows; a full row, which all warps of a block share."""
    mask = random_mask(out_features, in_features, 1.0, seed)
    density = torch.rand(out_features, 1, generator=torch.Generator().manual_seed(seed)) * 0.3
    mask &= torch.rand(out_features, in_features, generator=torch.Generator().manual_seed(seed + 1)) < density
    mask[:: out_features // 5] = False
    mask[out_features // 2] = True
    return MaskLayout.from_mask(mask, "csr")


def assert_right(function, meaning, arguments, indices, name):
    """``function`` in the dtype of its arguments against ``meaning`` in float64."""
    dtype = arguments[0].dtype
    peer_dtype = torch.float32 if dtype == torch.float64 else dtype

    def at(dtype, change=lambda tensor: tensor):
        return meaning(*(change(tensor.to(dtype)) if tensor is not None else None for tensor in arguments), *indices)

    result, exact = function(*arguments, *indices), at(torch.float64)
    assert result.dtype == dtype
    assert_within_budget(result, at(peer_dtype), exact, name, magnitude=at(torch.float64, torch.abs))


def assert_linear_right(order, batch, dtype, out_features, in_features, bias=True):
    x = random_tensor(batch, in_features, dtype=dtype)
    values = random_tensor(len(order.idx), dtype=dtype, seed=1)
    offset = random_tensor(out_features, dtype=dtype, seed=2) if bias else None
    indices = (*order, out_features)
    assert_right(masked_linear.masked_linear, reference.masked_linear, (x, values, offset), indices, "product")


def assert_sampled_right(order, batch, dtype, out_features, in_features):
    a = random_tensor(batch, out_features, dtype=dtype)
    b = random_tensor(batch, in_features, dtype=dtype, seed=1)
    assert_right(masked_linear.sampled_matmul, reference.sampled_matmul, (a, b), order[:2], "sampled")


# ---- the launches on the CPU, against the reference


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", BATCHES)
def test_batches(batch, dtype):
    layout = ragged_layout()
    masked_linear.seed(batch)
    assert_linear_right(layout.by_output, batch, dtype, 60, 530)
    assert_sampled_right(layout.by_output, batch, dtype, 60, 530)
    ledger.reached("L3", f"masked_linear-{dtype}-batch{batch}")
    ledger.reached("L3", f"sampled_matmul-{dtype}-batch{batch}")


@pytest.mark.parametrize("shape", [(1, 1), (1, 600), (600, 1), (33, 47), (300, 5)], ids=str)
@pytest.mark.parametrize("density", [0.0, 0.2, 1.0])
def test_shapes(shape, density):
    """Without an entry, without a gap; more blocks than rows, more rows than a block has entries."""
    layout = MaskLayout.from_mask(random_mask(*shape, density), "csr")
    assert_linear_right(layout.by_output, 7, torch.float32, *shape)
    assert_sampled_right(layout.by_output, 7, torch.float32, *shape)


@pytest.mark.parametrize("batch", BATCHES[1:])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bitwise_equal_for_columns_of_16_and_32_bits(dtype, batch):
    ptr, narrow, perm = ragged_layout().by_output
    assert narrow.dtype == torch.int16
    x, values = random_tensor(batch, 530, dtype=dtype), random_tensor(len(narrow), dtype=dtype, seed=1)
    grad = random_tensor(batch, 60, dtype=dtype, seed=2)
    products = [masked_linear.masked_linear(x, values, None, ptr, idx, perm, 60) for idx in (narrow, narrow.int())]
    sampled = [masked_linear.sampled_matmul(grad, x, ptr, idx) for idx in (narrow, narrow.int())]
    assert torch.equal(*products) and torch.equal(*sampled)


@pytest.mark.parametrize("wide", [False, True], ids=["int32", "int64"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_order_by_input(dtype, wide):
    """The gradient of x: values come permuted; 64-bit positions as where there are 2^31 entries."""
    order = ragged_layout().by_input
    if wide:
        order = order._replace(perm=order.perm.long())
    assert_linear_right(order, 5, dtype, 530, 60, bias=False)


def test_rows_around_the_length_that_is_shared():
    """Lengths next to a warp's window of 256 units and next to multiples of a block's warps."""
    lengths = (0, 1, 7, 8, 9, 254, 255, 256, 257, 263, 264, 265, 511, 512, 513, 2047, 2048, 2049)
    mask = torch.zeros(len(lengths), 2100, dtype=torch.bool)
    for row, length in enumerate(lengths):
        mask[row, 2100 - length :] = True
    layout = MaskLayout.from_mask(mask, "csr")
    for batch in (1, 6):
        assert_linear_right(layout.by_output, batch, torch.float32, *mask.shape)
        assert_sampled_right(layout.by_output, batch, torch.float32, *mask.shape)


@pytest.mark.parametrize("length, warps", [(255, 1), (256, 8)])
def test_a_long_row_is_shared_by_the_warps_of_a_block(length, warps):
    """Told from the rounding: ones that are added to 2^24 one by one are lost, sums of ones are not.

    The first of 32 lanes has the 2^24 and every 32nd one; with eight warps, an eighth of them.
    """
    order = MaskLayout.from_mask(torch.ones(1, length, dtype=torch.bool), "csr").by_output
    values = torch.ones(length)
    values[0] = 2**24
    y = masked_linear.masked_linear(torch.ones(1, length), values, None, *order, 1)
    lost = -(-length // (32 * warps)) - 1
    assert abs(y.item() - (2**24 + length - 1 - lost)) <= 1  # numbers above 2^24 are even


PIECES = (4095, 4096, 4097, 6143, 6144, 9000)  # entries, around multiples of the 2048 units of a block


@pytest.mark.parametrize("order", [PIECES, PIECES[::-1], (0, 4500, 1, 4500, 2000, 4500)], ids=str)
def test_rows_that_are_cut_into_pieces_of_several_blocks(order):
    """They begin anywhere in a block, and the blocks that follow them have rows of their own."""
    mask = torch.arange(9000) < torch.tensor(order)[:, None]
    layout = MaskLayout.from_mask(mask.roll(3, 1), "csr")
    for batch, dtype in ((1, torch.float32), (6, torch.float16), (70, torch.float64)):
        assert_linear_right(layout.by_output, batch, dtype, *mask.shape, bias=batch != 6)


@pytest.mark.parametrize("length, blocks", [(4095, 1), (4096, 2), (6144, 3)])
def test_a_very_long_row_is_shared_by_blocks(length, blocks):
    """Told as above: eight warps of 32 lanes in each block add the ones, each lane an even number (but of 4095)."""
    order = MaskLayout.from_mask(torch.ones(1, length, dtype=torch.bool), "csr").by_output
    values = torch.ones(length)
    values[0] = 2**24
    y = masked_linear.masked_linear(torch.ones(1, length), values, None, *order, 1)
    lost = -(-length // (32 * 8 * blocks)) - 1
    assert abs(y.item() - (2**24 + length - 1 - lost)) <= 1


@pytest.mark.parametrize("batch", [1, 33])
def test_bitwise_equal_in_any_order_of_threads(batch):
    order = ragged_layout().by_output
    x, values = random_tensor(batch, 530), random_tensor(len(order.idx), seed=1)
    grad = random_tensor(batch, 60, seed=2)
    results = []
    for seed in range(4):
        masked_linear.seed(seed)
        y = masked_linear.masked_linear(x, values, None, *order, 60)
        results.append((y, masked_linear.sampled_matmul(grad, x, *order[:2])))
    for y, sampled in results[1:]:
        assert torch.equal(y, results[0][0]) and torch.equal(sampled, results[0][1])


@pytest.mark.parametrize("batch", [1, 33])
def test_a_row_does_not_depend_on_its_neighbours(batch):
    """Where a row lies in the windows of warps and blocks does not change the order in which it is summed."""
    layout = ragged_layout()
    ptr, idx, _ = layout.by_output
    x, values = random_tensor(batch, 530), random_tensor(len(idx), seed=1)
    whole = masked_linear.masked_linear(x, values, None, ptr, idx, None, 60)
    for first in (1, 7, 30):
        start = int(ptr[first])
        rest = (values[start:], None, ptr[first:] - start, idx[start:].clone(), None, 60 - first)
        assert torch.equal(masked_linear.masked_linear(x, *rest), whole[:, first:])


# ---- under sanitizers


def test_address_and_undefined_behaviour_sanitizer():
    status, printed = build.run("address/masked_linear", 1)
    assert status == 0, printed


@pytest.mark.long
def test_thread_sanitizer():
    float32_and_float16 = (0, 2)
    status, printed = build.run("thread/masked_linear", 1, *float32_and_float16, timeout=600)
    assert status == 0, printed


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_the_shim_is_as_cuda_defines(sanitizer, seed):
    """Barriers, votes, shuffles, atomics, places; nothing that is right is reported."""
    status, printed = build.run(f"{sanitizer}/shim_cases", "correct", seed)
    assert (status, printed) == (0, "as CUDA defines it\n")


FAULTS = [
    ("address", "missing_barrier", "wrong result: prefix_sum"),
    ("thread", "missing_barrier", "ThreadSanitizer: data race"),
    ("thread", "race_between_blocks", "ThreadSanitizer: data race"),
    ("address", "beyond_shared", "AddressSanitizer: heap-buffer-overflow"),
    ("address", "beyond_global", "AddressSanitizer: heap-buffer-overflow"),
    ("address", "misaligned", "runtime error: .*misaligned address"),
    ("address", "overflow", "runtime error: signed integer overflow"),
    ("address", "unwritten_shared", "wrong result: prefix_sum"),
    ("address", "barrier_in_a_branch", "wrong result: prefix_sum"),
    ("address", "unreached_vote", "CUDA shim: deadlock"),
    ("address", "lane_outside_its_mask", "CUDA shim: a thread calls a warp collective without being in its mask"),
    ("address", "shuffle_from_an_absent_lane", "CUDA shim: a shuffle reads a lane that does not take part"),
]


@pytest.mark.parametrize("sanitizer, fault, complaint", FAULTS, ids=[f"{fault}-{by}" for by, fault, _ in FAULTS])
def test_faults_are_caught(sanitizer, fault, complaint):
    status, printed = build.run(f"{sanitizer}/shim_cases", fault, 1)
    assert status != 0 and re.search(complaint, printed), printed


# ---- what nvcc makes of the shipped sources


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", nvcc.sources())
def test_compiled_kernels(source, target):
    """No stack, no spills, 16-byte loads wherever the batch is wide, and room for half of the warps of a processor."""
    kernels = nvcc.compile_source(source, target)
    assert len({kernel.name for kernel in kernels}) == len(kernels) > 0
    for kernel in kernels:
        assert (kernel.stack, kernel.spills) == (0, 0), kernel.name
        assert kernel.registers <= nvcc.HALF_OCCUPANCY_REGISTERS, f"{kernel.name}: {kernel.registers} registers"
        if re.match(r"(product|sampled)<.*, [248], \d+>", kernel.name):
            assert re.search(r"ld\.global(\.nc)?\.v[24]", kernel.ptx), f"{kernel.name} has no vector load"
        assert not re.search(r"\b(atom|red)\.", kernel.ptx), f"{kernel.name} has atomics"
        ledger.reached("L2", f"{kernel.name}-{target}")


def test_every_warp_shape_of_every_dtype_is_compiled():
    names = {kernel.name for kernel in nvcc.compile_source("csrc/cuda/masked_linear/bind.cu", "sm_80")}
    widest = {"float": 4, "double": 2, "__half": 8, "__nv_bfloat16": 8}
    for kernel in ("product", "sampled"):
        for dtype, vector in widest.items():
            wanted = {
                f"{kernel}<{dtype}, {index}, {v}, {group}>"
                for v, group in ((1, 1), (vector, 1), (vector, 4), (vector, 16))
                for index in ("short", "int")
            }
            assert wanted <= names, wanted - names


@pytest.mark.parametrize("source", nvcc.sources())
def test_torch_s_stable_abi_only(source):
    """As of the CPU binary: the C shim, on torch's current stream, and never a mangled C++ name of torch."""
    names = nvcc.undefined_symbols(source, "sm_80")
    assert "aoti_torch_get_current_cuda_stream" in names and "torch_c10_cuda_check_msg" in names
    of_torch = [name for name in names if re.search(r"\b(c10|at|torch|caffe2)::", name)]
    assert not of_torch, of_torch


@pytest.mark.parametrize(
    "cuda, targets",
    [("13.0", ["sm_80", "sm_90", "sm_100", "compute_100"]), ("12.6", ["sm_80", "sm_90", "compute_90"])],
)
def test_setup_names_the_targets_that_a_compiler_knows(cuda, targets):
    flags = nvcc.planned_flags(cuda)["compsparse_kernels._C_cuda"]["nvcc"]
    assert re.findall(r",code=(\w+)", " ".join(flags)) == targets


@pytest.mark.parametrize("cuda, home", [(None, "cuda"), ("13.0", None)], ids=["torch for the CPU", "no toolkit"])
def test_setup_leaves_the_extension_out(cuda, home):
    assert set(nvcc.planned_flags(cuda, home)) == {"compsparse_kernels._C", "compsparse_kernels._layout"}
