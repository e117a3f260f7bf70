"""Sparse training at constant density: RigL against a dense gradient, SET, what both leave alone."""

import copy
import gc
import math
import pickle
import weakref
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from compsparse_kernels import prune
from compsparse_kernels.nn import MaskedLinear
from compsparse_kernels.prune import regrowth
from compsparse_kernels.testing import random_mask, random_tensor
from python_tests.pruning import NAMES, OPTIMIZERS, batch, dense_state, masks_of, net, step

ALPHA, END = 0.6, 40


def sparse(dtype=torch.float64, kind="csr", density=0.4):
    model = net(dtype)
    prune.convert(model, masks_of(density, seed=3), kind)
    return model, OPTIMIZERS["adamw"](model.parameters())


def rigl(model, optimizer, **options):
    return prune.RigL(model, optimizer, **{"delta_t": 2, "end": END, "alpha": ALPHA, "kind": "csr"} | options)


def backward(model, optimizer, k=0, forward=None):
    optimizer.zero_grad()
    x, target = batch(k, next(model.parameters()).dtype)
    F.mse_loss((forward or model)(x), target).backward()


def dense_gradients(model, backward):
    """Of the weights as if nothing were pruned: through dense twins of the layers."""
    twin = prune.to_dense(copy.deepcopy(model))
    backward(twin)
    return {name: twin.get_submodule(name).weight.grad for name in NAMES}


def expected_mask(weight, mask, gradient, share):
    """Algorithm 1 the plain way: by sorting."""
    count = int(share * int(mask.sum()))
    places = mask.flatten().nonzero().flatten()
    order = weight.flatten()[places].abs().argsort()
    kept = mask.flatten().clone()
    kept[places[order[:count]]] = False
    free = (~kept).nonzero().flatten()
    kept[free[gradient.flatten()[free].abs().argsort(descending=True)[:count]]] = True
    return kept.view_as(mask)


# ---- RigL


@pytest.mark.parametrize("chunk", [1, 60, 10**6])
@pytest.mark.parametrize("kind", ["csr", "dense"])
def test_it_drops_and_grows_as_a_dense_gradient_says(kind, chunk, monkeypatch):
    monkeypatch.setattr(regrowth, "CHUNK_ELEMENTS", chunk)
    model, optimizer = sparse(kind=kind)
    growth = rigl(model, optimizer, kind=kind)
    for k in range(1, 9):
        run = partial(backward, optimizer=optimizer, k=k)
        gradients = dense_gradients(model, run)
        run(model)
        before = {name: model.get_submodule(name) for name in NAMES}
        before = {name: (layer.weight.detach(), layer.layout.to_mask()) for name, layer in before.items()}
        states = {name: copy.deepcopy(dense_state(optimizer, model.get_submodule(name))) for name in NAMES if k > 1}
        changed = growth.step()
        assert changed == (k % 2 == 0)
        if not changed:
            optimizer.step()
            continue
        share = ALPHA / 2 * (1 + math.cos(math.pi * k / END))
        for name, (weight, mask) in before.items():
            layer = model.get_submodule(name)
            new = layer.layout.to_mask()
            assert torch.equal(new, expected_mask(weight, mask, gradients[name], share))
            assert layer.layout.nnz == int(mask.sum()) and not torch.equal(new, mask)
            assert torch.equal(layer.weight, weight * new)  # what has grown starts at 0, what survives is untouched
            for key, value in dense_state(optimizer, layer).items():
                assert torch.equal(value, states[name][key] * new if value.dim() else states[name][key])


def test_gradients_of_several_passes_and_leading_dimensions_add_up():
    torch.manual_seed(0)
    layer = nn.Linear(13, 13).double()
    mask = random_mask(13, 13)
    model = prune.convert(nn.Sequential(layer, nn.Tanh(), layer), {"0": mask}, kind="csr")  # used twice, at that
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inputs = [random_tensor(*shape, 13, seed=seed, dtype=torch.float64) for seed, shape in enumerate([(4,), (2, 3)])]

    def run(model):
        for x in inputs:
            model(x).square().sum().backward()

    twin = prune.to_dense(copy.deepcopy(model))
    run(twin)
    growth = rigl(model, optimizer, delta_t=1)
    run(model)
    growth.step()
    share = ALPHA / 2 * (1 + math.cos(math.pi / END))
    wanted = expected_mask(twin[0].weight.detach(), mask, twin[0].weight.grad, share)
    assert torch.equal(model[0].layout.to_mask(), wanted)


def test_ties_go_to_the_earlier_place(monkeypatch):
    monkeypatch.setattr(regrowth, "CHUNK_ELEMENTS", 1)  # a row at a time
    mask = torch.tensor([[True, False]] * 4)
    model = prune.convert(nn.Linear(2, 4, bias=False), {"": mask}, kind="csr")
    nn.init.ones_(model.values)
    growth = rigl(model, torch.optim.SGD(model.parameters(), lr=0.1), delta_t=1, alpha=0.6)
    model(torch.ones(1, 2)).sum().backward()  # all entries of the dense gradient are 1
    assert growth.step()
    assert model.layout.to_mask().tolist() == [[True, True], [True, True], [False, False], [False, False]]


