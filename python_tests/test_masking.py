"""Values with a mask beside them (kind dense, partly filled blocks): zero outside it, in value and in gradient."""

import pytest
import torch
import torch.nn.functional as F

from compsparse_kernels import MaskLayout, masked_linear, sampled_matmul
from compsparse_kernels.ops.masked_linear import masking
from compsparse_kernels.ops.masked_linear.masking import masked_gradient, masked_values
from compsparse_kernels.testing import (
    ISAS,
    assert_within_budget,
    cpu_isa,
    num_threads,
    random_mask,
    random_tensor,
)
from python_tests.masked import check_under_instruction_set

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
SHAPES = [(1, 1), (1, 0), (37, 53), (300, 513)]  # the last is more than one thread's least share
is_zero_outside = torch.ops.compsparse.is_zero_outside.default
zero_outside_ = torch.ops.compsparse.zero_outside_.default


def problem(*shape, dtype=torch.float32, density=0.5):
    """A mask, and values that are zero outside it, with either sign."""
    mask = random_mask(*shape, density)
    return mask, random_tensor(*shape, dtype=dtype) * mask


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_look_finds_every_single_element(shape, dtype, threads):
    mask, values = problem(*shape, dtype=dtype)
    dropped = (~mask).nonzero().tolist()
    with num_threads(threads):
        assert is_zero_outside(values, mask)
        for place in dropped[:: max(1, len(dropped) // 50)] + dropped[-1:]:
            for odd in (1.0, torch.inf, torch.nan, torch.finfo(dtype).smallest_normal / 2):
                spoilt = values.clone()
                spoilt[tuple(place)] = odd
                assert not is_zero_outside(spoilt, mask)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_zeroing_writes_outside_only(shape, dtype):
    mask = random_mask(*shape, 0.5)
    values = random_tensor(*shape, dtype=dtype)
    values[~mask] = torch.nan
    expected = torch.where(mask, values, 0.0)
    results = []
    for threads in (1, 2, 3):
        with num_threads(threads):
            results.append(values.clone())
            assert zero_outside_(results[-1], mask) is None
    assert all(torch.equal(result, expected) and not result[~mask].signbit().any() for result in results)


def test_opcheck():
    mask, values = problem(5, 7)
    torch.library.opcheck(zero_outside_, (values, mask))
    torch.library.opcheck(is_zero_outside, (values, mask), test_utils=("test_schema",))


def test_clean_values_are_not_copied():
    mask, values = problem(64, 64)
    assert masked_values(values, mask) is values and masked_values(values, None) is values
    leaf = values.clone().requires_grad_()
    assert masked_values(leaf, mask).data_ptr() == leaf.data_ptr()
    gradient = random_tensor(64, 64)
    assert masked_gradient(gradient, mask) is gradient and is_zero_outside(gradient, mask)


def test_a_mask_that_drops_nothing_costs_nothing(monkeypatch):
    monkeypatch.setattr(masking, "_is_zero_outside", None)  # would fail if it were called
    layout = MaskLayout.from_mask(torch.ones(8, 6, dtype=torch.bool), "dense")
    assert layout.mask is not None and layout.dropping_mask is None and layout.T.dropping_mask is None
    values, x = random_tensor(8, 6).requires_grad_(), random_tensor(3, 6)
    assert torch.equal(masked_linear(x, values, layout), F.linear(x, values))


@pytest.mark.parametrize("kind", ["dense", "block"])
@pytest.mark.parametrize("spoil", [0.0, -0.0, 1.0, torch.nan, torch.inf], ids=str)
def test_what_lies_outside_of_the_mask_does_not_matter(kind, spoil):
    mask = random_mask(64, 48, 0.6)
    layout = MaskLayout.from_mask(mask, kind, (16, 16) if kind == "block" else None)
    weight, x = random_tensor(64, 48), random_tensor(9, 48)
    clean = layout.pack(weight)
    values = torch.where(layout.mask, clean, spoil).requires_grad_()
    y = masked_linear(x, values, layout)
    y.square().sum().backward()
    assert torch.equal(y, masked_linear(x, clean, layout))
    (dense, dense_grad), (exact, exact_grad) = (
        _product_and_gradient(x.to(dtype), weight.to(dtype), mask) for dtype in (torch.float32, torch.float64)
    )
    assert_within_budget(y.detach(), dense, exact, "y")
    assert_within_budget(values.grad, *map(layout.pack, (dense_grad, exact_grad)), "values.grad")
    assert is_zero_outside(values.grad, layout.mask)


def _product_and_gradient(x, weight, mask):
    leaf = weight.clone().requires_grad_()
    y = F.linear(x, leaf * mask)
    y.square().sum().backward()
    return y.detach(), leaf.grad


def test_a_gradient_that_is_seen_elsewhere_is_not_written():
    """The gradient of what masked_values returns belongs to a product; a hook on the output sees another tensor."""
    mask, values = problem(6, 4)
    layout, leaf, x = MaskLayout.from_mask(mask, "dense"), values.requires_grad_(), random_tensor(3, 4)
    y, seen = masked_linear(x, leaf, layout), []
    y.register_hook(lambda grad: seen.append(grad.clone()) or grad)
    grad = random_tensor(3, 6)
    kept = grad.clone()
    y.backward(grad)
    assert torch.equal(grad, kept) and torch.equal(seen[0], kept)


@pytest.mark.parametrize("kind", ["dense", "block"])
@pytest.mark.parametrize("clean", [True, False])
def test_gradients_of_any_order(kind, clean):
    mask = random_mask(4, 6, 0.5)
    layout = MaskLayout.from_mask(mask, kind, (2, 2) if kind == "block" else None)
    values = random_tensor(*layout.values_shape, dtype=torch.float64)
    values = (values * layout.mask if clean else values).requires_grad_()
    x = random_tensor(3, 6, dtype=torch.float64).requires_grad_()
    a = random_tensor(3, 4, dtype=torch.float64).requires_grad_()
    # gradcheck steps out of the mask: both ways through the code are taken
    for function, inputs in (
        (lambda x, values: masked_linear(x, values, layout), (x, values)),
        (lambda a, b: sampled_matmul(a, b, layout), (a, x)),
    ):
        assert torch.autograd.gradcheck(function, inputs) and torch.autograd.gradgradcheck(function, inputs)


def test_transforms_and_forward_mode_take_the_other_way():
    mask, values = problem(6, 4)
    layout, x = MaskLayout.from_mask(mask, "dense"), random_tensor(3, 4)
    loss = lambda values: masked_linear(x, values, layout).square().sum()  # noqa: E731
    leaf = values.clone().requires_grad_()
    loss(leaf).backward()
    assert torch.allclose(torch.func.grad(loss)(values), leaf.grad)
    stack = torch.stack([values, 2 * values])
    assert torch.allclose(torch.func.vmap(loss)(stack), torch.stack([loss(values), loss(2 * values)]))
    _, tangent = torch.func.jvp(loss, (values,), (values,))
    assert torch.allclose(tangent, (leaf.grad * values).sum())


@pytest.mark.parametrize("kind", ["dense", "block"])
def test_compiles_as_one_graph(kind):
    mask = random_mask(64, 48, 0.6)
    layout = MaskLayout.from_mask(mask, kind, (16, 16) if kind == "block" else None)
    values, x = layout.pack(random_tensor(64, 48)).requires_grad_(), random_tensor(9, 48)
    product = torch.compile(lambda x, values: masked_linear(x, values, layout), fullgraph=True, backend="aot_eager")
    product(x, values).square().sum().backward()
    compiled, values.grad = values.grad, None
    masked_linear(x, values, layout).square().sum().backward()
    torch.testing.assert_close(compiled, values.grad)


@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa != cpu_isa()])
def test_every_instruction_set(isa):
    check_under_instruction_set(isa, __file__, "look or zeroing or clean")
