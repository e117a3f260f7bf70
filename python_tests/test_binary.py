"""What the compiled kernels define and need: nothing leaks, no OpenMP, torch's stable ABI only."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import compsparse_kernels

PACKAGE = Path(compsparse_kernels.__file__).parent
ARCHIVES = sorted((PACKAGE.parent / "build").glob("temp*/**/libcompsparse_*.a"))
BINARY = next(iter(PACKAGE.glob("_C.*so")), None)

needs_binary = pytest.mark.skipif(BINARY is None, reason="compsparse_kernels._C was not built")
needs_archives = pytest.mark.skipif(
    not ARCHIVES, reason="no build folder with the kernels' archives (an installed package)"
)
pytestmark = pytest.mark.skipif(not (shutil.which("nm") and shutil.which("readelf")), reason="no binutils here")

# What a kernel file may take from outside: the C library's mathematics and memory functions.
C_FUNCTIONS = re.compile(
    r"(mem(cpy|set|move)|(exp|exp2|log|erf|tanh|fma|fmin|fmax|sqrt|floor|nearbyint)f?|_GLOBAL_OFFSET_TABLE_)"
)
OF_THE_LINKER = ("_init", "_fini", "__bss_start", "_edata", "_end")


def symbols(*arguments):
    """(type letter, name) of each symbol that nm prints."""
    printed = subprocess.run(["nm", *map(str, arguments)], check=True, capture_output=True, text=True).stdout
    return re.findall(r"^[0-9a-f ]{16} ([A-Za-z]) (.+)$", printed, re.MULTILINE)


@needs_archives
@pytest.mark.parametrize("archive", ARCHIVES, ids=lambda path: path.stem)
def test_a_kernel_archive_defines_its_table_alone(archive):
    """Any other global symbol, weak ones above all, could replace code that other processors run."""
    isa = archive.stem.rsplit("_", 1)[1]
    defined = symbols("--defined-only", "--extern-only", "-C", archive)
    assert defined, f"{archive.name} defines nothing"
    for kind, name in defined:
        assert re.fullmatch(rf"compsparse::\w+_{isa}", name) and kind in "RDB", f"{archive.name} defines {kind} {name}"


@needs_archives
@pytest.mark.parametrize("archive", ARCHIVES, ids=lambda path: path.stem)
def test_a_kernel_archive_needs_the_c_library_alone(archive):
    for _, name in symbols("--undefined-only", archive):
        assert C_FUNCTIONS.fullmatch(name), f"{archive.name} needs {name}"


@needs_binary
def test_no_openmp_of_its_own():
    """Threads come from torch's pool: a second OpenMP runtime would start as many again."""
    needed = subprocess.run(["readelf", "-d", str(BINARY)], check=True, capture_output=True, text=True).stdout
    libraries = re.findall(r"\(NEEDED\).*\[(.+?)\]", needed)
    assert libraries and not [name for name in libraries if re.search(r"gomp|omp\.|iomp", name)]
    assert not [name for _, name in symbols("-D", "--undefined-only", BINARY) if re.match(r"(GOMP|omp|__kmpc)_", name)]


@needs_binary
def test_torch_s_stable_abi_only():
    """The binary serves later versions of torch: it asks for the C shim, never for a mangled C++ name of torch."""
    names = [name for _, name in symbols("-D", "-C", "--undefined-only", BINARY)]
    assert any(name.startswith(("aoti_torch_", "torch_")) for name in names)
    of_torch = [name for name in names if re.search(r"\b(c10|at|torch|caffe2)::", name)]
    assert not of_torch, of_torch


@needs_binary
def test_exports_its_module_alone():
    """Python's limited API, and hidden symbols: only the module's entry is strong and visible."""
    strong = [name for kind, name in symbols("-D", "--defined-only", BINARY) if kind in "TDBR"]
    ours = [name for name in strong if name not in OF_THE_LINKER]
    assert ours == ["PyInit__C"], ours
