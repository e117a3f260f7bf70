"""What torch asks of the attention ops: schemas, fakes, compilation, autocast, backends."""

import shutil

import pytest
import torch
import torch._dynamo.testing
import torch._inductor.config

from compsparse_kernels import explain, threshold_attention
from compsparse_kernels.ops.threshold_attention import reference
from compsparse_kernels.testing import DTYPES, HALVES, attention_inputs
from python_tests.attention import CHOICE_NAMES, CHOICES, LEARNABLE, backward_arguments, choice_options, op_arguments

OPS = torch.ops.compsparse
every_choice = pytest.mark.parametrize("choice", CHOICES, ids=CHOICE_NAMES)


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Functions that tests define anew would count as recompilations of one."""
    torch._dynamo.reset()


def some_arguments(transposed=False, dtype=torch.float32, **options):
    tensors = attention_inputs(2, 4, 5, 9, 8, value_width=6, kv_heads=2, dtype=dtype)
    if transposed:
        tensors = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in tensors]
    return op_arguments(*tensors, **options)


EXAMPLES = {
    "plain": some_arguments(is_causal=True),
    "transposed": some_arguments(transposed=True, attn_bias=torch.randn(1, 4, 1, 9), rule="absolute"),
    "masks": some_arguments(
        attn_bias=torch.rand(5, 9)[None, None] > 0.2, key_padding_mask=torch.rand(2, 9) > 0.8, window_left=3
    ),
    "learned": some_arguments(thresholds=torch.rand(1, 4, 1).double(), weighting="shrink", rule="relative"),
    "dropout": some_arguments(rule="entmax", threshold=1.5, dropout_p=0.3, seed=5, alibi_slopes=torch.rand(4)),
    "half": some_arguments(dtype=torch.bfloat16, rule="topk", threshold=3.0),
    "sequences": op_arguments(
        *attention_inputs(1, 2, 5, 9, 8),
        cu_seqlens_q=torch.tensor([0, 2, 5]),
        cu_seqlens_k=torch.tensor([0, 6, 9]),
        index=OPS.threshold_attention_index(torch.randn(1, 2, 9, 8)),
        query_offset=1,
    ),
    "empty": op_arguments(*attention_inputs(2, 2, 0, 0, 8)),
}


@pytest.mark.parametrize("example", EXAMPLES)
def test_opcheck(example):
    arguments = EXAMPLES[example]
    torch.library.opcheck(OPS.threshold_attention.default, arguments)
    torch.library.opcheck(OPS.threshold_attention_support.default, arguments)
    out, *support = OPS.threshold_attention_support(*arguments)
    backward = backward_arguments(torch.randn_like(out), arguments, support)
    torch.library.opcheck(OPS.threshold_attention_backward.default, backward)


def test_opcheck_of_the_index():
    key = torch.randn(2, 3, 70, 8)
    torch.library.opcheck(OPS.threshold_attention_index.default, (key,))
    index = OPS.threshold_attention_index(key)
    assert index.dtype == torch.uint8 and index.shape == reference.index_shape(key)
    torch.library.opcheck(OPS.threshold_attention_index_.default, (index, key[:, :, :5], 60))


def test_index_grows_with_its_keys():
    """Written piece by piece it is what it is at once: a cache needs no second look at old keys."""
    key = torch.randn(2, 3, 150, 8)
    index = OPS.threshold_attention_index(torch.zeros_like(key))
    for first, end in ((0, 64), (64, 65), (65, 140), (140, 150)):
        OPS.threshold_attention_index_(index, key[:, :, first:end], first)
    assert torch.equal(index, OPS.threshold_attention_index(key))


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


@every_choice
def test_compiled_training_step(choice):
    """Every option at once, thresholds learned where they can be."""
    starts, key_starts = torch.tensor([0, 4, 9]), torch.tensor([0, 3, 9])

    def step(query, key, value, bias, threshold, seed):
        options = {"is_causal": True, "window": (5, 0), "enable_gqa": True, "query_offset": 2, "dropout_p": 0.2}
        options |= {"cu_seqlens_q": starts, "cu_seqlens_k": key_starts, "alibi_slopes": torch.tensor([0.1, 0.2])}
        options |= choice_options(choice)
        if choice in LEARNABLE:
            options["threshold"] = threshold
        return threshold_attention(query, key, value, attn_bias=bias, seed=seed, **options).square().sum()

    leaves = [*attention_inputs(1, 2, 9, 9, 8, kv_heads=1, grad=True), torch.randn(2, 1, 9, requires_grad=True)]
    leaves.append(torch.rand(2, requires_grad=True))
    wanted = leaves if choice in LEARNABLE else leaves[:4]
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for seed in (1, 2, 3):
        results = [torch.autograd.grad(f(*leaves, seed), wanted) for f in (compiled, step)]
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_compiled_dropout_draws_anew():
    """A seed of None is drawn in every step, from torch's generator, and no step is compiled again."""
    count = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    leaves = attention_inputs(1, 2, 9, 30, 8, grad=True)

    def step(*tensors):
        return threshold_attention(*tensors, threshold=0.01, dropout_p=0.5)

    compiled = torch.compile(step, fullgraph=True, backend=count)
    torch.manual_seed(0)
    ours = [compiled(*leaves) for _ in range(3)]
    torch.manual_seed(0)
    eager = [step(*leaves) for _ in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(ours, eager, strict=True)) and not torch.equal(ours[0], ours[1])
    assert count.frame_count == 1
    results = [torch.autograd.grad(out.square().sum(), leaves) for out in (ours[2], eager[2])]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_compiled_by_inductor():
    """The code that torch generates around the ops: sums of gradients, the drawn seed."""

    def step(query, key, value, threshold, bias):
        options = {"threshold": threshold, "shrink": True, "dropout_p": 0.5, "attn_bias": bias}
        return threshold_attention(query, key, value, **options).square().sum()

    leaves = attention_inputs(1, 2, 9, 30, 8, grad=True)
    leaves += [torch.full((2,), 0.1, requires_grad=True), torch.randn(2, 1, 30, requires_grad=True)]
    results = []
    with torch._inductor.config.patch(fallback_random=True):  # draws as eager torch does
        for f in (torch.compile(step, fullgraph=True), step):
            torch.manual_seed(0)
            results.append(torch.autograd.grad(f(*leaves), leaves))
    for ours, eager in zip(*results, strict=True):
        torch.testing.assert_close(ours, eager)


