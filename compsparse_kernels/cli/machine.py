"""What this machine and its software are: the facts that stand beside every result."""

import importlib
import importlib.metadata
import os
import platform

import torch

from compsparse_kernels._processor import processor_model
from compsparse_kernels._version import __version__
from compsparse_kernels.ops import cpu_isa

CAP = "COMPSPARSE_CPU"
COMPILED_MODULES = {
    "_C": "CPU kernels; without it every op runs its dense reference",
    "_C_cuda": "CUDA C++ kernels of unstructured masks, for a torch that has CUDA",
    "_layout": "index arrays of layouts; without it numpy builds them",
}


def describe_machine() -> dict:
    """Processor, cores, threads, instruction set, versions."""
    return {
        "processor": processor_model(),
        "architecture": platform.machine(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "instruction_set": cpu_isa(),
        "instruction_set_cap": os.environ.get(CAP),
        "system": f"{platform.system()} {platform.release()}",
        "versions": versions(),
    }


def versions() -> dict[str, str | None]:
    """Versions of what results depend on; None where a package is not installed."""
    installed = {name: _installed_version(name) for name in ("numpy", "triton")}
    return {
        "compsparse_kernels": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **installed,
    }


def usable_cores() -> int:
    """Cores this process may run on, which can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def missing_reason(module: str) -> str | None:
    """Why a compiled module of the package is not there, or None if it is."""
    try:
        importlib.import_module(f"compsparse_kernels.{module}")
    except ImportError as error:
        return str(error)
    return None


def _installed_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
