"""Memory that catches mistakes of native code, and memory without end.

guarded   a tensor flush against a page that cannot be touched: what reads or writes past it dies with SIGSEGV. It
          serves any native code (the interpreter, C++ kernels, CUDA C++ built for the host); run it by `exit_code_of`.
far       a tensor of any size whose memory exists only where it was touched: offsets past 2^31 without the gigabytes.
"""

import ctypes
import faulthandler
import math
import mmap
import os
import signal
from collections.abc import Callable, Sequence

import torch

PAGE = mmap.PAGESIZE
FILLER = b"\xa5"  # between the tensor and the far end of its pages: not zero, so that reading it shows
MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Linux; Python has the name since 3.13
PROT_NONE = 0
TIMEOUT = 60  # seconds

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def guarded(tensor: torch.Tensor, at: str = "end") -> torch.Tensor:
    """A contiguous copy whose last byte (``at="end"``) or first byte (``at="start"``) borders on a protected page."""
    if at not in ("start", "end"):
        raise ValueError(f"at: expected 'start' or 'end', got {at!r}")
    num_bytes = tensor.numel() * tensor.element_size()
    body = max(1, -(-num_bytes // PAGE)) * PAGE
    memory = mmap.mmap(-1, body + 2 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory[PAGE : PAGE + body] = FILLER * body
    start = PAGE + (body - num_bytes if at == "end" else 0)
    first = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    for page in (first, first + PAGE + body):
        if _libc.mprotect(page, PAGE, PROT_NONE):
            raise OSError(ctypes.get_errno(), "mprotect failed")
    return _view(memory, tensor.shape, tensor.dtype, start).copy_(tensor)


def far(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Zeros of any size; only pages that are written take memory. Never print, copy or reduce it as a whole."""
    num_bytes = math.prod(shape) * dtype.itemsize
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    return _view(mmap.mmap(-1, num_bytes, flags=flags), shape, dtype, 0)


def exit_code_of(work: Callable[[], object]) -> int:
    """How a child process ends that does ``work``: 0, or 1 if that raises, or minus the number of a signal."""
    child = os.fork()
    if child == 0:
        faulthandler.disable()  # to die is a result here
        torch.set_num_threads(1)  # the threads of the parent are not there: a child that waits for them hangs
        signal.alarm(TIMEOUT)
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _view(memory: mmap.mmap, shape: Sequence[int], dtype: torch.dtype, offset: int) -> torch.Tensor:
    """The tensor keeps the mapping alive, and unmaps it when it dies."""
    count = math.prod(shape)
    if not count:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=offset).view(shape)
