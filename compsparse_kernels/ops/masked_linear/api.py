"""What users call: checks, then the op, inside an autograd Function only where a gradient is wanted."""

import torch
import torch.nn.functional as F

from compsparse_kernels.layouts import MaskLayout
from compsparse_kernels.layouts.checks import describe, require
from compsparse_kernels.ops.arguments import (
    autocast_to,
    autocasts,
    check_dtype,
    check_same,
    compute_dtype,
    refuse_forward_mode,
)
from compsparse_kernels.ops.backends import check_backend
from compsparse_kernels.ops.block_sparse_linear import block_sparse_linear, sampled_block_matmul
from compsparse_kernels.ops.masked_linear import contract, reference  # noqa: F401  (contract defines the ops)

_product = torch.ops.compsparse.masked_linear.default
_sampled = torch.ops.compsparse.sampled_matmul.default


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
        x: ``[..., in_features]``, float32 or float64; on a GPU also float16 and bfloat16.
        values: the survivors, of shape ``layout.values_shape`` (see :meth:`MaskLayout.pack`), dtype of ``x``.
        layout: the mask, and how it is stored.
        bias: ``[out_features]`` or None.
        backend: None lets torch's dispatcher choose; ``"cpu"``, ``"cuda"`` or ``"reference"`` runs that one or says
            why not.
            ``kind="dense"`` is torch's own product under either name.

    Returns:
        ``[..., out_features]``. Gradients reach ``x``, ``values`` and ``bias``, to any order; they are products with
        the same layout (:func:`sampled_matmul` for ``values``).

    Under autocast the output has autocast's dtype, as with ``nn.Linear``; on the CPU it is computed in float32.

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
    if autocasts(x):
        return _under_autocast(x, values, layout, bias, backend)
    _check(x, values, layout, bias)
    if backend is not None:
        check_backend(backend, "masked_linear", x)
    if layout.kind == "block":
        return block_sparse_linear(x, layout.masked(values), layout.blocks, bias, backend=backend)
    if layout.kind == "dense":
        weight = layout.masked(values)
        return F.linear(x, weight.mT if layout.transposed else weight, bias)
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if backend == "reference":
        y = reference.masked_linear(flat, values, bias, *layout.by_output, layout.out_features)
    else:
        refuse_forward_mode(("x", x), ("values", values), ("bias", bias))
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
    _check_sampled(a, b, layout)
    if layout.kind == "block":
        return layout.masked(sampled_block_matmul(a, b, layout.blocks))
    if layout.transposed:
        a, b, layout = b, a, layout.T
    if layout.kind == "dense":
        return layout.masked(a.mT @ b)
    refuse_forward_mode(("a", a), ("b", b))
    return _sampled_values(a, b, layout.by_output, layout.by_input)


def _linear(x, values, bias, order, other, out_features):
    wanted = x.requires_grad or values.requires_grad or (bias is not None and bias.requires_grad)
    if not (wanted and torch.is_grad_enabled()):
        return _product(x, values, bias, *order, out_features)
    return _MaskedLinear.apply(x, values, bias, *order, *other, out_features)


def _sampled_values(a, b, order, other):
    if (a.requires_grad or b.requires_grad) and torch.is_grad_enabled():
        return _SampledMatmul.apply(a, b, *order, *other)
    return _sampled(a, b, order[0], order[1])


class _MaskedLinear(torch.autograd.Function):
    """The gradients are the same two ops over the other order, so they can be differentiated again."""

    @staticmethod
    def forward(ctx, x, values, bias, ptr, idx, perm, t_ptr, t_idx, t_perm, out_features):
        ctx.save_for_backward(x, values, ptr, idx, perm, t_ptr, t_idx, t_perm)
        return _product(x, values, bias, ptr, idx, perm, out_features)

    @staticmethod
    def backward(ctx, grad):
        x, values, *indices = ctx.saved_tensors
        order, other = indices[:3], indices[3:]
        grad_x = grad_values = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = _linear(grad, values, None, other, order, x.shape[1])
        if ctx.needs_input_grad[1]:
            values_in_this_order = order[2] is None
            pair = (grad, x, order, other) if values_in_this_order else (x, grad, other, order)
            grad_values = _sampled_values(*pair)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum(0)
        return grad_x, grad_values, grad_bias, *[None] * 7


class _SampledMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b, ptr, idx, perm, t_ptr, t_idx, t_perm):
        ctx.save_for_backward(a, b, ptr, idx, perm, t_ptr, t_idx, t_perm)
        return _sampled(a, b, ptr, idx)

    @staticmethod
    def backward(ctx, grad):
        a, b, *indices = ctx.saved_tensors
        order, other = indices[:3], indices[3:]
        grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_a = _linear(b, grad, None, order, other, a.shape[1])
        if ctx.needs_input_grad[1]:
            grad_b = _linear(a, grad, None, other, order, b.shape[1])
        return grad_a, grad_b, *[None] * 6


def _under_autocast(x, values, layout, bias, backend):
    device = x.device.type
    dtype, compute = torch.get_autocast_dtype(device), compute_dtype("masked_linear", device)
    with torch.autocast(device, enabled=False):
        x, values, bias = (autocast_to(compute, tensor) for tensor in (x, values, bias))
        return masked_linear(x, values, layout, bias, backend=backend).to(dtype)


def _check(x, values, layout, bias):
    require(isinstance(layout, MaskLayout), "layout", "MaskLayout", type(layout).__name__, TypeError)
    if not (isinstance(x, torch.Tensor) and x.dim() >= 1 and x.shape[-1] == layout.in_features):
        require(False, "x", f"tensor [..., {layout.in_features}]", describe(x))
    if not (isinstance(values, torch.Tensor) and values.shape == layout.values_shape):
        require(False, "values", f"tensor {list(layout.values_shape)}", describe(values))
    if bias is not None and not (isinstance(bias, torch.Tensor) and bias.shape == (layout.out_features,)):
        require(False, "bias", f"tensor [{layout.out_features}] or None", describe(bias))
    for name, tensor in (("values", values), ("bias", bias)):
        if tensor is not None:
            check_same(name, tensor, "x", x)
    check_dtype("x", x, "masked_linear")
    _check_device(layout, "x", x)


def _check_sampled(a, b, layout):
    require(isinstance(layout, MaskLayout), "layout", "MaskLayout", type(layout).__name__, TypeError)
    for name, tensor, features in (("a", a, layout.out_features), ("b", b, layout.in_features)):
        ok = isinstance(tensor, torch.Tensor) and tensor.dim() == 2 and tensor.shape[1] == features
        require(ok, name, f"2-D tensor [batch, {features}]", describe(tensor))
        check_same(name, tensor, "a", a)
    check_dtype("a", a, "sampled_matmul")
    require(a.shape[0] == b.shape[0], "b", f"batch {a.shape[0]}, as in a", b.shape[0])
    _check_device(layout, "a", a)


def _check_device(layout, name, tensor):
    if tensor.device != layout.device:
        require(False, "layout", f"on {tensor.device}, like {name} (layout.to(device))", f"one on {layout.device}")