class LargestFloat(TorchDispatchMode):
    """How many numbers the largest floating tensor made has."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self.elements = max(self.elements, tensor.numel())
        return result


def test_the_dense_gradient_is_never_stored_whole(monkeypatch):
    rows, columns, count, samples = 300, 200, 50, 4
    monkeypatch.setattr(regrowth, "CHUNK_ELEMENTS", 10 * columns)
    layer = MaskedLinear(columns, rows, random_mask(rows, columns, 0.1), kind="csr")
    pairs = [(random_tensor(samples, columns), random_tensor(samples, rows, seed=1))]
    with LargestFloat() as seen:
        places = regrowth._largest_gradients(layer, pairs, layer.layout.to_mask(), count, None)
    assert len(places) == count and seen.elements <= 10 * columns + count < rows * columns / 25


def test_inputs_are_caught_only_where_a_mask_will_change():
    model, optimizer = sparse()
    growth = rigl(model, optimizer, delta_t=3, end=5)
    caught = []
    for k in range(1, 8):
        with torch.no_grad():
            model(batch(k, torch.float64)[0])
        model(batch(k, torch.float64)[0])  # no backward pass: nothing to grow from
        backward(model, optimizer, k)
        caught.append([len(pairs) for pairs in growth._caught.values()])
        assert growth.step() == (k == 3) and not growth._caught
    assert caught == [[], [], [1, 1], [], [], [], []]


def test_a_compiled_model_grows_the_same():
    masks = []
    for compiled in (False, True):
        model, optimizer = sparse()
        forward = torch.compile(model, backend="aot_eager") if compiled else model
        growth = rigl(model, optimizer)
        for k in range(4):
            backward(model, optimizer, k, forward)
            if not growth.step():
                optimizer.step()
        masks.append([model.get_submodule(name).layout.to_mask() for name in NAMES])
    assert all(torch.equal(a, b) for a, b in zip(*masks, strict=True))


def test_layers_that_cannot_grow_or_take_no_part_are_left_alone():
    model = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("used", "unused", "frozen", "full")})
    masks = {name: random_mask(8, 8, 0.4) for name in ("used", "unused", "frozen")}
    prune.convert(model, masks | {"full": torch.ones(8, 8, dtype=torch.bool)}, kind="csr")
    model["frozen"].values.requires_grad_(False)
    before = {name: layer.layout for name, layer in model.items()}
    growth = rigl(model, torch.optim.SGD(model.parameters(), lr=0.1), delta_t=1)
    model["full"](model["frozen"](model["used"](random_tensor(16, 8)))).square().sum().backward()
    assert growth.step()
    assert [name for name, layer in model.items() if layer.layout is not before[name]] == ["used"]


@pytest.mark.parametrize("chunk", [1, 10**6])
@pytest.mark.parametrize("scale", [torch.inf, torch.nan])
def test_masks_stay_where_a_gradient_is_not_finite(scale, chunk, monkeypatch):
    monkeypatch.setattr(regrowth, "CHUNK_ELEMENTS", chunk)
    model, optimizer = sparse()
    growth = rigl(model, optimizer, delta_t=1)
    before = [model.get_submodule(name).layout for name in NAMES]
    for factor, changes in ((scale, False), (1.0, True)):
        (model(batch(0, torch.float64)[0]).sum() * factor).backward()
        assert growth.step() == changes
        after = [model.get_submodule(name).layout for name in NAMES]
        assert all((new is old) != changes for new, old in zip(after, before, strict=True))


def test_it_finds_the_support_of_a_sparse_teacher():
    """8 outputs read 4 of 64 inputs each. A random mask of density 1/8 holds about an eighth of these 32 pairs."""
    torch.manual_seed(0)
    inputs, outputs, fan_in = 64, 8, 4
    places = torch.stack([torch.randperm(inputs)[:fan_in] for _ in range(outputs)])
    teacher = torch.zeros(outputs, inputs).scatter_(1, places, 1.0)
    model = nn.Sequential(nn.Linear(inputs, outputs, bias=False))
    prune.convert(model, prune.random_masks(model, 7 / 8, include_last=True))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    growth = prune.RigL(model, optimizer, delta_t=10, end=400)

    def found():
        return int((model[0].layout.to_mask() & (teacher > 0)).sum())

    assert found() < 10
    for _ in range(400):
        x = torch.randn(128, inputs)
        optimizer.zero_grad()
        F.mse_loss(model(x), x @ teacher.T).backward()
        if not growth.step():
            optimizer.step()
    assert found() == outputs * fan_in and model[0].layout.nnz == inputs * outputs // 8


def test_layers_that_convert_puts_in_later_grow_too():
    model, optimizer = sparse()
    ours = rigl(model, optimizer, delta_t=3)
    masks = {name: model.get_submodule(name).layout.to_mask() for name in NAMES}
    prune.convert(prune.to_dense(model, optimizer), masks, "csr", optimizer)
    grown = []
    for k in range(3):
        backward(model, optimizer, k)
        grown.append(ours.step())
    assert grown == [False, False, True]
    assert all(not torch.equal(model.get_submodule(name).layout.to_mask(), masks[name]) for name in NAMES)


def test_copies_and_pickles_leave_the_hooks_behind():
    model, optimizer = sparse()
    growth = rigl(model, optimizer, delta_t=1)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        backward(other, OPTIMIZERS["sgd"](other.parameters()))
        assert not growth._caught
        x, _ = batch(0, torch.float64)
        assert torch.equal(other(x), model(x))
    assert b"RigL" not in pickle.dumps(model)  # which would bring the optimizer along
    alive = weakref.ref(growth)
    del growth
    gc.collect()
    assert alive() is None
    backward(model, optimizer)


# ---- SET


@pytest.mark.parametrize("kind", ["csr", "dense"])
def test_set_drops_each_signs_smallest_and_grows_elsewhere(kind):
    model, optimizer = sparse(torch.float32, kind)
    evolution = prune.SET(
        model, optimizer, every=2, fraction=0.4, kind=kind, generator=torch.Generator().manual_seed(0)
    )
    step(model, optimizer, 0)
    assert not evolution.step()
    before = {name: model.get_submodule(name) for name in NAMES}
    before = {name: (layer.weight.detach(), layer.layout.to_mask()) for name, layer in before.items()}
    assert evolution.step()
    for name, (weight, mask) in before.items():
        layer = model.get_submodule(name)
        new, kept = layer.layout.to_mask(), torch.zeros_like(mask)
        assert layer.layout.nnz == int(mask.sum())
        for side in (weight > 0, weight < 0):
            values = weight[side & mask].abs().sort().values
            kept |= side & mask & (weight.abs() >= values[int(0.4 * len(values))])
        assert bool((new & kept).sum() == kept.sum())
        grown = new & ~mask
        assert grown.sum() > 0.3 * (mask & ~kept).sum()  # the rest was drawn where it had just been dropped
        assert torch.equal(layer.weight[new & mask], weight[new & mask])
        bound = new.sum(1, keepdim=True).rsqrt().expand_as(new)
        assert (layer.weight[grown].abs() <= bound[grown]).all() and layer.weight[grown].unique().numel() > 1
        assert not dense_state(optimizer, layer)["exp_avg"][grown].any()


def test_set_follows_its_generator_and_state():
    def evolved(resume):
        model, optimizer = sparse(torch.float32)
        make = partial(prune.SET, model, optimizer, every=2)
        evolution = make(generator=torch.Generator().manual_seed(5))
        for k in range(6):
            step(model, optimizer, k)
            evolution.step()
            if resume and k == 2:
                state, evolution = evolution.state_dict(), make(generator=torch.Generator())
                evolution.load_state_dict(state)
        return model[0].weight

    assert torch.equal(evolved(False), evolved(True))


# ---- errors


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: rigl(3, None), TypeError, "model: expected nn.Module, got int"),
        (lambda: rigl(net(), None), TypeError, "optimizer: expected torch.optim.Optimizer, got NoneType"),
        (
            lambda: rigl(net(), OPTIMIZERS["sgd"](net().parameters())),
            ValueError,
            "model: expected one with MaskedLinear layers",
        ),
        (lambda: rigl(*sparse(), kind="coo"), ValueError, "kind: expected auto or one of .*, got 'coo'"),
        (lambda: rigl(*sparse(), delta_t=0), ValueError, "delta_t: expected a positive int, got 0"),
        (lambda: rigl(*sparse(), end=0), ValueError, "end: expected a positive int, got 0"),
        (lambda: rigl(*sparse(), alpha=1), ValueError, r"alpha: expected a number in \[0, 1\), got 1"),
        (lambda: rigl(*sparse()).load_state_dict({}), ValueError, r"state: expected what .*, got a dict of \[\]"),
        (
            lambda: prune.SET(*sparse(), every=1, generator=torch.Generator()).load_state_dict({"steps": 3}),
            ValueError,
            "state: expected one with a generator's state, got one without",
        ),
        (lambda: prune.SET(*sparse(), every=0), ValueError, "every: expected a positive int, got 0"),
        (lambda: prune.SET(*sparse(), every=1, fraction=2), ValueError, r"fraction: expected a number in \[0, 1\)"),
        (lambda: prune.SET(*sparse(), every=1, generator=1), TypeError, "generator: expected torch.Generator or None"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
