"""What users call: checks, then the op, inside an autograd Function only where a gradient is wanted."""

import torch

from compsparse_kernels.layouts import BlockLayout
from compsparse_kernels.layouts.checks import require
from compsparse_kernels.ops.arguments import autocasts, refuse_forward_mode
from compsparse_kernels.ops.backends import check_backend, dtypes_on
from compsparse_kernels.ops.block_sparse_linear import contract, reference  # noqa: F401  (contract defines the ops)
from compsparse_kernels.ops.linear_arguments import (
    check_pair,
    check_product,
    is_usual_pair,
    is_usual_product,
    product_under_autocast,
)

_product = torch.ops.compsparse.block_sparse_linear.default
_sampled = torch.ops.compsparse.sampled_block_matmul.default
_activated = torch.ops.compsparse.activated.default
_CPU_DTYPES = dtypes_on("cpu", "block_sparse_linear")

ACTIVATIONS = (None, "relu", "gelu", "silu")


def block_sparse_linear(
    x: torch.Tensor,
    values: torch.Tensor,
    layout: BlockLayout,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    r"""Linear layer with a block-sparse weight: :math:`y = \mathrm{act}(x W^\top + b)`.

    It equals ``F.linear(x, layout.unpack(values), bias)`` followed by the activation, and costs only the blocks.

    Args:
        x: ``[..., in_features]``, float32, float64, float16 or bfloat16; half precision is summed in float32 and
            rounded once (before gelu and silu too where a gradient is wanted, which keeps what they read).
        values: the blocks, ``[num_slots, block_out, block_in]`` (see :meth:`BlockLayout.pack`), dtype of ``x``.
        layout: which blocks the weight has.
        bias: ``[out_features]`` or None.
        activation: None, ``"relu"``, ``"gelu"`` (exact, by erf) or ``"silu"``, computed in the epilogue.
        backend: None lets torch's dispatcher choose; ``"cpu"``, ``"triton"`` or ``"reference"`` runs that one or
            says why not.

    Returns:
        ``[..., out_features]``. Gradients reach ``x``, ``values`` and ``bias``, to any order; they are products with
        the same layout (:func:`sampled_block_matmul` for ``values``).

    Under autocast it computes in autocast's dtype, as ``nn.Linear`` does.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.

    Example:
        >>> import torch
        >>> from compsparse_kernels import BlockLayout, block_sparse_linear
        >>> layout = BlockLayout.from_mask(torch.eye(4, dtype=torch.bool), block_shape=(16, 8))
        >>> values = torch.randn(layout.values_shape, requires_grad=True)
        >>> y = block_sparse_linear(torch.randn(5, 32), values, layout, activation="relu")
        >>> y.shape, torch.autograd.grad(y.sum(), values)[0].shape
        (torch.Size([5, 64]), torch.Size([4, 16, 8]))
    """
    is_usual = backend is None and activation in ACTIVATIONS and isinstance(layout, BlockLayout)
    if not (is_usual and is_usual_product(x, values, bias, layout, layout.by_output.idx, _CPU_DTYPES)):
        if autocasts(x):
            return product_under_autocast(
                "block_sparse_linear",
                lambda x, values, bias: block_sparse_linear(x, values, layout, bias, activation, backend=backend),
                *(x, values, bias),
            )
        check_product("block_sparse_linear", x, values, bias, layout, BlockLayout)
        require(activation in ACTIVATIONS, "activation", "None, 'relu', 'gelu' or 'silu'", repr(activation))
        if backend is not None:
            check_backend(backend, "block_sparse_linear", x)
        if backend != "reference":
            refuse_forward_mode(("x", x), ("values", values), ("bias", bias))
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    order, other, name = layout.by_output, layout.by_input, activation or "none"
    if backend == "reference":
        y = reference.block_sparse_linear(flat, values, bias, *order, layout.out_features, layout.transposed, name)
    else:
        y = _linear(flat, values, bias, order, other, layout.out_features, layout.transposed, name)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], layout.out_features)


