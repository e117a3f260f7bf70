"""What users call: checks, then the op, inside an autograd Function only where a gradient is wanted."""

import torch
import torch.nn.functional as F

from compsparse_kernels.layouts import MaskLayout
from compsparse_kernels.ops.arguments import autocasts, refuse_forward_mode
from compsparse_kernels.ops.backends import check_backend, dtypes_on
from compsparse_kernels.ops.block_sparse_linear import block_sparse_linear, sampled_block_matmul
from compsparse_kernels.ops.linear_arguments import (
    check_pair,
    check_product,
    is_usual_pair,
    is_usual_product,
    product_under_autocast,
)
from compsparse_kernels.ops.masked_linear import contract, nm, reference  # noqa: F401  (contract defines the ops)
from compsparse_kernels.ops.masked_linear.masking import masked_gradient, masked_values

_product = torch.ops.compsparse.masked_linear.default
_sampled = torch.ops.compsparse.sampled_matmul.default
_CPU_DTYPES = dtypes_on("cpu", "masked_linear")


def masked_linear(
    x: torch.Tensor,
    values: torch.Tensor,
    layout: MaskLayout,
    bias: torch.Tensor | None = None,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    r"""Linear layer with a pruned weight: :math:`y = x (W \odot M)^\top + b`.

    It equals ``F.linear(x, W * M, bias)`` in value and gradient, and costs only the mask's survivors.

    Args:
        x: ``[..., in_features]``, float32, float64, float16 or bfloat16; half precision is summed in float32 and
            rounded once.
        values: the survivors, of shape ``layout.values_shape`` (see :meth:`MaskLayout.pack`), dtype of ``x``.
        layout: the mask, and how it is stored.
        bias: ``[out_features]`` or None.
        backend: None lets torch's dispatcher choose; ``"cpu"``, ``"cuda"`` (``"triton"`` where ``kind="nm"``) or
            ``"reference"`` runs that one or says why not.
            ``kind="dense"`` is torch's own product under either name.

    Returns:
        ``[..., out_features]``. Gradients reach ``x``, ``values`` and ``bias``, to any order; they are products with
        the same layout (:func:`sampled_matmul` for ``values``).

    Under autocast it computes in autocast's dtype, as ``nn.Linear`` does.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.

    Example:
        >>> import torch
        >>> from compsparse_kernels import MaskLayout, masked_linear
        >>> weight, mask = torch.randn(64, 32), torch.rand(64, 32) < 0.1
        >>> layout = MaskLayout.from_mask(mask, kind="csr")
        >>> x = torch.randn(5, 32)
        >>> y = masked_linear(x, layout.pack(weight), layout)
        >>> torch.allclose(y, torch.nn.functional.linear(x, weight * mask), atol=1e-5)
        True
    """
    if isinstance(layout, MaskLayout) and layout.kind == "nm":
        return nm.linear(x, values, layout, bias, backend)
    is_usual = backend is None and isinstance(layout, MaskLayout) and layout.kind == "csr"
    if not (is_usual and is_usual_product(x, values, bias, layout, layout.by_output.idx, _CPU_DTYPES)):
        if autocasts(x):
            return product_under_autocast(
                "masked_linear",
                lambda x, values, bias: masked_linear(x, values, layout, bias, backend=backend),
                *(x, values, bias),
            )
        check_product("masked_linear", x, values, bias, layout, MaskLayout)
        if backend is not None:
            check_backend(backend, "masked_linear", x)
        if layout.kind == "block":
            return block_sparse_linear(
                x, masked_values(values, layout.dropping_mask), layout.blocks, bias, backend=backend
            )
        if layout.kind == "dense":
            weight = masked_values(values, layout.dropping_mask)
            return F.linear(x, weight.mT if layout.transposed else weight, bias)
        if backend != "reference":
            refuse_forward_mode(("x", x), ("values", values), ("bias", bias))
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if backend == "reference":
        y = reference.masked_linear(flat, values, bias, *layout.by_output, layout.out_features)
    else:
        y = _linear(flat, values, bias, layout.by_output, layout.by_input, layout.out_features)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], layout.out_features)


