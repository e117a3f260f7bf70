"""Checks and conversions of tensor arguments that the op rooms share."""

import torch
from torch.autograd import forward_ad

from compsparse_kernels.layouts.checks import describe, require
from compsparse_kernels.ops.backends import dtypes_on


def check_dtype(name: str, tensor: torch.Tensor, op: str) -> None:
    """A dtype that the op takes on the tensor's device, and strided memory."""
    dtypes = dtypes_on(tensor.device.type, op)
    if tensor.dtype not in dtypes:
        *most, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
        require(False, name, f"{', '.join(most)} or {last}", describe(tensor), TypeError)
    check_strided(name, tensor)


def check_strided(name: str, tensor: torch.Tensor) -> None:
    """Memory that strides describe."""
    if tensor.layout != torch.strided:
        require(False, name, "a dense (strided) tensor", f"one with layout {tensor.layout}", TypeError)


def check_same(name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """The same dtype and device as another argument, and strided memory."""
    if tensor.dtype != other.dtype:
        require(
            False, name, f"{str(other.dtype).removeprefix('torch.')}, like {other_name}", describe(tensor), TypeError
        )
    if tensor.device != other.device:
        require(False, name, f"a tensor on {other.device}, like {other_name}", f"one on {tensor.device}")
    check_strided(name, tensor)


def refuse_forward_mode(*named: tuple[str, torch.Tensor | None]) -> None:
    """The kernels have no forward-mode derivative; without this the tangent would be lost in silence."""
    if forward_ad._current_level < 0:
        return
    for name, tensor in named:
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            wanted = "a tensor without a forward-mode tangent (backend='reference' has that derivative)"
            require(False, name, wanted, "a dual tensor", RuntimeError)


def autocasts(tensor: object) -> bool:
    """Is autocast on where this tensor lies? (The meta device has none, and says so with an error.)"""
    is_real = isinstance(tensor, torch.Tensor) and tensor.device.type != "meta"
    return is_real and torch.is_autocast_enabled(tensor.device.type)


def compute_dtype(op: str, device: str) -> torch.dtype:
    """What an op computes in under autocast: autocast's dtype where it has kernels for it, else float32."""
    wanted = torch.get_autocast_dtype(device)
    return wanted if wanted in dtypes_on(device, op) else torch.float32


def round_to(dtype: torch.dtype, result: torch.Tensor) -> torch.Tensor:
    """What autocast makes of a result: its own dtype, but float64 stays, as with torch's ops."""
    return result if result.dtype == torch.float64 else result.to(dtype)


def autocast_to(dtype: torch.dtype, tensor: torch.Tensor | None) -> torch.Tensor | None:
    """What autocast makes of an argument: float32 and half precision become ``dtype``, everything else stays."""
    if isinstance(tensor, torch.Tensor) and tensor.dtype in (torch.float32, torch.float16, torch.bfloat16):
        return tensor.to(dtype)
    return tensor