def sampled_block_matmul(a: torch.Tensor, b: torch.Tensor, layout: BlockLayout) -> torch.Tensor:
    r"""The blocks of :math:`a^\top b` that a layout names (SDDMM): the gradient of a block-sparse weight.

    Args:
        a: ``[batch, out_features]``, a dtype as in :func:`block_sparse_linear`.
        b: ``[batch, in_features]``, dtype of ``a``.
        layout: which blocks are wanted.

    Returns:
        ``[num_slots, block_out, block_in]``; entries that share a slot are added up. Differentiable to any order.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.

    Example:
        >>> import torch
        >>> from compsparse_kernels import BlockLayout, sampled_block_matmul
        >>> layout = BlockLayout.from_mask(torch.eye(4, dtype=torch.bool), block_shape=(16, 8))
        >>> a, b = torch.randn(5, 64), torch.randn(5, 32)
        >>> torch.allclose(sampled_block_matmul(a, b, layout), layout.pack(a.T @ b), atol=1e-5)
        True
    """
    is_usual = isinstance(layout, BlockLayout)
    if not (is_usual and is_usual_pair(a, b, layout, layout.by_output.idx, _CPU_DTYPES)):
        check_pair("sampled_block_matmul", a, b, layout, BlockLayout)
        refuse_forward_mode(("a", a), ("b", b))
    order, other = layout.by_output, layout.by_input
    if layout.transposed:
        a, b, order, other = b, a, other, order
    return _sampled_blocks(a, b, order, other, layout.values_shape)


def _linear(x, values, bias, order, other, out_features, transposed, activation):
    wanted = x.requires_grad or values.requires_grad or (bias is not None and bias.requires_grad)
    if not (wanted and torch.is_grad_enabled()):
        ptr, idx, slot = order
        return _product(x, values, bias, ptr, idx, slot, out_features, transposed, activation)
    # relu's derivative needs only the output, so it stays fused; the others' inputs are kept.
    fused = activation if activation == "relu" else "none"
    y = _BlockSparseLinear.apply(x, values, bias, order, other, out_features, transposed, fused)
    return y if fused == activation else _Activated.apply(y, activation)


class _Activated(torch.autograd.Function):
    """gelu and silu by our own kernels: the last bits of torch's depend on the number of threads."""

    @staticmethod
    def forward(ctx, z, activation):
        ctx.save_for_backward(z)
        ctx.activation = activation
        return _activated(z, None, activation)

    @staticmethod
    def backward(ctx, grad):
        (z,) = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return _activated(z, grad, ctx.activation), None
        with torch.autocast(z.device.type, enabled=False):  # for a second derivative: as torch would differentiate it
            y = reference.ACTIVATIONS[ctx.activation](z)
            return torch.autograd.grad(y, z, grad, create_graph=True)[0], None


def _sampled_blocks(a, b, order, other, shape):
    if (a.requires_grad or b.requires_grad) and torch.is_grad_enabled():
        return _SampledBlockMatmul.apply(a, b, order, other, shape)
    return _run_sampled(a, b, order, shape)


def _run_sampled(a, b, order, shape):
    (ptr, idx, slot), (num_slots, block_out, block_in) = order, shape
    return _sampled(a, b, ptr, idx, slot, num_slots, num_slots != idx.shape[0], block_out, block_in)


class _BlockSparseLinear(torch.autograd.Function):
    """The gradients are the same two ops over the other order, so they can be differentiated again."""

    @staticmethod
    def forward(ctx, x, values, bias, order, other, out_features, transposed, activation):
        ptr, idx, slot = order
        y = _product(x, values, bias, ptr, idx, slot, out_features, transposed, activation)
        ctx.save_for_backward(x, values, y if activation == "relu" else None)
        ctx.pattern = order, other, transposed
        return y

    @staticmethod
    def backward(ctx, grad):
        x, values, relu_output = ctx.saved_tensors
        order, other, transposed = ctx.pattern
        wants_x, wants_values, wants_bias, *_ = ctx.needs_input_grad
        if relu_output is not None:
            grad = grad.masked_fill(relu_output <= 0, 0)  # lets NaN through, as torch's relu does
        grad_x = grad_values = None
        if wants_x:
            grad_x = _linear(grad, values, None, other, order, x.shape[1], not transposed, "none")
        if wants_values:
            pair = (x, grad, other, order) if transposed else (grad, x, order, other)
            grad_values = _sampled_blocks(*pair, values.shape)
        return grad_x, grad_values, grad.sum(0) if wants_bias else None, None, None, None, None, None


class _SampledBlockMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b, order, other, shape):
        ctx.save_for_backward(a, b)
        ctx.pattern = order, other
        return _run_sampled(a, b, order, shape)

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        order, other = ctx.pattern
        wants_a, wants_b, *_ = ctx.needs_input_grad
        grad_a = _linear(b, grad, None, order, other, a.shape[1], False, "none") if wants_a else None
        grad_b = _linear(a, grad, None, other, order, b.shape[1], True, "none") if wants_b else None
        return grad_a, grad_b, None, None, None
