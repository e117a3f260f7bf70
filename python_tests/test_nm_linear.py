"""masked_linear and sampled_matmul of kind nm: values and gradients against the float64 reference."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compsparse_kernels import MaskLayout, explain, masked_linear, prune, sampled_matmul
from compsparse_kernels.nn import MaskedLinear
from compsparse_kernels.ops.masked_linear import reference
from compsparse_kernels.testing import (
    DTYPES,
    HALVES,
    ISAS,
    MEMORY_FORMS,
    random_tensor,
)
from python_tests.masked import (
    assert_right,
    check_derivatives_of_any_order,
    check_empty_batch,
    check_every_output_is_written,
    check_expanded_gradient,
    check_leading_dimensions,
    check_no_graph_without_need,
    check_only_the_wanted_gradients,
    check_same_bits_for_any_number_of_threads,
    check_under_instruction_set,
    dense_linear,
    make_inputs,
    ours_linear,
    output_and_gradients,
)
from python_tests.nm import PATTERNS, nm_layout, nm_mask

every_pattern = pytest.mark.parametrize("nm", PATTERNS, ids=str)
either_way = pytest.mark.parametrize("transposed", [False, True])


def make_layout(out_features, in_features, nm, missing=0.0, transposed=False, seed=0):
    layout = nm_layout(out_features, in_features, *nm, missing, seed)
    return layout.T if transposed else layout


# ---- shapes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5, 8, 9, 16, 17, 31, 33, 48, 63, 64, 65, 66, 130, 1100])
def test_batches(batch, dtype):
    """Every width of a panel, alone and after full panels; more panels than are taken at a time."""
    assert_right(make_layout(37, 52, (2, 4)), batch, dtype)


@every_pattern
@either_way
@pytest.mark.parametrize("shape", [(1, 1), (1, 70), (70, 1), (64, 128), (33, 47), (19, 600)], ids=str)
@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_shapes_and_patterns(shape, transposed, nm, missing):
    for dtype in DTYPES:
        assert_right(make_layout(*shape, nm, missing, transposed), 7, dtype)


@either_way
def test_no_survivors(transposed):
    assert_right(make_layout(20, 30, (2, 4), missing=1.0, transposed=transposed))


@either_way
def test_empty_batch(transposed):
    check_empty_batch(make_layout(24, 31, (2, 4), transposed=transposed))


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (1, 2, 1, 3), (0, 3)], ids=str)
def test_leading_dimensions(lead):
    check_leading_dimensions(make_layout(24, 32, (2, 4)), lead)


@given(
    shape=st.tuples(st.integers(1, 90), st.integers(1, 300)),
    batch=st.integers(1, 150),
    n=st.integers(1, 30),
    more=st.integers(0, 226),
    missing=st.sampled_from([0.0, 0.1, 0.9]),
    dtype=st.sampled_from(DTYPES),
    transposed=st.booleans(),
    memory=st.sampled_from(MEMORY_FORMS),
    seed=st.integers(0, 2**20),
)
def test_any_shape(shape, batch, n, more, missing, dtype, transposed, memory, seed):
    layout = make_layout(*shape, (n, n + more), missing, transposed, seed)
    assert_right(layout, batch, dtype, seed, memory)


# ---- memory


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory", MEMORY_FORMS)
def test_memory_of_inputs_and_gradients(memory, dtype):
    assert_right(make_layout(40, 50, (2, 4)), 18, dtype, memory=memory)


def test_expanded_gradient_of_a_sum():
    check_expanded_gradient(make_layout(40, 50, (2, 4)))


@pytest.mark.parametrize("batch", [1, 3, 65, 140])
@pytest.mark.parametrize("in_features", [52, 53])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_output_is_written(batch, in_features, dtype):
    check_every_output_is_written(make_layout(37, in_features, (2, 4)), batch, dtype)


def test_indices_past_2_to_the_31():
    """8 GB of zeros that are never written take no memory; few slots, the last of which is in the last column."""
    columns, m = 2**30 + 256, 256
    try:
        x = torch.from_numpy(np.zeros((2, columns), np.float32))
        values = torch.from_numpy(np.zeros((1, columns // m, 1), np.float32))
    except MemoryError as error:
        pytest.skip(f"no room for 8 GB of address space: {error}")
    positions = torch.zeros(1, columns // m, dtype=torch.uint8)
    positions[0, -1] = 255
    x[1, -1] = 3
    values[0, -1] = 1
    for first in (0, 1):  # batch 1 reads x itself
        y = torch.ops.compsparse.nm_linear(x[first:][:1], values, None, positions, m)
        assert y.item() == 3 * first


@pytest.mark.skipif(not ISAS, reason="the dense reference reads everything: no compiled kernels here")
@pytest.mark.parametrize("batch", [1, 6, 70])
def test_cost_is_on_slots_only(batch):
    """0 * NaN is NaN: what is not NaN was not multiplied. Dense torch fails this, so something is skipped here."""
    mask = nm_mask(24, 32, 2, 4)
    mask[:, 4:8] = torch.tensor([True, False, True, False])
    layout = MaskLayout.from_mask(mask, "nm", nm=(2, 4))
    x, values, bias, grad = make_inputs(layout, batch)
    assert values.numel() == layout.nnz == 24 * 32 // 2
    x[:, 5] = x[:, 7] = float("nan")
    y, _, grad_values, _ = output_and_gradients(ours_linear(layout), (x, values, bias), grad, x.dtype)
    assert torch.isfinite(y).all() and torch.isfinite(grad_values).all()
    assert dense_linear(layout)(x, values, bias).isnan().all()
    g = random_tensor(batch, 24)
    g[:, 3] = float("nan")
    kept = masked_linear(g, values, layout.T).isfinite().all(0)
    assert torch.equal(kept, ~mask[3])


@either_way
@pytest.mark.parametrize("in_features", [32, 33])
def test_padding_has_no_part(transposed, in_features):
    """Slots without a survivor, and slots past the last column: not finite, they change nothing and get no gradient."""
    layout = make_layout(24, in_features, (2, 4), 0.3, transposed)
    x, values, bias, grad = make_inputs(layout)
    kept = layout.pack(torch.ones(layout.out_features, layout.in_features)) == 1
    assert not kept.all()
    clean = output_and_gradients(ours_linear(layout), (x, values, bias), grad, x.dtype)
    values = values.where(kept, float("nan"))
    dirty = output_and_gradients(ours_linear(layout), (x, values, bias), grad, x.dtype)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    assert not dirty[2][~kept].any()
    # Without a mask, what lies past the last column is left to the ops.
    full = make_layout(24, 33, (2, 4), 0.0, transposed)
    x, values, _, grad = make_inputs(full)
    outside = ~full.nm.inside()
    assert full.mask is None and outside.sum() == 24
    values[outside] = float("nan")
    y, grad_x, grad_values = output_and_gradients(
        lambda x, values: masked_linear(x, values, full), (x, values), grad, x.dtype
    )
    assert y.isfinite().all() and grad_x.isfinite().all() and not grad_values[outside].any()


# ---- derivatives


@pytest.mark.parametrize("nm", [(2, 4), (1, 3), (3, 5)], ids=str)
@pytest.mark.parametrize("missing", [0.0, 0.3])
@either_way
def test_derivatives_of_any_order(transposed, missing, nm):
    check_derivatives_of_any_order(make_layout(6, 5, nm, missing, transposed))


@pytest.mark.parametrize("wanted", [("x",), ("values",), ("bias",), ("x", "values")], ids=str)
def test_only_the_wanted_gradients(wanted):
    check_only_the_wanted_gradients(make_layout(20, 30, (2, 4)), wanted)


def test_no_graph_without_need():
    check_no_graph_without_need(make_layout(20, 30, (2, 4)))


# ---- threads and instruction sets


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nm", [(2, 4), (3, 7)], ids=str)
@pytest.mark.parametrize("shape, batch", [((250, 300), 61), ((40, 900), 260), ((700, 800), 1)], ids=str)
def test_bitwise_equal_for_any_number_of_threads(shape, batch, nm, dtype):
    check_same_bits_for_any_number_of_threads(make_layout(*shape, nm), batch, dtype)


@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa != "avx512_bf16"])  # that has the tables of avx512 here
def test_every_instruction_set(isa):
    check_under_instruction_set(isa, __file__, "test_batches or slots or bitwise")


# ---- torch's contracts


@pytest.mark.parametrize("memory", ["contiguous", "transposed", "strided"])
@pytest.mark.parametrize("batch", [0, 1, 5])
@pytest.mark.parametrize("with_bias", [False, True])
def test_opcheck(with_bias, batch, memory):
    layout = make_layout(20, 23, (2, 4))
    x, values, bias, grad = make_inputs(layout, batch, memory=memory)
    back = bias.new_ones(23) if with_bias else None
    ops, positions = torch.ops.compsparse, layout.nm.positions
    torch.library.opcheck(ops.nm_linear, (x, values, bias if with_bias else None, positions, 4))
    torch.library.opcheck(ops.nm_linear_transposed, (grad, values, back, positions, 4, 23))
    torch.library.opcheck(ops.nm_sampled, (grad, x, positions, 2, 4))


@every_pattern
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_ops_mean_their_reference(with_bias, nm):
    """Boxing does not check: each argument straight through the registered op, slots past the last column filled."""
    layout = make_layout(20, 47, nm)
    x, values, bias, grad = make_inputs(layout)
    back = random_tensor(47) if with_bias else None
    ops, positions, (n, m) = torch.ops.compsparse, layout.nm.positions, nm
    for op, arguments in (
        ("nm_linear", (x, values, bias if with_bias else None, positions, m)),
        ("nm_linear_transposed", (grad, values, back, positions, m, 47)),
        ("nm_sampled", (grad, x, positions, n, m)),
    ):
        torch.testing.assert_close(getattr(ops, op)(*arguments), getattr(reference, op)(*arguments))


@either_way
def test_the_reference_is_the_dense_product(transposed):
    layout = make_layout(20, 47, (3, 5), transposed=transposed)
    x, values, bias, grad = make_inputs(layout, dtype=torch.float64)
    torch.testing.assert_close(
        masked_linear(x, values, layout, bias, backend="reference"), dense_linear(layout)(x, values, bias)
    )
    product, pair = grad.mT @ x, (x, grad) if transposed else (grad, x)
    assert torch.equal(reference.nm_sampled(*pair, layout.nm.positions, 3, 5), layout.pack(product))


@either_way
@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_compile(transposed, missing):
    layout = make_layout(20, 24, (2, 4), missing, transposed)
    *inputs, grad = make_inputs(layout)
    compiled = torch.compile(ours_linear(layout), fullgraph=True, backend="aot_eager")
    ours = output_and_gradients(compiled, inputs, grad, torch.float32)
    eager = output_and_gradients(ours_linear(layout), inputs, grad, torch.float32)
    for a, b in zip(ours, eager, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision_is_float32_rounded_once(dtype):
    layout = make_layout(20, 24, (2, 4))
    halves = [tensor.to(dtype).requires_grad_() for tensor in make_inputs(layout)[:3]]
    wide = [tensor.detach().float().requires_grad_() for tensor in halves]
    y, exact = masked_linear(*halves[:2], layout, halves[2]), masked_linear(*wide[:2], layout, wide[2])
    assert y.dtype == dtype and torch.equal(y, exact.to(dtype))
    y.sum().backward()
    exact.sum().backward()
    assert all(torch.equal(half.grad, full.grad.to(dtype)) for half, full in zip(halves, wide, strict=True))
    sampled = sampled_matmul(y.detach(), halves[0].detach(), layout)
    assert torch.equal(sampled, sampled_matmul(y.detach().float(), wide[0].detach(), layout).to(dtype))


def test_autocast():
    layout = make_layout(20, 24, (2, 4))
    x, values, bias, _ = make_inputs(layout)
    with torch.autocast("cpu", torch.bfloat16):
        y = masked_linear(x, values.requires_grad_(), layout, bias)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, masked_linear(x.bfloat16(), values.bfloat16(), layout, bias.bfloat16()))
    y.sum().backward()
    assert values.grad.dtype == torch.float32


@either_way
@pytest.mark.parametrize(
    "backend", ["reference", pytest.param("cpu", marks=pytest.mark.skipif(not ISAS, reason="none"))]
)
def test_backends(backend, transposed):
    layout = make_layout(20, 24, (2, 4), transposed=transposed)
    x, values, bias, _ = make_inputs(layout)
    y = masked_linear(x, values, layout, bias, backend=backend)
    torch.testing.assert_close(y, dense_linear(layout)(x, values, bias))


def test_explain():
    for op in ("nm_linear", "nm_sampled"):
        reasons = explain(op)
        assert reasons["cuda"] == "has no kernel of this op"


def test_forward_mode_is_refused():
    layout = make_layout(20, 24, (2, 4))
    x, values, bias, grad = make_inputs(layout)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        for call in (lambda: masked_linear(dual, values, layout, bias), lambda: sampled_matmul(grad, dual, layout)):
            with pytest.raises(RuntimeError, match="expected a tensor without a forward-mode tangent"):
                call()


# ---- modules


def test_module_equals_linear():
    torch.manual_seed(0)
    linear = torch.nn.Linear(30, 20)
    layer = MaskedLinear.from_linear(linear, nm_layout(20, 30, 2, 4, missing=0.2))
    x = torch.randn(5, 30)
    torch.testing.assert_close(layer(x), layer.to_linear()(x))
    assert torch.equal(layer.weight, linear.weight * layer.layout.to_mask())
    assert "kind=nm" in repr(layer)


def test_magnitude_masks_of_2_to_4_converted():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 24), torch.nn.ReLU(), torch.nn.Linear(24, 8))
    dense = {name: model[int(name)].weight.detach().clone() for name in ("0", "2")}
    masks = {name: nm_mask(*weight.shape, 2, 4) for name, weight in dense.items()}
    prune.convert(model, masks, kind="nm")
    assert [model[i].layout.nm.m for i in (0, 2)] == [4, 4]
    x = torch.randn(5, 32)
    y = model(x)
    back = prune.to_dense(model)
    assert all(torch.equal(back[int(name)].weight, dense[name] * masks[name]) for name in dense)
    torch.testing.assert_close(y, back(x))


# ---- errors


LAYOUT = nm_layout(4, 6, 2, 4)
X, VALUES, BIAS, GRAD = make_inputs(LAYOUT, 3)
ERRORS = {
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
        "values: expected tensor [4, 2, 2], got 3-D float32 tensor [3, 2, 2]",
    ),
    "bias shape": (
        lambda: masked_linear(X, VALUES, LAYOUT, BIAS[1:]),
        ValueError,
        "bias: expected tensor [4] or None, got 1-D float32 tensor [3]",
    ),
    "bias of the transpose": (
        lambda: masked_linear(GRAD, VALUES, LAYOUT.T, BIAS),
        ValueError,
        "bias: expected tensor [6] or None, got 1-D float32 tensor [4]",
    ),
    "layout device": (
        lambda: masked_linear(X.to("meta"), VALUES.to("meta"), LAYOUT),
        ValueError,
        "layout: expected on meta, like x (layout.to(device)), got one on cpu",
    ),
    "backend": (
        lambda: masked_linear(X, VALUES, LAYOUT, backend="cuda"),
        ValueError,
        "backend: expected one that can run here (cuda can't), got has no kernel of this op",
    ),
    "sampled a": (
        lambda: sampled_matmul(GRAD[0], X, LAYOUT),
        ValueError,
        "a: expected 2-D tensor [batch, 4], got 1-D float32 tensor [4]",
    ),
    "sampled batch": (lambda: sampled_matmul(GRAD, X[1:], LAYOUT), ValueError, "b: expected batch 3, as in a, got 2"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    call, error, message = ERRORS[case]
    with pytest.raises(error) as raised:
        call()
    assert str(raised.value) == message
