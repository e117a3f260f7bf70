"""Which backends an op has here, and why not the others. torch's dispatcher is the only router; this explains it."""

import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable

import torch

from compsparse_kernels.layouts.checks import require

try:
    import compsparse_kernels._C as _C  # registers the CPU kernels
except ImportError as error:
    _C, _no_cpu_kernels = None, f"compiled kernels are not there ({error})"
else:
    _no_cpu_kernels = None

_no_cuda_kernels = "this torch was built without CUDA"
if torch.version.cuda:
    try:
        import compsparse_kernels._C_cuda  # noqa: F401  (registers the CUDA C++ kernels)
    except ImportError as error:
        _no_cuda_kernels = f"compiled CUDA kernels are not there ({error})"
    else:
        _no_cuda_kernels = None

_no_triton = None if importlib.util.find_spec("triton") else "triton is not installed"

BACKENDS = ("cpu", "triton", "cuda", "reference")
_CPU_OPS = (
    "block_sparse_linear",
    "sampled_block_matmul",
    "masked_linear",
    "sampled_matmul",
    "threshold_attention",
    "dag_network",
    "nm_linear",
    "nm_sampled",
)
_PROXIMAL_OPS = ("proximal_sgd_", "proximal_adamw_")
_TRITON_OPS = (
    *_CPU_OPS[:2],
    "dag_network",
    "dag_network_backward",
    "nm_linear",
    "nm_linear_transposed",
    "nm_sampled",
    "threshold_attention",
    "threshold_attention_support",
    "threshold_attention_backward",
    *_PROXIMAL_OPS,
)
_TRITON_RULES = ("relative", "absolute")  # of threshold_attention
_WIDEST_TRITON_HEAD = 256
_ANYWHERE = (torch.float32, torch.float64)
_HALVES = (torch.float16, torch.bfloat16)
# Of each backend with kernels: its device, the dtypes each op takes there, and why it is missing here, or None.
_KERNELS = {
    "cpu": (
        "cpu",
        dict.fromkeys((*_CPU_OPS, *_PROXIMAL_OPS), _ANYWHERE + _HALVES),
        _no_cpu_kernels,
    ),
    "triton": ("cuda", dict.fromkeys(_TRITON_OPS, (torch.float32, *_HALVES)), _no_triton),
    "cuda": ("cuda", dict.fromkeys(_CPU_OPS[2:4], _ANYWHERE + _HALVES), _no_cuda_kernels),
}
_DTYPES = {
    (device, op): tuple(dict.fromkeys(_ANYWHERE + dtypes))
    for device, ops, _ in _KERNELS.values()
    for op, dtypes in ops.items()
}
CPU_CAPS = ("scalar", "avx2", "avx512", "avx512_bf16")


_cap = os.environ.get("COMPSPARSE_CPU")
if _cap and _cap not in CPU_CAPS:
    warnings.warn(
        f"COMPSPARSE_CPU: expected one of {', '.join(CPU_CAPS)}, got {_cap!r}; nothing is capped", stacklevel=2
    )


def cpu_isa() -> str | None:
    """Instruction set of the CPU kernels in use, or None where they were not built."""
    return None if _C is None else _C.cpu_isa()


def dtypes_on(device: str, op: str) -> tuple[torch.dtype, ...]:
    """The dtypes an op takes on a type of device: those of its kernels; float32 and float64 on any (the reference)."""
    return _DTYPES.get((device, op), _ANYWHERE)


def why_not(backend: str, op: str, *tensors: torch.Tensor, rule: str | None = None) -> str | None:
    """The reason why a backend can't run an op (with this ``rule``) on these tensors, or None if it can."""
    if backend == "reference":
        return next((reason for tensor in tensors if (reason := _no_reference(op, tensor))), None)
    device, ops, missing = _KERNELS[backend]
    if op not in ops:
        return "has no kernel of this op"
    if missing is not None:
        return missing
    for tensor in tensors:
        if tensor.device.type != device:
            return f"tensors are on {tensor.device.type}"
        if reason := _unfit(tensor, ops[op]):
            return reason
    if backend == "triton" and op.startswith("threshold_attention"):
        return _no_triton_attention(tensors, rule)
    if not tensors and device == "cuda" and not torch.cuda.is_available():
        return "there is no GPU here"
    return None


