"""What the tests of masked_linear share, over all kinds: layouts, inputs, dense torch, the comparison with float64, and
checks that any layout must pass."""

import copy

import torch
import torch.nn.functional as F

from compsparse_kernels import MaskLayout, masked_linear, sampled_matmul
from compsparse_kernels.testing import (
    THREADS,
    assert_within_budget,
    num_threads,
    random_mask,
    random_tensor,
    run_in_subprocess,
)

KINDS = ("csr", "block", "dense")


def make_layout(out_features, in_features, density=0.3, seed=0, kind="csr", block_shape=(8, 4)):
    mask = random_mask(out_features, in_features, density, seed)
    return MaskLayout.from_mask(mask, kind, block_shape if kind == "block" else None)


def with_int32_columns(layout):
    """The layout as it was stored, and pickled, when columns had no other dtype."""
    other = copy.copy(layout)
    other.__dict__.pop("T", None)
    for name in ("by_output", "by_input"):
        order = getattr(layout, name)
        object.__setattr__(other, name, order._replace(idx=order.idx.int()))
    return other


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


# ---- checks of any layout


def check_empty_batch(layout):
    x, values, bias, grad = make_inputs(layout, 0)
    y, grad_x, *others = output_and_gradients(ours_linear(layout), (x, values, bias), grad, x.dtype)
    assert y.shape == (0, layout.out_features) and grad_x.shape == (0, layout.in_features)
    assert all(torch.equal(g, torch.zeros_like(t)) for g, t in zip(others, (values, bias), strict=True))
    assert torch.equal(sampled_matmul(grad, x, layout), torch.zeros(layout.values_shape))


def check_leading_dimensions(layout, lead):
    _, values, bias, _ = make_inputs(layout)
    x = random_tensor(*lead, layout.in_features, requires_grad=True)
    y, expected = masked_linear(x, values, layout, bias), dense_linear(layout)(x, values, bias)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x), torch.autograd.grad(expected.sum(), x))


def check_expanded_gradient(layout):
    x, values, bias, grad = make_inputs(layout)
    assert_linear_right(layout, (x, values, bias, torch.ones(()).expand_as(grad)))


def check_every_output_is_written(layout, batch, dtype):
    """Deterministic mode fills fresh memory with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        x, values, bias, grad = make_inputs(layout, batch, dtype)
        with torch.no_grad():
            results = masked_linear(x, values, layout, bias), masked_linear(grad, values, layout.T)
            results += (sampled_matmul(grad, x, layout), sampled_matmul(grad[:0], x[:0], layout))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.isfinite(result).all() for result in results)


def check_derivatives_of_any_order(layout):
    x, values, bias, grad = (t.requires_grad_() for t in make_inputs(layout, 3, torch.float64))
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(ours_linear(layout), (x, values, bias))
        assert check(lambda a, b: sampled_matmul(a, b, layout), (grad, x))


def check_only_the_wanted_gradients(layout, wanted):
    inputs = dict(zip(("x", "values", "bias"), make_inputs(layout), strict=False))
    for name in wanted:
        inputs[name].requires_grad_()
    y, expected = ours_linear(layout)(**inputs), dense_linear(layout)(**inputs)
    leaves = [inputs[name] for name in wanted]
    torch.testing.assert_close(torch.autograd.grad(y.sum(), leaves), torch.autograd.grad(expected.sum(), leaves))


def check_no_graph_without_need(layout):
    x, values, bias, grad = make_inputs(layout)
    assert masked_linear(x, values, layout, bias).grad_fn is None
    with torch.no_grad():
        assert masked_linear(x.requires_grad_(), values, layout, bias).grad_fn is None
        assert sampled_matmul(grad, x, layout).grad_fn is None


def check_same_bits_for_any_number_of_threads(layout, batch, dtype):
    *inputs, grad = make_inputs(layout, batch, dtype)
    results = []
    for threads in THREADS:
        with num_threads(threads):
            results.append(output_and_gradients(ours_linear(layout), inputs, grad, dtype)[:3])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def check_under_instruction_set(isa, file, tests):
    """The tests of a file that ``-k`` chooses, in a process whose kernels are capped to one instruction set."""
    code = (
        "import sys, pytest, compsparse_kernels.ops as ops\n"
        f"assert ops.cpu_isa() == {isa!r}\n"
        f"sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', '-k', {tests!r}, {file!r}]))"
    )
    run_in_subprocess(code, isa=isa)
