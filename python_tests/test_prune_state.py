"""Optimizer state on the survivors: remapped to the bit by convert, update_masks, to_dense and rewind."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from compsparse_kernels import prune
from compsparse_kernels.nn import MaskedLinear
from compsparse_kernels.testing import random_mask, random_tensor
from python_tests.pruning import KINDS, NAMES, OPTIMIZERS, PER_WEIGHT, dense_state, masks_of, net, step, trained

# ---- the remap itself: bits


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("kind", KINDS)
def test_convert_and_back_keep_the_survivors_to_the_bit(name, kind):
    model, optimizer = trained(name)
    groups, lists = optimizer.param_groups, [group["params"] for group in optimizer.param_groups]
    before = {layer: dense_state(optimizer, model.get_submodule(layer)) for layer in NAMES}
    weights = {layer: model.get_submodule(layer).weight.detach().clone() for layer in NAMES}
    gradients = {layer: model.get_submodule(layer).weight.grad.clone() for layer in NAMES}
    masks = masks_of(0.4, seed=5)
    biases = [layer.bias for layer in model if hasattr(layer, "bias")]
    prune.convert(model, masks, kind, optimizer)
    for back in (False, True):
        assert optimizer.param_groups is groups
        assert all(group["params"] is params for group, params in zip(groups, lists, strict=True))
        assert all(a is b for a, b in zip(lists[0], model.parameters(), strict=True))
        assert set(optimizer.state) == set(model.parameters())
        assert all(layer.bias is bias for layer, bias in zip(model[::2], biases, strict=True))
        for layer, mask in masks.items():
            module = model.get_submodule(layer)
            state = dense_state(optimizer, module)
            assert state.keys() == before[layer].keys() and PER_WEIGHT[name] <= state.keys()
            for key, value in state.items():
                old = before[layer][key]
                assert torch.equal(value, old * mask if key in PER_WEIGHT[name] else old), (layer, key)
            assert torch.equal(module.weight, weights[layer] * mask)
            grad = module.weight.grad if back else module.layout.unpack(module.values.grad)
            assert torch.equal(grad, gradients[layer] * mask)
        if not back:
            stored = {entry.shape for entry in optimizer.state[model[0].values].values() if entry.dim()}
            assert stored == {model[0].layout.values_shape}
            prune.to_dense(model, optimizer)


@pytest.mark.parametrize("first", KINDS)
@pytest.mark.parametrize("second", KINDS)
def test_update_masks_keeps_survivors_and_starts_the_regrown_at_zero(first, second):
    model, optimizer = trained()
    prune.convert(model, masks_of(0.4, seed=5), first, optimizer)
    loss = step(model, optimizer, 5)
    layer = model[0]
    seen = []
    layer.register_forward_hook(lambda *_: seen.append(1))
    old_mask, old_weight, old_state = layer.layout.to_mask(), layer.weight.detach(), dense_state(optimizer, layer)
    new = masks_of(0.5, seed=50)
    regrown = new["0"] & ~old_mask
    assert regrown.any() and (new["0"] & old_mask).any() and (old_mask & ~new["0"]).any()
    assert prune.update_masks(model, new, optimizer, kind=second) is model
    assert model[0] is layer and layer.layout.kind == second and torch.equal(layer.layout.to_mask(), new["0"])
    assert torch.equal(layer.weight, old_weight * new["0"])
    for key, value in dense_state(optimizer, layer).items():
        assert torch.equal(value, old_state[key] * new["0"] if value.dim() else old_state[key])
    assert all(a is b for a, b in zip(optimizer.param_groups[0]["params"], model.parameters(), strict=True))
    before = layer.weight.detach()
    step(model, optimizer, 6)  # the graph of the last loss is still alive
    assert loss.requires_grad and seen
    assert (layer.weight != before)[regrown].any() and not layer.weight[~new["0"]].any()


@pytest.mark.parametrize("name", ["adam", "adamw", "rmsprop"])
@pytest.mark.parametrize("kind", ["block", "dense"])
def test_second_moments_are_not_zero_where_the_mask_drops(name, kind):
    """Square roots of 0 are slow; the update there is 0 whatever they are, and what grows again starts at 0."""
    model, optimizer = trained(name)
    moments = PER_WEIGHT[name] & {"exp_avg_sq", "max_exp_avg_sq", "square_avg"}
    start = prune.snapshot(model, optimizer)
    first, second = masks_of(0.4, seed=5), masks_of(0.5, seed=50)
    for change in (
        lambda: prune.convert(model, first, kind, optimizer),
        lambda: prune.update_masks(model, second, optimizer, kind=kind),
        lambda: prune.rewind(model, start, optimizer),
    ):
        change()
        layer = model[0]
        dropped = ~layer.layout.mask
        assert dropped.any() and moments
        for _ in range(2):
            state = optimizer.state[layer.values]
            assert all((state[key][dropped] > 0).all() for key in moments)
            assert not any(state[key][dropped].any() for key in PER_WEIGHT[name] - moments)
            assert not layer.values[dropped].any()
            step(model, optimizer, 6)
    regrown = second["0"] & ~first["0"]
    prune.update_masks(model, first, optimizer, kind=kind)
    prune.update_masks(model, second, optimizer, kind=kind)
    assert not any(dense_state(optimizer, model[0])[key][regrown].any() for key in moments)
    prune.to_dense(model, optimizer)
    assert not any(optimizer.state[model[0].weight][key][~second["0"]].any() for key in moments)


def test_groups_of_n_in_m_are_as_wide_as_asked():
    model, optimizer = trained()
    mask = prune.magnitude_masks(model, nm=(1, 4))["0"]
    prune.convert(model, {"0": mask}, "nm", optimizer, nm=(2, 8))
    assert (model[0].layout.nm.n, model[0].layout.nm.m) == (2, 8) and torch.equal(model[0].layout.to_mask(), mask)
    prune.update_masks(model, {"0": mask}, optimizer, kind="nm", nm=(3, 8))
    assert (model[0].layout.nm.n, model[0].layout.nm.m) == (3, 8) and torch.equal(model[0].layout.to_mask(), mask)


def test_groups_of_n_in_m():
    """2:4, then 1:4 of what is left, then other 2:4 groups, and back to dense."""
    model, optimizer = trained()
    expected = {name: model.get_submodule(name).weight.detach().clone() for name in NAMES}
    states = {name: copy.deepcopy(dense_state(optimizer, model.get_submodule(name))) for name in NAMES}
    prune.convert(model, prune.magnitude_masks(model, nm=(2, 4)), "nm", optimizer)
    wider = {name: layer.layout.to_mask().roll(1, 0) for name, layer in model.named_children() if name in NAMES}
    rounds = [
        {name: model.get_submodule(name).layout.to_mask() for name in NAMES},
        prune.magnitude_masks(model, nm=(1, 4)),
        wider,
    ]
    kept = {name: torch.ones_like(mask) for name, mask in wider.items()}
    for masks in rounds:
        prune.update_masks(model, masks, optimizer, kind="nm")
        kept = {name: kept[name] & masks[name] for name in NAMES}
        for name in NAMES:
            layer = model.get_submodule(name)
            assert layer.layout.kind == "nm" and torch.equal(layer.layout.to_mask(), masks[name])
            assert torch.equal(layer.weight, expected[name] * kept[name])
            for key, value in dense_state(optimizer, layer).items():
                assert torch.equal(value, states[name][key] * kept[name] if value.dim() else states[name][key])
    prune.to_dense(model, optimizer)
    assert all(torch.equal(model.get_submodule(name).weight, expected[name] * kept[name]) for name in NAMES)
    step(model, optimizer, 6)


def test_regrown_entries_start_at_the_fill():
    model, optimizer = trained()
    masks = masks_of(0.3, seed=5)
    prune.convert(model, masks, optimizer=optimizer)
    weight = model[0].weight.detach()
    grown = {name: torch.ones_like(mask) for name, mask in masks.items()}
    fill = {name: random_tensor(*mask.shape, seed=9) for name, mask in masks.items()}
    prune.update_masks(model, grown, optimizer, fill=fill)
    assert torch.equal(model[0].weight, torch.where(masks["0"], weight, fill["0"]))
    assert not dense_state(optimizer, model[0])["exp_avg"][~masks["0"]].any()
    prune.update_masks(model, masks, optimizer)
    prune.update_masks(model, grown, optimizer, fill=-2)
    assert torch.equal(model[0].weight, torch.where(masks["0"], weight, -2.0))


def test_groups_keep_their_options_and_places():
    model = net()
    optimizer = torch.optim.SGD(
        [{"params": model[4].parameters()}, {"params": [model[2].bias, model[2].weight], "lr": 0.5}], lr=0.1
    )
    prune.convert(model, masks_of(0.5, seed=1), optimizer=optimizer)
    (first, second) = optimizer.param_groups
    assert second["params"][0] is model[2].bias and second["params"][1] is model[2].values and second["lr"] == 0.5
    assert first["params"][0] is model[4].weight  # the first layer, which the optimizer does not hold, goes without
    assert isinstance(model[0], MaskedLinear)


def test_frozen_weights_stay_frozen():
    model = net()
    model[0].weight.requires_grad_(False)
    prune.convert(model, masks_of(0.5, seed=1))
    prune.update_masks(model, masks_of(0.5, seed=2))
    assert not model[0].values.requires_grad and model[2].values.requires_grad


def test_blocks_of_a_given_shape():
    model = net()
    mask = random_mask(3, 7, 0.5).repeat_interleave(6, 0).repeat_interleave(2, 1)[:, :13]
    prune.convert(model, {"0": mask}, kind="block", block_shape=(6, 2))
    assert model[0].layout.blocks.block_shape == (6, 2) and model[0].layout.mask is None
    prune.update_masks(model, {"0": mask}, kind="block", block_shape=(3, 1))
    assert model[0].layout.blocks.block_shape == (3, 1) and torch.equal(model[0].layout.to_mask(), mask)


# ---- rewinding


def test_rewinding_takes_weights_buffers_state_and_options_back():
    model = nn.Sequential(nn.Linear(13, 18), nn.BatchNorm1d(18), nn.Linear(18, 4))
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    for k in range(3):
        step(model, optimizer, k)
    start = prune.snapshot(model, optimizer)
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    mask = random_mask(18, 13)
    prune.convert(model, {"0": mask}, optimizer=optimizer)
    optimizer.param_groups[0]["lr"] = 1.0
    groups = optimizer.param_groups
    for k in range(3):
        step(model, optimizer, k)
    kept = copy.deepcopy(start)
    for _ in range(2):  # a snapshot serves more than once
        prune.rewind(model, start, optimizer)
        assert optimizer.param_groups is groups and groups[0]["lr"] == twin_optimizer.param_groups[0]["lr"]
        assert all(parameter.grad is None for parameter in model.parameters())
        assert torch.equal(model[0].weight, twin[0].weight * mask)
        assert torch.equal(model[1].running_mean, twin[1].running_mean)
        for key, value in twin_optimizer.state[twin[0].weight].items():
            assert torch.equal(dense_state(optimizer, model[0])[key], value * mask if value.dim() else value)
            assert torch.equal(optimizer.state[model[2].bias][key], twin_optimizer.state[twin[2].bias][key])
        step(model, optimizer, 3)
    for name, value in kept["model"].items():
        assert torch.equal(start["model"][name], value)
    assert str(start["optimizer"]) == str(kept["optimizer"])


def test_a_snapshot_of_a_masked_model_fits_a_dense_one_and_a_file(tmp_path):
    model, optimizer = trained()
    prune.convert(model, masks_of(0.4, seed=5), optimizer=optimizer)
    weight, state = model[0].weight.detach(), copy.deepcopy(dense_state(optimizer, model[0]))
    torch.save(prune.snapshot(model, optimizer), tmp_path / "start.pt")
    step(model, optimizer, 6)
    prune.to_dense(model, optimizer)
    prune.rewind(model, torch.load(tmp_path / "start.pt", weights_only=True), optimizer)
    assert type(model[0]) is nn.Linear and torch.equal(model[0].weight, weight)
    assert all(torch.equal(value, state[key]) for key, value in dense_state(optimizer, model[0]).items())


def test_a_snapshot_before_the_first_step_clears_the_state():
    model, optimizer = trained(steps=0)
    start = prune.snapshot(model, optimizer)
    step(model, optimizer, 0)
    assert optimizer.state
    prune.rewind(model, start, optimizer)
    assert not optimizer.state


def test_layers_under_two_names():
    shared = nn.Linear(13, 13)
    model = nn.Sequential(shared, nn.Tanh(), shared)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    start, weight = prune.snapshot(model, optimizer), shared.weight.detach().clone()
    mask = random_mask(13, 13)
    prune.convert(model, {"2": mask}, optimizer=optimizer)
    nn.init.zeros_(model[0].values)
    prune.rewind(model, start, optimizer)
    assert model[0] is model[2] and torch.equal(model[0].weight, weight * mask)
    assert {name for name in prune.snapshot(model)["model"] if "weight" in name} == {"0.weight", "2.weight"}


# ---- errors


class Factored(torch.optim.Optimizer):
    """Adafactor in little: its state is a number per row."""

    def __init__(self, params):
        super().__init__(params, {})

    def step(self):
        for parameter in self.param_groups[0]["params"]:
            if parameter.dim() == 2:
                self.state[parameter]["row_var"] = parameter.mean(1)


def convert_factored():
    model = net()
    optimizer = Factored(model.parameters())
    optimizer.step()
    prune.convert(model, {"0": MASK}, optimizer=optimizer)


def convert_with(name):
    """None of them has state yet that would tell; the first layer's is not asked for."""
    model = net()
    prune.convert(
        model, {"2": torch.ones(17, 18, dtype=torch.bool)}, optimizer=getattr(torch.optim, name)(weights(model))
    )


