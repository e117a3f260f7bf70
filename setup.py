"""Build of the compiled parts; everything else about the package is in pyproject.toml.

compsparse_kernels._C       CPU kernels, one static archive per operation and instruction set (each with its own flags)
compsparse_kernels._C_cuda  CUDA kernels, where CUDA's compiler and a torch built for CUDA are there
compsparse_kernels._layout  index arrays from masks and edge lists (pybind11, numpy)
"""

import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import setup
from setuptools.command.build_clib import build_clib

try:
    import torch
    from pybind11.setup_helpers import Pybind11Extension
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
except ImportError as error:
    sys.exit(
        f"{error.name} is needed to build: run  pip install torch==2.13.0 pybind11 ninja  first,"
        " then  pip install --no-build-isolation ."
    )

CSRC = Path("csrc")
X86 = platform.machine().lower() in ("x86_64", "amd64")
INSTRUCTION_SETS = {"scalar": []}
if X86:
    INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
    INSTRUCTION_SETS["avx512"] = INSTRUCTION_SETS["avx2"] + AVX512
    INSTRUCTION_SETS["avx512_bf16"] = INSTRUCTION_SETS["avx512"] + ["-mavx512bf16", "-mavx512vnni"]
# Debug information, which Python's own flags ask for, is a quarter of the time.
TORCH_FREE_FLAGS = ["-std=c++20", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti", "-Wall"]
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"
BIND_FLAGS = [
    "-std=c++20",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    "-Wall",
    TORCH_TARGET,
    *(["-DCOMPSPARSE_X86"] if X86 else []),
]
CUDA_ARCHITECTURES = {"80": (11, 0), "90": (11, 8), "100": (12, 8)}  # and the first CUDA whose compiler knows them
HEADERS = [str(path) for path in sorted(CSRC.glob("cpu/**/*.h"))]
BINDING_HEADERS = {"arena.h", "kernels.h", "partition.h", "scratch.h", "tensors.h"}  # of bind.cpp files alone
SHARED_HEADERS = [str(path) for path in sorted(CSRC.glob("cpu/*.h")) if path.name not in BINDING_HEADERS]
CUDA_HEADERS = [str(path) for path in sorted(CSRC.glob("cuda/**/*.*h"))]


class BuildArchives(build_clib):
    """Archives side by side, since each is one source; the widest vectors first, whose sources take longest."""

    def build_libraries(self, libraries):
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda library: super(BuildArchives, self).build_libraries([library]), libraries[::-1]))


def kernel_archives():
    archives = []
    for isa, flags in INSTRUCTION_SETS.items():
        for source in sorted(CSRC.glob(f"cpu/*/{isa}.cpp")):
            headers = SHARED_HEADERS + [str(path) for path in sorted(source.parent.glob("*.h"))]
            options = {"sources": [str(source)], "cflags": TORCH_FREE_FLAGS + flags, "obj_deps": {"": headers}}
            archives.append((f"compsparse_{source.parent.name}_{isa}", options))
    return archives


def cuda_bindings():
    """No GPU is asked for: the machine that builds may have none. Later architectures compile the last one's PTX."""
    if not (CUDA_HOME and torch.version.cuda):
        return []
    cuda = tuple(map(int, torch.version.cuda.split(".")[:2]))
    known = [architecture for architecture, since in CUDA_ARCHITECTURES.items() if cuda >= since]
    targets = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in known]
    ptx = f"-gencode=arch=compute_{known[-1]},code=compute_{known[-1]}"
    flags = ["-std=c++20", "-O3", "-Xcompiler=-fvisibility=hidden", "-DUSE_CUDA", TORCH_TARGET]
    extension = CUDAExtension(
        "compsparse_kernels._C_cuda",
        [str(CSRC / "cuda/module.cpp"), *map(str, sorted(CSRC.glob("cuda/*/bind.cu")))],
        depends=HEADERS + CUDA_HEADERS,
        extra_compile_args={"cxx": BIND_FLAGS, "nvcc": [*flags, *targets, ptx]},
        py_limited_api=True,
    )
    return [extension]


bindings = CppExtension(
    "compsparse_kernels._C",
    [str(CSRC / "module.cpp"), str(CSRC / "cpu/dispatch.cpp"), *map(str, sorted(CSRC.glob("cpu/*/bind*.cpp")))],
    depends=HEADERS,
    extra_compile_args=BIND_FLAGS,
    py_limited_api=True,
)
layout = Pybind11Extension("compsparse_kernels._layout", [str(CSRC / "layout.cpp")], cxx_std=17)

setup(
    libraries=kernel_archives(),
    ext_modules=[bindings, *cuda_bindings(), layout],
    cmdclass={"build_ext": BuildExtension, "build_clib": BuildArchives},
)
