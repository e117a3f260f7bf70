"""Which backends an op has here, and why not the others. torch's dispatcher is the only router; this explains it."""

import os
import warnings

import torch

from compsparse_kernels.layouts.checks import require

try:
    from compsparse_kernels import _C  # registers the CPU kernels
except ImportError as error:
    _C, _missing = None, str(error)
else:
    _missing = ""

BACKENDS = ("cpu", "reference")
CPU_CAPS = ("scalar", "avx2", "avx512")
CPU_DTYPES = (torch.float32, torch.float64)


_cap = os.environ.get("COMPSPARSE_CPU")
if _cap and _cap not in CPU_CAPS:
    warnings.warn(
        f"COMPSPARSE_CPU: expected one of {', '.join(CPU_CAPS)}, got {_cap!r}; nothing is capped", stacklevel=2
    )


def cpu_isa() -> str | None:
    """Instruction set of the CPU kernels in use, or None where they were not built."""
    return None if _C is None else _C.cpu_isa()


def why_not(backend: str, *tensors: torch.Tensor) -> str | None:
    """The reason why a backend can't run on these tensors, or None if it can."""
    if backend == "reference":
        return None
    if _C is None:
        return f"compiled kernels are not there ({_missing})"
    for tensor in tensors:
        if tensor.device.type != "cpu":
            return f"tensors are on {tensor.device.type}"
        if tensor.dtype not in CPU_DTYPES:
            return f"dtype {str(tensor.dtype).removeprefix('torch.')} (has float32, float64)"
    return None


def explain(op: str, *tensors: torch.Tensor) -> dict[str, str]:
    """Each backend of an op, and whether it would run on these tensors: ``"runs"``, ``"available"`` or why not.

    Args:
        op: name of an op, such as ``"block_sparse_linear"``.
        tensors: the tensors it would get; without any, what this machine has.

    Example:
        >>> import torch
        >>> from compsparse_kernels import explain
        >>> explain("block_sparse_linear", torch.zeros(2, 2, dtype=torch.float16))["cpu"]
        'dtype float16 (has float32, float64)'
    """
    from compsparse_kernels.ops import OPS

    require(op in OPS, "op", f"one of {', '.join(OPS)}", repr(op))
    for tensor in tensors:
        require(isinstance(tensor, torch.Tensor), "tensors", "tensors", type(tensor).__name__, TypeError)
    reasons = {backend: why_not(backend, *tensors) for backend in BACKENDS}
    chosen = next(backend for backend in BACKENDS if reasons[backend] is None)
    return {backend: "runs" if backend == chosen else reason or "available" for backend, reason in reasons.items()}


def check_backend(backend: str | None, *tensors: torch.Tensor) -> None:
    """An explicit ``backend=`` runs or says why not."""
    require(backend in BACKENDS, "backend", f"one of {', '.join(BACKENDS)} or None", repr(backend))
    reason = why_not(backend, *tensors)
    require(reason is None, "backend", f"one that can run here ({backend} can't)", reason)
