"""What nvcc makes of the shipped CUDA sources: registers, stack, spills and PTX of every kernel of a target.

The flags are those of ``setup.py``, which is asked for its plan on a machine with CUDA's compiler and a torch for CUDA.
"""

import json
import re
import subprocess
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from torch.utils.cpp_extension import COMMON_NVCC_FLAGS, include_paths

from compsparse_kernels.testing import run_in_subprocess
from python_tests.gpu.hostcuda.build import BUILD, ROOT

# 256 threads a block with as many registers each: four blocks, half of the 64 warps of a multiprocessor.
HALF_OCCUPANCY_REGISTERS = 65536 // (4 * 256)

_PLAN = """
import json, setuptools
from distutils.core import run_setup
import torch
from torch.utils import cpp_extension

def planned(cuda, home):
    torch.version.cuda, cpp_extension.CUDA_HOME = cuda, home
    extensions = run_setup({setup!r}, stop_after="init").ext_modules
    return {{extension.name: extension.extra_compile_args for extension in extensions}}

print(json.dumps([planned(*machine) for machine in {machines!r}]))
"""

# (the CUDA that torch is built for, the folder of its toolkit): complete, an older one, torch for the CPU, no toolkit
MACHINES = (("13.0", "cuda"), ("12.6", "cuda"), (None, "cuda"), ("13.0", None))


@dataclass(frozen=True)
class Kernel:
    """One kernel of a compiled source."""

    name: str  # as c++filt would write it, without arguments
    registers: int
    stack: int  # bytes
    spills: int  # bytes stored and loaded
    shared: int  # bytes, static
    ptx: str


def sources() -> list[str]:
    """The CUDA sources that ship, relative to the repository."""
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/cuda/*/bind.cu"))


@lru_cache
def _plans() -> list[dict]:
    code = _PLAN.format(setup="setup.py", machines=MACHINES)
    return json.loads(run_in_subprocess(f"import os\nos.chdir({str(ROOT)!r})\n{code}").splitlines()[-1])


def planned_flags(cuda: str | None = "13.0", home: str | None = "cuda") -> dict[str, list | dict]:
    """Compiler flags of each extension module that ``setup.py`` plans on one of MACHINES, by the module's name."""
    return _plans()[MACHINES.index((cuda, home))]


@lru_cache
def compile_source(source: str, target: str) -> tuple[Kernel, ...]:
    """Compiles a source of the extension for one target, such as ``"sm_80"``, host code and all."""
    folder = _folder(source, target)
    folder.mkdir(parents=True, exist_ok=True)
    planned = [
        flag for flag in planned_flags()["compsparse_kernels._C_cuda"]["nvcc"] if not flag.startswith("-gencode")
    ]
    command = ["nvcc", "-c", source, "-o", str(folder / "kernels.o"), f"-arch={target}", "-Xptxas", "-v"]
    command += ["--keep", "--keep-dir", str(folder), *COMMON_NVCC_FLAGS, *planned]
    command += [f"-I{path}" for path in include_paths()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"nvcc refused {source} for {target}:\n{done.stdout}{done.stderr}"
    ptx = next(folder.glob(f"{Path(source).stem}*.ptx")).read_text()
    return tuple(_kernels(done.stdout + done.stderr, ptx))


def undefined_symbols(source: str, target: str) -> list[str]:
    """What the compiled object takes from elsewhere, demangled."""
    compile_source(source, target)
    command = ["nm", "-C", "--undefined-only", str(_folder(source, target) / "kernels.o")]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return re.findall(r"^ +U (.+)$", printed, re.MULTILINE)


def _folder(source: str, target: str) -> Path:
    return BUILD / "nvcc" / Path(source).parent.name / target


def _kernels(report: str, ptx: str) -> list[Kernel]:
    """Kernels of what ``ptxas -v`` printed."""
    bodies = dict(re.findall(r"\.entry (\w+)\((.*?)^}", ptx, re.DOTALL | re.MULTILINE))
    sections = re.split(r"Compiling entry function '", report)[1:]
    mangled = [re.search(r"Function properties for (\w+)", section)[1] for section in sections]
    return [
        Kernel(
            name=name,
            registers=_number(r"Used (\d+) registers", section),
            stack=_number(r"(\d+) bytes stack frame", section),
            spills=_number(r"(\d+) bytes spill stores", section) + _number(r"(\d+) bytes spill loads", section),
            shared=_number(r"(\d+) bytes smem", section, missing=0),
            ptx=bodies[symbol],
        )
        for name, symbol, section in zip(_demangled(mangled), mangled, sections, strict=True)
    ]


def _number(pattern: str, text: str, missing: int | None = None) -> int:
    found = re.search(pattern, text)
    assert found or missing is not None, f"ptxas printed nothing like {pattern!r}:\n{text}"
    return int(found[1]) if found else missing


def _demangled(symbols: list[str]) -> list[str]:
    done = subprocess.run(["c++filt"], input="\n".join(symbols), check=True, capture_output=True, text=True)
    names = re.findall(r"compsparse::cuda::(\w+<.*?>)\(", done.stdout)
    assert len(names) == len(symbols), f"expected kernels of compsparse::cuda, got {done.stdout}"
    return names
