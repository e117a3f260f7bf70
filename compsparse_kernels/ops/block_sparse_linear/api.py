"""What users call: checks, then the op, inside an autograd Function only where a gradient is wanted."""

import torch

from compsparse_kernels.layouts import BlockLayout
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
from compsparse_kernels.ops.block_sparse_linear import contract, reference  # noqa: F401  (contract defines the ops)

_product = torch.ops.compsparse.block_sparse_linear.default
_sampled = torch.ops.compsparse.sampled_block_matmul.default

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
            rounded once.
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
    if autocasts(x):
        return _under_autocast(x, values, layout, bias, activation, backend)
    _check(x, values, layout, bias, activation)
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    name = "none" if activation is None else activation
    order, other = layout.by_output, layout.by_input
    if backend is not None:
        check_backend(backend, "block_sparse_linear", x)
    if backend == "reference":
        y = reference.block_sparse_linear(flat, values, bias, *order, layout.out_features, layout.transposed, name)
    else:
        refuse_forward_mode(("x", x), ("values", values), ("bias", bias))
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
    _check_layout(layout)
    for name, tensor, features in (("a", a, layout.out_features), ("b", b, layout.in_features)):
        ok = isinstance(tensor, torch.Tensor) and tensor.dim() == 2 and tensor.shape[1] == features
        require(ok, name, f"2-D tensor [batch, {features}]", describe(tensor))
        check_same(name, tensor, "a", a)
    check_dtype("a", a, "sampled_block_matmul")
    _check_layout_device(layout, "a", a)
    require(a.shape[0] == b.shape[0], "b", f"batch {a.shape[0]}, as in a", b.shape[0])
    refuse_forward_mode(("a", a), ("b", b))
    if layout.transposed:
        a, b, layout = b, a, layout.T
    return _sampled_blocks(a, b, layout.by_output, layout.by_input, layout.num_slots, layout.block_shape)


def _linear(x, values, bias, order, other, out_features, transposed, activation):
    wanted = x.requires_grad or values.requires_grad or (bias is not None and bias.requires_grad)
    if not (wanted and torch.is_grad_enabled()):
        return _product(x, values, bias, *order, out_features, transposed, activation)
    # relu's derivative needs only the output, so it stays fused; the others' inputs are kept by torch.
    fused = activation if activation == "relu" else "none"
    y = _BlockSparseLinear.apply(x, values, bias, *order, *other, out_features, transposed, fused)
    return y if fused == activation else reference.ACTIVATIONS[activation](y)


def _sampled_blocks(a, b, order, other, num_slots, block_shape):
    if (a.requires_grad or b.requires_grad) and torch.is_grad_enabled():
        return _SampledBlockMatmul.apply(a, b, *order, *other, num_slots, *block_shape)
    return _sampled(a, b, *order, num_slots, num_slots != len(order[1]), *block_shape)


class _BlockSparseLinear(torch.autograd.Function):
    """The gradients are the same two ops over the other order, so they can be differentiated again."""

    @staticmethod
    def forward(ctx, x, values, bias, ptr, idx, slot, t_ptr, t_idx, t_slot, out_features, transposed, activation):
        y = _product(x, values, bias, ptr, idx, slot, out_features, transposed, activation)
        relu_output = y if activation == "relu" else None
        ctx.save_for_backward(x, values, relu_output, ptr, idx, slot, t_ptr, t_idx, t_slot)
        ctx.transposed = transposed
        return y

    @staticmethod
    def backward(ctx, grad):
        x, values, relu_output, *indices = ctx.saved_tensors
        order, other = indices[:3], indices[3:]
        if relu_output is not None:
            grad = grad.masked_fill(relu_output <= 0, 0)  # lets NaN through, as torch's relu does
        grad_x = grad_values = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = _linear(grad, values, None, other, order, x.shape[1], not ctx.transposed, "none")
        if ctx.needs_input_grad[1]:
            num_slots, rows, columns = values.shape
            pair = (x, grad, other, order) if ctx.transposed else (grad, x, order, other)
            grad_values = _sampled_blocks(*pair, num_slots, (rows, columns))
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum(0)
        return grad_x, grad_values, grad_bias, *[None] * 9


class _SampledBlockMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b, ptr, idx, slot, t_ptr, t_idx, t_slot, num_slots, block_out, block_in):
        ctx.save_for_backward(a, b, ptr, idx, slot, t_ptr, t_idx, t_slot)
        return _sampled(a, b, ptr, idx, slot, num_slots, num_slots != len(idx), block_out, block_in)

    @staticmethod
    def backward(ctx, grad):
        a, b, *indices = ctx.saved_tensors
        order, other = indices[:3], indices[3:]
        grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_a = _linear(b, grad, None, order, other, a.shape[1], False, "none")
        if ctx.needs_input_grad[1]:
            grad_b = _linear(a, grad, None, other, order, b.shape[1], True, "none")
        return grad_a, grad_b, *[None] * 9


def _under_autocast(x, values, layout, bias, activation, backend):
    device = x.device.type
    dtype, compute = torch.get_autocast_dtype(device), compute_dtype("block_sparse_linear", device)
    with torch.autocast(device, enabled=False):
        x, values, bias = (autocast_to(compute, tensor) for tensor in (x, values, bias))
        return block_sparse_linear(x, values, layout, bias, activation, backend=backend).to(dtype)


def _check_layout(layout):
    require(isinstance(layout, BlockLayout), "layout", "BlockLayout", type(layout).__name__, TypeError)


def _check_layout_device(layout, name, tensor):
    if tensor.device != layout.device:
        require(False, "layout", f"on {tensor.device}, like {name} (layout.to(device))", f"one on {layout.device}")


def _check(x, values, layout, bias, activation):
    _check_layout(layout)
    ok = isinstance(x, torch.Tensor) and x.dim() >= 1 and x.shape[-1] == layout.in_features
    if not ok:
        require(False, "x", f"tensor [..., {layout.in_features}]", describe(x))
    if not (isinstance(values, torch.Tensor) and values.shape == layout.values_shape):
        require(False, "values", f"tensor {list(layout.values_shape)}", describe(values))
    if bias is not None and not (isinstance(bias, torch.Tensor) and bias.shape == (layout.out_features,)):
        require(False, "bias", f"tensor [{layout.out_features}] or None", describe(bias))
    for name, tensor in (("values", values), ("bias", bias)):
        if tensor is not None:
            check_same(name, tensor, "x", x)
    check_dtype("x", x, "block_sparse_linear")
    _check_layout_device(layout, "x", x)
    if activation not in ACTIVATIONS:
        require(False, "activation", "None, 'relu', 'gelu' or 'silu'", repr(activation))
