"""Builds of CUDA C++ for the CPU, by this folder's Makefile: plain, under ASan and UBSan, under TSan."""

import os
import platform
import re
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[2]
BUILD = ROOT / "build" / "hostcuda"

_SANITIZERS = {
    "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",
    "UBSAN_OPTIONS": "print_stacktrace=0",
    "TSAN_OPTIONS": "halt_on_error=0:exitcode=66",
}


@lru_cache
def why_not() -> str | None:
    """The reason why nothing can be built here, or None."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"the shim's fibers are x86-64 code, this processor is {platform.machine()}"
    for tool in ("nvcc", "make", "g++", "c++filt", "nm"):
        if shutil.which(tool) is None:
            return f"{tool} is not on the path" + (" (it comes with cuda_fp16.h)" if tool == "nvcc" else "")
    if cuda_include() is None:
        return "nvcc names no folder with cuda_fp16.h"
    return None


@lru_cache
def cuda_include() -> Path | None:
    """The folder of CUDA's headers, as nvcc itself names it: nvcc on the path may be a wrapper that lies elsewhere."""
    said = subprocess.run(["nvcc", "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    folders = [Path(folder) for folder in re.findall(r'"-I([^"]+)"', said)]
    return next((folder.resolve() for folder in folders if (folder / "cuda_fp16.h").exists()), None)


def make(target: str) -> Path:
    """Brings a target of the Makefile up to date, such as ``address/masked_linear`` or ``plain/masked_linear.so``."""
    path = BUILD / target
    command = ["make", "-C", str(FOLDER), f"BUILD={BUILD}", f"CUDA_INCLUDE={cuda_include()}", "CXX=g++", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{target} was not built:\n{done.stdout}{done.stderr}"
    return path


def run(target: str, *arguments: object, timeout: float = 300) -> tuple[int, str]:
    """Builds a program and runs it: exit status and all it printed."""
    environment = {**os.environ, **_SANITIZERS}
    command = [str(make(target)), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    return done.returncode, done.stdout + done.stderr
