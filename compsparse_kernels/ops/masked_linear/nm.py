"""The masked ops of a layout of kind nm: checks, dispatch, and an autograd Function where a gradient is wanted."""

from typing import NamedTuple

import torch

from compsparse_kernels.layouts import MaskLayout
from compsparse_kernels.ops.arguments import autocasts, refuse_forward_mode
from compsparse_kernels.ops.backends import check_backend
from compsparse_kernels.ops.linear_arguments import (
    check_pair,
    check_product,
    is_usual_pair,
    is_usual_product,
    product_under_autocast,
)
from compsparse_kernels.ops.masked_linear import contract, reference  # noqa: F401  (contract defines the ops)
from compsparse_kernels.ops.masked_linear.masking import masked_gradient, masked_values

_product = torch.ops.compsparse.nm_linear.default
_transposed_product = torch.ops.compsparse.nm_linear_transposed.default
_sampled = torch.ops.compsparse.nm_sampled.default
_KERNEL_DTYPES = (torch.float32, torch.float64)


class _Pattern(NamedTuple):
    """What the ops need of a layout, whose weight is that of the product, or its transpose."""

    positions: torch.Tensor
    n: int
    m: int
    in_features: int


def linear(x, values, layout, bias, backend):
    """:func:`masked_linear` of a layout of kind nm."""
    slots = layout.nm
    if not (backend is None and is_usual_product(x, values, bias, layout, slots.positions, _KERNEL_DTYPES)):
        if autocasts(x):
            return product_under_autocast(
                "nm_linear", lambda x, values, bias: linear(x, values, layout, bias, backend), *(x, values, bias)
            )
        check_product("nm_linear", x, values, bias, layout, MaskLayout)
        if backend is not None:
            check_backend(backend, "nm_linear", x)
        if backend != "reference":
            refuse_forward_mode(("x", x), ("values", values), ("bias", bias))
            if _is_widened(x):
                wide = [None if tensor is None else tensor.float() for tensor in (x, values, bias)]
                return linear(*wide[:2], layout, wide[2], backend).to(x.dtype)
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    pattern = _Pattern(slots.positions, slots.n, slots.m, slots.in_features)
    run = _reference if backend == "reference" else _linear
    y = run(flat, masked_values(values, layout.dropping_mask), bias, pattern, layout.transposed)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], layout.out_features)


def sampled(a, b, layout):
    """:func:`sampled_matmul` of a layout of kind nm."""
    slots = layout.nm
    if not is_usual_pair(a, b, layout, slots.positions, _KERNEL_DTYPES):
        check_pair("nm_sampled", a, b, layout, MaskLayout)
        refuse_forward_mode(("a", a), ("b", b))
        if _is_widened(a):
            return sampled(a.float(), b.float(), layout).to(a.dtype)
    pair = (b, a) if layout.transposed else (a, b)
    grad = _sampled_values(*pair, _Pattern(slots.positions, slots.n, slots.m, slots.in_features))
    return masked_gradient(grad, layout.dropping_mask)


def _is_widened(tensor) -> bool:
    """Half precision on the CPU is computed in float32, from copies, and rounded once."""
    return tensor.is_cpu and tensor.dtype not in _KERNEL_DTYPES


def _reference(x, values, bias, pattern, transposed):
    return _call(reference.nm_linear, reference.nm_linear_transposed, x, values, bias, pattern, transposed)


def _call(product, transposed_product, x, values, bias, pattern, transposed):
    if transposed:
        return transposed_product(x, values, bias, pattern.positions, pattern.m, pattern.in_features)
    return product(x, values, bias, pattern.positions, pattern.m)


def _linear(x, values, bias, pattern, transposed):
    wanted = x.requires_grad or values.requires_grad or (bias is not None and bias.requires_grad)
    if wanted and torch.is_grad_enabled():
        return _NMLinear.apply(x, values, bias, pattern, transposed)
    return _call(_product, _transposed_product, x, values, bias, pattern, transposed)


def _sampled_values(a, b, pattern):
    if (a.requires_grad or b.requires_grad) and torch.is_grad_enabled():
        return _NMSampled.apply(a, b, pattern)
    return _sampled(a, b, pattern.positions, pattern.n, pattern.m)


class _NMLinear(torch.autograd.Function):
    """The gradients are the product with the transpose, and the sampled product: they can be differentiated again."""

    @staticmethod
    def forward(ctx, x, values, bias, pattern, transposed):
        ctx.save_for_backward(x, values)
        ctx.pattern, ctx.transposed = pattern, transposed
        return _call(_product, _transposed_product, x, values, bias, pattern, transposed)

    @staticmethod
    def backward(ctx, grad):
        x, values = ctx.saved_tensors
        wants_x, wants_values, wants_bias, *_ = ctx.needs_input_grad
        grad_x = _linear(grad, values, None, ctx.pattern, not ctx.transposed) if wants_x else None
        pair = (x, grad) if ctx.transposed else (grad, x)
        grad_values = _sampled_values(*pair, ctx.pattern) if wants_values else None
        return grad_x, grad_values, grad.sum(0) if wants_bias else None, None, None


class _NMSampled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b, pattern):
        ctx.save_for_backward(a, b)
        ctx.pattern = pattern
        return _sampled(a, b, pattern.positions, pattern.n, pattern.m)

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        wants_a, wants_b, _ = ctx.needs_input_grad
        grad_a = _linear(b, grad, None, ctx.pattern, False) if wants_a else None
        grad_b = _linear(a, grad, None, ctx.pattern, True) if wants_b else None
        return grad_a, grad_b, None
