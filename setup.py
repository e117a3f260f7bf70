"""Build of the compiled parts; everything else about the package is in pyproject.toml.

compsparse_kernels._C       CPU kernels, one static archive per operation and instruction set (each with its own flags)
compsparse_kernels._layout  index arrays from masks and edge lists (pybind11, numpy)
"""

import platform
import sys
from pathlib import Path

from setuptools import setup

try:
    from pybind11.setup_helpers import Pybind11Extension
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError as error:
    sys.exit(
        f"{error.name} is needed to build: run  pip install torch==2.13.0 pybind11 ninja  first,"
        " then  pip install --no-build-isolation ."
    )

CSRC = Path("csrc")
X86 = platform.machine().lower() in ("x86_64", "amd64")
INSTRUCTION_SETS = {"scalar": []}
if X86:
    INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mfma"]
    INSTRUCTION_SETS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma"]
TORCH_FREE_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti", "-Wall"]
BIND_FLAGS = [
    "-std=c++20",
    "-O3",
    "-fvisibility=hidden",
    "-Wall",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
    *(["-DCOMPSPARSE_X86"] if X86 else []),
]
HEADERS = [str(path) for path in sorted(CSRC.rglob("*.h"))]


def kernel_archives():
    archives = []
    for isa, flags in INSTRUCTION_SETS.items():
        for source in sorted(CSRC.glob(f"cpu/*/{isa}.cpp")):
            options = {"sources": [str(source)], "cflags": TORCH_FREE_FLAGS + flags, "obj_deps": {"": HEADERS}}
            archives.append((f"compsparse_{source.parent.name}_{isa}", options))
    return archives


bindings = CppExtension(
    "compsparse_kernels._C",
    [str(CSRC / "module.cpp"), str(CSRC / "cpu/dispatch.cpp"), *map(str, sorted(CSRC.glob("cpu/*/bind.cpp")))],
    depends=HEADERS,
    extra_compile_args=BIND_FLAGS,
    py_limited_api=True,
)
layout = Pybind11Extension("compsparse_kernels._layout", [str(CSRC / "layout.cpp")], cxx_std=17)

setup(
    libraries=kernel_archives(),
    ext_modules=[bindings, layout],
    cmdclass={"build_ext": BuildExtension},
)
