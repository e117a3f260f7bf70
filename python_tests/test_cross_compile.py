"""The scalar table on processors other than x86: it compiles for arm64, becomes NEON code, and computes the same.

The compiler is clang as the package ``ziglang`` ships it, with headers and libraries for arm64.
"""

import ast
import functools
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "csrc/cpu").glob("*/scalar.cpp"))
EMULATOR = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("ziglang") is None, reason="no cross-compiler (pip install ziglang)"),
    pytest.mark.skipif(not SOURCES, reason="no C++ sources (an installed package)"),
]


def build_flags():
    """Those of the kernel files in setup.py."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "TORCH_FREE_FLAGS":
            return ast.literal_eval(node.value)


def compile_for_arm64(target, *arguments):
    # ziglang's driver adds a -c of its own.
    strict = ["-Wall", "-Werror", "-Wno-unused-command-line-argument"]
    command = [sys.executable, "-m", "ziglang", "c++", "-target", f"aarch64-linux-{target}", *strict]
    done = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@functools.cache
def assembly(source, folder):
    path = folder / f"{source.parent.name}.s"
    compile_for_arm64("gnu", *build_flags(), "-g0", "-S", source, "-o", path)
    return path.read_text(encoding="latin-1")  # clang writes constants as raw bytes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("arm64")


@pytest.mark.parametrize("lanes, register", [("4s", "s"), ("2d", "d")], ids=["float32", "float64"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.parent.name)
def test_multiplies_and_adds_whole_vectors(source, lanes, register, folder):
    """Of the multiply-adds in the code, most are of whole vectors; the others are of ragged edges."""
    text = assembly(source, folder)
    vectors = len(re.findall(rf"^\s+fmla\s+v\d+\.{lanes}", text, re.MULTILINE))
    scalars = len(re.findall(rf"^\s+fmadd\s+{register}\d+", text, re.MULTILINE))
    assert vectors > scalars, f"{vectors} multiply-adds of {lanes}, {scalars} of one lane"


def test_the_choice_of_a_table_compiles_without_x86(folder):
    compile_for_arm64("gnu", "-std=c++20", "-c", "csrc/cpu/dispatch.cpp", "-o", folder / "dispatch.o")


@pytest.mark.long  # minutes at the first run: the C++ library for arm64 is compiled, too
@pytest.mark.skipif(EMULATOR is None, reason="no emulator of arm64 (qemu-aarch64)")
def test_computes_the_same_on_arm64(folder):
    """The drivers of `make sanitize` compare every kernel with plain loops."""
    drivers = sorted((ROOT / "python_tests/sanitize").glob("*.cpp"))
    compile_for_arm64("musl", "-static", "-std=c++20", "-O3", *SOURCES, *drivers, "-o", folder / "kernels")
    done = subprocess.run([EMULATOR, folder / "kernels"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" ok\n") == len(SOURCES)
