"""What the tests of masked_linear share: layouts, inputs, dense torch, the comparison with float64."""

import torch
import torch.nn.functional as F

from compsparse_kernels import MaskLayout, masked_linear, sampled_matmul
from compsparse_kernels.testing import assert_within_budget, random_mask, random_tensor

KINDS = ("csr", "block", "dense")


def make_layout(out_features, in_features, density=0.3, seed=0, kind="csr", block_shape=(8, 4)):
    mask = random_mask(out_features, in_features, density, seed)
    return MaskLayout.from_mask(mask, kind, block_shape if kind == "block" else None)


def make_inputs(layout, batch=5, dtype=torch.float32, seed=0, memory="contiguous"):
    """x, values, bias and the gradient of the output."""
    shapes = ((batch, layout.in_features), layout.values_shape, (layout.out_features,), (batch, layout.out_features))
    return [random_tensor(*shape, dtype=dtype, memory=memory, seed=seed + i) for i, shape in enumerate(shapes)]


def dense_linear(layout):
    return lambda x, values, bias: F.linear(x, layout.unpack(values), bias)


def ours_linear(layout):
    return lambda x, values, bias: masked_linear(x, values, layout, bias)


def output_and_gradients(function, inputs, grad, dtype):
    inputs = [tensor.to(dtype).requires_grad_() for tensor in inputs]
    y = function(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, grad.to(dtype))]


def assert_all_within_budget(ours, dense, inputs, grad, names):
    """Output and every gradient of ``ours``, in the dtype of the inputs, against ``dense``."""
    results = output_and_gradients(ours, inputs, grad, grad.dtype)
    peers = output_and_gradients(dense, inputs, grad, torch.float32 if grad.dtype == torch.float64 else grad.dtype)
    exact = output_and_gradients(dense, inputs, grad, torch.float64)
    sizes = output_and_gradients(dense, [tensor.abs() for tensor in inputs], grad.abs(), torch.float64)
    for name, result, *others in zip(names, results, peers, exact, sizes, strict=True):
        assert result.dtype == grad.dtype
        assert_within_budget(result, others[0], others[1], name, magnitude=others[2])


def assert_linear_right(layout, inputs):
    *inputs, grad = inputs
    names = ("output", "gradient of x", "gradient of values", "gradient of bias")
    assert_all_within_budget(ours_linear(layout), dense_linear(layout), inputs, grad, names)


def assert_sampled_right(layout, a, b, grad):
    def ours(a, b):
        return sampled_matmul(a, b, layout)

    def dense(a, b):
        return layout.pack(a.mT @ b)

    assert_all_within_budget(ours, dense, (a, b), grad, ("output", "gradient of a", "gradient of b"))


def assert_right(layout, batch=5, dtype=torch.float32, seed=0, memory="contiguous"):
    x, values, bias, grad = make_inputs(layout, batch, dtype, seed, memory)
    assert_linear_right(layout, (x, values, bias, grad))
    assert_sampled_right(layout, grad, x, values)
