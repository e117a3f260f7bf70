"""What one core can do at most, measured: multiply-adds from registers, and reading a buffer wherever it fits."""

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from compsparse_kernels.ops import cpu_isa

SOURCE = Path(__file__).with_name("limits.cpp")
AVX2 = ["-mavx2", "-mfma"]
FLAGS = {"scalar": [], "avx2": AVX2, "avx512": [*AVX2, "-mavx512f"]}
FLAGS["avx512_bf16"] = [*FLAGS["avx512"], "-mavx512bf16"]
SAMPLES = 7
SAMPLE = 0.01  # seconds


def best_seconds(run: Callable[[], object], samples: int = SAMPLES, sample: float = SAMPLE) -> float:
    """Least processor time of one call: what others do on the machine is not in it, but for what they do to caches."""
    run()
    started = time.process_time()
    run()
    repeats = max(1, round(sample / max(time.process_time() - started, 1e-7)))
    return min(_processor_seconds(run, repeats) for _ in range(samples))


def _processor_seconds(run: Callable[[], object], repeats: int) -> float:
    started = time.process_time()
    for _ in range(repeats):
        run()
    return (time.process_time() - started) / repeats


def peak_flops(dtype: torch.dtype) -> float:
    """Floating-point operations a second of one core, in float32 or bfloat16; a multiply-add is two."""
    function = _library()[f"{str(dtype).removeprefix('torch.')}_products"]
    steps = 100_000
    return 2 * function(ctypes.c_int64(steps)) / best_seconds(lambda: function(ctypes.c_int64(steps)))


@functools.cache
def bytes_per_second(size: int) -> float:
    """Read again and again, a buffer of ``size`` bytes comes from the smallest cache that holds it, or from memory."""
    numbers = torch.zeros(max(size // 4, 256))
    function, address = _library().read_bytes, ctypes.c_void_p(numbers.data_ptr())
    times = ctypes.c_int64(1 + (1 << 22) // size)
    count = ctypes.c_int64(numbers.numel())
    moved = function(address, count, times)
    return moved / best_seconds(lambda: function(address, count, times))


@functools.cache
def _library() -> ctypes.CDLL:
    """Loads ``limits.cpp``, compiled for the instruction set that the kernels use here.

    Raises:
        RuntimeError: ``compiler: expected a C++ compiler (CXX, c++), got none``.
    """
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        raise RuntimeError("compiler: expected a C++ compiler (CXX, c++), got none")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "limits.so"
        command = [compiler, "-std=c++20", "-O3", "-shared", "-fPIC", *FLAGS[cpu_isa()], str(SOURCE), "-o", str(path)]
        subprocess.run(command, check=True)
        library = ctypes.CDLL(str(path))
    for name in ("float32_products", "bfloat16_products", "read_bytes"):
        library[name].restype = ctypes.c_int64
        setattr(library, name, library[name])
    return library
