"""What the tests of block_sparse_linear share: layouts, inputs, dense torch, the comparison with float64."""

import torch
import torch.nn.functional as F

from compsparse_kernels import BlockLayout, block_sparse_linear, sampled_block_matmul
from compsparse_kernels.testing import assert_within_budget, random_mask, random_tensor

ACTIVATIONS = {None: lambda z: z, "relu": F.relu, "gelu": F.gelu, "silu": F.silu}


def make_layout(out_features, in_features, block_shape, density=0.4, seed=0):
    grid = (-(-out_features // block_shape[0]), -(-in_features // block_shape[1]))
    return BlockLayout.from_mask(random_mask(*grid, density, seed), block_shape, in_features, out_features)


def make_inputs(layout, batch=5, dtype=torch.float32, seed=0, memory="contiguous"):
    """x, values, bias and the gradient of the output."""
    shapes = ((batch, layout.in_features), layout.values_shape, (layout.out_features,), (batch, layout.out_features))
    return [random_tensor(*shape, dtype=dtype, memory=memory, seed=seed + i) for i, shape in enumerate(shapes)]


def dense_linear(layout, activation=None):
    return lambda x, values, bias: ACTIVATIONS[activation](F.linear(x, layout.unpack(values), bias))


def ours_linear(layout, activation=None):
    return lambda x, values, bias: block_sparse_linear(x, values, layout, bias, activation)


def magnitudes(layout, activation):
    """On absolute inputs, what one rounding of each result is relative to.

    Rounding z moves the derivative of a smooth activation by act''(z) dz, |act''| < 1: gradients get one more factor z.
    """
    linear = dense_linear(layout)

    def function(*inputs):
        z = linear(*inputs)
        return z + (z**2 - z.detach() ** 2) / 2 if activation in ("gelu", "silu") else z

    return function


def output_and_gradients(function, inputs, grad, dtype):
    inputs = [tensor.to(dtype).requires_grad_() for tensor in inputs]
    y = function(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, grad.to(dtype))]


def assert_all_within_budget(ours, dense, magnitude, inputs, grad, names):
    """Output and every gradient of ``ours``, in the dtype of the inputs, against ``dense``."""
    results = output_and_gradients(ours, inputs, grad, grad.dtype)
    peers = output_and_gradients(dense, inputs, grad, torch.float32 if grad.dtype == torch.float64 else grad.dtype)
    exact = output_and_gradients(dense, inputs, grad, torch.float64)
    sizes = output_and_gradients(magnitude, [tensor.abs() for tensor in inputs], grad.abs(), torch.float64)
    for name, result, *others in zip(names, results, peers, exact, sizes, strict=True):
        assert result.dtype == grad.dtype
        assert_within_budget(result, others[0], others[1], name, magnitude=others[2])


def assert_linear_right(layout, inputs, activation=None):
    x, values, bias, grad = inputs
    if activation == "relu":  # next to the kink, rounding decides which derivative is right
        z = dense_linear(layout)(x.double(), values.double(), bias.double())
        grad = grad * (z.abs() > 1e-3)
    functions = ours_linear(layout, activation), dense_linear(layout, activation), magnitudes(layout, activation)
    names = ("output", "gradient of x", "gradient of values", "gradient of bias")
    assert_all_within_budget(*functions, (x, values, bias), grad, names)


def assert_sampled_right(layout, a, b, grad):
    def ours(a, b):
        return sampled_block_matmul(a, b, layout)

    def dense(a, b):
        """Entries that share a slot add up, as in the gradient of unpack."""
        zeros = torch.zeros(layout.values_shape, dtype=a.dtype, requires_grad=True)
        unpacked = layout.unpack(zeros)
        return torch.autograd.grad(unpacked, zeros, a.mT @ b, create_graph=True)[0]

    names = ("output", "gradient of a", "gradient of b")
    assert_all_within_budget(ours, dense, dense, (a, b), grad, names)