def sampled_matmul(a: torch.Tensor, b: torch.Tensor, layout: MaskLayout) -> torch.Tensor:
    r"""The elements of :math:`a^\top b` that a mask keeps (SDDMM): the gradient of a pruned weight.

    Args:
        a: ``[batch, out_features]``, a dtype as in :func:`masked_linear`.
        b: ``[batch, in_features]``, dtype of ``a``.
        layout: which elements are wanted.

    Returns:
        Values of shape ``layout.values_shape``, as :meth:`MaskLayout.pack` makes them. Differentiable to any order.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.

    Example:
        >>> import torch
        >>> from compsparse_kernels import MaskLayout, sampled_matmul
        >>> layout = MaskLayout.from_mask(torch.rand(64, 32) < 0.1, kind="csr")
        >>> a, b = torch.randn(5, 64), torch.randn(5, 32)
        >>> torch.allclose(sampled_matmul(a, b, layout), layout.pack(a.T @ b), atol=1e-5)
        True
    """
    if isinstance(layout, MaskLayout) and layout.kind == "nm":
        return nm.sampled(a, b, layout)
    is_usual = isinstance(layout, MaskLayout) and layout.kind == "csr"
    if not (is_usual and is_usual_pair(a, b, layout, layout.by_output.idx, _CPU_DTYPES)):
        check_pair("sampled_matmul", a, b, layout, MaskLayout)
        if layout.kind == "block":
            return masked_gradient(sampled_block_matmul(a, b, layout.blocks), layout.dropping_mask)
        if layout.kind == "dense":
            return masked_gradient(b.mT @ a if layout.transposed else a.mT @ b, layout.dropping_mask)
        refuse_forward_mode(("a", a), ("b", b))
    order, other = layout.by_output, layout.by_input
    if layout.transposed:
        a, b, order, other = b, a, other, order
    return _sampled_values(a, b, order, other)


def _linear(x, values, bias, order, other, out_features):
    wanted = x.requires_grad or values.requires_grad or (bias is not None and bias.requires_grad)
    if wanted and torch.is_grad_enabled():
        return _MaskedLinear.apply(x, values, bias, order, other, out_features)
    ptr, idx, perm = order
    return _product(x, values, bias, ptr, idx, perm, out_features)


def _sampled_values(a, b, order, other):
    if (a.requires_grad or b.requires_grad) and torch.is_grad_enabled():
        return _SampledMatmul.apply(a, b, order, other)
    return _sampled(a, b, order[0], order[1])


class _MaskedLinear(torch.autograd.Function):
    """The gradients are the same two ops over the other order, so they can be differentiated again."""

    @staticmethod
    def forward(ctx, x, values, bias, order, other, out_features):
        ctx.save_for_backward(x, values)
        ctx.orders = order, other
        ptr, idx, perm = order
        return _product(x, values, bias, ptr, idx, perm, out_features)

    @staticmethod
    def backward(ctx, grad):
        x, values = ctx.saved_tensors
        order, other = ctx.orders
        wants_x, wants_values, wants_bias, *_ = ctx.needs_input_grad
        grad_x = _linear(grad, values, None, other, order, x.shape[1]) if wants_x else None
        grad_values = None
        if wants_values:
            values_in_this_order = order[2] is None
            pair = (grad, x, order, other) if values_in_this_order else (x, grad, other, order)
            grad_values = _sampled_values(*pair)
        return grad_x, grad_values, grad.sum(0) if wants_bias else None, None, None, None


class _SampledMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b, order, other):
        ctx.save_for_backward(a, b)
        ctx.orders = order, other
        return _sampled(a, b, order[0], order[1])

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        order, other = ctx.orders
        wants_a, wants_b, *_ = ctx.needs_input_grad
        grad_a = _linear(b, grad, None, order, other, a.shape[1]) if wants_a else None
        grad_b = _linear(a, grad, None, other, order, b.shape[1]) if wants_b else None
        return grad_a, grad_b, None, None
