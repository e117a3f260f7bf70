"""block_sparse_linear and sampled_block_matmul as torch ops: derivatives of any order, opcheck, compile, errors."""

import re

import pytest
import torch
import torch.nn.functional as F

from compsparse_kernels import BlockLayout, block_sparse_linear, explain, sampled_block_matmul
from compsparse_kernels.ops import NM_OPS, OPS
from compsparse_kernels.testing import DTYPES, HALVES, ISAS, assert_within_budget, random_mask, random_tensor

ACTIVATIONS = {None: lambda z: z, "relu": F.relu, "gelu": F.gelu, "silu": F.silu}
needs_kernels = pytest.mark.skipif(not ISAS, reason="no compiled kernels here")


def patterns():
    ragged = BlockLayout.from_mask(torch.tensor([[1, 0, 1], [0, 1, 1]]).bool(), (3, 2), in_features=5, out_features=5)
    rows, columns = torch.tensor([0, 0, 1]), torch.tensor([0, 2, 1])
    shared = BlockLayout.from_entries(rows, columns, (2, 2), 4, 6, slot=torch.tensor([0, 1, 0]))
    return {"ragged": ragged, "transposed": ragged.T, "shared": shared, "shared, transposed": shared.T}


LAYOUTS = patterns()
LAYOUT = LAYOUTS["ragged"]


def make_inputs(layout, batch=3, dtype=torch.float32, requires_grad=False, memory="contiguous"):
    shapes = (batch, layout.in_features), layout.values_shape, (layout.out_features,)
    options = {"dtype": dtype, "memory": memory, "requires_grad": requires_grad}
    return [random_tensor(*shape, seed=7 + i, **options) for i, shape in enumerate(shapes)]


def make_pair(layout, **options):
    """The inputs of a sampled product: a [batch, out], b [batch, in]."""
    return make_inputs(layout.T, **options)[0], make_inputs(layout, **options)[0]


# ---- derivatives of any order


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck_and_gradgradcheck_of_the_product(name, activation):
    layout = LAYOUTS[name]
    inputs = make_inputs(layout, dtype=torch.float64, requires_grad=True)

    def product(x, values, bias):
        return block_sparse_linear(x, values, layout, bias, activation)

    assert torch.autograd.gradcheck(product, inputs)
    assert torch.autograd.gradgradcheck(product, inputs)


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradcheck_and_gradgradcheck_of_the_sampled_product(name):
    pair = make_pair(LAYOUTS[name], dtype=torch.float64, requires_grad=True)

    def sampled(a, b):
        return sampled_block_matmul(a, b, LAYOUTS[name])

    assert torch.autograd.gradcheck(sampled, pair)
    assert torch.autograd.gradgradcheck(sampled, pair)


def test_each_input_alone_can_want_a_gradient():
    for i in range(3):
        inputs = make_inputs(LAYOUT)
        inputs[i].requires_grad_()
        x, values, bias = inputs
        y = block_sparse_linear(x, values, LAYOUT, bias)
        expected = F.linear(x, LAYOUT.unpack(values), bias)
        torch.testing.assert_close(
            torch.autograd.grad(y.square().sum(), inputs[i]), torch.autograd.grad(expected.square().sum(), inputs[i])
        )


def test_gradients_without_a_bias():
    x, values, _ = make_inputs(LAYOUT, requires_grad=True)
    y, expected = block_sparse_linear(x, values, LAYOUT), F.linear(x, LAYOUT.unpack(values))
    ours, theirs = (torch.autograd.grad(out.square().sum(), (x, values)) for out in (y, expected))
    torch.testing.assert_close(ours, theirs)


def test_no_graph_where_no_gradient_is_wanted():
    x, values, bias = make_inputs(LAYOUT)
    assert block_sparse_linear(x, values, LAYOUT, bias).grad_fn is None
    with torch.no_grad():
        assert block_sparse_linear(x, values.requires_grad_(), LAYOUT, bias).grad_fn is None
    with torch.inference_mode():
        assert block_sparse_linear(x, values, LAYOUT, bias).is_inference()
    assert block_sparse_linear(x, values, LAYOUT, bias).grad_fn is not None


# ---- torch's own machinery