def test_compiled_with_one_tensor_for_all():
    x, bounds = torch.randn(1, 2, 9, 8, requires_grad=True), torch.tensor([0, 4, 9])

    def attend(x):
        return threshold_attention(x, x, x, threshold=0.1, cu_seqlens_q=bounds, cu_seqlens_k=bounds)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    results = [torch.autograd.grad(f(x).square().sum(), x)[0] for f in (compiled, attend)]
    torch.testing.assert_close(*results)  # the three gradients of x are added up in another order


def test_compiled_nested_tensors():
    values, bounds = torch.randn(28, 2, 8, requires_grad=True), torch.tensor([0, 7, 8, 28])

    def attend(values):
        nested = torch.nested.nested_tensor_from_jagged(values, bounds).transpose(1, 2)
        return threshold_attention(nested, nested, nested, threshold=0.1, is_causal=True).values()

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    results = [torch.autograd.grad(f(values).square().sum(), values)[0] for f in (compiled, attend)]
    torch.testing.assert_close(*results)
    assert torch.equal(compiled(values), attend(values))


def test_compiled_decoding_is_compiled_once():
    """The offset of a growing cache is no constant of the graph."""
    count = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    query, key, value = attention_inputs(1, 2, 1, 40, 8)

    def decode(offset):
        return threshold_attention(query, key, value, threshold=0.1, is_causal=True, query_offset=offset)

    compiled = torch.compile(decode, fullgraph=True, backend=count, dynamic=True)
    compiled(5)
    first = count.frame_count
    for offset in (9, 30):
        assert torch.equal(compiled(offset), decode(offset))
    assert count.frame_count == first


@every_choice
def test_export(choice):
    class Attend(torch.nn.Module):
        def forward(self, query, key, value):
            return threshold_attention(query, key, value, window=4, **choice_options(choice))

    tensors = tuple(attention_inputs(2, 2, 9, 9, 8))
    program = torch.export.export(Attend(), tensors)
    assert torch.equal(program.module()(*tensors), Attend()(*tensors))


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


@pytest.mark.parametrize("dtype", DTYPES + HALVES)
def test_backends_and_explain(dtype):
    tensors = attention_inputs(1, 2, 9, 12, 8, dtype=dtype)
    reference, support = threshold_attention(*tensors, threshold=0.1, backend="reference", return_support=True)
    out, ours = threshold_attention(*tensors, threshold=0.1, backend="cpu", return_support=True)
    torch.testing.assert_close(out, reference)
    assert torch.equal(support.col_idx, ours.col_idx) and torch.equal(support.row_ptr, ours.row_ptr)
    assert explain("threshold_attention", *tensors)["reference"] == "available"


@pytest.mark.parametrize("example", EXAMPLES)
def test_fallback_backward_matches(example):
    """The dense fallback of the backward op, which devices without a kernel run, against the kernel."""
    arguments = EXAMPLES[example]
    out, *support = OPS.threshold_attention_support(*arguments)
    backward = backward_arguments(torch.randn_like(out), arguments, support)
    ours = OPS.threshold_attention_backward(*backward)
    for a, b in zip(ours, reference.threshold_attention_backward(*backward), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("example", EXAMPLES)
def test_shapes_and_dtypes(example):
    arguments = EXAMPLES[example]
    query, dtype = arguments[0], reference.sum_dtype(arguments[0])
    out, row_ptr, col_idx, weights, log_sum, slope = OPS.threshold_attention_support(*arguments)
    assert out.dtype == query.dtype and row_ptr.dtype == torch.int64 and col_idx.dtype == torch.int32
    assert weights.dtype == log_sum.dtype == slope.dtype == dtype and log_sum.shape == slope.shape == query.shape[:3]
    assert weights.shape == col_idx.shape == (row_ptr[-1],) and out.is_contiguous()
    grads = OPS.threshold_attention_backward(*backward_arguments(torch.randn_like(out), arguments, [
        row_ptr, col_idx, weights, log_sum, slope]))  # fmt: skip
    assert [grad.dtype for grad in grads] == [query.dtype] * 3 + [dtype] * 2
    assert [grad.shape for grad in grads[:3]] == [tensor.shape for tensor in arguments[:3]]
    assert grads[3].shape == weights.shape and grads[4].shape == slope.shape


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
