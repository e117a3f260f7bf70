"""Checks that the linear rooms share: products ``x W^T + b`` and sampled products ``a^T b`` over a layout.

A call on a small input costs more in checks than in arithmetic. So there are two of each: an expression that is true in
the usual case, everything right and on the CPU, and the checks that look closer where it is not, and name the fault.
"""

from collections.abc import Callable

import torch
from torch import Tensor, is_autocast_enabled, strided
from torch.autograd import forward_ad

from compsparse_kernels.layouts.checks import describe, require
from compsparse_kernels.ops.arguments import autocast_to, check_dtype, check_same, compute_dtype, round_to


def is_usual_product(x, values, bias, layout, index, dtypes) -> bool:
    """Would :func:`check_product` pass, on the CPU, with neither autocast nor forward mode? False if in doubt.

    ``index`` is an index tensor of the layout, ``dtypes`` what the op takes on the CPU.
    """
    return (
        isinstance(x, Tensor)
        and isinstance(values, Tensor)
        and (x.is_cpu and values.is_cpu and index.is_cpu)
        and x.dtype in dtypes
        and x.dtype == values.dtype
        and x.layout == strided == values.layout
        and x.dim() > 0
        and x.shape[-1] == layout.in_features
        and values.shape == layout.values_shape
        and (bias is None or _is_usual_bias(bias, x, layout))
        and not is_autocast_enabled("cpu")
        and forward_ad._current_level < 0
    )


def _is_usual_bias(bias, x, layout) -> bool:
    return (
        isinstance(bias, Tensor)
        and bias.is_cpu
        and bias.dtype == x.dtype
        and bias.layout == strided
        and bias.shape == (layout.out_features,)
    )


def is_usual_pair(a, b, layout, index, dtypes) -> bool:
    """Would :func:`check_pair` pass, on the CPU, without forward mode? False if in doubt."""
    return (
        isinstance(a, Tensor)
        and isinstance(b, Tensor)
        and (a.is_cpu and b.is_cpu and index.is_cpu)
        and a.dtype in dtypes
        and a.dtype == b.dtype
        and a.layout == strided == b.layout
        and a.dim() == 2
        and a.shape[1] == layout.out_features
        and b.shape == (a.shape[0], layout.in_features)
        and forward_ad._current_level < 0
    )


def check_product(op: str, x, values, bias, layout, layout_type: type) -> None:
    """Arguments of a product, all named in errors; the layout first, which says what shapes are wanted."""
    require(isinstance(layout, layout_type), "layout", layout_type.__name__, type(layout).__name__, TypeError)
    if not (isinstance(x, Tensor) and x.dim() >= 1 and x.shape[-1] == layout.in_features):
        require(False, "x", f"tensor [..., {layout.in_features}]", describe(x))
    if not (isinstance(values, Tensor) and values.shape == layout.values_shape):
        require(False, "values", f"tensor {list(layout.values_shape)}", describe(values))
    if bias is not None and not (isinstance(bias, Tensor) and bias.shape == (layout.out_features,)):
        require(False, "bias", f"tensor [{layout.out_features}] or None", describe(bias))
    check_dtype("x", x, op)
    for name, tensor in (("values", values), ("bias", bias)):
        if tensor is not None:
            check_same(name, tensor, "x", x)
    _check_layout_device(layout, "x", x)


def check_pair(op: str, a, b, layout, layout_type: type) -> None:
    """Arguments of a sampled product."""
    require(isinstance(layout, layout_type), "layout", layout_type.__name__, type(layout).__name__, TypeError)
    for name, tensor, features in (("a", a, layout.out_features), ("b", b, layout.in_features)):
        ok = isinstance(tensor, Tensor) and tensor.dim() == 2 and tensor.shape[1] == features
        require(ok, name, f"2-D tensor [batch, {features}]", describe(tensor))
        check_same(name, tensor, "a", a)
    check_dtype("a", a, op)
    _check_layout_device(layout, "a", a)
    require(a.shape[0] == b.shape[0], "b", f"batch {a.shape[0]}, as in a", b.shape[0])


def _check_layout_device(layout, name, tensor):
    if tensor.device != layout.device:
        require(False, "layout", f"on {tensor.device}, like {name} (layout.to(device))", f"one on {layout.device}")


def product_under_autocast(op: str, product: Callable, x, values, bias) -> Tensor:
    """``product(x, values, bias)`` in the dtype that autocast computes the op in, rounded to autocast's own."""
    device = x.device.type
    dtype, compute = torch.get_autocast_dtype(device), compute_dtype(op, device)
    with torch.autocast(device, enabled=False):
        return round_to(dtype, product(*(autocast_to(compute, tensor) for tensor in (x, values, bias))))