def _no_triton_attention(tensors: tuple[torch.Tensor, ...], rule: str | None) -> str | None:
    if rule is not None and rule not in _TRITON_RULES:
        return f"rule {rule!r} (has {', '.join(_TRITON_RULES)})"
    widest = max((tensor.shape[-1] for tensor in tensors if tensor.dim() > 2), default=0)
    if widest > _WIDEST_TRITON_HEAD:
        return f"heads {widest} wide (takes at most {_WIDEST_TRITON_HEAD})"
    return None if tensors or torch.cuda.is_available() else "there is no GPU here"


def _no_reference(op: str, tensor: torch.Tensor) -> str | None:
    return _unfit(tensor, dtypes_on(tensor.device.type, op))


def _unfit(tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...]) -> str | None:
    if tensor.layout != torch.strided:
        return f"a tensor has layout {tensor.layout} (takes dense ones)"
    if tensor.dtype not in dtypes:
        return f"dtype {_name(tensor.dtype)} (has {', '.join(map(_name, dtypes))})"
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def register_triton(
    lib: torch.library.Library, op: str, module: str, reference: Callable, asked: Callable[..., dict] | None = None
) -> None:
    """Registers a launcher at key CUDA. ``module`` (with a function named like the op) is imported at the first call;
    what it has no kernel for runs the reference, as on any device without kernels. ``asked`` makes of the arguments
    what decides that: ``tensors`` and options of ``why_not``; without it, the first argument does."""

    def launch(*arguments):
        options = asked(*arguments) if asked else {"tensors": arguments[:1]}
        if why_not("triton", op, *options.pop("tensors"), **options) is not None:
            return reference(*arguments)
        with torch.cuda.device_of(arguments[0]):  # Triton launches on the current device, whatever its tensors'
            return getattr(importlib.import_module(module), op)(*arguments)

    lib.impl(op, launch, "CUDA")


def explain(op: str, *tensors: torch.Tensor, rule: str | None = None) -> dict[str, str]:
    """Each backend of an op, and whether it would run on these tensors: ``"runs"``, ``"available"`` or why not.

    Args:
        op: name of an op, such as ``"block_sparse_linear"``; ``"nm_linear"`` and ``"nm_sampled"`` are masked_linear and
            sampled_matmul of a layout of kind nm.
        tensors: the tensors it would get; without any, what this machine has.
        rule: of threshold_attention, as not every backend has every rule.

    Example:
        >>> import torch
        >>> from compsparse_kernels import explain
        >>> explain("masked_linear", torch.zeros(2, 2, dtype=torch.int32))["cpu"]
        'dtype int32 (has float32, float64, float16, bfloat16)'
    """
    from compsparse_kernels.ops import NM_OPS, OPS

    known = OPS + NM_OPS
    require(op in known, "op", f"one of {', '.join(known)}", repr(op))
    for tensor in tensors:
        require(isinstance(tensor, torch.Tensor), "tensors", "tensors", type(tensor).__name__, TypeError)
    reasons = {backend: why_not(backend, op, *tensors, rule=rule) for backend in BACKENDS}
    chosen = next((backend for backend in BACKENDS if reasons[backend] is None), None)
    return {backend: "runs" if backend == chosen else reason or "available" for backend, reason in reasons.items()}


def check_backend(backend: str | None, op: str, *tensors: torch.Tensor, rule: str | None = None) -> None:
    """An explicit ``backend=`` runs or says why not; ``rule`` as for :func:`explain`."""
    require(backend in BACKENDS, "backend", f"one of {', '.join(BACKENDS)} or None", repr(backend))
    reason = why_not(backend, op, *tensors, rule=rule)
    require(reason is None, "backend", f"one that can run here ({backend} can't)", reason)
