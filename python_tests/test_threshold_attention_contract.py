"""What torch asks of the attention ops: schemas, fakes, compilation, autocast, backends."""

import pytest
import torch

from compsparse_kernels import explain, threshold_attention
from compsparse_kernels.ops.threshold_attention import reference
from compsparse_kernels.testing import attention_inputs


def op_arguments(transposed=False, bias=None, padding=None, rule="relative"):
    tensors = attention_inputs(2, 4, 5, 9, 8, value_width=6, kv_heads=2, grad=False)
    if transposed:
        tensors = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in tensors]
    return (*tensors, bias, padding, 0.3, rule, True, 0.7)


@pytest.mark.parametrize(
    "arguments",
    [
        op_arguments(),
        op_arguments(transposed=True, bias=torch.randn(1, 4, 1, 9), rule="absolute"),
        op_arguments(bias=torch.rand(5, 9)[None, None] > 0.2, padding=torch.rand(2, 9) > 0.8),
    ],
)
def test_opcheck(arguments):
    ops = torch.ops.compsparse
    torch.library.opcheck(ops.threshold_attention.default, arguments)
    torch.library.opcheck(ops.threshold_attention_support.default, arguments)
    out, *support = ops.threshold_attention_support(*arguments)
    backward = (torch.randn_like(out), *arguments[:3], *support, 0.7)
    torch.library.opcheck(ops.threshold_attention_backward.default, backward)


@pytest.mark.parametrize("scale", [0.7, 3])
def test_scalars_are_boxed_right(scale):
    query, key, value = attention_inputs(1, 1, 4, 6, 8)
    for rule, threshold in (("relative", 1), ("absolute", 3), ("absolute", 0.7)):
        options = {"threshold": threshold, "rule": rule, "scale": scale}
        expected = threshold_attention(query, key, value, backend="reference", **options)
        torch.testing.assert_close(threshold_attention(query, key, value, **options), expected)


def test_compile():
    def attend(query, key, value, bias):
        return threshold_attention(query, key, value, threshold=0.1, attn_bias=bias, is_causal=True)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    tensors = [*attention_inputs(2, 2, 9, 9, 8), torch.randn(2, 1, 9)]
    assert torch.equal(compiled(*tensors), attend(*tensors))
    leaves = [tensor.requires_grad_() for tensor in tensors]
    results = [torch.autograd.grad(f(*leaves).square().sum(), leaves) for f in (compiled, attend)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_compile_with_support():
    compiled = torch.compile(threshold_attention, fullgraph=True, backend="aot_eager")
    tensors = attention_inputs(2, 2, 9, 9, 8)
    out, support = compiled(*tensors, threshold=0.1, return_support=True)
    expected, expected_support = threshold_attention(*tensors, threshold=0.1, return_support=True)
    assert torch.equal(out, expected) and torch.equal(support.to_dense(), expected_support.to_dense())


def test_autocast():
    query, key, value = attention_inputs(1, 2, 9, 12, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = threshold_attention(query.bfloat16(), key, value, threshold=0.1, attn_bias=torch.zeros(12).bfloat16())
        pair = threshold_attention(query, key, value, threshold=0.1, return_support=True)
    assert out.dtype == pair[0].dtype == torch.bfloat16 and pair[1].weights.dtype == torch.float32
    expected = threshold_attention(query.bfloat16().float(), key, value, threshold=0.1)
    assert torch.equal(out, expected.bfloat16())


def test_backends_and_explain():
    tensors = attention_inputs(1, 2, 9, 12, 8)
    reference, support = threshold_attention(*tensors, threshold=0.1, backend="reference", return_support=True)
    out, ours = threshold_attention(*tensors, threshold=0.1, backend="cpu", return_support=True)
    torch.testing.assert_close(out, reference)
    assert torch.equal(support.col_idx, ours.col_idx) and torch.equal(support.row_ptr, ours.row_ptr)
    assert explain("threshold_attention", *tensors)["reference"] == "available"


def test_fallback_backward_matches():
    """The dense fallback of the backward op, which devices without a kernel run."""
    arguments = op_arguments(bias=torch.randn(1, 4, 1, 9))
    out, *support = torch.ops.compsparse.threshold_attention_support(*arguments)
    backward = (torch.randn_like(out), *arguments[:3], *support, 0.7)
    ours = torch.ops.compsparse.threshold_attention_backward(*backward)
    for a, b in zip(ours, reference.threshold_attention_backward(*backward), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("position", range(4))
def test_second_derivative_is_refused_where_the_loss_is_linear(position):
    """torch's once_differentiable would call the first gradient constant here, and the second zero."""
    tensors = [*attention_inputs(1, 1, 5, 7, 4, grad=True), torch.randn(5, 7, requires_grad=True)]
    out = threshold_attention(*tensors[:3], threshold=0.1, attn_bias=tensors[3])
    grad = torch.autograd.grad(out.sum(), tensors[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once differentiable"):
        torch.autograd.grad(grad.sum(), tensors[position], allow_unused=True)


def test_forward_mode_is_refused():
    query, key, value = attention_inputs(1, 1, 5, 7, 4)
    with pytest.raises(RuntimeError, match="query: expected a tensor without a forward-mode tangent"):
        torch.func.jvp(lambda q: threshold_attention(q, key, value, threshold=0.1), (query,), (query,))


@pytest.mark.parametrize("dynamic", [None, True])
def test_compile_with_another_threshold(dynamic):
    compiled = torch.compile(threshold_attention, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    tensors = attention_inputs(2, 2, 9, 9, 8)
    for threshold in (0.1, 0.3, 0.6):
        assert torch.equal(compiled(*tensors, threshold=threshold), threshold_attention(*tensors, threshold=threshold))
