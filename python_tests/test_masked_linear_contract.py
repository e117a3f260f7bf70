"""masked_linear and sampled_matmul as torch operators: opcheck, compile, autocast, backends, errors."""

import pytest
import torch

from compsparse_kernels import explain, masked_linear, sampled_matmul
from compsparse_kernels.ops.masked_linear import reference
from compsparse_kernels.testing import HALVES, ISAS
from python_tests.masked import (
    KINDS,
    dense_linear,
    make_inputs,
    make_layout,
    ours_linear,
    output_and_gradients,
    with_int32_columns,
)


@pytest.mark.parametrize("memory", ["contiguous", "transposed", "strided"])
@pytest.mark.parametrize("batch", [0, 1, 5])
@pytest.mark.parametrize("with_bias, dtype", [(False, torch.float32), (True, torch.float32), (True, torch.bfloat16)])
def test_opcheck(with_bias, dtype, batch, memory):
    layout = make_layout(20, 24)
    x, values, bias, grad = make_inputs(layout, batch, dtype, memory=memory)
    bias = bias if with_bias else None
    product = torch.ops.compsparse.masked_linear
    torch.library.opcheck(product, (x, values, bias, *layout.by_output, 20))
    torch.library.opcheck(product, (grad, values, None, *layout.by_input, 24))
    torch.library.opcheck(torch.ops.compsparse.sampled_matmul, (grad, x, *layout.by_output[:2]))