def weights(model):
    return [parameter for parameter in model.parameters() if parameter.dim() == 2]


def rewind_with(saved_with, optimizer_of):
    model = net()
    prune.rewind(model, prune.snapshot(model, saved_with(model)), optimizer_of(model))


def masked():
    return prune.convert(net(), masks_of(0.5, seed=1))


MASK = torch.ones(18, 13, dtype=torch.bool)
SGD = partial(torch.optim.SGD, lr=0.1)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: prune.convert(net(), {"0": MASK}, optimizer=[]), TypeError, "optimizer: expected .*Optimizer or None"),
        (
            lambda: prune.convert(net(), {"0": MASK}, optimizer=SGD(net().parameters())),
            ValueError,
            "optimizer: expected one that holds a weight of these layers, got one that holds none",
        ),
        (
            lambda: convert_factored(),
            ValueError,
            r"optimizer: expected state 'row_var' of '0' to be .* tensor \[18, 13\] or \[\], got 1-D float32 tensor",
        ),
        (
            lambda: prune.convert(nn.utils.parametrizations.weight_norm(nn.Linear(13, 18)), {"": MASK}),
            ValueError,
            r"masks\[''\]: expected a name of an nn.Linear or MaskedLinear, got ParametrizedLinear",
        ),
        (
            lambda: prune.convert(nn.utils.spectral_norm(nn.Linear(13, 18)), {"": MASK}),
            ValueError,
            r"masks\[''\]: expected a layer whose weight and bias are Parameters, got a reparametrised one",
        ),
        (
            lambda: prune.convert(shared(), {"0": MASK, "1": MASK}),
            ValueError,
            r"masks\['1'\]: expected one mask for each layer, got a second one for '0'",
        ),
        (lambda: prune.update_masks(net(), {"0": MASK}), ValueError, r"masks\['0'\]: expected .*MaskedLinear.*Linear"),
        (lambda: prune.update_masks(masked(), {"0": MASK.T}), ValueError, r"masks\['0'\]: expected bool tensor \[18"),
        (lambda: prune.update_masks(masked(), {"0": MASK}, fill="x"), TypeError, "fill: expected a number or a dict"),
        (
            lambda: prune.update_masks(masked(), {"0": MASK}, fill={"2": MASK}),
            ValueError,
            r"fill\['0'\]: expected real tensor \[18, 13\], got NoneType",
        ),
        (lambda: prune.to_dense(tied()), ValueError, "model: layer '0': expected .* own, got one tied to .* of '1'"),
        (
            lambda: prune.update_masks(masked(), {"0": MASK}, fill={"0": torch.ones(18, 13, dtype=torch.complex64)}),
            ValueError,
            r"fill\['0'\]: expected real tensor \[18, 13\], got 2-D complex64 tensor",
        ),
        (
            lambda: prune.convert(net(), {"0": MASK}, "nm", nm=(2, 4)),
            ValueError,
            r"masks\['0'\]: expected at most 2 survivors in each 4 columns",
        ),
        (
            lambda: prune.convert(net(), {"0": MASK}, nm=(2, 4)),
            ValueError,
            r"nm: expected None with kind auto, got \(2",
        ),
        (lambda: prune.convert(net(), {"0": MASK}, "nm", nm=2), TypeError, r"nm: expected \(n, m\), got 2"),
        *(
            (partial(convert_with, name), ValueError, f"optimizer: expected one that treats each weight.* got {name}")
            for name in ("LBFGS", "Muon", "Adafactor")
            if hasattr(torch.optim, name)
        ),
        (lambda: prune.to_dense(masked(), "adam"), TypeError, "optimizer: expected .*Optimizer or None, got str"),
        (
            lambda: prune.to_dense(masked(), SGD(net().parameters())),
            ValueError,
            "optimizer: expected one that holds a weight",
        ),
        (lambda: prune.snapshot([]), TypeError, "model: expected nn.Module, got list"),
        (lambda: prune.snapshot(net(), 3), TypeError, "optimizer: expected .*Optimizer or None, got int"),
        (lambda: prune.rewind(None, {}), TypeError, "model: expected nn.Module, got NoneType"),
        (lambda: prune.rewind(net(), {}), TypeError, "snapshot: expected what prune.snapshot returned, got dict"),
        (
            lambda: prune.rewind(net(), prune.snapshot(nn.Linear(2, 2))),
            ValueError,
            "snapshot: expected one of a model like this, got another: Error",
        ),
        (
            lambda: rewind_with(lambda model: None, lambda model: SGD(model.parameters())),
            ValueError,
            "snapshot: expected one taken with an optimizer, got one without",
        ),
        (
            lambda: rewind_with(lambda model: SGD(model.parameters()), lambda model: SGD(model[0].parameters())),
            ValueError,
            r"optimizer: expected groups of \[6\] parameters, as in the snapshot, got \[2\]",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def tied():
    model = nn.Sequential(*(MaskedLinear(13, 18, MASK) for _ in range(2)))
    model[1].values = model[0].values
    return model


def shared():
    layer = nn.Linear(13, 18)
    return nn.Sequential(layer, layer)


def test_a_refused_update_changes_nothing():
    model, optimizer = trained()
    prune.convert(model, masks_of(0.5, seed=1), optimizer=optimizer)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="kind"):
        prune.update_masks(model, masks_of(0.2, seed=1), optimizer, kind="coo")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(a is b for a, b in zip(optimizer.param_groups[0]["params"], model.parameters(), strict=True))