@pytest.mark.parametrize("memory", ["contiguous", "transposed", "empty"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_opcheck(name, memory):
    layout = LAYOUTS[name]
    options = {"batch": 0} if memory == "empty" else {"memory": memory}
    x, values, bias = make_inputs(layout, **options)
    arguments = (*layout.by_output, layout.out_features, layout.transposed)
    for offset, activation in ((bias, "gelu"), (None, "none")):
        product = (x, values, offset, *arguments, activation)
        torch.library.opcheck(torch.ops.compsparse.block_sparse_linear.default, product)
    if not layout.transposed:
        a, b = make_pair(layout, **options)
        sampled = (a, b, *layout.by_output, layout.num_slots, layout.shared, *layout.block_shape)
        torch.library.opcheck(torch.ops.compsparse.sampled_block_matmul.default, sampled)


@pytest.mark.parametrize("memory", ["contiguous", "transposed", "expanded"])
@pytest.mark.parametrize("activation", ["gelu", "silu"])
@pytest.mark.parametrize("dtype", DTYPES + HALVES, ids=str)
def test_activated(dtype, activation, memory):
    """The op of training's gelu and silu: opcheck, and at most twice torch's error, values and gradients."""
    z, grad = random_tensor(7, 61, dtype=dtype), random_tensor(7, 61, dtype=dtype, memory=memory, seed=1)
    op = torch.ops.compsparse.activated.default
    exact = z.double().requires_grad_()
    y = ACTIVATIONS[activation](exact)
    rounded = z.to(torch.float32 if dtype == torch.float64 else dtype).requires_grad_()
    dense = ACTIVATIONS[activation](rounded)
    results = [(None, dense, y)]
    gradients = (torch.autograd.grad(out, at, grad.to(out.dtype))[0] for out, at in ((dense, rounded), (y, exact)))
    results.append((grad, *gradients))
    for given, peer, right in results:
        torch.library.opcheck(op, (z, given, activation))
        assert_within_budget(op(z, given, activation), peer.detach(), right.detach(), activation)
    assert op(z[:0], None, activation).shape == (0, 61)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gelu_of_large_numbers(dtype):
    """Far from 0 it is 0 or z and its slope 0 or 1; nothing overflows on the way."""
    z = torch.tensor([[-3e38, -1e5, -200.0, -40.0, 40.0, 200.0, 1e5, 3e38]], dtype=dtype)
    assert torch.equal(torch.ops.compsparse.activated(z, None, "gelu"), z.clamp(min=0))
    assert torch.equal(torch.ops.compsparse.activated(z, torch.ones_like(z), "gelu"), (z > 0).to(dtype))


def test_opcheck_without_blocks():
    layout = BlockLayout.from_mask(torch.zeros(2, 2, dtype=torch.bool), (4, 4))
    x, values, bias = make_inputs(layout)
    product = (x, values, bias, *layout.by_output, 8, False, "relu")
    torch.library.opcheck(torch.ops.compsparse.block_sparse_linear.default, product)
    torch.library.opcheck(torch.ops.compsparse.sampled_block_matmul.default, (x, x, *layout.by_output, 0, False, 4, 4))


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("name", ["ragged", "shared, transposed"])
def test_compile_forward_and_backward(name, activation):
    layout = LAYOUTS[name]
    inputs = make_inputs(layout, requires_grad=True)

    def function(x, values, bias):
        return block_sparse_linear(x, values, layout, bias, activation).square().sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected = function(*inputs)
    torch.testing.assert_close(compiled(*inputs), expected)
    torch.testing.assert_close(
        torch.autograd.grad(compiled(*inputs), inputs), torch.autograd.grad(expected, inputs), rtol=1e-5, atol=1e-5
    )


def test_compile_of_the_sampled_product_with_any_batch():
    def function(a, b):
        return sampled_block_matmul(a, b, LAYOUT)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (3, 5, 8):
        pair = make_pair(LAYOUT, batch=batch)
        torch.testing.assert_close(compiled(*pair), function(*pair))


def test_export():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            _, values, bias = make_inputs(LAYOUT)
            self.values, self.bias = torch.nn.Parameter(values), torch.nn.Parameter(bias)

        def forward(self, x):
            return block_sparse_linear(x, self.values, LAYOUT, self.bias, "relu")

    layer, x = Layer(), make_inputs(LAYOUT)[0]
    with torch.no_grad():
        exported = torch.export.export(layer, (x,)).module()
        torch.testing.assert_close(exported(x), layer(x))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_computes_in_its_dtype(half, activation):
    x, values, bias = make_inputs(LAYOUT, requires_grad=True)
    with torch.autocast("cpu", dtype=half):
        y = block_sparse_linear(x, values, LAYOUT, bias, activation)
        from_half = block_sparse_linear(x.to(half), values, LAYOUT, bias, activation)
    assert y.dtype == half and torch.equal(y, from_half)
    assert torch.equal(y, block_sparse_linear(*changed(x, values, dtype=half), LAYOUT, bias.to(half), activation))
    grads = torch.autograd.grad(y.float().sum(), (x, values, bias))
    assert all(grad.dtype == torch.float32 and torch.isfinite(grad).all() for grad in grads)


@pytest.fixture
def nan_in_fresh_memory():
    """Deterministic mode fills every new tensor with NaN: what a kernel did not write shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("nan_in_fresh_memory")
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("block_shape", [(8, 8), (5, 3), (16, 32), (33, 70)], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_every_output_is_written(transposed, block_shape, density):
    layout = BlockLayout.from_mask(
        random_mask(5, 4, density), block_shape, 4 * block_shape[1] - 2, 5 * block_shape[0] - 1
    )
    layout = layout.T if transposed else layout
    for dtype in DTYPES + HALVES:
        inputs = make_inputs(layout, batch=11, dtype=dtype, requires_grad=True)
        y = block_sparse_linear(*inputs[:2], layout, inputs[2])
        for result in (y, *torch.autograd.grad(y.square().sum(), inputs)):
            assert torch.isfinite(result).all()


@pytest.mark.usefixtures("nan_in_fresh_memory")
@pytest.mark.parametrize("dtype", DTYPES + HALVES, ids=str)
def test_every_shared_slot_is_written(dtype):
    layout = LAYOUTS["shared"]
    assert torch.isfinite(sampled_block_matmul(*make_pair(layout, dtype=dtype), layout)).all()


# ---- backends


def test_explicit_backends():
    x, values, bias = make_inputs(LAYOUT, requires_grad=True)
    expected = F.relu(F.linear(x, LAYOUT.unpack(values), bias))
    for backend in ("reference", "cpu") if ISAS else ("reference",):
        y = block_sparse_linear(x, values, LAYOUT, bias, "relu", backend=backend)
        torch.testing.assert_close(y, expected)
        torch.autograd.grad(y.sum(), (x, values, bias))


@pytest.mark.parametrize("op", ["block_sparse_linear", "sampled_block_matmul"])
@needs_kernels
def test_explain(op):
    assert op in OPS
    assert explain(op)["cpu"] == "runs" and explain(op)["reference"] == "available"
    assert explain(op, torch.zeros(2))["cpu"] == "runs"
    for half in HALVES:
        assert explain(op, torch.zeros(2, dtype=half))["cpu"] == "runs"
    whole = explain(op, torch.zeros(2), torch.zeros(2, dtype=torch.int64))
    assert whole["cpu"] == whole["reference"] == "dtype int64 (has float32, float64, float16, bfloat16)"
    sparse = explain(op, torch.zeros(2, 2).to_sparse())
    assert sparse["cpu"] == sparse["reference"] == "a tensor has layout torch.sparse_coo (takes dense ones)"
    elsewhere = explain(op, torch.zeros(2, device="meta"))
    assert elsewhere["cpu"] == "tensors are on meta" and elsewhere["reference"] == "runs"
    assert elsewhere["cuda"] == "has no kernel of this op"


@pytest.mark.parametrize("op", ["block_sparse_linear", "sampled_block_matmul"])
def test_the_triton_launcher_is_registered_and_says_why_it_does_not_run_here(op):
    pytest.importorskip("triton")
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"compsparse::{op}", "CUDA")
    assert explain(op, torch.zeros(2))["triton"] == "tensors are on cpu"
    if not torch.cuda.is_available():
        assert explain(op)["triton"] == "there is no GPU here"
    wanted = r"^backend: expected one that can run here \(triton can't\), got tensors are on cpu"
    with pytest.raises(ValueError, match=wanted):
        block_sparse_linear(X, VALUES, LAYOUT, backend="triton")


# ---- errors

X, VALUES, BIAS = make_inputs(LAYOUT)
A, B = make_pair(LAYOUT)


def linear(x=X, values=VALUES, layout=LAYOUT, bias=BIAS, activation=None, **options):
    return block_sparse_linear(x, values, layout, bias, activation, **options)


def sampled(a=A, b=B, layout=LAYOUT):
    return sampled_block_matmul(a, b, layout)


def changed(*tensors, dtype):
    return [tensor.to(dtype) for tensor in tensors]


MESSAGES = [
    (lambda: linear(x=[1.0]), ValueError, "x: expected tensor [..., 5], got list"),
    (lambda: linear(x=X[:, :4]), ValueError, "x: expected tensor [..., 5], got 2-D float32 tensor [3, 4]"),
    (lambda: linear(x=X[0, 0]), ValueError, "x: expected tensor [..., 5], got 0-D float32 tensor []"),
    (
        lambda: linear(*changed(X, VALUES, dtype=torch.int64), bias=None),
        TypeError,
        "x: expected float32, float64, float16 or bfloat16, got 2-D int64 tensor",
    ),
    (
        lambda: linear(values=VALUES[:-1]),
        ValueError,
        "values: expected tensor [4, 3, 2], got 3-D float32 tensor [3, 3, 2]",
    ),
    (
        lambda: linear(values=VALUES.mT),
        ValueError,
        "values: expected tensor [4, 3, 2], got 3-D float32 tensor [4, 2, 3]",
    ),
    (lambda: linear(values=None), ValueError, "values: expected tensor [4, 3, 2], got NoneType"),
    (lambda: linear(values=VALUES.double()), TypeError, "values: expected float32, like x, got 3-D float64 tensor"),
    (lambda: linear(values=VALUES.to("meta")), ValueError, "values: expected a tensor on cpu, like x, got one on meta"),
    (lambda: linear(bias=BIAS[:2]), ValueError, "bias: expected tensor [5] or None, got 1-D float32 tensor [2]"),
    (lambda: linear(bias=1.0), ValueError, "bias: expected tensor [5] or None, got float"),
    (lambda: linear(bias=BIAS.double()), TypeError, "bias: expected float32, like x, got 1-D float64 tensor [5]"),
    (lambda: linear(layout=torch.ones(2, 2)), TypeError, "layout: expected BlockLayout, got Tensor"),
    (lambda: linear(layout=LAYOUT.to("meta")), ValueError, "layout: expected on cpu, like x (layout.to(device)), got"),
    (lambda: linear(activation="tanh"), ValueError, "activation: expected None, 'relu', 'gelu' or 'silu', got 'tanh'"),
    (lambda: linear(activation="none"), ValueError, "activation: expected None, 'relu', 'gelu' or 'silu', got 'none'"),
    (
        lambda: linear(activation=F.relu),
        ValueError,
        "activation: expected None, 'relu', 'gelu' or 'silu', got <function",
    ),
    (
        lambda: linear(backend="gpu"),
        ValueError,
        "backend: expected one of cpu, triton, cuda, reference or None, got 'gpu'",
    ),
    (lambda: sampled(a=[1.0]), ValueError, "a: expected 2-D tensor [batch, 5], got list"),
    (lambda: sampled(a=A[0]), ValueError, "a: expected 2-D tensor [batch, 5], got 1-D float32 tensor [5]"),
    (lambda: sampled(b=B[:, :2]), ValueError, "b: expected 2-D tensor [batch, 5], got 2-D float32 tensor [3, 2]"),
    (lambda: sampled(b=B[:2]), ValueError, "b: expected batch 3, as in a, got 2"),
    (lambda: sampled(b=B.double()), TypeError, "b: expected float32, like a, got 2-D float64 tensor [3, 5]"),
    (
        lambda: sampled(*changed(A, B, dtype=torch.int64)),
        TypeError,
        "a: expected float32, float64, float16 or bfloat16, got 2-D int64 tensor",
    ),
    (lambda: sampled(layout=LAYOUT.to("meta")), ValueError, "layout: expected on cpu, like a (layout.to(device)), got"),
    (lambda: sampled(layout=None), TypeError, "layout: expected BlockLayout, got NoneType"),
    (lambda: explain("matmul"), ValueError, f"op: expected one of {', '.join(OPS + NM_OPS)}, got 'matmul'"),
]


@pytest.mark.parametrize("call, error, message", MESSAGES, ids=[message for *_, message in MESSAGES])
def test_errors_name_the_argument_what_was_wanted_and_what_came(call, error, message):
    with pytest.raises(error, match="^" + re.escape(message)):
        call()


@needs_kernels
def test_an_explicit_backend_says_why_not():
    layout = LAYOUT.to("meta")
    x, values = X.to("meta"), VALUES.to("meta")
    with pytest.raises(
        ValueError, match=r"^backend: expected one that can run here \(cpu can't\), got tensors are on meta"
    ):
        block_sparse_linear(x, values, layout, backend="cpu")
    assert block_sparse_linear(x, values, layout).shape == (3, 5)


def test_autocast_checks_its_arguments_too():
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ValueError, match=r"^x: expected tensor"):
        linear(x=None)


def test_forward_mode_is_refused():
    layout = BlockLayout.from_mask(torch.ones(2, 2, dtype=torch.bool), (4, 4))
    x, values = torch.randn(3, 8), torch.randn(layout.values_shape)
    for name, call in (
        ("x", lambda x: block_sparse_linear(x, values, layout)),
        ("a", lambda x: sampled_block_matmul(x, x, layout)),
    ):
        with pytest.raises(RuntimeError, match=f"{name}: expected a tensor without a forward-mode tangent"):
            torch.func.jvp(call, (x,), (x,))
    tangent = torch.func.jvp(lambda x: block_sparse_linear(x, values, layout, backend="reference"), (x,), (x,))[1]
    torch.testing.assert_close(tangent, block_sparse_linear(x, values, layout))


def test_relu_lets_nan_through_to_the_gradient():
    layout = BlockLayout.from_mask(torch.ones(1, 1, dtype=torch.bool), (1, 1))
    x = torch.tensor([[float("nan")], [-1.0], [0.0], [2.0]], requires_grad=True)
    ours = torch.autograd.grad(block_sparse_linear(x, torch.ones(1, 1, 1), layout, activation="relu").sum(), x)[0]
    assert torch.equal(ours, torch.autograd.grad(torch.relu(x).sum(), x)[0])


def test_sparse_tensors_are_refused():
    layout = BlockLayout.from_mask(torch.ones(1, 1, dtype=torch.bool), (4, 4))
    for backend in (None, "cpu", "reference"):
        with pytest.raises(TypeError, match=r"x: expected a dense \(strided\) tensor, got one with layout"):
            block_sparse_linear(torch.eye(4).to_sparse(), torch.randn(1, 4, 4), layout, backend=backend)
    with pytest.raises(TypeError, match=r"^values: expected a dense \(strided\) tensor, got one with layout"):
        block_sparse_linear(torch.eye(4), torch.randn(1, 4, 4).to_sparse(), layout)
    with pytest.raises(TypeError, match=r"^bias: expected a dense \(strided\) tensor, got one with layout"):
        block_sparse_linear(torch.eye(4), torch.randn(1, 4, 4), layout, torch.ones(4).to_sparse())
    with pytest.raises(TypeError, match=r"^b: expected a dense \(strided\) tensor, got one with layout"):
        sampled_block_matmul(torch.eye(4), torch.eye(4).to_sparse(), layout)


def test_autocast_checks_arguments_too():
    layout = BlockLayout.from_mask(torch.ones(1, 1, dtype=torch.bool), (4, 4))
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ValueError, match="bias: expected tensor"):
        block_sparse_linear(torch.eye(4), torch.randn(1, 4, 4), layout, [1])


def test_autocast_leaves_float64_alone():
    layout = BlockLayout.from_mask(torch.eye(3, dtype=torch.bool), (4, 8))
    x, values = torch.randn(5, 24, dtype=torch.float64), torch.randn(layout.values_shape, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = block_sparse_linear(x, values, layout)
    assert torch.equal(y, block_sparse_linear(x, values, layout))
