"""Values of a layout with a mask (dense, or partly filled blocks), as zero where the mask drops: in value and gradient.

``torch.where`` says all of it, and copies the weight in each direction: at batch 256 that is half the time of the
product itself. A layer's values are zero there to begin with and stay so, since their gradient is; then it is enough to
look, which only reads, and to clear the gradient's elements where they lie.
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from compsparse_kernels.ops.masked_linear import contract  # noqa: F401  (defines the ops)

_is_zero_outside = torch.ops.compsparse.is_zero_outside.default
_zero_outside_ = torch.ops.compsparse.zero_outside_.default
_BYTES = (2, 4, 8)


def masked_values(values: Tensor, mask: Tensor | None) -> Tensor:
    """``where(mask, values, 0)``, to any order of differentiation; ``values`` itself where that is the same."""
    if mask is None:
        return values
    if not (_is_plain(values, mask) and _is_zero_outside(values, mask)):
        return _where(values, mask)
    return _Masked.apply(values, mask) if values.requires_grad and torch.is_grad_enabled() else values


def masked_gradient(fresh: Tensor, mask: Tensor | None) -> Tensor:
    """``where(mask, fresh, 0)``; ``fresh``, memory that nobody else knows of, is written where that is possible."""
    if mask is None:
        return fresh
    if (fresh.requires_grad and torch.is_grad_enabled()) or not _is_plain(fresh, mask):
        return _where(fresh, mask)
    _zero_outside_(fresh, mask)
    return fresh


def _where(values, mask):
    return torch.where(mask, values, values.new_zeros(()))


def _is_plain(values, mask) -> bool:
    """Is there memory to look at: dense, on the CPU, neither traced nor wrapped by a transform?"""
    return (
        not torch.compiler.is_compiling()
        and type(values) in (Tensor, torch.nn.Parameter)
        and (values.is_cpu and mask.is_cpu)
        and (values.is_contiguous() and mask.is_contiguous())
        and values.element_size() in _BYTES
        and forward_ad._current_level < 0
        and not torch._C._functorch.peek_interpreter_stack()
    )


class _Masked(torch.autograd.Function):
    """The identity of values that are zero where the mask drops, whose gradient is zero there, too."""

    @staticmethod
    def forward(ctx, values, mask):
        ctx.mask = mask
        return values.view_as(values)

    @staticmethod
    def backward(ctx, grad):
        # A product's gradient to its weight is memory of its own: what this function returned goes to one product.
        return masked_gradient(grad, ctx.mask), None