@pytest.mark.parametrize("stored", [lambda layout: layout, with_int32_columns], ids=["int16", "int32"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_op_means_its_reference(with_bias, transposed, stored):
    """Boxing does not check: each argument straight through the registered op."""
    layout = stored(make_layout(20, 24))
    layout = layout.T if transposed else layout
    x, values, bias, grad = make_inputs(layout)
    arguments = (x, values, bias if with_bias else None, *layout.by_output, layout.out_features)
    ours = torch.ops.compsparse.masked_linear(*arguments)
    torch.testing.assert_close(ours, reference.masked_linear(*arguments))
    arguments = (grad, x, *layout.by_output[:2])
    torch.testing.assert_close(torch.ops.compsparse.sampled_matmul(*arguments), reference.sampled_matmul(*arguments))


@pytest.mark.skipif(not ISAS, reason="the reference takes columns of any dtype: no compiled kernels here")
def test_the_kernels_refuse_columns_of_another_dtype():
    layout = make_layout(20, 24)
    x, values, _, grad = make_inputs(layout)
    ptr, idx, _ = layout.by_output
    with pytest.raises(RuntimeError, match="idx: expected int16 or int32"):
        torch.ops.compsparse.masked_linear(x, values, None, ptr, idx.long(), None, 20)
    with pytest.raises(RuntimeError, match="idx: expected int16 or int32"):
        torch.ops.compsparse.sampled_matmul(grad, x, ptr, idx.long())


@pytest.mark.parametrize("kind", KINDS)
def test_compile(kind):
    layout = make_layout(20, 24, kind=kind)
    *inputs, grad = make_inputs(layout)
    compiled = torch.compile(ours_linear(layout), fullgraph=True, backend="aot_eager")
    ours = output_and_gradients(compiled, inputs, grad, torch.float32)
    eager = output_and_gradients(ours_linear(layout), inputs, grad, torch.float32)
    for a, b in zip(ours, eager, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("half", HALVES, ids=str)
def test_autocast_computes_in_its_dtype(half, kind):
    layout = make_layout(20, 24, kind=kind)
    x, values, bias = (tensor.requires_grad_() for tensor in make_inputs(layout)[:3])
    with torch.autocast("cpu", dtype=half):
        y, from_half = (masked_linear(x, values, layout, bias) for x in (x, x.to(half)))
    assert y.dtype == half and torch.equal(y, from_half)
    assert torch.equal(y, masked_linear(x.to(half), values.to(half), layout, bias.to(half)))
    grads = torch.autograd.grad(y.float().sum(), (x, values, bias))
    assert all(grad.dtype == torch.float32 and torch.isfinite(grad).all() for grad in grads)


def test_autocast_leaves_float64_alone():
    layout = make_layout(20, 24)
    x, values, bias, _ = make_inputs(layout, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = masked_linear(x, values, layout, bias)
    assert torch.equal(y, masked_linear(x, values, layout, bias))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "backend", ["reference", pytest.param("cpu", marks=pytest.mark.skipif(not ISAS, reason="none"))]
)
def test_backends(backend, kind):
    layout = make_layout(20, 24, kind=kind)
    x, values, bias, _ = make_inputs(layout)
    y = masked_linear(x, values, layout, bias, backend=backend)
    torch.testing.assert_close(y, dense_linear(layout)(x, values, bias))


def test_explain():
    for op in ("masked_linear", "sampled_matmul"):
        reasons = explain(op)
        assert set(reasons) == {"cpu", "triton", "cuda", "reference"}
        assert reasons["triton"] == "has no kernel of this op"
        if not torch.version.cuda:
            assert reasons["cuda"] == "this torch was built without CUDA"


# ---- errors


LAYOUT = make_layout(4, 6, 0.5)
N = LAYOUT.nnz
X, VALUES, BIAS, GRAD = make_inputs(LAYOUT, 3)
ERRORS = {
    "layout": (lambda: masked_linear(X, VALUES, "csr"), TypeError, "layout: expected MaskLayout, got str"),
    "x shape": (
        lambda: masked_linear(X[:, :5], VALUES, LAYOUT),
        ValueError,
        "x: expected tensor [..., 6], got 2-D float32 tensor [3, 5]",
    ),
    "x dtype": (
        lambda: masked_linear(X.int(), VALUES.int(), LAYOUT),
        TypeError,
        "x: expected float32, float64, float16 or bfloat16, got 2-D int32 tensor [3, 6]",
    ),
    "values shape": (
        lambda: masked_linear(X, VALUES[1:], LAYOUT),
        ValueError,
        f"values: expected tensor [{N}], got 1-D float32 tensor [{N - 1}]",
    ),
    "values dtype": (
        lambda: masked_linear(X, VALUES.double(), LAYOUT),
        TypeError,
        f"values: expected float32, like x, got 1-D float64 tensor [{N}]",
    ),
    "bias shape": (
        lambda: masked_linear(X, VALUES, LAYOUT, BIAS[1:]),
        ValueError,
        "bias: expected tensor [4] or None, got 1-D float32 tensor [3]",
    ),
    "bias dtype": (
        lambda: masked_linear(X, VALUES, LAYOUT, BIAS.double()),
        TypeError,
        "bias: expected float32, like x, got 1-D float64 tensor [4]",
    ),
    "values device": (
        lambda: masked_linear(X, VALUES.to("meta"), LAYOUT),
        ValueError,
        "values: expected a tensor on cpu, like x, got one on meta",
    ),
    "layout device": (
        lambda: masked_linear(X.to("meta"), VALUES.to("meta"), LAYOUT),
        ValueError,
        "layout: expected on meta, like x (layout.to(device)), got one on cpu",
    ),
    "backend": (
        lambda: masked_linear(X, VALUES, LAYOUT, backend="gpu"),
        ValueError,
        "backend: expected one of cpu, triton, cuda, reference or None, got 'gpu'",
    ),
    "sampled layout": (lambda: sampled_matmul(GRAD, X, None), TypeError, "layout: expected MaskLayout, got NoneType"),
    "sampled a": (
        lambda: sampled_matmul(GRAD[0], X, LAYOUT),
        ValueError,
        "a: expected 2-D tensor [batch, 4], got 1-D float32 tensor [4]",
    ),
    "sampled b": (
        lambda: sampled_matmul(GRAD, GRAD, LAYOUT),
        ValueError,
        "b: expected 2-D tensor [batch, 6], got 2-D float32 tensor [3, 4]",
    ),
    "sampled batch": (lambda: sampled_matmul(GRAD, X[1:], LAYOUT), ValueError, "b: expected batch 3, as in a, got 2"),
    "sampled dtype": (
        lambda: sampled_matmul(GRAD.int(), X.int(), LAYOUT),
        TypeError,
        "a: expected float32, float64, float16 or bfloat16, got 2-D int32 tensor [3, 4]",
    ),
    "sampled dtypes": (
        lambda: sampled_matmul(GRAD, X.double(), LAYOUT),
        TypeError,
        "b: expected float32, like a, got 2-D float64 tensor [3, 6]",
    ),
    "sampled device": (
        lambda: sampled_matmul(GRAD.to("meta"), X.to("meta"), LAYOUT),
        ValueError,
        "layout: expected on meta, like a (layout.to(device)), got one on cpu",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    call, error, message = ERRORS[case]
    with pytest.raises(error) as raised:
        call()
    assert str(raised.value) == message
