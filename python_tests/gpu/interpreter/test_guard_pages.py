"""guarded(): what leaves the tensor dies. far(): offsets past 2^31 work, and take no memory."""

import resource
import signal

import pytest
import torch
import triton
import triton.language as tl

from python_tests.gpu.interpreter.faults import KernelFault
from python_tests.gpu.interpreter.guard_pages import exit_code_of, far, guarded
from python_tests.gpu.interpreter.strict import strict


@triton.jit
def copy_kernel(source, target, first, size, SIDE: tl.constexpr):
    lane = tl.arange(0, SIDE)
    numbers = tl.load(source + first + lane, mask=lane < size, other=0.0)
    tl.store(target + lane, numbers, mask=lane < size)


@pytest.mark.parametrize("at,first", [("end", 1), ("start", -1)])
def test_one_element_too_far_dies(at, first):
    source = guarded(torch.arange(13.0), at)

    def copy_from(first):
        copy_kernel[(1,)](source, torch.zeros(16), first, 13, 16)

    assert exit_code_of(lambda: copy_from(0)) == 0
    assert exit_code_of(lambda: copy_from(first)) == -signal.SIGSEGV


def test_exit_code_of_what_raises():
    assert exit_code_of(lambda: [][0]) == 1


@pytest.mark.parametrize("shape", [(13,), (3, 5), (1024,), (2049,), (0,), (4, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("at", ["start", "end"])
def test_the_copy_is_equal(shape, dtype, at):
    tensor = torch.arange(torch.Size(shape).numel()).view(shape).to(dtype)
    assert torch.equal(guarded(tensor, at), tensor)
    if len(shape) == 2:
        assert torch.equal(guarded(tensor.mT, at), tensor.mT)


def test_at_is_start_or_end():
    with pytest.raises(ValueError, match="at: expected 'start' or 'end', got 'middle'"):
        guarded(torch.ones(1), "middle")


@triton.jit
def store_kernel(target, row, stride, WIDE: tl.constexpr):
    tl.store(target + (row.to(tl.int64) if WIDE else row) * stride, 7)


def test_far_offsets():
    target = far((70_001, 70_000), torch.int8)
    with strict():
        store_kernel[(1,)](target, 70_000, 70_000, True)
    assert target[70_000, 0] == 7 and target[70_000, 1] == 0


def test_far_offsets_in_32_bits_go_elsewhere():
    target = far((50_001, 50_000), torch.int8)
    with strict(), pytest.raises(KernelFault, match=r"^overflow"):
        store_kernel[(1,)](target, 50_000, 50_000, False)
    with strict(overflow=False), pytest.raises(KernelFault, match=r"^bounds"):
        store_kernel[(1,)](target, 50_000, 50_000, False)


def test_far_takes_no_memory():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(8):
        tensor = far((2**40,), torch.int8)
        tensor[2**39] = 1
        assert tensor[2**39] == 1 and tensor[-1] == 0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**15  # KiB
