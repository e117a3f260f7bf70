"""The checks that the linear rooms share: the short way of the usual call, and that nothing malformed takes it."""

import itertools

import pytest
import torch

from compsparse_kernels import (
    BlockLayout,
    MaskLayout,
    block_sparse_linear,
    masked_linear,
    sampled_block_matmul,
    sampled_matmul,
)
from compsparse_kernels.ops import linear_arguments
from compsparse_kernels.ops.backends import dtypes_on
from compsparse_kernels.ops.block_sparse_linear import api as block_api
from compsparse_kernels.ops.masked_linear import api as masked_api

MASK = torch.tensor([[1, 0, 1], [0, 1, 1]]).bool()
BLOCKS = BlockLayout.from_mask(MASK, (2, 2), in_features=5)
CSR = MaskLayout.from_mask(MASK.repeat_interleave(2, 0).repeat_interleave(2, 1)[:, :5], kind="csr")
ROOMS = {
    "block_sparse_linear": (BLOCKS, block_api, block_sparse_linear, sampled_block_matmul),
    "masked_linear": (CSR, masked_api, masked_linear, sampled_matmul),
}


def variants(*shape):
    """A tensor of the right shape in every dtype the ops may take, and what can be wrong with one."""
    right = torch.randn(shape)
    wrong = [right.to("meta"), right.to_sparse(), right.to(torch.int32), right[..., :-1], right[0], right.numpy(), None]
    return [right, right.double(), *wrong]


@pytest.fixture(params=ROOMS)
def room(request):
    return request.param


def is_refused(check, *arguments):
    try:
        check(*arguments)
    except (TypeError, ValueError):
        return True
    return False


def test_nothing_malformed_takes_the_short_way_of_a_product(room):
    layout = ROOMS[room][0]
    dtypes, index = dtypes_on("cpu", room), layout.by_output.idx
    inputs = variants(3, 5), variants(*layout.values_shape), [*variants(4), torch.randn(1, 4)]
    usual = 0
    for x, values, bias in itertools.product(*inputs):
        if linear_arguments.is_usual_product(x, values, bias, layout, index, dtypes):
            usual += 1
            assert not is_refused(linear_arguments.check_product, room, x, values, bias, layout, type(layout))
    assert usual == 6  # x [3, 5] in two dtypes and x [5], each with and without a bias
    elsewhere = layout.to("meta").by_output.idx
    assert not linear_arguments.is_usual_product(*(one[0] for one in inputs), layout, elsewhere, dtypes)


def test_nothing_malformed_takes_the_short_way_of_a_sampled_product(room):
    layout = ROOMS[room][0]
    dtypes, index = dtypes_on("cpu", room), layout.by_output.idx
    usual = 0
    for a, b in itertools.product(variants(3, 4), [*variants(3, 5), torch.randn(2, 5), torch.randn(1, 3, 5)]):
        if linear_arguments.is_usual_pair(a, b, layout, index, dtypes):
            usual += 1
            assert not is_refused(linear_arguments.check_pair, room, a, b, layout, type(layout))
    assert usual == 2


def test_autocast_and_forward_mode_go_the_long_way(room):
    layout = ROOMS[room][0]
    arguments = (torch.randn(3, 5), torch.randn(layout.values_shape), None, layout, layout.by_output.idx)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not linear_arguments.is_usual_product(*arguments, dtypes_on("cpu", room))
    with torch.autograd.forward_ad.dual_level():
        assert not linear_arguments.is_usual_product(*arguments, dtypes_on("cpu", room))
        pair = torch.randn(3, 4), torch.randn(3, 5)
        assert not linear_arguments.is_usual_pair(*pair, *arguments[3:], dtypes_on("cpu", room))


def test_the_usual_call_takes_the_short_way(room, monkeypatch):
    layout, api, product, sampled = ROOMS[room]

    def long_way(*_):
        raise AssertionError("the long way")

    monkeypatch.setattr(api, "check_product", long_way)
    monkeypatch.setattr(api, "check_pair", long_way)
    x, values, bias = torch.randn(3, 5), torch.randn(layout.values_shape, requires_grad=True), torch.randn(4)
    for given, at in ((bias, layout), (None, layout), (None, layout.T)):
        lead = x.new_ones(2, 3, at.in_features)
        product(lead, values, at, given).sum().backward()
        sampled(lead.new_ones(3, at.out_features), lead[0], at)
    with pytest.raises(AssertionError, match="the long way"):
        product(x[:, :-1], values, layout)
    with pytest.raises(AssertionError, match="the long way"):
        sampled(x, x, layout)


def test_the_pattern_is_not_saved_as_an_activation(room):
    """Hooks that move saved tensors away see what a gradient may reach, and not the index tensors of every layer."""
    layout, _, product, sampled = ROOMS[room]
    x, values = torch.randn(3, 5, requires_grad=True), torch.randn(layout.values_shape, requires_grad=True)
    saved = []

    def pack(tensor):
        saved.append(tensor.data_ptr())
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = product(x, values, layout)
        s = sampled(y.detach().requires_grad_(), x, layout)
    assert saved[:2] == [x.data_ptr(), values.data_ptr()] and len(saved) == 4
    y.sum().backward()
    s.sum().backward()
